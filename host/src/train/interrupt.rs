//! SIGINT and SIGTERM: the first asks the run to save and end at the next step, the second ends it at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};

const SIGNALS: [(i32, &str); 2] = [(SIGINT, "SIGINT"), (SIGTERM, "SIGTERM")];

/// Which of the signals have come.
pub(super) struct Interrupt(Vec<(Arc<AtomicBool>, &'static str)>);

impl Interrupt {
    /// Listens from here on.
    pub(super) fn listen() -> Result<Interrupt> {
        let failed = |e: std::io::Error| Error::run(format!("cannot listen for signals: {e}"));
        let any = Arc::new(AtomicBool::new(false));
        let mut seen = Vec::new();
        for (signal, name) in SIGNALS {
            let own = Arc::new(AtomicBool::new(false));
            // In the order in which they are called: ending at once is for a signal that finds an earlier one.
            flag::register_conditional_shutdown(signal, 1, any.clone()).map_err(failed)?;
            flag::register(signal, any.clone()).map_err(failed)?;
            flag::register(signal, own.clone()).map_err(failed)?;
            seen.push((own, name));
        }
        Ok(Interrupt(seen))
    }

    /// The name of the signal that came.
    pub(super) fn signal(&self) -> Option<&'static str> {
        self.0.iter().find(|(seen, _)| seen.load(Ordering::Relaxed)).map(|(_, name)| *name)
    }
}
