//! A hub on the loopback: one server that speaks as Hugging Face and as ModelScope do, and misbehaves when told to.
//! What goes up to it is in `uploads.rs`. The hubs' own clients get along with it (`tests/oracle/hub_clients.py`).

mod uploads;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// How the next request for a file ends, instead of well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The connection breaks in the middle of what was asked for.
    Breaks,
    /// This status, and 0 seconds of `Retry-After`.
    Status(u16),
    /// It is done, and the connection breaks before the answer.
    Lost,
}

/// What the server has and does.
#[derive(Default)]
pub struct State {
    /// Files by their path.
    pub files: Vec<(String, Vec<u8>)>,
    /// What goes wrong with a file, one after the other.
    pub troubles: HashMap<String, Vec<Trouble>>,
    /// Answers every request for a file from its beginning, and ends after so many bytes.
    pub cuts: Option<usize>,
    /// Where requests for files are sent on to, in place of an answer: the address of a server.
    pub redirect: Option<String>,
    /// Files of which another hash is told.
    pub lies: Vec<String>,
    /// Sizes that are told in place of true ones.
    pub sizes: HashMap<String, u64>,
    /// Paths that are listed and are not there.
    pub listed: Vec<String>,
    /// What has to be shown to be let in.
    pub token: Option<String>,
    /// Tokens that were shown.
    pub shown: Vec<String>,
    /// Requests for files: path, and from which byte on.
    pub asked: Vec<(String, u64)>,
    /// Repositories that are there, and whether they are private.
    pub repositories: HashMap<String, bool>,
    /// Branches beside the first one.
    pub branches: Vec<String>,
    /// Tokens may read alone.
    pub read_only: bool,
    /// Large files that have arrived, by their SHA-256.
    pub objects: HashMap<String, Vec<u8>>,
    /// Bytes of a part, where large files go up in parts.
    pub part: Option<usize>,
    /// Parts that have arrived, by the object and their number.
    pub parts: HashMap<(String, usize), Vec<u8>>,
    /// Messages of commits.
    pub commits: Vec<String>,
    /// What was sent: `create`, `object`, `object 2` of a part, `commit`.
    pub sent: Vec<String>,
    /// Where large files go, in place of this server: the address of another one.
    pub store: Option<String>,
}

/// A running server.
pub struct Hub {
    /// Its address.
    pub address: String,
    /// What it has; may be changed while it runs.
    pub state: Arc<Mutex<State>>,
}

/// The commit of which everything is.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

impl Hub {
    /// What was sent since the last time.
    pub fn sent(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().expect("no thread has panicked").sent)
    }

    /// A server with files, under the name `owner/name` whatever that is, but for `owner/missing`.
    pub fn start(files: Vec<(String, Vec<u8>)>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || answer(stream, &state));
            }
        });
        Hub { address, state }
    }

    /// What was asked for since the last time.
    pub fn asked(&self) -> Vec<(String, u64)> {
        std::mem::take(&mut self.state.lock().expect("no thread has panicked").asked)
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut first = String::new();
    reader.read_line(&mut first).ok()?;
    let (method, target) = (first.split(' ').next()?.to_owned(), first.split(' ').nth(1)?.to_owned());
    let headers = reader.by_ref().lines().map_while(|l| l.ok().filter(|l| !l.is_empty()));
    let headers =
        headers.filter_map(|l| l.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())));
    let headers: HashMap<String, String> = headers.collect();
    let mut state = state.lock().ok()?;
    let shown = headers.get("authorization").and_then(|v| v.strip_prefix("Bearer "));
    state.shown.extend(shown.map(str::to_owned));
    if state.token.is_some() && shown != state.token.as_deref() {
        return send(&mut stream, 401, &[], b"{}");
    }
    let call = uploads::Call { method: &method, target: &target, headers: &headers };
    if let Some(answer) = call.answer(&mut state, &mut reader) {
        return match answer {
            uploads::Answer::Json(status, value) => send(&mut stream, status, &[], value.to_string().as_bytes()),
            uploads::Answer::Stored(etag) => send(&mut stream, 200, &[("etag", etag)], b""),
            uploads::Answer::Busy(status) => send(&mut stream, status, &[("retry-after", "0".into())], b""),
            uploads::Answer::Nothing => Some(()),
        };
    }
    if target.contains("/missing") {
        return send(&mut stream, 404, &[], b"{}");
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let file = match (path.split_once("/resolve/"), query.split_once("FilePath=")) {
        (Some((_, rest)), _) => rest.split_once('/')?.1.to_owned(),
        (None, Some((_, path))) => path.replace("%2F", "/"),
        (None, None) if path.starts_with("/api/v1/") => return json(&mut stream, &modelscope(&state, query)),
        (None, None) if path.contains("/tree/") => return json(&mut stream, &tree(&state)),
        (None, None) => return json(&mut stream, &hugging_face(&state)),
    };
    if let Some(server) = state.redirect.as_ref().filter(|_| !target.starts_with("/renamed/")) {
        let location = ("location", format!("{server}/renamed{target}"));
        return send(&mut stream, 302, &[location], b"");
    }
    if method == "HEAD" {
        return about(&mut stream, &state, &file);
    }
    let from = headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    state.asked.push((file.clone(), from.unwrap_or(0)));
    if let Some(length) = state.cuts {
        let (_, bytes) = state.files.iter().find(|(path, _)| *path == file)?;
        head(&mut stream, 200, &[], bytes.len())?;
        return stream.write_all(&bytes[..length.min(bytes.len())]).ok();
    }
    let trouble = state.troubles.get_mut(&file).filter(|t| !t.is_empty()).map(|t| t.remove(0));
    let Some((_, bytes)) = state.files.iter().find(|(path, _)| *path == file) else {
        return send(&mut stream, 404, &[("x-error-code", "EntryNotFound".into())], b"{}");
    };
    let rest = &bytes[from.unwrap_or(0) as usize..];
    let range = format!("bytes {}-{}/{}", from.unwrap_or(0), bytes.len() - 1, bytes.len());
    let (status, more) = if from.is_some() { (206, vec![("content-range", range)]) } else { (200, vec![]) };
    match trouble {
        Some(Trouble::Status(status)) => send(&mut stream, status, &[("retry-after", "0".into())], b""),
        Some(Trouble::Breaks | Trouble::Lost) => {
            head(&mut stream, status, &more, rest.len())?;
            stream.write_all(&rest[..rest.len() / 2]).ok()
        }
        None => send(&mut stream, status, &more, rest),
    }
}

