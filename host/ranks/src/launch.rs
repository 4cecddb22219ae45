//! `--gpus N` without another launcher: this process starts N copies of itself and looks after them.
//!
//! Each rank's standard input is a pipe from here: when it closes, because a rank was lost or because this
//! process is gone for whatever reason, the rank ends. A byte on it asks the rank to save and end, as a signal to this
//! process does.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::environment::{ATTEMPT, LAUNCHED};
use super::handshake;
use super::secret::SECRET;
use crate::interrupt::Interrupt;
use dpo_core::console;
use dpo_core::error::{Error, Kind, Result};

/// How long ranks may take to report an error before their pipes close.
const ERROR_GRACE: Duration = Duration::from_millis(1100);
/// How long a rank may take to end when its pipe closes, before it is killed; one that is stopped never does.
const KILL_GRACE: Duration = Duration::from_millis(300);

/// Variables of other launchers that a rank of ours must not see.
const FOREIGN: &[&str] = &["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"];

/// Runs this command line with some `more` arguments as `size` ranks; when one is lost, starts all again up to `restarts`
/// times.
///
/// # Errors
/// The rank that was lost, and how it ended.
pub fn launch(size: usize, more: &[OsString], restarts: usize) -> Result<()> {
    // A rank that launched ranks would do so without end.
    if std::env::var_os(LAUNCHED).is_some() {
        return Err(Error::run(format!("a process with {LAUNCHED} in its environment is a rank and starts none")));
    }
    let interrupt = Interrupt::listen()?;
    let mut attempt = 0;
    loop {
        let Err(error) = Group::start(size, more, attempt)?.wait(&interrupt) else { return Ok(()) };
        if let Some(signal) = interrupt.signal() {
            return Err(Error::run(format!("ended by {signal}")).help(
                "what rank 0 says above goes on from there; else --resume-from-checkpoint latest with --output-dir",
            ));
        }
        // Input that is wrong does not mend itself.
        if attempt == restarts || error.kind == Kind::Input {
            return Err(error);
        }
        attempt += 1;
        console::warning(error.message());
        console::note(format!("restart {attempt} of {restarts}, from the last checkpoint if there is one"));
    }
}

/// In a rank: ends the process when its launcher is gone or wants it to end.
pub fn end_with_launcher() {
    let watch = || {
        let mut byte = [0];
        while matches!(io::stdin().read(&mut byte), Ok(1)) {
            let _ = signal_hook::low_level::raise(signal_hook::consts::SIGTERM);
        }
        std::process::exit(1);
    };
    // Without the thread the rank only ends later: when it misses the others.
    let _ = thread::Builder::new().name("launcher pipe".into()).spawn(watch);
}

/// The ranks of an attempt.
struct Group {
    ranks: Vec<Child>,
    /// Ended ones, in the order in which they were found.
    ended: Vec<(usize, ExitStatus)>,
    stderr_readers: Vec<JoinHandle<()>>,
}

impl Group {
    fn start(size: usize, more: &[OsString], attempt: usize) -> Result<Group> {
        let failed = |e: io::Error| Error::run(format!("cannot start ranks: {e}"));
        let secret: String = handshake::random().map_err(failed)?.iter().map(|b| format!("{b:02x}")).collect();
        // The port is free again when rank 0 takes it.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(failed)?.port();
        let threads = rayon::current_num_threads();
        let printed = Arc::default();
        let mut group = Group { ranks: Vec::new(), ended: Vec::new(), stderr_readers: Vec::new() };
        for rank in 0..size {
            let mut command = Command::new(std::env::current_exe().map_err(failed)?);
            command.args(std::env::args_os().skip(1)).args(more);
            let numbers = [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", size)];
            command.envs(numbers.map(|(name, value)| (name, value.to_string())));
            command.env(LAUNCHED, "1").env(ATTEMPT, attempt.to_string()).env(SECRET, &secret);
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            FOREIGN.iter().for_each(|name| {
                command.env_remove(name);
            });
            command.env("RAYON_NUM_THREADS", (threads / size).max(1).to_string());
            command.stdin(Stdio::piped());
            // The terminal's Ctrl-C comes to this process, which passes it on.
            command.process_group(0);
            if rank > 0 {
                command.stdout(Stdio::null()).stderr(Stdio::piped());
            }
            let mut child = command.spawn().map_err(failed)?;
            if let Some(stderr) = child.stderr.take() {
                let printed = Arc::clone(&printed);
                group
                    .stderr_readers
                    .push(thread::spawn(move || forward_stderr(rank, BufReader::new(stderr), &printed)));
            }
            group.ranks.push(child);
        }
        Ok(group)
    }

    /// Waits for all to end; when one is lost, ends the others.
    fn wait(mut self, interrupt: &Interrupt) -> Result<()> {
        let forever = Duration::MAX;
        let over = |g: &Group| g.ended.len() == g.ranks.len() || g.lost().is_some();
        self.until(forever, |g| over(g) || interrupt.signal().is_some());
        if interrupt.signal().is_some() {
            for child in &mut self.ranks {
                // One that is gone needs no asking.
                let _ = child.stdin.as_mut().map(|pipe| pipe.write_all(&[1]));
            }
        }
        if self.until(forever, over) && self.lost().is_none() {
            return Ok(());
        }
        self.until(ERROR_GRACE, |g| g.ended.len() == g.ranks.len());
        self.end();
        let Some((rank, status)) = self.lost() else { return Ok(()) };
        let what = format!("rank {rank} ended with {status}");
        Err(match status.code() {
            Some(2) => Error::input(what).help("it says why above"),
            _ => Error::run(what)
                .help("the run goes on with --resume-from-checkpoint latest, or by itself with --max-restarts"),
        })
    }

    /// The rank that was lost: the first one found, but one that was killed or has wrong input rather than one that gave up.
    fn lost(&self) -> Option<(usize, ExitStatus)> {
        let failed = self.ended.iter().filter(|(_, status)| !status.success());
        let blame = |status: &ExitStatus| match status.code() {
            None => 0,
            Some(2) => 1,
            Some(_) => 2,
        };
        failed.min_by_key(|(_, status)| blame(status)).copied()
    }

    /// Waits until something holds, or for a time; says whether it holds.
    fn until(&mut self, time: Duration, holds: impl Fn(&Group) -> bool) -> bool {
        let start = Instant::now();
        loop {
            for (rank, child) in self.ranks.iter_mut().enumerate() {
                if let Ok(Some(status)) = child.try_wait()
                    && !self.ended.iter().any(|(r, _)| *r == rank)
                {
                    self.ended.push((rank, status));
                }
            }
            if holds(self) || start.elapsed() > time {
                return holds(self);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends all that still run.
    fn end(&mut self) {
        // Those that have to be killed are not the ones that were lost.
        let found = self.ended.len();
        self.ranks.iter_mut().for_each(|child| drop(child.stdin.take()));
        if !self.until(KILL_GRACE, |g| g.ended.len() == g.ranks.len()) {
            for child in &mut self.ranks {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        self.ended.truncate(found);
        self.stderr_readers.drain(..).for_each(|reader| drop(reader.join()));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.end();
    }
}

/// Passes on what a rank prints and no rank before it has `printed`: what happens to all is read once.
fn forward_stderr(rank: usize, mut lines: impl BufRead, printed: &Mutex<HashSet<Vec<u8>>>) {
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let line = std::mem::take(&mut line);
        let text = format!("rank {rank}: {}", String::from_utf8_lossy(&line).trim_end());
        if printed.lock().unwrap_or_else(PoisonError::into_inner).insert(line) {
            eprintln!("{text}");
        }
    }
}
