//! Requests to a hub: patient with lines that break and hubs that are busy, strict about what a file has to be.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use ureq::http::{Method, Request, Response, Uri};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body, SendBody};

use super::protocol::{Hub, Remote, variable};
use dpo_core::console;
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::progress;

/// Tries without progress before it is given up.
const TRIES: u32 = 5;

/// Bytes beyond those that had arrived before, which make progress.
const PROGRESS: u64 = 64 << 10;

/// Redirects that are followed.
const REDIRECTS: usize = 10;

/// The first pause between two tries; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(500);

/// The longest pause that a hub may ask for.
const LONGEST_PAUSE: u64 = 300;

/// For a connection to come about, and to be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// For an answer to what was sent: parts of a large file are put together before it comes.
const THOUGHT: Duration = Duration::from_secs(300);

/// Most bytes of an answer that is read as a whole.
const MOST_ANSWER: u64 = 64 << 20;

/// Asks one hub.
pub(super) struct Client {
    agent: Agent,
    hub: &'static Hub,
    /// The token, and where it may be shown: files come from other hosts, which it is none of the business of.
    secret: Option<(String, Origin)>,
}

/// Scheme, host and port of an address.
#[derive(PartialEq)]
struct Origin(String, String, u16);

impl Origin {
    fn of(address: &Uri) -> Option<Origin> {
        let (scheme, host) = (address.scheme_str()?.to_lowercase(), address.host()?.to_lowercase());
        let port = address.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        Some(Origin(scheme, host, port))
    }
}

/// How a try failed.
pub(super) enum Failure {
    /// Another try may do: why it failed, for how long the hub wants to be left alone, whether something arrived.
    Passing {
        cause: String,
        pause: Option<Duration>,
        progress: bool,
    },
    Final(Error),
}

/// What is sent with a request: so many bytes of a reader, which begins anew with every try.
pub(super) struct Payload<'a> {
    pub(super) length: u64,
    pub(super) open: &'a dyn Fn() -> std::io::Result<Box<dyn Read + 'a>>,
}

/// What a server says to something that was sent.
pub(super) struct Reply {
    pub(super) status: u16,
    /// The name of what was stored, as it is to be given back.
    pub(super) etag: Option<String>,
    /// JSON; null where there is none.
    pub(super) body: Value,
    /// What is wrong, in the server's words.
    pub(super) message: String,
}

impl Reply {
    pub(super) fn is_ok(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Final(error)
    }
}

pub(super) fn passing(cause: impl ToString) -> Failure {
    Failure::Passing { cause: cause.to_string(), pause: None, progress: false }
}

/// Whether hubs are not to be asked.
pub(super) fn offline() -> bool {
    let on = |name| variable(name).is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.to_lowercase().as_str()));
    on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE")
}

/// The variables that name a file of certificates, as OpenSSL and Python's requests have them.
const CERTIFICATES: [&str; 2] = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"];

/// Authorities whose certificates are taken: the program's own, or those of the file that a variable names, which is how a
/// company's proxy makes itself known.
fn trusted() -> Result<RootCerts> {
    let Some((name, path)) = CERTIFICATES.iter().find_map(|name| Some((name, variable(name)?))) else {
        return Ok(RootCerts::WebPki);
    };
    let place = format!("{name}={path}");
    let unread = |e: std::io::Error| Error::input(format!("cannot be read: {e}")).at(&place);
    // Requests take a folder of such files too.
    let files = match fs::read_dir(&path) {
        Ok(entries) => entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect(),
        Err(_) => vec![path.into()],
    };
    let mut certificates: Vec<Certificate> = Vec::new();
    for file in files {
        let text = fs::read(file).map_err(unread)?;
        let items = ureq::tls::parse_pem(&text).flatten();
        certificates.extend(items.filter_map(|i| if let PemItem::Certificate(c) = i { Some(c) } else { None }));
    }
    if certificates.is_empty() {
        return Err(Error::input("has no certificates in PEM").at(&place));
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}

/// What makes requests, with the environment's proxy and certificates: it waits so long for an answer to begin, follows no redirects, and an
/// answer of any status is one.
///
/// # Errors
/// A variable that names a file without certificates.
pub fn agent(patience: Duration) -> Result<Agent> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_connect(Some(SILENCE))
        .timeout_recv_response(Some(patience))
        .timeout_per_read(Some(patience))
        .timeout_per_write(Some(patience))
        .tls_config(TlsConfig::builder().root_certs(trusted()?).build())
        .user_agent(concat!("dpo-host/", env!("CARGO_PKG_VERSION")));
    Ok(config.build().into())
}

