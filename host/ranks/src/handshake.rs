//! What two ranks say to each other before anything else: that both know the run's secret, and who they are.
//!
//! Both sides send an opening with a random number; the caller proves that it knows the secret (HMAC-SHA256, RFC 2104)
//! over both numbers and what it says of itself; the other side answers with a proof of its own and a verdict. The secret
//! never crosses, nothing can be replayed, and before a proof no more than 4 KiB are read from anyone.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rand::TryRngCore;
use rand::rngs::OsRng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Opens every conversation; the digit changes with the protocol.
const MAGIC: &[u8; 16] = b"dpo-host ranks 1";
/// Largest message of the handshake, in bytes.
const LARGEST_MESSAGE: usize = 4096;
/// A caller that has not finished the handshake by then is refused.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a handshake goes over: a TCP connection, or memory in a test.
pub trait Transport: Read + Write {
    /// How long a read may take from now on.
    fn wait_at_most(&mut self, time: Duration) -> io::Result<()>;
}

impl Transport for TcpStream {
    fn wait_at_most(&mut self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))
    }
}

/// The shared secret of a run, by which its ranks authenticate each other.
#[derive(Clone, PartialEq)]
pub struct Secret([u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// From a text of any length.
    pub fn new(text: &[u8]) -> Secret {
        Secret(Sha256::digest(text).into())
    }

    /// Shows that one knows the secret: its HMAC over some parts.
    pub fn proof(&self, parts: &[&[u8]]) -> [u8; 32] {
        let pad = |with: u8| {
            let mut block = [with; 64];
            block.iter_mut().zip(self.0).for_each(|(b, s)| *b ^= s);
            block
        };
        let mut inner = Sha256::new_with_prefix(pad(0x36));
        parts.iter().for_each(|p| inner.update(p));
        Sha256::new_with_prefix(pad(0x5c)).chain_update(inner.finalize()).finalize().into()
    }
}

/// Random bytes from the operating system.
pub(super) fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    OsRng.try_fill_bytes(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}

/// What a rank says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Of dpo-host: ranks that compute other numbers do not mix.
    pub version: String,
    /// Its place.
    pub rank: usize,
    /// Ranks of the run.
    pub size: usize,
    /// Which start of the run it is of.
    pub attempt: u64,
    /// `host:pid`, for people.
    pub process: String,
    /// What the connection is for.
    pub purpose: Purpose,
    /// Where it takes connections from the rank before it.
    pub port: u16,
}

/// What a rank calls another one for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Purpose {
    /// To take part in the run; to rank 0.
    Join,
    /// To carry data on the ring of a number; to the next rank.
    Ring(usize),
}

/// Rings between the same ranks: one for what the run exchanges step by step, one for [`Parts`](super::Parts).
pub(super) const RINGS: usize = 2;

impl Hello {
    /// What is wrong with a caller who knows the secret, for the rank that says this of itself.
    pub fn check(&self, caller: &Hello) -> Result<(), String> {
        let Hello { rank, size, .. } = *self;
        let before = (rank + size - 1) % size;
        let rings = matches!(caller.purpose, Purpose::Ring(at) if at >= RINGS || caller.rank != before);
        let rules = [
            (caller.version != self.version, format!("it runs dpo-host {}, this is {}", caller.version, self.version)),
            (caller.size != size, format!("it counts {} ranks, here are {size}", caller.size)),
            (
                caller.attempt != self.attempt,
                format!("it is of attempt {}, this is attempt {}", caller.attempt, self.attempt),
            ),
            (caller.rank >= size || caller.rank == rank, format!("it says it is rank {}", caller.rank)),
            (caller.purpose == Purpose::Join && rank != 0, format!("ranks join at rank 0, this is rank {rank}")),
            (rings, format!("rank {before} comes before {rank}, on {RINGS} rings")),
        ];
        rules.into_iter().find(|(broken, _)| *broken).map_or(Ok(()), |(_, text)| Err(text))
    }
}

/// Why a conversation led to nothing.
pub enum Refused {
    /// The other side knows the secret and says no.
    ByRank(String),
    /// It failed to authenticate: another run or another program.
    Unauthenticated(String),
    /// It is not there, not yet, or no longer.
    Absent(String),
}

impl From<io::Error> for Refused {
    fn from(e: io::Error) -> Refused {
        match e.kind() {
            ErrorKind::InvalidData => Refused::Unauthenticated(e.to_string()),
            _ => Refused::Absent(plain(&e)),
        }
    }
}

