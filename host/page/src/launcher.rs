//! Runs that the page starts and stops: processes of their own, which go on without it.
//!
//! What may be started is for the command line to say, which knows the flags; here is how it is done. A process is started by
//! its arguments, and no shell reads them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};

use super::CONSOLE;
use dpo_core::error::{Error, IoContext, Result};

/// How long a check of rows and memory may take.
const CHECK: Duration = Duration::from_secs(300);
/// Bytes that are shown of what a check prints.
const SHOWN: u64 = 64 << 10;

/// A run that may be started.
pub struct Start {
    /// The folder that it writes.
    pub output: PathBuf,
    /// Command lines that say beforehand what would become of it.
    pub checks: Vec<Vec<String>>,
}

/// Reads the arguments of a run; refuses those that a page may not give.
pub type ReadStart = Box<dyn Fn(&[String]) -> Result<Start> + Send + Sync>;

/// Starts runs.
pub struct Launcher {
    program: PathBuf,
    /// Flags of all commands, which its processes have, too.
    common: Vec<String>,
    /// The folder that runs are written into.
    folder: PathBuf,
    form: Value,
    read: ReadStart,
    /// Processes that were started, by the folders that they write.
    started: Mutex<HashMap<PathBuf, Started>>,
    checking: Mutex<()>,
}

struct Started {
    child: Child,
    exit: Option<i32>,
}

impl Launcher {
    /// Of runs inside `folder`, as `program COMMON train ARGS`; `form` is what the page makes its form of.
    pub fn new(program: PathBuf, common: Vec<String>, folder: &Path, form: Value, read: ReadStart) -> Launcher {
        let (folder, started, checking) = (folder.to_owned(), Mutex::default(), Mutex::default());
        Launcher { program, common, folder, form, read, started, checking }
    }

    /// What the form is made of.
    pub(super) fn form(&self) -> &Value {
        &self.form
    }

