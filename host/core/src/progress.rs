//! Whether this process moves, for the watchdog of a run on many ranks: a process that waits for a kernel or a peer that never
//! returns is alive, but counts no further. What may take long counts: ops, tensors that are loaded, rows, bytes that arrive.

use std::sync::atomic::{AtomicU64, Ordering};

static ADVANCES: AtomicU64 = AtomicU64::new(0);
static COLLECTIVES: AtomicU64 = AtomicU64::new(0);

/// How far a process has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Pieces of work.
    pub advances: u64,
    /// Collectives that it has entered, which is the same number on all ranks once each waits for the others.
    pub collectives: u64,
}

/// A piece of work is done.
pub fn advance() {
    ADVANCES.fetch_add(1, Ordering::Relaxed);
}

/// This rank now waits for the others.
pub fn enter_collective() {
    COLLECTIVES.fetch_add(1, Ordering::Relaxed);
}

/// How far this process has come.
pub fn now() -> Progress {
    Progress { advances: ADVANCES.load(Ordering::Relaxed), collectives: COLLECTIVES.load(Ordering::Relaxed) }
}