impl Client {
    pub(super) fn of(hub: &'static Hub) -> Result<Client> {
        let origin = (hub.endpoint)().parse().ok().and_then(|endpoint| Origin::of(&endpoint));
        Ok(Client { agent: agent(SILENCE)?, hub, secret: (hub.secret)().zip(origin) })
    }

    /// What is at an address, as JSON.
    pub(super) fn json(&self, address: &str) -> Result<Value> {
        patiently(|| {
            let mut response = self.get(address, 0)?;
            let text = response.body_mut().with_config().limit(MOST_ANSWER).read_to_string().map_err(passing)?;
            serde_json::from_str(&text).map_err(|e| {
                let help = "is there a proxy or a login page between? HF_ENDPOINT names a mirror";
                Failure::Final(Error::run(format!("{address} answers no JSON: {e}")).help(help))
            })
        })
    }

    /// What the hub says to a question, whatever it is.
    pub(super) fn ask(&self, address: &str) -> Result<Reply> {
        patiently(|| match self.answer(address, 0)? {
            response if is_busy(response.status().as_u16()) => Err(busy(address, &response)),
            mut response => reply(&mut response),
        })
    }

    /// The text of a file, where there is one.
    pub(super) fn text(&self, address: &str) -> Result<Option<String>> {
        patiently(|| {
            let response = self.answer(address, 0)?;
            if response.status() == 404 {
                return Ok(None);
            }
            let mut response = self.accepted(address, response)?;
            let bytes = response.body_mut().with_config().limit(MOST_ANSWER).read_to_vec().map_err(passing)?;
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        })
    }

    /// The headers that show the token, at a place that it is for: the hub, and where `siblings` are, hosts of its domain.
    fn credentials(&self, place: &Uri, siblings: bool) -> Vec<(&'static str, String)> {
        let (Some((secret, origin)), Some(to)) = (&self.secret, Origin::of(place)) else { return Vec::new() };
        let domain = format!(".{}", origin.1.trim_start_matches("www."));
        let is_sibling = siblings && to.0 == "https" && origin.0 == "https" && to.1.ends_with(&domain);
        if to != *origin && !is_sibling {
            return Vec::new();
        }
        let cookie = self.hub.cookie.map(|cookie| ("cookie", format!("{cookie}={secret}")));
        [("authorization", format!("Bearer {secret}"))].into_iter().chain(cookie).collect()
    }

    /// Whether there is a token to show.
    pub(super) fn has_token(&self) -> bool {
        self.secret.is_some()
    }

