//! Runs a program of strangers, such as a chat template, on a thread with a large stack, and gives up on it where it does
//! not come to an end.

use std::cell::Cell;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use dpo_core::error::{Error, Result};
use dpo_plugin_api::abi::guard;

/// Stack in bytes, of which what is not used costs nothing. A list in a list in a list is walked by recursion, at up to 400
/// bytes a level, and an expression is compiled by recursion, at up to 850 bytes a letter.
const STACK: usize = 1 << 27;
/// Time is counted in ticks, since a process that is stopped for a while then loses one of them.
const TICK: Duration = Duration::from_millis(100);

type Job = Box<dyn FnOnce() + Send>;

thread_local! {
    /// Each thread has one that works for it, and goes when it goes.
    static WORKER: Cell<Option<Sender<Job>>> = const { Cell::new(None) };
}

/// What `work` answers. A panic in it is an input error. `what` is worked on, for messages.
///
/// # Errors
/// A run error if it takes longer than `limit`. The thread that it runs on is then left behind, so the process should end.
pub(super) fn bounded<T: Send + 'static>(
    what: &str,
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let job: Job = Box::new(move || {
        // Nobody listens any more where this took too long.
        let _ = sender.send(guard(|| Ok(work())));
    });
    let worker = WORKER.take().map_or_else(begin, Ok)?;
    worker.send(job).map_err(|e| Error::run(e.to_string()))?;
    for _ in 0..limit.div_duration_f64(TICK).ceil() as usize {
        match receiver.recv_timeout(TICK) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(e) => return Err(Error::run(e.to_string())),
            Ok(answer) => {
                WORKER.set(Some(worker));
                return answer.map_err(|e| Error::input(format!("{what} cannot be used: {}", e.message)));
            }
        }
    }
    Err(Error::run(format!("{what} does not come to an end within {} seconds", limit.as_secs())))
}

fn begin() -> Result<Sender<Job>> {
    let (sender, jobs) = mpsc::channel::<Job>();
    let work = move || jobs.into_iter().for_each(|job| job());
    let thread = thread::Builder::new().name("chat template".into()).stack_size(STACK).spawn(work);
    thread.map_err(|e| Error::run(format!("no thread can be had: {e}")))?;
    Ok(sender)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    #[test]
    fn what_does_not_end_is_left_and_the_next_work_is_done() {
        let error = bounded("it", TICK * 2, || thread::sleep(Duration::from_secs(3))).unwrap_err();
        assert!(error.message().starts_with("it does not come to an end"), "{error}");
        assert_eq!(bounded("it", TICK * 20, || 1).unwrap(), 1);
    }

    #[test]
    fn a_panic_is_an_error_and_the_thread_goes_on() {
        let id = || bounded("it", TICK * 20, || thread::current().id()).unwrap();
        let before = id();
        let error = bounded("it", TICK * 20, || [0][std::hint::black_box(1)]).unwrap_err();
        assert!(error.message().starts_with("it cannot be used: it panicked at"), "{error}");
        assert_eq!(id(), before);
    }
}
