//! Large files, as objects of git LFS (github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md): they are announced in batches,
//! the server says which of them it lacks and where they go. Besides the transfer `basic` there is Hugging Face's `multipart`,
//! whose parts are sent one by one and then put together (huggingface_hub/lfs.py).

use std::cell::RefCell;
use std::io::{self, Read};

use serde_json::{Value, json};
use ureq::http::Method;

use super::{Source, amount, post_bytes, refused};
use crate::Name;
use crate::client::{Client, Failure, Payload, Reply, passing, patiently};
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::progress;

/// Where objects are announced.
pub(super) struct Place {
    /// The address of batches.
    pub(super) address: String,
    /// The branch that they are for, where it is asked.
    pub(super) branch: Option<String>,
    /// Whether addresses in answers are the hub's own where a mirror was asked, which then is asked for them, too.
    pub(super) is_moved: bool,
}

impl Place {
    /// Where an address of an answer is.
    fn of(&self, name: &Name, href: &str) -> String {
        match href.strip_prefix(name.hub.home).filter(|_| self.is_moved) {
            Some(path) => format!("{}/{path}", (name.hub.endpoint)()),
            None => href.to_owned(),
        }
    }
}

/// Objects in one batch.
const BATCH: usize = 64;
/// How often addresses are asked for anew: they hold for some hours.
const ROUNDS: usize = 3;
/// Headers that are not taken from an answer.
const OWN: [&str; 5] = ["authorization", "content-length", "cookie", "host", "transfer-encoding"];
/// Bytes from which on it takes a while to know a file's hash.
const LONG: u64 = 1 << 30;
const LFS: &str = "application/vnd.git-lfs+json";

/// How an object's transfer ended.
enum Transfer {
    Done,
    /// Its address is not taken any more.
    Expired(Reply),
}

/// Sends what the hub lacks.
pub(super) fn send(client: &Client, name: &Name, place: &Place, files: &[&Source]) -> Result<()> {
    for file in files.iter().filter(|file| file.size() >= LONG) {
        console::line(format!("hashing     {}, {}", file.path(), amount(file.size())));
        file.sha256()?;
    }
    for files in files.chunks(BATCH) {
        let actions = batch(client, name, place, files)?;
        let absent = files.iter().zip(&actions).filter(|(_, action)| !action.is_null());
        let there = files.len() - absent.clone().count();
        if there > 0 {
            console::line(format!("there       {there} of {} large files, from before", files.len()));
        }
        for (file, action) in absent {
            object(client, name, place, file, action).map_err(|e| e.at(file.path()))?;
        }
    }
    Ok(())
}

/// Of each file what the server wants done; null where it has it.
fn batch(client: &Client, name: &Name, place: &Place, files: &[&Source]) -> Result<Vec<Value>> {
    let hashes = files.iter().map(|file| file.sha256()).collect::<Result<Vec<&str>>>()?;
    let objects: Vec<Value> =
        files.iter().zip(&hashes).map(|(file, hash)| json!({"oid": hash, "size": file.size()})).collect();
    let mut asked = json!({"operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256"});
    asked["objects"] = objects.into();
    if let Some(branch) = &place.branch {
        asked["ref"] = json!({"name": branch});
    }
    let headers = [("accept", LFS), ("content-type", LFS)];
    let reply = patiently(|| post_bytes(client, &place.address, &headers, asked.to_string().as_bytes()))?;
    if !reply.is_ok() {
        return Err(refused(name, "to announce large files", &reply));
    }
    // ModelScope has the answer in an envelope.
    let body = reply.body.get("Data").unwrap_or(&reply.body);
    let told = body["objects"].as_array().ok_or_else(|| Error::run("an unknown kind of answer to large files"))?;
    let of = |(file, hash): (&&Source, &&str)| {
        // One that is not mentioned is there, which is ModelScope's way to say so.
        let object = told.iter().find(|object| object["oid"] == **hash);
        let wrong = object.and_then(|object| object["error"]["message"].as_str());
        match wrong {
            Some(wrong) => Err(Error::input(format!("the hub does not take it: {wrong}")).at(file.path())),
            None => {
                Ok(object.filter(|o| o["actions"]["upload"].is_object()).map_or(Value::Null, |o| o["actions"].clone()))
            }
        }
    };
    files.iter().zip(&hashes).map(of).collect()
}

