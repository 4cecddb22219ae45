//! The folder of a run: claimed before any work is done for it, and held until the process ends, so that no two runs share one.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dpo_core::console;
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::files;
use serde::{Deserialize, Serialize};

use super::checkpoint;
use super::config::{OutputConfig, Resume};

/// The file whose lock a run holds, and in which it says who it is.
const LOCK: &str = ".lock";
/// What only a run leaves in a folder.
const OF_A_RUN: [&str; 3] = ["args.json", "logging.jsonl", ADAPTER];
/// What only a run leaves that came to its end.
const ADAPTER: &str = "adapter_model.safetensors";
/// How long a run that is started again waits for what is left of the one before.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a run is written, and the checkpoint it resumes from.
#[derive(Serialize, Deserialize)]
pub(super) struct RunDir {
    pub(super) output: PathBuf,
    pub(super) resumed: Option<PathBuf>,
}

impl RunDir {
    /// Claims the folder of a run, for as long as the claim lives. A run that is started again (`attempt` above 0) finds its own
    /// folder, and resumes from the last checkpoint there if there is one.
    pub(super) fn claim(config: &OutputConfig, (name, model): (&str, &Path), attempt: u64) -> Result<(RunDir, Claim)> {
        let again = attempt > 0 && config.dir.is_some();
        let patience = if again { PATIENCE } else { Duration::ZERO };
        let named = match (&config.dir, &config.resume) {
            (Some(_), Some(Resume::From(checkpoint))) if config.version => checkpoint.parent().map(Path::to_owned),
            (Some(dir), Some(Resume::Latest)) if config.version => newest_version(dir),
            (Some(dir), _) => Some(dir.clone()),
            (None, Some(resume)) => checkpoint::find(None, resume)?.and_then(|c| Some(c.parent()?.to_owned())),
            (None, None) => None,
        };
        let claim = match (named, &config.dir) {
            (Some(dir), _) if config.version && config.resume.is_none() => Claim::version(&dir)?,
            (Some(dir), _) => Claim::of(&dir, patience)?,
            (None, Some(dir)) => Claim::version(dir)?,
            (None, None) => Claim::free(name, model)?,
        };
        if claim.folder.canonicalize().is_ok_and(|own| model.canonicalize().is_ok_and(|model| own == model)) {
            return Err(Error::input("is the model's folder")
                .at(claim.folder.display())
                .help("name another folder for the run"));
        }
        checkpoint::remove_leftovers(&claim.folder);
        let latest = if again { checkpoint::find(Some(&claim.folder), &Resume::Latest)? } else { None };
        let resumed = match &config.resume {
            Some(Resume::Latest) if again => latest,
            Some(resume) if latest.is_none() => {
                checkpoint::find(config.dir.as_ref().map(|_| claim.folder.as_path()), resume)?
            }
            _ => latest,
        };
        // One that was killed before its first checkpoint begins again; one that has an adapter came to its end.
        let begins_again = again || (config.resume.is_some() && !claim.folder.join(ADAPTER).exists());
        if resumed.is_none() && !begins_again {
            refuse_run(&claim.folder)?;
        }
        Ok((RunDir { output: claim.folder.clone(), resumed }, claim))
    }
}

/// Refuses a folder that holds a run, for one that begins.
///
/// # Errors
/// That it does.
pub fn refuse_run(folder: &Path) -> Result<()> {
    if !OF_A_RUN.iter().any(|file| folder.join(file).exists()) {
        return Ok(());
    }
    Err(Error::input("holds a run already")
        .at(folder.display())
        .help("name another folder, or go on with --resume-from-checkpoint latest"))
}

/// The folder that ranks of a launcher are told to write into, made now where it is not named: the first of them claims it.
///
/// # Errors
/// A folder that holds a run already, is another run's, or cannot be written.
pub fn output_of(config: &OutputConfig, name: &str, model: &Path) -> Result<PathBuf> {
    if let (Some(dir), Some(_), false) = (&config.dir, &config.resume, config.version) {
        return Ok(dir.clone());
    }
    let (RunDir { output, .. }, mut claim) = RunDir::claim(config, (name, model), 0)?;
    claim.made.clear();
    Ok(output)
}

/// A folder that this process alone writes. Dropped before anything was written there, it leaves nothing.
pub(super) struct Claim {
    folder: PathBuf,
    /// Folders of this claim's making, from this one outwards.
    made: Vec<PathBuf>,
    /// Whether the file of the lock is of this claim's making.
    made_lock: bool,
    /// The lock goes with the handle, however this process ends.
    _lock: File,
}

