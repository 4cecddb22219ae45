//! Folders of runs: which there are, and what has changed in them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::chart::CHARTS;
use super::{ARGS, CONSOLE, FACTS, LOG, Launcher, excerpt};
use dpo_core::error::{Error, Result};
use dpo_core::files;

/// The file whose lock a run holds for as long as its process lives, and in which it says `process N on HOST`.
const LOCK: &str = ".lock";
/// What a run leaves that came to its end.
const ADAPTER: &str = "adapter_model.safetensors";
/// The file that names the newest checkpoint, and what stands in it before the step.
const LATEST: &str = "latest";
const CHECKPOINT: &str = "checkpoint-";
/// Folders deep that runs are looked for, and runs that are shown.
const DEPTH: usize = 2;
const RUNS: usize = 100;

/// Runs that are looked at.
pub struct Runs {
    roots: Vec<PathBuf>,
    /// In the order in which they were found, so that a place in the list names a run for good.
    found: Mutex<Vec<PathBuf>>,
    /// Runs whose process has ended, with the time at which it had claimed its folder.
    ended: Mutex<HashMap<PathBuf, SystemTime>>,
}

impl Runs {
    /// A run that begins, of which there may be no file yet.
    pub fn one(output: &Path) -> Runs {
        Runs { roots: Vec::new(), found: Mutex::new(vec![output.to_owned()]), ended: Mutex::default() }
    }

    /// Runs in these folders and below them, and in one that may have none; those that begin later come to them.
    ///
    /// # Errors
    /// A folder without a run.
    pub fn below(roots: &[PathBuf], empty: Option<&Path>) -> Result<Runs> {
        for root in roots.iter().filter(|root| Some(root.as_path()) != empty) {
            let mut found = Vec::new();
            find(root, DEPTH, &mut found);
            if found.is_empty() {
                let what = if root.is_dir() { "holds no run" } else { "is not a folder" };
                return Err(Error::input(what)
                    .at(root.display())
                    .help("name the output folder of a `dpo-host train`, or a folder above some"));
            }
        }
        // `.` has no name.
        let roots = roots.iter().map(PathBuf::as_path).chain(empty);
        let roots = roots.map(|root| root.canonicalize().unwrap_or_else(|_| root.to_owned())).collect();
        let runs = Runs { roots, found: Mutex::default(), ended: Mutex::default() };
        runs.folders();
        Ok(runs)
    }

    /// The folders of all runs that there are now.
    pub fn folders(&self) -> Vec<PathBuf> {
        let mut now = Vec::new();
        self.roots.iter().for_each(|root| find(root, DEPTH, &mut now));
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        for folder in now {
            if found.len() < RUNS && !found.contains(&folder) {
                found.push(folder);
            }
        }
        found.clone()
    }

    /// What the page begins with: the charts, and of every run its name and which of its files have changed; whether it may be
    /// stopped, and how it ended, where there is a launcher.
    pub(super) fn list(&self, launcher: Option<&Launcher>) -> Value {
        let folders = self.folders();
        let runs = folders.iter().enumerate().map(|(id, folder)| {
            let changed = |name: &str| {
                let meta = excerpt::metadata(folder, name)?;
                let time = meta.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
                Some((name.to_owned(), json!(format!("{}-{}", meta.len(), time.as_nanos()))))
            };
            let spoke = [LOG, FACTS].iter().find_map(|name| excerpt::metadata(folder, name)?.modified().ok());
            let done = folder.join(ADAPTER).is_file();
            let exit = launcher.and_then(|launcher| launcher.exit(folder));
            // One that has been started and did not claim its folder yet goes on, whatever was there before.
            let begins = launcher.is_some_and(|launcher| launcher.process(folder, || None).is_some());
            // One that had ended here may go on from elsewhere.
            let left = exit.is_some() && self.holder(folder).is_none();
            let ended = !done && !begins && (left || self.has_ended(folder));
            json!({
                "id": id,
                "name": short(folder, &folders),
                "folder": folder.display().to_string(),
                "silent_s": spoke.and_then(|t| t.elapsed().ok()).map(|t| t.as_secs_f64()),
                "done": done,
                "ended": ended,
                "exit": exit,
                "resumable": ended && launcher.is_some_and(|launcher| launcher.writes(folder)),
                "stoppable": launcher.is_some_and(|launcher| launcher.process(folder, || self.holder(folder)).is_some()),
                "saved_step": saved_step(folder),
                "left_out": excerpt::left_out(folder),
                "files": excerpt::names().filter_map(changed).collect::<Map<String, Value>>(),
            })
        });
        json!({"charts": CHARTS, "starts": launcher.is_some(), "runs": runs.collect::<Vec<_>>()})
    }

