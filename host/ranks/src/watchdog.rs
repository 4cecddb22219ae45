//! Notices that a rank has died or hangs, and ends the run on every rank with its name.
//!
//! A thread of every rank sends a heartbeat once in a while, on a control connection to rank 0: a rank that only
//! computes for long is heard all the same. What rank 0 finds out it tells to all others. They notice rank 0's end
//! themselves.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::handshake::{read_frame, write_frame};
use dpo_core::console;
use dpo_core::error::{Error, Result};

/// Largest message on a control connection, in bytes.
const LARGEST_MESSAGE: usize = 1 << 16;
/// How long a rank may take to end by itself once it knows; a kernel that waits for another GPU never does.
const GRACE: Duration = Duration::from_secs(1);

const BEAT: u8 = 0;
const BYE: u8 = 1;
/// A rank died or hangs; followed by a text, as is the next one.
const LOST: u8 = 2;
/// A rank met an error.
const FAILED: u8 = 3;

/// What ended the run.
#[derive(Clone)]
struct Verdict {
    kind: u8,
    text: String,
}

impl Verdict {
    fn message(&self) -> Vec<u8> {
        [&[self.kind], self.text.as_bytes()].concat()
    }

    fn error(&self) -> Error {
        match self.kind {
            LOST => Error::run(&self.text).help(
                "look at what that rank printed; the run goes on from its last checkpoint with --resume-from-checkpoint latest",
            ),
            _ => Error::run(&self.text),
        }
    }
}

#[derive(Clone)]
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    limit: Duration,
}

struct Shared {
    rank: usize,
    verdict: Mutex<Option<Verdict>>,
    told: Condvar,
    /// Whether the run is at its end, so that nobody is missed any more.
    over: AtomicBool,
    control: Mutex<Vec<TcpStream>>,
    rings: Vec<TcpStream>,
}

impl Watchdog {
    /// Begins to watch. `control` leads to every other rank at rank 0, to rank 0 elsewhere; a rank that is silent for `limit`
    /// hangs.
    pub(super) fn start(
        rank: usize,
        processes: &[String],
        control: Vec<(usize, TcpStream)>,
        rings: Vec<TcpStream>,
        limit: Duration,
    ) -> Result<Watchdog> {
        let failed = |e: io::Error| Error::run(format!("the watchdog cannot start: {e}"));
        let writers = control.iter().map(|(_, s)| s.try_clone()).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        let shared = Arc::new(Shared {
            rank,
            verdict: Mutex::new(None),
            told: Condvar::new(),
            over: AtomicBool::new(false),
            control: Mutex::new(writers),
            rings,
        });
        for (other, stream) in control {
            stream.set_read_timeout(Some(limit)).map_err(failed)?;
            stream.set_write_timeout(Some(limit)).map_err(failed)?;
            let (shared, name) = (shared.clone(), format!("rank {other} ({})", processes[other]));
            let listen = move || shared.listen(stream, &name, limit);
            thread::Builder::new().name(format!("watch {other}")).spawn(listen).map_err(failed)?;
        }
        let beating = shared.clone();
        let pause = (limit / 4).min(Duration::from_secs(1));
        let beat = move || {
            while !beating.over.load(Ordering::Relaxed) {
                beating.send(&[BEAT]);
                thread::sleep(pause);
            }
        };
        thread::Builder::new().name("heartbeat".into()).spawn(beat).map_err(failed)?;
        Ok(Watchdog { shared, limit })
    }

    /// Why a round of the ring broke: what the watchdog says, which may take it a moment to find out.
    pub(super) fn verdict(&self) -> Option<Error> {
        let verdict = self.shared.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = self.limit + 2 * GRACE;
        let found = self.shared.told.wait_timeout_while(verdict, wait, |v| v.is_none());
        found.unwrap_or_else(PoisonError::into_inner).0.as_ref().map(Verdict::error)
    }

    /// Tells the others that this rank has failed.
    pub(super) fn fail(&self, text: &str) {
        if self.shared.verdict.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            // It failed because of what all have been told.
            return;
        }
        self.shared.over.store(true, Ordering::Relaxed);
        let text = text.chars().take(LARGEST_MESSAGE / 8).collect();
        self.shared.send(&Verdict { kind: FAILED, text }.message());
    }

    /// The run is over on all ranks.
    pub(super) fn finish(&self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.shared.send(&[BYE]);
    }
}

impl Shared {
    fn send(&self, message: &[u8]) {
        for stream in self.control.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            // A rank that does not take it is noticed by who listens to it.
            let _ = write_frame(stream, message);
        }
    }

    fn listen(&self, mut stream: TcpStream, name: &str, limit: Duration) {
        let lost = |text: String| Verdict { kind: LOST, text };
        let verdict = loop {
            match read_frame(&mut stream, LARGEST_MESSAGE, None) {
                Ok(message) => match message.split_first() {
                    Some((&BYE, _)) => return,
                    Some((kind @ &(LOST | FAILED), text)) => {
                        let text = String::from_utf8_lossy(text);
                        // Rank 0 passes on what it was told, with the name of who said it.
                        let text = if self.rank == 0 { format!("{name} failed: {text}") } else { text.into_owned() };
                        break Verdict { kind: *kind, text };
                    }
                    _ => {}
                },
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    let seconds = limit.as_secs_f64();
                    break lost(format!("{name} has been silent for {seconds} s: it hangs, or its host does"));
                }
                Err(_) => break lost(format!("{name} died")),
            }
        };
        if !self.over.load(Ordering::Relaxed) {
            self.end(&verdict);
        }
    }

    /// Ends the run on this rank, and at rank 0 on all others.
    fn end(&self, verdict: &Verdict) {
        let mut first = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_some() {
            return;
        }
        if self.rank == 0 {
            self.send(&verdict.message());
        }
        // Once it is known here, this rank may be gone at any moment.
        *first = Some(verdict.clone());
        drop(first);
        for stream in &self.rings {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.told.notify_all();
        thread::sleep(GRACE);
        console::error(&verdict.error());
        std::process::exit(1);
    }
}