fn object(client: &Client, name: &Name, place: &Place, file: &Source, action: &Value) -> Result<()> {
    console::line(format!("sending     {}, {}", file.path(), amount(file.size())));
    let bar = console::bar(file.size(), "{msg} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left");
    bar.set_message(file.path().to_owned());
    let at = |bytes| bar.set_position(bytes);
    let mut action = action.clone();
    for round in 1.. {
        let upload = &action["upload"];
        let href = upload["href"].as_str().ok_or_else(|| Error::run("the hub does not say where it goes"))?;
        let (href, header) = (place.of(name, href), &upload["header"]);
        let transfer = match number(&header["chunk_size"]) {
            Some(size) => parts(client, file, (&href, header, size), &at)?,
            None => whole(client, file, (&href, header), &at)?,
        };
        match transfer {
            Transfer::Done => break,
            Transfer::Expired(reply) if round == ROUNDS => return Err(refused(name, "to store the file", &reply)),
            Transfer::Expired(_) => {
                action = batch(client, name, place, &[file])?.remove(0);
                if action.is_null() {
                    break;
                }
            }
        }
    }
    bar.finish_and_clear();
    if let Some(href) = action["verify"]["href"].as_str() {
        let asked = json!({"oid": file.sha256()?, "size": file.size()});
        let reply = super::post(client, &place.of(name, href), &asked)?;
        if !reply.is_ok() {
            return Err(refused(name, "to check what arrived", &reply));
        }
    }
    Ok(())
}

/// A number that may be written as a text.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).filter(|n| *n > 0)
}

/// The transfer `basic`.
fn whole(client: &Client, file: &Source, (href, header): (&str, &Value), at: &dyn Fn(u64)) -> Result<Transfer> {
    // How long it is follows from the file, and who asks from the token.
    let own = |name: &str| OWN.iter().any(|own| own.eq_ignore_ascii_case(name));
    let told = header.as_object().into_iter().flatten().filter(|(name, _)| !own(name));
    let headers: Vec<(&str, &str)> = told.filter_map(|(name, value)| Some((name.as_str(), value.as_str()?))).collect();
    let reply = patiently(|| put(client, file, href, &headers, (0, file.size()), at))?;
    stored(reply)
}

/// The transfer `multipart`: addresses of parts by their numbers, from 1 on, each of so many bytes but the last.
fn parts(
    client: &Client,
    file: &Source,
    (href, header, size): (&str, &Value, u64),
    at: &dyn Fn(u64),
) -> Result<Transfer> {
    let count = file.size().div_ceil(size);
    let told =
        header.as_object().into_iter().flatten().filter(|(name, _)| name.bytes().all(|b| b.is_ascii_digit())).count();
    if told as u64 != count {
        return Err(Error::run(format!("the hub has {told} places for the {count} parts of this file")));
    }
    // Some hubs write numbers with zeros before them.
    let address = |part: u64| {
        let of =
            |(name, value): (&String, &Value)| (name.parse() == Ok(part)).then(|| value.as_str().map(str::to_owned))?;
        header.as_object().into_iter().flatten().find_map(of)
    };
    let mut done = Vec::new();
    for part in 1..=count {
        let address = address(part).ok_or_else(|| Error::run(format!("the hub has no place for part {part}")))?;
        let from = (part - 1) * size;
        let reply = patiently(|| put(client, file, &address, &[], (from, size.min(file.size() - from)), at))?;
        if !reply.is_ok() {
            return stored(reply);
        }
        let etag = reply.etag.filter(|etag| !etag.is_empty());
        let etag = etag.ok_or_else(|| Error::run(format!("the store gives part {part} no name")))?;
        done.push(json!({"partNumber": part, "etag": etag}));
    }
    let all = json!({"oid": file.sha256()?, "parts": done}).to_string();
    let headers = [("accept", LFS), ("content-type", LFS)];
    stored(patiently(|| post_bytes(client, href, &headers, all.as_bytes()))?)
}

fn stored(reply: Reply) -> Result<Transfer> {
    // ModelScope says in its answer what it has against it.
    let against = number(&reply.body["Code"]).filter(|code| *code != 200);
    match (reply.is_ok(), against) {
        (true, None) => Ok(Transfer::Done),
        _ => Ok(Transfer::Expired(reply)),
    }
}

/// Sends some of a file's bytes once.
fn put(
    client: &Client,
    file: &Source,
    href: &str,
    headers: &[(&str, &str)],
    (from, length): (u64, u64),
    at: &dyn Fn(u64),
) -> std::result::Result<Reply, Failure> {
    file.unchanged()?;
    let ended = RefCell::new(None);
    let open = || {
        let inner = file.open(from, length)?;
        Ok(Box::new(Counted { inner, from, end: from + length, at, ended: &ended }) as Box<dyn Read>)
    };
    let reply = client.send(Method::PUT, href, headers, &Payload { length, open: &open });
    if let Some(why) = ended.take() {
        file.unchanged()?;
        return Err(passing(why));
    }
    reply
}

/// A file while it is sent, from some byte to some byte.
struct Counted<'a> {
    inner: Box<dyn Read + 'a>,
    from: u64,
    end: u64,
    /// Told how far it is.
    at: &'a dyn Fn(u64),
    /// Why it could not be read to its end.
    ended: &'a RefCell<Option<String>>,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (self.at)(self.from);
        progress::advance();
        let read = self.inner.read(buffer).inspect_err(|e| *self.ended.borrow_mut() = Some(e.to_string()))?;
        if read == 0 && self.from < self.end && !buffer.is_empty() {
            *self.ended.borrow_mut() = Some("the file ended early".into());
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.from += read as u64;
        Ok(read)
    }
}