/// The caller's side. The secret is asked for once the other side has answered; it is returned if both know it.
pub fn call(
    stream: &mut impl Transport,
    secret: impl FnOnce() -> Result<Secret, Refused>,
    hello: &Hello,
) -> Result<Secret, Refused> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    let own = random()?;
    stream.write_all(&[&MAGIC[..], &own].concat())?;
    let other = opening(stream, deadline)?;
    let secret = secret()?;
    let body = serde_json::to_vec(hello).map_err(io::Error::other)?;
    stream.write_all(&secret.proof(&[b"call", &own, &other, &body]))?;
    write_frame(stream, &body)?;
    let answer = read_frame(stream, LARGEST_MESSAGE, Some(deadline))?;
    let (proof, verdict) = answer.split_at_checked(32).unwrap_or_default();
    let text = String::from_utf8_lossy(verdict).into_owned();
    if !same(proof, &secret.proof(&[b"answer", &own, &other, &body, verdict])) {
        return Err(Refused::Unauthenticated("has another secret: it belongs to another run".into()));
    }
    if text.is_empty() { Ok(secret) } else { Err(Refused::ByRank(text)) }
}

/// The other side: `check` says what is wrong with a caller who knows the secret, if anything is.
pub fn answer(
    stream: &mut impl Transport,
    secret: &Secret,
    check: impl FnOnce(&Hello) -> Result<(), String>,
) -> Result<Hello, String> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    let failed = |e: io::Error| plain(&e);
    let other = opening(stream, deadline).map_err(failed)?;
    let own = random().map_err(failed)?;
    stream.write_all(&[&MAGIC[..], &own].concat()).map_err(failed)?;
    let mut proof = [0; 32];
    read_exact(stream, &mut proof, Some(deadline)).map_err(failed)?;
    let body = read_frame(stream, LARGEST_MESSAGE, Some(deadline)).map_err(failed)?;
    let mut reply = |secret: Option<&Secret>, verdict: &str| {
        let proof = secret.map_or([0; 32], |s| s.proof(&[b"answer", &other, &own, &body, verdict.as_bytes()]));
        write_frame(stream, &[&proof, verdict.as_bytes()].concat()).map_err(failed)
    };
    if !same(&proof, &secret.proof(&[b"call", &other, &own, &body])) {
        let _ = reply(None, "");
        return Err("does not know the run's secret".into());
    }
    let checked = serde_json::from_slice::<Hello>(&body)
        .map_err(|_| "speaks another version of the protocol".to_owned())
        .and_then(|hello| check(&hello).map(|()| hello));
    reply(Some(secret), checked.as_ref().err().map_or("", String::as_str))?;
    checked
}

/// The random number of the other side's opening.
fn opening(stream: &mut impl Transport, deadline: Instant) -> io::Result<[u8; 32]> {
    let mut bytes = [0; 48];
    read_exact(stream, &mut bytes[..16], Some(deadline))?;
    if bytes[..16] != MAGIC[..] {
        let ours = bytes[..15] == MAGIC[..15];
        let what = if ours { "speaks another version of the protocol" } else { "is not a rank of dpo-host" };
        return Err(io::Error::new(ErrorKind::InvalidData, what));
    }
    read_exact(stream, &mut bytes[16..], Some(deadline))?;
    let mut number = [0; 32];
    number.copy_from_slice(&bytes[16..]);
    Ok(number)
}

/// Equal in a time that does not say where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

/// Sends a message: its length, itself.
pub fn write_frame(stream: &mut impl Transport, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(&[&(bytes.len() as u32).to_le_bytes()[..], bytes].concat())
}

/// Receives a message of at most `most` bytes.
pub fn read_frame(stream: &mut impl Transport, most: usize, deadline: Option<Instant>) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    read_exact(stream, &mut length, deadline)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > most {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a message of {length} bytes")));
    }
    let mut bytes = vec![0; length];
    read_exact(stream, &mut bytes, deadline)?;
    Ok(bytes)
}

/// Fills a buffer by a deadline, however slowly bytes drip; without one, by the stream's own timeout.
fn read_exact(stream: &mut impl Transport, mut buffer: &mut [u8], deadline: Option<Instant>) -> io::Result<()> {
    let Some(deadline) = deadline else { return stream.read_exact(buffer) };
    while !buffer.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.wait_at_most(left)?;
        match stream.read(buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => buffer = &mut buffer[n..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// An IO error for people.
pub(super) fn plain(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "does not answer".into(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "closed the connection".into(),
        ErrorKind::ConnectionRefused => "refused the connection".into(),
        _ => error.to_string(),
    }
}