/// What Hugging Face's own client wants to know of a file before it fetches it.
fn about(stream: &mut TcpStream, state: &State, file: &str) -> Option<()> {
    let (_, bytes) = state.files.iter().find(|(path, _)| path == file)?;
    let etag = format!("\"{}\"", git(bytes));
    head(stream, 200, &[("etag", etag), ("x-repo-commit", COMMIT.into())], bytes.len())
}

fn head(stream: &mut TcpStream, status: u16, headers: &[(&str, String)], length: usize) -> Option<()> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n").ok()
}

fn send(stream: &mut TcpStream, status: u16, headers: &[(&str, String)], body: &[u8]) -> Option<()> {
    head(stream, status, headers, body.len())?;
    stream.write_all(body).ok()
}

fn json(stream: &mut TcpStream, value: &Value) -> Option<()> {
    send(stream, 200, &[], value.to_string().as_bytes())
}

fn hash(state: &State, path: &str, bytes: &[u8]) -> String {
    told(state, path, format!("{:x}", Sha256::digest(bytes)))
}

fn told(state: &State, path: &str, hash: String) -> String {
    if state.lies.iter().any(|l| l == path) { hash.chars().rev().collect() } else { hash }
}

/// Git's name of a file.
fn git(bytes: &[u8]) -> String {
    format!("{:x}", Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
}

fn hugging_face(state: &State) -> Value {
    let file = |(path, bytes): &(String, Vec<u8>)| {
        let git = told(state, path, git(bytes));
        let size = state.sizes.get(path).copied().unwrap_or(bytes.len() as u64);
        let mut file = json!({"rfilename": path, "size": size, "blobId": git});
        if path.ends_with(".safetensors") {
            let hash = hash(state, path, bytes);
            file["lfs"] = json!({"sha256": hash, "size": bytes.len(), "pointerSize": 135});
        }
        file
    };
    let listed = state.listed.iter().map(|path| json!({"rfilename": path, "size": 1, "blobId": "0"}));
    json!({"id": "owner/name", "sha": COMMIT, "private": false, "siblings": state.files.iter().map(file).chain(listed).collect::<Vec<_>>()})
}

/// The files as Hugging Face's own client asks for them.
fn tree(state: &State) -> Value {
    let file = |(path, bytes): &(String, Vec<u8>)| {
        let mut file = json!({"type": "file", "path": path, "size": bytes.len(), "oid": git(bytes)});
        if path.ends_with(".safetensors") {
            file["lfs"] = json!({"oid": hash(state, path, bytes), "size": bytes.len(), "pointerSize": 135});
        }
        file
    };
    state.files.iter().map(file).collect()
}

fn modelscope(state: &State, query: &str) -> Value {
    let file = |(path, bytes): &(String, Vec<u8>)| json!({"Path": path, "Type": "blob", "Size": bytes.len(), "Sha256": hash(state, path, bytes)});
    let number = |name: &str| query.split('&').find_map(|p| p.strip_prefix(name)?.strip_prefix('=')?.parse().ok());
    let (page, size) = (number("PageNumber").unwrap_or(1), number("PageSize").unwrap_or(usize::MAX));
    let files: Vec<Value> =
        state.files.iter().skip((page - 1_usize).saturating_mul(size)).take(size).map(file).collect();
    let files = if files.is_empty() { Value::Null } else { json!(files) };
    json!({"Code": 200, "Success": true, "Data": {"Files": files}})
}
