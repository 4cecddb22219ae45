//! Many processes, one run: who they are, how they meet, what they exchange, and what happens when one is lost.
//!
//! `environment` reads a rank's place, `rendezvous` brings ranks together (after the `handshake`), `ring` sums and
//! gathers, `watchdog` notices losses, `launch` starts ranks on one machine. The training loop sees only [`Ranks`], and a
//! run on one device is a run of one rank.

mod environment;
pub mod handshake;
mod interrupt;
mod launch;
mod rendezvous;
mod ring;
mod secret;
mod watchdog;

use std::io;
use std::ops::Range;
use std::time::Duration;

pub use environment::Place;
pub use interrupt::{Announcement, Interrupt};
pub use launch::{end_with_launcher, launch};

use self::ring::Ring;
use self::watchdog::Watchdog;
use dpo_core::collective::{ProcessGroup, Shards};
use dpo_core::error::{Error, Result};
use dpo_core::progress;

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For all to come at the start.
    pub rendezvous: Duration,
    /// Without a heartbeat, after which a rank counts as lost.
    pub watchdog: Duration,
    /// Without progress on any rank, after which the run is stuck.
    pub progress: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        let seconds = Duration::from_secs;
        Timeouts { rendezvous: seconds(60), watchdog: seconds(8), progress: seconds(1800) }
    }
}

/// Does some work as one of the ranks that a launcher has started.
///
/// # Errors
/// Those of the work; ranks that do not come.
pub fn work(place: &Place, work: impl FnOnce(&mut Ranks) -> Result<()>) -> Result<()> {
    if place.launched {
        end_with_launcher();
    }
    let mut ranks = Ranks::join(place, Timeouts::default())?;
    let result = work(&mut ranks);
    ranks.end(result)
}

/// The ranks of a run, seen from one of them.
pub struct Ranks {
    rank: usize,
    processes: Vec<String>,
    wire: Option<Wire>,
    /// Until a thread of its own takes it.
    parts: Option<Parts>,
}

/// A ring between ranks, and what knows why it broke.
struct Wire {
    rank: usize,
    ring: Ring,
    watchdog: Watchdog,
}

/// Values of which every rank keeps a part, filled in from the others when they are needed. It has a ring of its own, so
/// that it does so beside whatever else ranks exchange; what it fills in, and in which order, is the same on all of them.
pub struct Parts(Wire);

impl Wire {
    fn round<T>(&mut self, work: impl FnOnce(&mut Ring) -> io::Result<T>) -> Result<T> {
        progress::enter_collective();
        let done = work(&mut self.ring);
        progress::advance();
        done.map_err(|e| {
            // Only a connection that broke has a rank to blame.
            let verdict = if e.kind() == io::ErrorKind::InvalidData { None } else { self.watchdog.verdict() };
            verdict
                .unwrap_or_else(|| Error::run(format!("the rank before rank {} {}", self.rank, handshake::plain(&e))))
        })
    }
}

impl Shards for Parts {
    fn own(&self, length: usize) -> Range<usize> {
        self.0.ring.own(length)
    }

    fn fill(&mut self, values: &mut [f32]) -> Result<()> {
        self.0.round(|ring| ring.fill(values))
    }
}

impl ProcessGroup for Ranks {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.processes.len()
    }

    fn all_reduce(&mut self, values: &mut [f32]) -> Result<()> {
        self.round(|ring| ring.sum(values)).map(|_| ())
    }

    fn all_gather(&mut self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        Ok(self.round(|ring| ring.gather(&own))?.unwrap_or_else(|| vec![own]))
    }

    fn broadcast(&mut self, mut bytes: Vec<u8>) -> Result<Vec<u8>> {
        self.round(|ring| ring.broadcast(&mut bytes))?;
        Ok(bytes)
    }

    fn name(&self, rank: usize) -> &str {
        self.processes.get(rank).map_or("", String::as_str)
    }

    fn shards(&mut self) -> Option<Box<dyn Shards>> {
        self.parts.take().map(|parts| Box::new(parts) as Box<dyn Shards>)
    }
}

impl Ranks {
    /// A run of one rank.
    pub fn alone() -> Ranks {
        Ranks { rank: 0, processes: vec![String::new()], wire: None, parts: None }
    }

    /// Meets the other ranks of a run.
    ///
    /// # Errors
    /// Ranks that do not come, or that are of another run.
    pub fn join(place: &Place, timeouts: Timeouts) -> Result<Ranks> {
        let met = rendezvous::meet(place, timeouts.rendezvous)?;
        let handles = met.rings.iter().map(Ring::handles).collect::<io::Result<Vec<_>>>();
        let handles = handles.map_err(|e| Error::run(e.to_string()))?.into_iter().flatten().collect();
        let watchdog = Watchdog::start(place.rank, &met.processes, met.control, handles, timeouts)?;
        let [wire, parts] = met.rings.map(|ring| Wire { rank: place.rank, ring, watchdog: watchdog.clone() });
        Ok(Ranks { rank: place.rank, processes: met.processes, wire: Some(wire), parts: Some(Parts(parts)) })
    }

    /// Ends the run on this rank: well, once all ranks are here, or by telling the others why not.
    pub fn end<T>(&mut self, result: Result<T>) -> Result<T> {
        let result = match result {
            Ok(value) => self.barrier().map(|()| value),
            failed => failed,
        };
        if let Some(Wire { watchdog, .. }) = &self.wire {
            match &result {
                Ok(_) => watchdog.finish(),
                Err(e) => watchdog.fail(&if self.is_first() { self.named(e) } else { e.to_string() }),
            }
        }
        result
    }

    fn named(&self, error: &Error) -> String {
        format!("rank {} ({}) failed: {error}", self.rank, self.processes[self.rank])
    }

    fn round<T>(&mut self, work: impl FnOnce(&mut Ring) -> io::Result<T>) -> Result<Option<T>> {
        self.wire.as_mut().map(|wire| wire.round(work)).transpose()
    }
}
