//! The page's server: GET of a few known names, one answer a connection, and nothing that a training could wait for.
//!
//! It reads files of runs and holds nothing but their places. A page of another origin cannot read its answers (no CORS),
//! nor a name that was bent to this machine (the `Host` header), and who comes over the network needs the token.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rand::TryRngCore;
use rand::rngs::OsRng;

use super::connections::{Connections, send};
use super::{Runs, STYLE};
use dpo_core::console;
use dpo_core::error::{Error, Result};

/// Where the page is unless told otherwise; where that is taken, any free port of it.
const ADDRESS: &str = "127.0.0.1:6868";
/// Bytes of a request's head, and how long it may take.
const HEAD: usize = 8 << 10;
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the end of a run waits for a page that is open; it asks every two seconds.
const FAREWELL: Duration = Duration::from_millis(2500);

/// What is there beside the files of runs: path, type, text.
const ASSETS: &[(&str, &str, &str)] = &[
    ("/", "text/html", include_str!("page.html")),
    ("/page.css", "text/css", STYLE),
    ("/page.js", "text/javascript", include_str!("page.js")),
    ("/shared.js", "text/javascript", include_str!("shared.js")),
    ("/numbers.js", "text/javascript", include_str!("numbers.js")),
    ("/table.js", "text/javascript", include_str!("table.js")),
    ("/curves.js", "text/javascript", include_str!("curves.js")),
    ("/details.js", "text/javascript", include_str!("details.js")),
    ("/download.js", "text/javascript", include_str!("download.js")),
];

/// Of every answer. Nothing but the page's own files is loaded, and nobody else's page shows them.
const HEADERS: &str = "connection: close\r\n\
    cache-control: no-store\r\n\
    content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n\
    cross-origin-resource-policy: same-origin\r\n\
    referrer-policy: no-referrer\r\n\
    x-content-type-options: nosniff\r\n";

/// A server that has its port.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    door: Door,
    watchers: Watchers,
}

/// Who is let in.
struct Door {
    /// Needed by everybody, where the page can be reached from other machines.
    token: Option<String>,
    /// The cookie that remembers it; cookies are of a host, not of a port.
    cookie: String,
    /// The name that the server was told to listen at.
    name: String,
}

/// Whether somebody looks at the page.
#[derive(Clone, Default)]
pub struct Watchers(Arc<Mutex<Option<Instant>>>);

impl Watchers {
    /// A page that is open asks once more for what a run left at its end; not for long, whether it does or not.
    pub fn farewell(&self) {
        let asked = || *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let end = Instant::now();
        while asked().is_some_and(|last| last + PATIENCE > end && last < end) && end.elapsed() < FAREWELL {
            thread::sleep(Duration::from_millis(20));
        }
        if asked().is_some_and(|last| last >= end) {
            // For the files that it now asks for.
            thread::sleep(Duration::from_millis(300));
        }
    }