    /// Sends something once, and takes any answer but those of a server that is busy. A token is shown to its hub alone.
    pub(super) fn send(
        &self,
        method: Method,
        address: &str,
        headers: &[(&str, &str)],
        payload: &Payload<'_>,
    ) -> std::result::Result<Reply, Failure> {
        let mut place: Uri = address.parse().map_err(|e| not_an_address(address, &e))?;
        for _ in 0..=REDIRECTS {
            let mut request = Request::builder().method(method.clone()).uri(&place);
            for (name, value) in self.credentials(&place, self.hub.siblings) {
                request = request.header(name, value);
            }
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            request = request.header("content-length", payload.length);
            let mut body = (payload.open)().map_err(|e| Error::input(format!("cannot read what is sent: {e}")))?;
            let request = request.body(SendBody::from_reader(&mut body)).map_err(|e| not_an_address(address, &e))?;
            let request = self.agent.configure_request(request).timeout_recv_response(Some(THOUGHT)).build();
            let mut response = self.agent.run(request).map_err(|e| unanswered(&place, &e))?;
            let location = response.headers().get("location").and_then(|v| v.to_str().ok());
            if let Some(location) = location.filter(|_| matches!(response.status().as_u16(), 307 | 308)) {
                place = joined(&place, location)
                    .ok_or_else(|| Error::run(format!("{address} leads to '{location}', which is no address")))?;
                continue;
            }
            if is_busy(response.status().as_u16()) {
                return Err(busy(address, &response));
            }
            return reply(&mut response);
        }
        Err(Error::run(format!("{address} leads on and on, {REDIRECTS} times")).into())
    }

    /// Fetches a file to its place, from where the last try ended.
    pub(super) fn download(&self, address: &str, file: &Remote, place: &Path) -> Result<()> {
        let mut part = place.as_os_str().to_owned();
        part.push(".incomplete");
        let part = Path::new(&part);
        if let Some(folder) = part.parent() {
            fs::create_dir_all(folder).writing(folder)?;
        }
        let bar =
            console::bar(file.size.unwrap_or(0), "{msg} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left");
        bar.set_message(file.path.clone());
        let mut furthest = fs::metadata(part).map_or(0, |m| m.len());
        let result = patiently(|| {
            self.append(address, file, part, &mut furthest, |at| bar.set_position(at))?;
            verify(file, part)?;
            Ok(())
        });
        bar.finish_and_clear();
        result?;
        fs::rename(part, place).writing(place)?;
        place.parent().map_or(Ok(()), dpo_core::files::sync_folder)
    }