    /// What the checks of a run print.
    pub(super) fn check(&self, args: &[String]) -> Result<Value> {
        let _alone = match self.checking.try_lock() {
            Ok(alone) => alone,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Error::input("another check goes on").help("wait for its end")),
        };
        let told = |check: &Vec<String>| {
            let args = self.with_common(check.iter());
            let (ok, output) = self.output(&args)?;
            Ok(json!({"command": quoted(&args), "ok": ok, "output": output}))
        };
        let checks = (self.read)(args)?.checks;
        Ok(json!({"checks": checks.iter().map(told).collect::<Result<Vec<_>>>()?}))
    }

    /// Starts a run; returns its folder.
    pub(super) fn start(&self, args: &[String]) -> Result<Value> {
        let folder = (self.read)(args)?.output;
        fs::create_dir_all(&folder).writing(&folder)?;
        let folder = folder.canonicalize().reading(&folder)?;
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if started.get_mut(&folder).is_some_and(|run| run.exit().is_none()) {
            return Err(Error::input("a run goes on in this folder")
                .at(folder.display())
                .help("wait for it or stop it, or name another folder"));
        }
        let args = self.with_common(std::iter::once(&"train".to_owned()).chain(args));
        let path = folder.join(CONSOLE);
        let mut console =
            File::options().append(true).create(true).custom_flags(libc::O_NOFOLLOW).open(&path).writing(&path)?;
        writeln!(console, "$ {}", quoted(&args)).writing(&path)?;
        let mut command = self.command(&args);
        command.stdout(console.try_clone().writing(&path)?).stderr(console);
        let child = command.spawn().map_err(|e| Error::run(format!("the run cannot be started: {e}")))?;
        started.insert(folder.clone(), Started { child, exit: None });
        Ok(json!({"folder": folder}))
    }

    /// The process that can be asked to end of a run that goes on: one of this launcher's, or who holds a folder inside of its
    /// own, as one does that was started before this server.
    pub(super) fn process(&self, folder: &Path, holder: impl FnOnce() -> Option<i32>) -> Option<Pid> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(run) = started.get_mut(folder)
            && run.exit().is_none()
        {
            return Some(Pid::from_child(&run.child));
        }
        // 1 is the system's first process, and what is below means many.
        if self.writes(folder) { Pid::from_raw(holder().filter(|pid| *pid > 1)?) } else { None }
    }

    /// Whether a run's folder is one that this launcher may write.
    pub(super) fn writes(&self, folder: &Path) -> bool {
        folder.canonicalize().is_ok_and(|folder| folder.parent() == Some(&self.folder))
    }

    /// Asks a run to save and end, as Ctrl-C does.
    pub(super) fn stop(&self, folder: &Path, holder: impl FnOnce() -> Option<i32>) -> Result<Value> {
        let Some(pid) = self.process(folder, holder) else {
            return Err(Error::input("no run goes on here that can be stopped").at(folder.display()));
        };
        kill_process(pid, Signal::INT).map_err(|e| Error::run(format!("the run cannot be stopped: {e}")))?;
        Ok(json!({}))
    }

    /// How the process ended that was started for a folder: not known of others', nor of one that goes on.
    pub(super) fn exit(&self, folder: &Path) -> Option<i32> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).get_mut(folder)?.exit()
    }

    /// What a command prints, and whether it came to a good end.
    fn output(&self, args: &[String]) -> Result<(bool, String)> {
        let failed = |e: io::Error| Error::run(format!("the check cannot be run: {e}"));
        let (mut reader, writer) = io::pipe().map_err(failed)?;
        let mut command = self.command(args);
        command.stdout(writer.try_clone().map_err(failed)?).stderr(writer);
        let mut child = command.spawn().map_err(failed)?;
        // Else the pipe would have no end.
        drop(command);
        let printed = thread::spawn(move || {
            let mut text = Vec::new();
            let _ = (&mut reader).take(SHOWN).read_to_end(&mut text);
            let _ = io::copy(&mut reader, &mut io::sink());
            String::from_utf8_lossy(&text).into_owned()
        });
        let start = Instant::now();
        let mut late = "";
        let status = loop {
            match child.try_wait().map_err(failed)? {
                Some(status) => break status,
                None if start.elapsed() < CHECK => thread::sleep(Duration::from_millis(20)),
                None => {
                    late = "\nIt took too long and was ended; run it on a command line.\n";
                    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
                    break child.wait().map_err(failed)?;
                }
            }
        };
        Ok((status.success(), printed.join().unwrap_or_default() + late))
    }

    fn with_common<'a>(&'a self, args: impl Iterator<Item = &'a String>) -> Vec<String> {
        self.common.iter().chain(args).cloned().collect()
    }

    /// A process of this program that no key of this one's terminal reaches, and that prints for a file.
    fn command(&self, args: &[String]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).stdin(Stdio::null()).process_group(0).env_remove("CLICOLOR_FORCE");
        command
    }
}

impl Started {
    /// How it ended, if it has.
    fn exit(&mut self) -> Option<i32> {
        if self.exit.is_none() {
            // One that a signal ended has no code.
            self.exit = self.child.try_wait().ok().flatten().map(|status| status.code().unwrap_or(-1));
        }
        self.exit
    }
}

/// A command line that a shell reads as these arguments. `start.js` does the same while it is typed.
fn quoted(args: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+#".contains(c);
    let quoted = |arg: &String| match arg.chars().all(plain) && !arg.is_empty() && !arg.starts_with('#') {
        true => arg.clone(),
        false => format!("'{}'", arg.replace('\'', r"'\''")),
    };
    std::iter::once("dpo-host".to_owned()).chain(args.iter().map(quoted)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_quoted_for_a_shell() {
        let args = ["train", "--dataset", "a b#7", "rows.jsonl#7", "it's", "", "$(x)", "#"].map(str::to_owned);
        assert_eq!(quoted(&args), r"dpo-host train --dataset 'a b#7' rows.jsonl#7 'it'\''s' '' '$(x)' '#'");
        let printed =
            Command::new("sh").args(["-c", &quoted(&args).replacen("dpo-host", "printf '%s\\n'", 1)]).output();
        let lines = String::from_utf8(printed.map(|p| p.stdout).unwrap_or_default()).unwrap_or_default();
        assert_eq!(lines.lines().collect::<Vec<_>>(), args);
    }
}