impl Claim {
    /// The next free `output/<model>-N`, of the folder's own name, or of that on a hub without owner and revision.
    fn free(name: &str, model: &Path) -> Result<Claim> {
        let own = || model.canonicalize().ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        let on_hub = || name.split('@').next()?.rsplit('/').next().filter(|part| !part.is_empty()).map(str::to_owned);
        let name = if Path::new(name).is_dir() { own() } else { on_hub() };
        let name = name.unwrap_or_else(|| "run".into());
        Claim::first(Path::new("output"), 1, |n| format!("{name}-{n}"))
    }

    /// The next `vN-TIME` inside of a folder, in UTC.
    fn version(parent: &Path) -> Result<Claim> {
        let taken = versions(parent).map(|(number, _)| number).max();
        let time = dpo_data::strftime_now("%Y%m%d-%H%M%S");
        Claim::first(parent, taken.map_or(0, |n| n + 1), |n| format!("v{n}-{time}"))
    }

    /// The first folder that is not there yet of those that are named by numbers.
    fn first(parent: &Path, from: u64, name: impl Fn(u64) -> String) -> Result<Claim> {
        let made = missing(parent);
        fs::create_dir_all(parent).writing(parent)?;
        for n in from.. {
            let folder = parent.join(name(n));
            match fs::create_dir(&folder) {
                Ok(()) => {
                    let mut claim = Claim::of(&folder, Duration::ZERO)?;
                    claim.made = std::iter::once(folder).chain(made).collect();
                    return Ok(claim);
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                made => made.writing(&folder)?,
            }
        }
        Err(Error::run(format!("no free folder in {}", parent.display())))
    }

    /// A folder by name, made if it is not there.
    fn of(folder: &Path, patience: Duration) -> Result<Claim> {
        let made = missing(folder);
        fs::create_dir_all(folder).writing(folder)?;
        let made_lock = !folder.join(LOCK).exists();
        let start = Instant::now();
        loop {
            match lock(&folder.join(LOCK)).writing(folder)? {
                Some(lock) => return Ok(Claim { folder: folder.to_owned(), made, made_lock, _lock: lock }),
                None if start.elapsed() < patience => std::thread::sleep(Duration::from_millis(100)),
                None => {
                    return Err(Error::input(format!("another run writes this folder: {}", holder_of(folder)))
                        .at(folder.display())
                        .help("wait for it or end it, or name another folder with --output-dir"));
                }
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // What was there before is left as it was.
        let is_run = OF_A_RUN.iter().any(|file| self.folder.join(file).exists());
        if self.made_lock && !is_run {
            let _ = fs::remove_file(self.folder.join(LOCK));
            // Only empty folders are removed.
            self.made.iter().for_each(|folder| drop(fs::remove_dir(folder)));
        }
    }
}

/// The folders `vN-TIME` of a folder, by their numbers.
fn versions(parent: &Path) -> impl Iterator<Item = (u64, PathBuf)> {
    let number = |entry: io::Result<fs::DirEntry>| {
        let path = entry.ok()?.path();
        let name = path.file_name()?.to_str()?;
        Some((name.strip_prefix('v')?.split_once('-')?.0.parse().ok()?, path))
    };
    fs::read_dir(parent).into_iter().flatten().filter_map(number)
}

/// The newest of them, in which a run goes on that is resumed.
fn newest_version(parent: &Path) -> Option<PathBuf> {
    versions(parent).max().map(|(_, path)| path)
}

/// A folder and those around it that are not there.
fn missing(folder: &Path) -> Vec<PathBuf> {
    let named = folder.ancestors().filter(|p| !p.as_os_str().is_empty());
    named.take_while(|p| !p.exists()).map(Path::to_owned).collect()
}

/// The lock of a file that is made if it is not there; `None` while another process has it.
fn lock(path: &Path) -> io::Result<Option<File>> {
    loop {
        let mut file = files::open_own(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(e)) => {
                let what = format!("{} cannot be locked ({e}): no other run may write this folder", path.display());
                console::warning(what);
            }
        }
        // Between opening and locking it, who had it before may have removed it.
        if is_at(&file, path) {
            file.set_len(0)?;
            file.write_all(holder().as_bytes())?;
            return Ok(Some(file));
        }
    }
}

/// Whether an open file is the one under its name.
fn is_at(file: &File, path: &Path) -> bool {
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    file.metadata().is_ok_and(|own| fs::metadata(path).is_ok_and(|named| same(&own, &named)))
}

/// Who holds a folder's lock. One that has just taken it has a moment to say so.
fn holder_of(folder: &Path) -> String {
    for _ in 0..20 {
        let holder = fs::read_to_string(folder.join(LOCK)).unwrap_or_default();
        if holder.ends_with('\n') {
            return holder.trim().to_owned();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    "a process that does not say its name".into()
}

/// Who this process is, for those who find the folder taken.
fn holder() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("process {} on {}\n", std::process::id(), if host.is_empty() { "this host" } else { host.trim() })
}