    /// Adds to the part of a file that is there what it lacks. `furthest` is how much of it there has been at most: who always
    /// begins anew and never comes further makes no progress.
    fn append(
        &self,
        address: &str,
        file: &Remote,
        part: &Path,
        furthest: &mut u64,
        mut at: impl FnMut(u64),
    ) -> std::result::Result<(), Failure> {
        let there = fs::metadata(part).map_or(0, |m| m.len());
        // Without a size nobody knows whether the part is the whole.
        let from = file.size.filter(|size| there <= *size).map_or(0, |_| there);
        if from > 0 && Some(from) == file.size {
            return Ok(());
        }
        let mut response = self.get(address, from)?;
        let begins = |r: &Response<Body>| {
            let range = r.headers().get("content-range").and_then(|v| v.to_str().ok());
            range.is_some_and(|v| v.starts_with(&format!("bytes {from}-")))
        };
        let goes_on = from > 0 && response.status() == 206 && begins(&response);
        let mut have = if goes_on { from } else { 0 };
        let mut out = File::options().create(true).append(true).open(part).writing(part)?;
        out.set_len(have).writing(part)?;
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 18];
        let mut broken = |cause: String, have: u64| {
            let anew =
                if from > 0 && !goes_on { "; each answer begins anew instead of where the last one ended" } else { "" };
            let progress = have >= *furthest + PROGRESS;
            *furthest = have.max(*furthest);
            Err(Failure::Passing { cause: format!("{cause}{anew}"), pause: None, progress })
        };
        let of = file.size.map(|size| format!(" of {size}")).unwrap_or_default();
        loop {
            at(have);
            progress::advance();
            let read = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) => return broken(format!("the connection broke after {have}{of} bytes: {e}"), have),
            };
            have += read as u64;
            if file.size.is_some_and(|size| have > size) {
                let _ = fs::remove_file(part);
                return Err(Error::run(format!("more bytes arrive than the {} it has", file.size.unwrap_or(0))).into());
            }
            out.write_all(&buffer[..read]).writing(part)?;
        }
        out.sync_all().writing(part)?;
        match file.size {
            Some(size) if have < size => broken(format!("the connection ended after {have}{of} bytes"), have),
            _ => Ok(()),
        }
    }

    fn get(&self, address: &str, from: u64) -> std::result::Result<Response<Body>, Failure> {
        self.accepted(address, self.answer(address, from)?)
    }

    /// What is said to a request, whatever it is.
    fn answer(&self, address: &str, from: u64) -> std::result::Result<Response<Body>, Failure> {
        let mut place: Uri = address.parse().map_err(|e| not_an_address(address, &e))?;
        for _ in 0..=REDIRECTS {
            let mut request = self.agent.get(&place);
            for (name, value) in self.credentials(&place, false) {
                request = request.header(name, value);
            }
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|e| unanswered(&place, &e))?;
            let location = response.headers().get("location").and_then(|v| v.to_str().ok());
            match location.filter(|_| matches!(response.status().as_u16(), 301..=303 | 307 | 308)) {
                Some(location) => {
                    place = joined(&place, location)
                        .ok_or_else(|| Error::run(format!("{address} leads to '{location}', which is no address")))?;
                }
                None => return Ok(response),
            }
        }
        Err(Error::run(format!("{address} leads on and on, {REDIRECTS} times"))
            .help("is there a proxy or a login page between? HF_ENDPOINT names a mirror")
            .into())
    }

    /// An answer that is one, or why there is none.
    fn accepted(&self, address: &str, response: Response<Body>) -> std::result::Result<Response<Body>, Failure> {
        let status = response.status().as_u16();
        match status {
            200..=299 => Ok(response),
            401 | 403 => Err(self.closed(status).into()),
            404 => Err(Error::input("there is no such thing, or it is private (404)")
                .help(format!(
                    "look at its page; {} lets you in where it is private; a folder of that name is not here",
                    self.hub.token
                ))
                .into()),
            status if is_busy(status) => Err(busy(address, &response)),
            _ => Err(Error::run(format!("{} answers {status} to {address}", host(address))).into()),
        }
    }

    /// Hugging Face says 401 also of what does not exist.
    fn closed(&self, status: u16) -> Error {
        let token = self.hub.token;
        match self.secret {
            Some(_) => Error::input(format!("the hub does not let this token in ({status})"))
                .help(format!("accept the terms on its page with the account of {token}; is the name right?")),
            None => {
                Error::input(format!("the hub lets nobody in without a token, or does not know the name ({status})"))
                    .help(format!("is the name right? if so, accept the terms on its page and set {token}"))
            }
        }
    }
}

fn not_an_address(address: &str, what: &impl std::fmt::Display) -> Failure {
    Failure::Final(Error::input(format!("{address} is not an address: {what}")))
}

/// Why there is no answer.
fn unanswered(place: &Uri, error: &ureq::Error) -> Failure {
    match error {
        ureq::Error::BadUri(what) => not_an_address(&place.to_string(), what),
        e => passing(format!("{} does not answer: {e}", place.authority().map_or("", |a| a.as_str()))),
    }
}

/// Whether a status says that another try may do.
fn is_busy(status: u16) -> bool {
    matches!(status, 408 | 429 | 500..=599)
}

fn busy(address: &str, response: &Response<Body>) -> Failure {
    let asked = response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.trim().parse().ok());
    let cause = format!("{} is busy ({})", host(address), response.status().as_u16());
    match asked {
        Some(seconds) if seconds > LONGEST_PAUSE => {
            Error::run(format!("{cause} and asks to come back in {seconds} s")).into()
        }
        _ => Failure::Passing { cause, pause: asked.map(Duration::from_secs), progress: false },
    }
}

