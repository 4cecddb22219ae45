//! SIGINT and SIGTERM: the first asks the run to save and end at the next step, the second ends it at once.
//!
//! Ranks that our launcher has started are asked by it alone, and ended by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::{Handle, Signals};

use crate::Place;
use dpo_core::collective::ProcessGroup;
use dpo_core::error::{Error, Result};

const SIGNALS: [(i32, &str); 2] = [(SIGINT, "SIGINT"), (SIGTERM, "SIGTERM")];

/// Which of the signals have come.
pub struct Interrupt(Vec<(Arc<AtomicBool>, &'static str)>);

/// A thread that says at once that a signal has come, while the step that it waits for goes on; it ends with this.
pub struct Announcement(Handle);

impl Announcement {
    /// `tell` is called once, at the first signal.
    pub fn new(tell: impl FnOnce() + Send + 'static) -> Result<Announcement> {
        let failed = |e: std::io::Error| Error::run(format!("cannot listen for signals: {e}"));
        let mut signals = Signals::new(SIGNALS.map(|(signal, _)| signal)).map_err(failed)?;
        let handle = signals.handle();
        let wait = move || {
            if signals.forever().next().is_some() {
                tell();
            }
        };
        thread::Builder::new().name("signals".into()).spawn(wait).map_err(failed)?;
        Ok(Announcement(handle))
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Interrupt {
    /// Listens from here on.
    pub fn listen() -> Result<Interrupt> {
        let launched = Place::from_environment()?.is_some_and(|p| p.launched);
        let failed = |e: std::io::Error| Error::run(format!("cannot listen for signals: {e}"));
        let any = Arc::new(AtomicBool::new(false));
        let mut seen = Vec::new();
        for (signal, name) in SIGNALS {
            let own = Arc::new(AtomicBool::new(false));
            // In the order in which they are called: ending at once is for a signal that finds an earlier one.
            if !launched {
                flag::register_conditional_shutdown(signal, 1, any.clone()).map_err(failed)?;
            }
            flag::register(signal, any.clone()).map_err(failed)?;
            flag::register(signal, own.clone()).map_err(failed)?;
            seen.push((own, name));
        }
        Ok(Interrupt(seen))
    }

    /// The name of the signal that came.
    pub fn signal(&self) -> Option<&'static str> {
        self.0.iter().find(|(seen, _)| seen.load(Ordering::Relaxed)).map(|(_, name)| *name)
    }

    /// The name of a signal that came to any rank, the same on all of them.
    pub fn on_any(&self, group: &mut dyn ProcessGroup) -> Result<Option<&'static str>> {
        let own = self.0.iter().position(|(seen, _)| seen.load(Ordering::Relaxed));
        let any = group.all_reduce_max(own.map_or(0, |at| at as u64 + 1))?;
        Ok(any.checked_sub(1).and_then(|at| self.0.get(at as usize)).map(|(_, name)| *name))
    }
}
