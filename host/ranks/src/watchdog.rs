//! Notices that a rank has died or hangs, and ends the run on every rank with its name.
//!
//! A thread of every rank sends a heartbeat once in a while, on a control connection to rank 0: a rank that only
//! computes for long is heard all the same. It tells how far the rank has come, so that rank 0 notices a run in which all live
//! and none moves. What rank 0 finds out it tells to all others. They notice rank 0's end themselves.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::Timeouts;
use super::handshake::{read_frame, write_frame};
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::progress::{self, Progress};

/// Largest message on a control connection, in bytes.
const LARGEST_MESSAGE: usize = 1 << 16;
/// How long a rank may take to end by itself once it knows; a kernel that waits for another GPU never does.
const GRACE: Duration = Duration::from_secs(1);

/// Followed by two numbers: how far the rank has come.
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
    /// `host:pid` of every rank.
    processes: Vec<String>,
    /// How far every rank has come, as rank 0 knows.
    progress: Mutex<Vec<Progress>>,
    verdict: Mutex<Option<Verdict>>,
    told: Condvar,
    /// Whether the run is at its end, so that nobody is missed any more.
    over: AtomicBool,
    control: Mutex<Vec<TcpStream>>,
    rings: Vec<TcpStream>,
}

impl Watchdog {
    /// Begins to watch. `control` leads to every other rank at rank 0, to rank 0 elsewhere; a rank that is silent for too long
    /// hangs, and the run is stuck when none has come any further for as long as that may take.
    pub(super) fn start(
        rank: usize,
        processes: &[String],
        control: Vec<(usize, TcpStream)>,
        rings: Vec<TcpStream>,
        timeouts: Timeouts,
    ) -> Result<Watchdog> {
        let limit = timeouts.watchdog;
        let failed = |e: io::Error| Error::run(format!("the watchdog cannot start: {e}"));
        let writers = control.iter().map(|(_, s)| s.try_clone()).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        let shared = Arc::new(Shared {
            rank,
            processes: processes.to_vec(),
            progress: Mutex::new(vec![Progress::default(); processes.len()]),
            verdict: Mutex::new(None),
            told: Condvar::new(),
            over: AtomicBool::new(false),
            control: Mutex::new(writers),
            rings,
        });
        for (other, stream) in control {
            stream.set_read_timeout(Some(limit)).map_err(failed)?;
            stream.set_write_timeout(Some(limit)).map_err(failed)?;
            let shared = shared.clone();
            let listen = move || shared.listen(stream, other, limit);
            thread::Builder::new().name(format!("watch {other}")).spawn(listen).map_err(failed)?;
        }
        let beating = shared.clone();
        let pause = (limit / 4).min(timeouts.progress / 4).min(Duration::from_secs(1));
        let beat = move || {
            // In pauses that this process was there for, so that one that was stopped, and the others with it, is not stuck.
            let (mut before, mut still) = (Vec::new(), Duration::ZERO);
            while !beating.over.load(Ordering::Relaxed) {
                let now = progress::now();
                beating.send(&[&[BEAT][..], &now.advances.to_le_bytes(), &now.collectives.to_le_bytes()].concat());
                let all = beating.note(rank, now);
                still = if all == before { still + pause } else { Duration::ZERO };
                before = all;
                if rank == 0 && still > timeouts.progress && !beating.over.load(Ordering::Relaxed) {
                    beating.end(&beating.stuck(&before, timeouts.progress));
                }
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

    /// Notes how far a rank has come; answers how far all have.
    fn note(&self, rank: usize, progress: Progress) -> Vec<Progress> {
        let mut all = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        all[rank] = progress;
        all.clone()
    }

    fn name(&self, rank: usize) -> String {
        format!("rank {rank} ({})", self.processes[rank])
    }

    /// Who keeps a run in which nobody moves: ranks that did not enter the collective in which the others wait for them.
    fn stuck(&self, all: &[Progress], limit: Duration) -> Verdict {
        let furthest = all.iter().map(|p| p.collectives).max().unwrap_or(0);
        let late: Vec<String> =
            (0..all.len()).filter(|rank| all[*rank].collectives < furthest).map(|rank| self.name(rank)).collect();
        let seconds = limit.as_secs_f64();
        let text = match late.as_slice() {
            [] => format!(
                "no rank has made progress for {seconds} s, all in the same collective: a connection or a GPU hangs"
            ),
            [one] => format!("{one} is stuck: it has made no progress for {seconds} s, and the others wait for it"),
            some => format!("{} are stuck: no progress for {seconds} s, and the others wait for them", some.join(", ")),
        };
        Verdict { kind: LOST, text }
    }

    fn listen(&self, mut stream: TcpStream, other: usize, limit: Duration) {
        let name = self.name(other);
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
                    Some((&BEAT, numbers)) => {
                        if let ([advances, collectives], []) = numbers.as_chunks() {
                            let [advances, collectives] = [advances, collectives].map(|n| u64::from_le_bytes(*n));
                            self.note(other, Progress { advances, collectives });
                        }
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