    fn asked(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

/// An answer: status, type, further headers, body.
struct Answer(u16, &'static str, String, Vec<u8>);

impl Server {
    /// Takes the port of `ADDR:PORT`, or of a port alone, which is then one of this machine only. `flag` is what named it.
    ///
    /// # Errors
    /// An address that is none, or cannot be had.
    pub fn bind(address: Option<&str>, flag: &str) -> Result<Server> {
        let named = match address {
            Some(port) if port.parse::<u16>().is_ok() => format!("127.0.0.1:{port}"),
            other => other.unwrap_or(ADDRESS).to_owned(),
        };
        let places: Vec<SocketAddr> = named.to_socket_addrs().map(Iterator::collect).map_err(|e| {
            Error::input(format!("'{named}' is not an address with a port: {e}"))
                .at(flag)
                .help(format!("such as {ADDRESS}, or a port alone"))
        })?;
        let listener = match TcpListener::bind(&*places) {
            Err(e) if e.kind() == ErrorKind::AddrInUse && address.is_none() => TcpListener::bind("127.0.0.1:0"),
            other => other,
        };
        let listener = listener.map_err(|e| {
            let (what, help) = match e.kind() {
                ErrorKind::AddrInUse => ("something listens there already", "name another port, or 0 for a free one"),
                ErrorKind::AddrNotAvailable => ("this machine has no such address", "127.0.0.1, or 0.0.0.0 for all"),
                ErrorKind::PermissionDenied => ("this user may not listen there", "name a port from 1024 on"),
                _ => ("nothing can listen there", "name another address"),
            };
            Error::input(format!("cannot listen at {named}: {what}")).at(flag).help(help)
        })?;
        let failed = |e: std::io::Error| Error::run(format!("cannot listen at {named}: {e}")).at(flag);
        let address = listener.local_addr().map_err(failed)?;
        let token = if address.ip().is_loopback() { None } else { Some(token().map_err(failed)?) };
        let name = named.rsplit_once(':').map_or("", |(name, _)| name).to_owned();
        let door = Door { token, cookie: format!("dpo-host-{}", address.port()), name };
        Ok(Server { listener, address, door, watchers: Watchers::default() })
    }

    /// What to open in a browser.
    pub fn url(&self) -> String {
        let ip = self.address.ip();
        let place = SocketAddr::new(if ip.is_unspecified() { outward(ip) } else { ip }, self.address.port());
        let token = self.door.token.as_ref().map(|t| format!("?token={t}")).unwrap_or_default();
        format!("http://{place}/{token}")
    }

    /// Serves runs from a thread of its own for as long as the process lives.
    pub fn serve_beside(self, runs: Runs) -> Watchers {
        let watchers = self.watchers.clone();
        if let Err(e) = thread::Builder::new().name("page".into()).spawn(move || self.serve(runs)) {
            console::warning(format!("no dashboard: {e}"));
        }
        watchers
    }

    /// Serves runs, for good.
    pub fn serve(self, runs: Runs) {
        let (shared, connections) = (Arc::new((runs, self.door, self.watchers)), Connections::default());
        for stream in self.listener.incoming() {
            let Ok(stream) = stream else {
                // No more files may be opened just now.
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            let own = shared.clone();
            connections.serve(stream, move |stream| converse(stream, &own.0, &own.1, &own.2));
        }
    }
}

/// The address by which other machines reach this one. Nothing is sent.
fn outward(any: IpAddr) -> IpAddr {
    let (from, to) = if any.is_ipv4() { ("0.0.0.0:0", "192.0.2.1:9") } else { ("[::]:0", "[2001:db8::1]:9") };
    let route = UdpSocket::bind(from).and_then(|s| s.connect(to).and_then(|()| s.local_addr()));
    route.map_or(any, |local| local.ip())
}

fn token() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    OsRng.try_fill_bytes(&mut bytes).map_err(|e| std::io::Error::other(e.to_string()))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Reads the head of a request and answers it.
fn converse(mut stream: &TcpStream, runs: &Runs, door: &Door, watchers: &Watchers) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let (start, mut head, mut part) = (Instant::now(), Vec::new(), [0; 2048]);
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let read = stream.read(&mut part)?;
        if read == 0 || start.elapsed() > PATIENCE {
            return Ok(());
        }
        head.extend(&part[..read]);
        if head.len() > HEAD {
            break;
        }
    }
    let Answer(status, kind, more, body) = answer(&head, runs, door, watchers);
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} {}\r\ncontent-type: {kind}; charset=utf-8\r\ncontent-length: {length}\r\n{HEADERS}{more}\r\n",
        if status < 400 { "OK" } else { "No" }
    );
    send(stream, head.as_bytes())?;
    send(stream, &body)
}