    /// Whether the process of a run is gone; not known of one on another machine. After a claim of the folder, its lock is
    /// found free only once, so as not to be in the way of a run that is started again.
    fn has_ended(&self, folder: &Path) -> bool {
        let Ok((file, claimed, process)) = lock_of(folder) else { return false };
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.get(folder) == Some(&claimed) {
            return true;
        }
        // The lock goes again with the file.
        let free = process.is_some() && file.try_lock_shared().is_ok();
        if free {
            ended.insert(folder.to_owned(), claimed);
        }
        free
    }

    /// The process of this machine that holds a run's folder.
    pub(super) fn holder(&self, folder: &Path) -> Option<i32> {
        let done = folder.join(ADAPTER).is_file();
        lock_of(folder).ok().and_then(|(.., process)| process).filter(|_| !done && !self.has_ended(folder))
    }

    /// The folder of a run.
    pub(super) fn folder(&self, id: usize) -> Option<PathBuf> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// A file of a run, where both are known.
    pub(super) fn file(&self, id: usize, name: &str) -> Option<String> {
        let folder = self.folder(id)?;
        excerpt::names().any(|known| known == name).then(|| excerpt::read(&folder, name))
    }
}

/// The file of a folder's lock, when it was claimed, and by which process, if one of this machine.
fn lock_of(folder: &Path) -> io::Result<(File, SystemTime, Option<i32>)> {
    let file = files::open_regular(&folder.join(LOCK))?;
    let (claimed, mut holder) = (file.metadata()?.modified()?, String::new());
    (&file).take(1000).read_to_string(&mut holder)?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let told = holder.trim_end().strip_prefix("process ").and_then(|rest| rest.split_once(" on "));
    let here = told.filter(|(_, name)| !host.is_empty() && *name == host.trim());
    Ok((file, claimed, here.and_then(|(process, _)| process.parse().ok())))
}

/// The step of a run's newest checkpoint.
fn saved_step(folder: &Path) -> Option<u64> {
    let mut text = String::new();
    files::open_regular(&folder.join(LATEST)).ok()?.take(1000).read_to_string(&mut text).ok()?;
    text.trim().strip_prefix(CHECKPOINT)?.parse().ok()
}

/// Folders of runs in a folder. A run is not looked into: its checkpoints are no runs.
fn find(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if [ARGS, LOG, CONSOLE].iter().any(|name| excerpt::metadata(folder, name).is_some()) {
        found.push(folder.to_owned());
    } else if depth > 0 {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut inner: Vec<PathBuf> = entries.map(|e| e.path()).filter(|p| p.is_dir()).collect();
        inner.sort();
        inner.iter().for_each(|p| find(p, depth - 1, found));
    }
}

/// A folder's last name, with as many of those before it as set it apart from the others.
fn short(folder: &Path, all: &[PathBuf]) -> String {
    let end = |path: &Path, names: usize| -> PathBuf {
        let parts: Vec<_> = path.components().collect();
        parts[parts.len().saturating_sub(names)..].iter().collect()
    };
    let alone = |names: &usize| !all.iter().any(|p| p != folder && end(p, *names) == end(folder, *names));
    let names = (1..folder.components().count()).find(alone).unwrap_or(usize::MAX);
    end(folder, names).display().to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // In a test, a panic is the report.
mod tests {
    use super::*;

    #[test]
    fn a_run_has_ended_when_its_lock_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let runs = Runs::one(folder);
        assert!(!runs.has_ended(folder), "nothing is known without a lock");
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let claim = |host: &str, time: u64| {
            let file = std::fs::File::create(folder.join(LOCK)).unwrap();
            file.try_lock().unwrap();
            std::fs::write(folder.join(LOCK), format!("process 7 on {}\n", host.trim())).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(time)).unwrap();
            file
        };
        let held = claim(&host, 1);
        assert!(!runs.has_ended(folder));
        drop(held);
        assert!(runs.has_ended(folder));
        let again = claim(&host, 2);
        assert!(!runs.has_ended(folder), "a run that was resumed goes on");
        drop(again);
        drop(claim("another.example", 3));
        assert!(!runs.has_ended(folder), "nothing is known of another machine");
    }

    #[test]
    fn the_newest_checkpoint_has_a_step() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(saved_step(folder.path()), None);
        std::fs::write(folder.path().join(LATEST), "checkpoint-14\n").unwrap();
        assert_eq!(saved_step(folder.path()), Some(14));
    }

    #[test]
    fn names_set_runs_apart() {
        let all = ["a/x/run", "b/x/run", "b/other"].map(PathBuf::from);
        assert_eq!(all.each_ref().map(|p| short(p, &all)), ["a/x/run", "b/x/run", "other"]);
    }
}