/// Reads an answer to its end.
fn reply(response: &mut Response<Body>) -> std::result::Result<Reply, Failure> {
    let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let (status, etag, said) = (response.status().as_u16(), header("etag"), header("x-error-message"));
    let text = response.body_mut().with_config().limit(MOST_ANSWER).read_to_vec().map_err(passing)?;
    let body: Value = serde_json::from_slice(&text).unwrap_or_default();
    // Hugging Face has `error`, ModelScope `Message`, object storage XML.
    let told = |name: &str| body.get(name).and_then(Value::as_str).map(str::to_owned);
    let raw = || String::from_utf8_lossy(&text).chars().take(200).collect::<String>();
    let message = said.or_else(|| told("error")).or_else(|| told("Message")).or_else(|| told("message"));
    Ok(Reply { status, etag, message: message.unwrap_or_else(raw), body })
}

/// Tries again, later and later, as long as something may come of it.
pub(super) fn patiently<T>(mut attempt: impl FnMut() -> std::result::Result<T, Failure>) -> Result<T> {
    let mut tries = 0;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing { cause, pause, progress }) => {
                tries = if progress { 1 } else { tries + 1 };
                if tries >= TRIES {
                    let help = "run it again: it goes on where it ended. HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy, SSL_CERT_FILE \
                                its certificates; without a network, name a folder";
                    return Err(Error::run(format!("given up after {TRIES} tries: {cause}")).help(help));
                }
                std::thread::sleep(pause.unwrap_or(PAUSE * 2_u32.pow(tries - 1)));
            }
        }
    }
}

/// Whether what arrived is the file. What is not is removed, so that the next try begins anew.
fn verify(file: &Remote, part: &Path) -> Result<()> {
    let Some(hash) = &file.hash else { return Ok(()) };
    let is = hash.of(part).reading(part)?;
    if hash.is(&is) {
        return Ok(());
    }
    let _ = fs::remove_file(part);
    let what = format!("what arrived is another file: its {hash} is {is}, the hub says {}", hash.text());
    Err(Error::run(what).help("it is removed; run it again, or try another mirror"))
}

/// Where an address leads from another one.
fn joined(from: &Uri, to: &str) -> Option<Uri> {
    let (scheme, authority) = (from.scheme_str()?, from.authority()?);
    let address = match to {
        to if to.starts_with("//") => format!("{scheme}:{to}"),
        to if to.starts_with('/') => format!("{scheme}://{authority}{to}"),
        to => to.to_owned(),
    };
    address.parse().ok().filter(|address| Origin::of(address).is_some())
}

fn host(address: &str) -> &str {
    address.split('/').nth(2).unwrap_or(address)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;
    use crate::protocol::HUBS;

    #[test]
    fn a_token_goes_to_its_hub_and_where_its_client_sends_it() {
        let shown = |hub: &'static Hub, endpoint: &str, place: &str, siblings: bool| {
            let origin = Origin::of(&endpoint.parse().unwrap()).unwrap();
            let client = Client { agent: agent(SILENCE).unwrap(), hub, secret: Some(("secret".into(), origin)) };
            !client.credentials(&place.parse().unwrap(), siblings).is_empty()
        };
        let (hf, ms) = (&HUBS[0], &HUBS[1]);
        assert!(shown(hf, "https://huggingface.co", "https://huggingface.co/api/models", hf.siblings));
        let others = ["https://s3.amazonaws.com/x", "https://cdn.huggingface.co/x", "http://huggingface.co/x"];
        others.iter().for_each(|place| assert!(!shown(hf, "https://huggingface.co", place, hf.siblings), "{place}"));
        let home = "https://www.modelscope.cn";
        assert!(shown(ms, home, "https://lfs.modelscope.cn/store", ms.siblings));
        assert!(!shown(ms, home, "https://lfs.modelscope.cn/store", false));
        for place in ["http://lfs.modelscope.cn/x", "https://evilmodelscope.cn/x", "https://modelscope.cn.evil.com/x"] {
            assert!(!shown(ms, home, place, ms.siblings), "{place}");
        }
    }
}
