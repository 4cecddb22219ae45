//! The page's server: GET of a few known names, one answer a connection, and nothing that a training could wait for.
//!
//! It reads files of runs and holds nothing but their places. A page of another origin cannot read its answers (no CORS),
//! nor a name that was bent to this machine (the `Host` header), and who comes over the network needs the token. With a launcher
//! there is POST, too: everybody needs the token then, and only the page itself may ask (`door.rs`).

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::connections::{Connections, send};
use super::door::{Door, foreign};
use super::request::{PATIENCE, Request};
use super::{Launcher, Runs, STYLE};
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::listen::{self, Listening};

/// Where the page is unless told otherwise; where that is taken, any free port of it.
const ADDRESS: &str = "127.0.0.1:6868";
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
    ("/start.js", "text/javascript", include_str!("start.js")),
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
    launcher: Option<Launcher>,
    watchers: Watchers,
}

/// What is served, to whom.
struct Site {
    runs: Runs,
    door: Door,
    launcher: Option<Launcher>,
    watchers: Watchers,
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
        let Listening { listener, address, name } = match listen::bind(address, ADDRESS, flag) {
            // Where its usual port is taken, any other will do.
            Err(_) if address.is_none() => listen::bind(Some("0"), ADDRESS, flag),
            bound => bound,
        }?;
        let mut door = Door::open(&name, address.port());
        if !address.ip().is_loopback() {
            door.lock().map_err(|e| Error::run(format!("no token can be made: {e}")).at(flag))?;
        }
        Ok(Server { listener, address, door, launcher: None, watchers: Watchers::default() })
    }

    /// Lets the page start runs; from here on everybody needs the token.
    ///
    /// # Errors
    /// A system without random numbers.
    pub fn starting(mut self, launcher: Launcher) -> Result<Server> {
        self.door.lock().map_err(|e| Error::run(format!("there is no token to be had: {e}")))?;
        Ok(Server { launcher: Some(launcher), ..self })
    }

    /// What to open in a browser.
    pub fn url(&self) -> String {
        let ip = self.address.ip();
        let place = SocketAddr::new(if ip.is_unspecified() { outward(ip) } else { ip }, self.address.port());
        let token = self.door.token().map(|t| format!("?token={t}")).unwrap_or_default();
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
        let Server { door, launcher, watchers, .. } = self;
        let (site, connections) = (Arc::new(Site { runs, door, launcher, watchers }), Connections::default());
        for stream in self.listener.incoming() {
            let Ok(stream) = stream else {
                // No more files may be opened just now.
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            let site = site.clone();
            connections.serve(stream, move |stream| converse(stream, &site));
        }
    }
}

/// The address by which other machines reach this one. Nothing is sent.
fn outward(any: IpAddr) -> IpAddr {
    let (from, to) = if any.is_ipv4() { ("0.0.0.0:0", "192.0.2.1:9") } else { ("[::]:0", "[2001:db8::1]:9") };
    let route = UdpSocket::bind(from).and_then(|s| s.connect(to).and_then(|()| s.local_addr()));
    route.map_or(any, |local| local.ip())
}

/// Reads a request and answers it.
fn converse(stream: &TcpStream, site: &Site) -> std::io::Result<()> {
    let Answer(status, kind, more, body) = match Request::read(stream)? {
        Ok(request) => answer(&request, site),
        Err((status, why)) => refusal(status, why),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} {}\r\ncontent-type: {kind}; charset=utf-8\r\ncontent-length: {length}\r\n{HEADERS}{more}\r\n",
        if status < 400 { "OK" } else { "No" }
    );
    send(stream, head.as_bytes())?;
    send(stream, &body)
}

fn answer(request: &Request, site: &Site) -> Answer {
    let Site { runs, door, launcher, watchers } = site;
    match (request.method.as_str(), launcher) {
        ("GET", _) | ("POST", Some(_)) => {}
        (_, None) => return refusal(405, "this page is only read").with("allow: GET\r\n"),
        (_, Some(_)) => return refusal(405, "this page takes GET and POST").with("allow: GET, POST\r\n"),
    }
    if !request.header("host").is_some_and(|host| door.knows(host)) {
        return refusal(421, "this page answers to localhost, to addresses, and to the name it was told to listen at");
    }
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    if let Some(shown) = query.split('&').find_map(|part| part.strip_prefix("token="))
        && path == "/"
        && door.opens(shown)
    {
        // The token leaves the address, which is kept in histories.
        return refusal(303, "").with(&format!("location: /\r\n{}", door.cookie(shown)));
    }
    if !door.admits(request.header("cookie").unwrap_or_default()) {
        return refusal(403, "open this page by the whole address that was printed, with its token");
    }
    if let Some(launcher) = launcher.as_ref().filter(|_| request.method == "POST") {
        return match foreign(|name| request.header(name)) {
            Some((status, why)) => refusal(status, why),
            None => act(path, &request.body, launcher, runs),
        };
    }
    if let Some((_, kind, text)) = ASSETS.iter().find(|(known, ..)| *known == path) {
        return Answer(200, kind, String::new(), text.as_bytes().to_vec());
    }
    if path == "/runs" {
        watchers.asked();
        return as_json(200, &runs.list(launcher.as_ref()));
    }
    if let Some(launcher) = launcher.as_ref().filter(|_| path == "/start") {
        return as_json(200, launcher.form());
    }
    let file = path.strip_prefix("/runs/").and_then(|rest| rest.split_once('/'));
    match file.and_then(|(id, name)| runs.file(id.parse().ok()?, name)) {
        Some(text) => Answer(200, "application/json", String::new(), text.into()),
        None => refusal(404, "there is nothing of this name"),
    }
}

/// Does what the page asks for: `args` are a run's arguments, `run` is its place in the list.
fn act(path: &str, body: &[u8], launcher: &Launcher, runs: &Runs) -> Answer {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let args = || {
        let texts = body["args"].as_array().ok_or_else(|| Error::input("there are no arguments"))?;
        let text =
            |text: &Value| text.as_str().map(str::to_owned).ok_or_else(|| Error::input(format!("{text} is no text")));
        texts.iter().map(text).collect::<Result<Vec<String>>>()
    };
    let folder = || {
        body["run"].as_u64().and_then(|id| runs.folder(id as usize)).ok_or_else(|| Error::input("there is no such run"))
    };
    let done = match path {
        "/check" => args().and_then(|args| launcher.check(&args)),
        "/start" => args().and_then(|args| launcher.start(&args)),
        "/stop" => folder().and_then(|folder| launcher.stop(&folder, || runs.holder(&folder))),
        _ => return refusal(404, "there is nothing of this name"),
    };
    match done {
        Ok(value) => as_json(200, &value),
        Err(e) => as_json(422, &json!({"text": e.message(), "place": e.place(), "help": e.advice()})),
    }
}

fn as_json(status: u16, value: &Value) -> Answer {
    Answer(status, "application/json", String::new(), value.to_string().into())
}

fn refusal(status: u16, text: &str) -> Answer {
    Answer(status, "text/plain", String::new(), text.into())
}

impl Answer {
    fn with(self, headers: &str) -> Answer {
        Answer(self.0, self.1, headers.to_owned(), self.3)
    }
}
