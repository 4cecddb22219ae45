//! Folders of runs: which there are, what has changed in them, and their files, none of them longer than a page can show.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::chart::CHARTS;
use super::{ANSWERS, ARGS, FACTS, LOG, REMARKS, SAMPLES};
use dpo_core::error::{Error, Result};

/// Files that are shown, and the lines that are taken of them.
const FILES: &[(&str, usize)] =
    &[(ARGS, usize::MAX), (FACTS, usize::MAX), (LOG, 800), (REMARKS, 500), (SAMPLES, 40), (ANSWERS, 40)];
/// Bytes that are read of a file.
const MOST: u64 = 64 << 20;
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
                let meta = folder.join(name).metadata().ok()?;
                let time = meta.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
                Some((name.to_owned(), json!(format!("{}-{}", meta.len(), time.as_nanos()))))
            };
            let spoke = [LOG, FACTS].iter().find_map(|name| folder.join(name).metadata().ok()?.modified().ok());
            json!({
                "id": id,
                "name": short(folder, &folders),
                "folder": folder.display().to_string(),
                "silent_s": spoke.and_then(|t| t.elapsed().ok()).map(|t| t.as_secs_f64()),
                "done": folder.join("adapter_model.safetensors").is_file(),
                "files": FILES.iter().filter_map(|(name, _)| changed(name)).collect::<Map<String, Value>>(),
            })
        });
        json!({"charts": CHARTS, "runs": runs.collect::<Vec<_>>()})
    }

    /// A file of a run, where both are known.
    pub(super) fn file(&self, id: usize, name: &str) -> Option<String> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = found.get(id)?.clone();
        drop(found);
        FILES.iter().any(|(known, _)| *known == name).then(|| read(&folder, name))
    }
}

/// A file as it is shown; nothing of one that is not there.
pub(super) fn read(folder: &Path, name: &str) -> String {
    let mut bytes = Vec::new();
    let _ = File::open(folder.join(name)).and_then(|f| f.take(MOST).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    match FILES.iter().find(|(known, _)| *known == name) {
        Some((_, most)) if *most < usize::MAX => thinned(&text, *most),
        _ => text.into_owned(),
    }
}

/// The whole lines of a file, as objects.
pub(super) fn lines(folder: &Path, name: &str) -> Vec<Map<String, Value>> {
    read(folder, name).lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
}

/// Of a text with many lines every second, third and so on, always the first and the last; of evaluations' lines by
/// themselves, which are rare among the others.
fn thinned(text: &str, most: usize) -> String {
    let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    let (rare, usual): (Vec<_>, Vec<_>) = whole.enumerate().partition(|(_, line)| line.contains("\"eval_loss\""));
    let mut kept = Vec::new();
    for lines in [rare, usual] {
        let (stride, last) = (lines.len().div_ceil(most).max(1), lines.len().saturating_sub(1));
        kept.extend(lines.into_iter().enumerate().filter(|(i, _)| i % stride == 0 || *i == last).map(|(_, line)| line));
    }
    kept.sort_unstable_by_key(|(place, _)| *place);
    kept.into_iter().map(|(_, line)| line).collect()
}

/// Folders of runs in a folder. A run is not looked into: its checkpoints are no runs.
fn find(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if [ARGS, LOG].iter().any(|name| folder.join(name).is_file()) {
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
    fn long_files_are_thinned_and_their_ends_stay() {
        let text: String = (0..1000).map(|i| format!("{i}\n")).collect();
        let thin = thinned(&text, 100);
        assert_eq!(thin.lines().count(), 101);
        assert!(thin.starts_with("0\n10\n") && thin.ends_with("990\n999\n"));
        assert_eq!(thinned("1\n{\"eval_loss\":2}\n3\nhalf", 2), "1\n{\"eval_loss\":2}\n3\n");
    }

    #[test]
    fn names_set_runs_apart() {
        let all = ["a/x/run", "b/x/run", "b/other"].map(PathBuf::from);
        assert_eq!(all.each_ref().map(|p| short(p, &all)), ["a/x/run", "b/x/run", "other"]);
    }
}
