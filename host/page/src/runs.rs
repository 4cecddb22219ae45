//! Folders of runs: which there are, and what has changed in them.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::chart::CHARTS;
use super::{ARGS, FACTS, LOG, excerpt};
use dpo_core::error::{Error, Result};

/// Folders deep that runs are looked for, and runs that are shown.
const DEPTH: usize = 2;
const RUNS: usize = 100;

/// Runs that are looked at.
pub struct Runs {
    roots: Vec<PathBuf>,
    /// In the order in which they were found, so that a place in the list names a run for good.
    found: Mutex<Vec<PathBuf>>,
}

impl Runs {
    /// A run that begins, of which there may be no file yet.
    pub fn one(output: &Path) -> Runs {
        Runs { roots: Vec::new(), found: Mutex::new(vec![output.to_owned()]) }
    }

    /// Runs in these folders and below them; those that begin later come to them.
    ///
    /// # Errors
    /// A folder without a run.
    pub fn below(roots: &[PathBuf]) -> Result<Runs> {
        for root in roots {
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
        let roots = roots.iter().map(|root| root.canonicalize().unwrap_or_else(|_| root.clone())).collect();
        let runs = Runs { roots, found: Mutex::default() };
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

    /// What the page begins with: the charts, and of every run its name and which of its files have changed.
    pub(super) fn list(&self) -> Value {
        let folders = self.folders();
        let runs = folders.iter().enumerate().map(|(id, folder)| {
            let changed = |name: &str| {
                let meta = excerpt::metadata(folder, name)?;
                let time = meta.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
                Some((name.to_owned(), json!(format!("{}-{}", meta.len(), time.as_nanos()))))
            };
            let spoke = [LOG, FACTS].iter().find_map(|name| excerpt::metadata(folder, name)?.modified().ok());
            json!({
                "id": id,
                "name": short(folder, &folders),
                "folder": folder.display().to_string(),
                "silent_s": spoke.and_then(|t| t.elapsed().ok()).map(|t| t.as_secs_f64()),
                "done": folder.join("adapter_model.safetensors").is_file(),
                "left_out": excerpt::left_out(folder),
                "files": excerpt::names().filter_map(changed).collect::<Map<String, Value>>(),
            })
        });
        json!({"charts": CHARTS, "runs": runs.collect::<Vec<_>>()})
    }

    /// A file of a run, where both are known.
    pub(super) fn file(&self, id: usize, name: &str) -> Option<String> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = found.get(id)?.clone();
        drop(found);
        excerpt::names().any(|known| known == name).then(|| excerpt::read(&folder, name))
    }
}

/// Folders of runs in a folder. A run is not looked into: its checkpoints are no runs.
fn find(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if [ARGS, LOG].iter().any(|name| excerpt::metadata(folder, name).is_some()) {
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
mod tests {
    use super::*;

    #[test]
    fn names_set_runs_apart() {
        let all = ["a/x/run", "b/x/run", "b/other"].map(PathBuf::from);
        assert_eq!(all.each_ref().map(|p| short(p, &all)), ["a/x/run", "b/x/run", "other"]);
    }
}