fn answer(head: &[u8], runs: &Runs, door: &Door, watchers: &Watchers) -> Answer {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    let whole = request.parse(head).is_ok_and(|s| s.is_complete());
    let (Some(method), Some(target), true) = (request.method, request.path, whole) else {
        return refusal(400, "this is not a request");
    };
    if method != "GET" {
        return refusal(405, "this page is only read").with("allow: GET\r\n");
    }
    let header = |name: &str| {
        let mut values = request.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name));
        values.next().and_then(|h| std::str::from_utf8(h.value).ok()).filter(|_| values.next().is_none())
    };
    if !header("host").is_some_and(|host| door.knows(host)) {
        return refusal(421, "this page answers to localhost, to addresses, and to the name it was told to listen at");
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if let Some(shown) = query.split('&').find_map(|part| part.strip_prefix("token="))
        && path == "/"
        && door.opens(shown)
    {
        // The token leaves the address, which is kept in histories.
        let cookie = format!("set-cookie: {}={shown}; HttpOnly; SameSite=Strict; Path=/\r\n", door.cookie);
        return refusal(303, "").with(&format!("location: /\r\n{cookie}"));
    }
    let cookies = header("cookie").unwrap_or_default().split(';').filter_map(|c| c.trim().split_once('='));
    if door.token.is_some() && !cookies.filter(|(name, _)| *name == door.cookie).any(|(_, shown)| door.opens(shown)) {
        return refusal(403, "open this page by the whole address that was printed, with its token");
    }
    if let Some((_, kind, text)) = ASSETS.iter().find(|(known, ..)| *known == path) {
        return Answer(200, kind, String::new(), text.as_bytes().to_vec());
    }
    if path == "/runs" {
        watchers.asked();
        return Answer(200, "application/json", String::new(), runs.list().to_string().into());
    }
    let file = path.strip_prefix("/runs/").and_then(|rest| rest.split_once('/'));
    match file.and_then(|(id, name)| runs.file(id.parse().ok()?, name)) {
        Some(text) => Answer(200, "application/json", String::new(), text.into()),
        None => refusal(404, "there is nothing of this name"),
    }
}

fn refusal(status: u16, text: &str) -> Answer {
    Answer(status, "text/plain", String::new(), text.into())
}

impl Answer {
    fn with(self, headers: &str) -> Answer {
        Answer(self.0, self.1, headers.to_owned(), self.3)
    }
}

impl Door {
    /// Whether a `Host` header names this server. A name that somebody else gives to this address does not, and over an
    /// address by itself nobody can be led astray. The port may be another one: that of a tunnel.
    fn knows(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((address, _)) => address,
            None => host.rsplit_once(':').map_or(host, |(name, _)| name),
        };
        let own = ["localhost", &self.name].iter().any(|known| !known.is_empty() && name.eq_ignore_ascii_case(known));
        own || name.parse::<IpAddr>().is_ok()
    }

    /// Whether this is the token. It takes as long wherever the two differ.
    fn opens(&self, shown: &str) -> bool {
        let Some(token) = &self.token else { return false };
        let differing = token.bytes().zip(shown.bytes()).fold(0, |differing, (a, b)| differing | (a ^ b));
        token.len() == shown.len() && differing == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let door = Door { token: None, cookie: String::new(), name: "gpu7".into() };
        let known = ["localhost", "LOCALHOST:6868", "127.0.0.1:1", "[::1]:80", "10.0.0.7", "gpu7:6868"];
        known.iter().for_each(|h| assert!(door.knows(h), "{h}"));
        let foreign =
            ["", ":", "evil.example", "127.0.0.1.evil.example:6868", "localhost.evil.example", "gpu8", "[gpu7"];
        foreign.iter().for_each(|h| assert!(!door.knows(h), "{h}"));
    }

    #[test]
    fn tokens() {
        let door = |token: Option<&str>| Door { token: token.map(str::to_owned), cookie: "c".into(), name: "".into() };
        assert!(door(Some("abc")).opens("abc"));
        ["", "ab", "abd", "abcd"].iter().for_each(|t| assert!(!door(Some("abc")).opens(t), "{t}"));
        assert!(!door(None).opens(""));
    }
}
