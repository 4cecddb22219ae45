//! A request as it comes over a connection: its head within some KiB, its body within some more, both in time.

use std::io::{self, ErrorKind, Read};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Bytes of a request's head, and of its body.
const HEAD: usize = 8 << 10;
const BODY: usize = 64 << 10;
/// How long a request may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A request that has come.
pub(super) struct Request {
    pub(super) method: String,
    pub(super) target: String,
    /// Those that are texts.
    headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Request {
    /// Reads one; of what is none, the status and why.
    ///
    /// # Errors
    /// A connection that breaks, ends, or is slow.
    pub(super) fn read(mut stream: &TcpStream) -> io::Result<Result<Request, (u16, &'static str)>> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let start = Instant::now();
        let mut read_into = |text: &mut Vec<u8>| {
            let mut part = [0; 2048];
            let read = stream.read(&mut part)?;
            if read == 0 || start.elapsed() > PATIENCE {
                return Err(io::Error::from(ErrorKind::UnexpectedEof));
            }
            text.extend(&part[..read]);
            Ok(())
        };
        let mut text = Vec::new();
        let end = |text: &[u8]| text.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4);
        while end(&text).is_none() && text.len() <= HEAD {
            read_into(&mut text)?;
        }
        let body = text.split_off(end(&text).unwrap_or(text.len()));
        let Some(request) = Request::parsed(&text, body) else { return Ok(Err((400, "this is not a request"))) };
        let length = match request.header("content-length").map(str::parse) {
            None => 0,
            Some(Ok(length)) if length <= BODY => length,
            Some(_) => return Ok(Err((413, "this is longer than anything that is asked here"))),
        };
        let mut request = request;
        while request.body.len() < length {
            read_into(&mut request.body)?;
        }
        request.body.truncate(length);
        Ok(Ok(request))
    }

    fn parsed(head: &[u8], body: Vec<u8>) -> Option<Request> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut headers);
        request.parse(head).ok().filter(httparse::Status::is_complete)?;
        let header =
            |h: &httparse::Header<'_>| Some((h.name.to_owned(), std::str::from_utf8(h.value).ok()?.to_owned()));
        let (method, target) = (request.method?.to_owned(), request.path?.to_owned());
        Some(Request { method, target, headers: request.headers.iter().filter_map(header).collect(), body })
    }

    /// A header that is there once.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(own, _)| own.eq_ignore_ascii_case(name));
        values.next().map(|(_, value)| value.as_str()).filter(|_| values.next().is_none())
    }
}
