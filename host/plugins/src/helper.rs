//! A plugin's code in a process of its own, with limits of time and memory: one that hangs, exits, aborts or asks for too much
//! costs an error.

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use dpo_core::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// The first argument of a process that calls a library: behind it stand the library, the function and the item.
pub const COMMAND: &str = "plugin-call";
/// Put before the answer, to tell it from what the library prints.
pub(super) const MARK: &str = "answer: ";

/// How long a call may take.
pub(super) const TIME: Duration = Duration::from_secs(5);
/// Longest answer: the graph of a model of a thousand layers has some MiB.
const ANSWER: u64 = 64 << 20;

/// What a process answers.
#[derive(Serialize, Deserialize)]
pub(super) enum Answer {
    Value(String),
    Error { message: String, help: Option<String> },
}

/// Calls a JSON function of an item of a library in a process of its own.
pub(super) fn call(helper: &Path, library: &Path, what: &str, item: usize, input: &str) -> Result<String> {
    let failed = |e: io::Error| Error::run(format!("no process could be started to call it: {e}"));
    let mut command = Command::new(helper);
    command.arg(COMMAND).arg(library).arg(what).arg(item.to_string());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let (sender, receiver) = mpsc::channel();
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let input = input.to_owned();
    thread::spawn(move || {
        // A process that does not read its input has ended, or says so by not answering.
        let _ = stdin.map(|mut pipe| pipe.write_all(input.as_bytes()));
    });
    let said = thread::spawn(move || text_of(stderr));
    thread::spawn(move || {
        let _ = sender.send(text_of(stdout));
    });
    let answered = receiver.recv_timeout(TIME);
    let status = end(&mut child);
    let Ok(text) = answered else {
        return Err(Error::input(format!("its {what} does not come to an end within {} s", TIME.as_secs())));
    };
    match text.lines().rev().find_map(|l| serde_json::from_str(l.strip_prefix(MARK)?).ok()) {
        Some(Answer::Value(value)) => Ok(value),
        Some(Answer::Error { message, help }) => {
            let error = Error::input(message);
            Err(match help {
                Some(help) => error.help(help),
                None => error,
            })
        }
        None => {
            let said = said.join().unwrap_or_default();
            let last = said
                .lines()
                .rfind(|l| !l.trim().is_empty() && !l.starts_with("note:"))
                .map(|l| format!(": {}", l.trim()));
            let how = status.map_or_else(|| "it was ended".to_owned(), |s| s.to_string());
            Err(Error::input(format!(
                "its {what} ends the process that asks for it ({how}){}",
                last.unwrap_or_default()
            )))
        }
    }
}

/// What a pipe gives until it closes, up to a limit; the rest is not read.
fn text_of(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    let _ = pipe.map(|pipe| pipe.take(ANSWER).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Ends a process, which has a moment to end by itself; how it did, where that is known.
fn end(child: &mut Child) -> Option<ExitStatus> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(200) {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(1));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}
