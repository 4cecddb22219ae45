//! Where a run is written, and where one that goes on has been.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::checkpoint;
use super::config::{OutputConfig, Resume};
use dpo_core::error::{Error, Result};
use dpo_core::files;

/// Where a run is written, and the checkpoint it goes on from.
#[derive(Serialize, Deserialize)]
pub(super) struct RunDir {
    pub(super) output: PathBuf,
    pub(super) resumed: Option<PathBuf>,
}

impl RunDir {
    /// A run that is started again finds its own folder, and resumes from the last checkpoint there if there is one.
    pub(super) fn of(config: &OutputConfig, model: &Path, attempt: u64) -> Result<RunDir> {
        let again = config.dir.clone().filter(|_| attempt > 0);
        let latest = again.as_ref().map_or(Ok(None), |output| checkpoint::find(Some(output), &Resume::Latest))?;
        let resumed = match &config.resume {
            Some(resume) if latest.is_none() && !(again.is_some() && *resume == Resume::Latest) => {
                checkpoint::find(config.dir.as_deref(), resume)?
            }
            _ => latest,
        };
        let output = again.map_or_else(|| output_folder(config, model, resumed.as_deref()), Ok)?;
        files::refuse_unwritable(&output)?;
        Ok(RunDir { output, resumed })
    }
}

/// Where a run goes that launches ranks: rank 0 looks for the checkpoint to resume from, and says what it finds.
///
/// # Errors
/// A folder that holds a run already or cannot be written.
pub fn output_of(config: &OutputConfig, model: &Path) -> Result<PathBuf> {
    match &config.dir {
        Some(dir) if config.resume.is_some() => Ok(dir.clone()),
        _ => Ok(RunDir::of(config, model, 0)?.output),
    }
}

/// Where the run goes: what was named, unless it holds a run; else the next free folder.
fn output_folder(config: &OutputConfig, model: &Path, resumed: Option<&Path>) -> Result<PathBuf> {
    let holds_run =
        |p: &Path| ["args.json", "logging.jsonl", "adapter_model.safetensors"].iter().any(|f| p.join(f).exists());
    // With `latest`, a run that was killed before its first checkpoint; one that has an adapter came to its end.
    let begins_again = |p: &Path| config.resume.is_some() && !p.join("adapter_model.safetensors").exists();
    match (&config.dir, resumed) {
        (Some(folder), None) if holds_run(folder) && !begins_again(folder) => Err(Error::input("holds a run already")
            .at(folder.display())
            .help("name another folder, or go on with --resume-from-checkpoint latest")),
        (Some(folder), _) => Ok(folder.clone()),
        (None, Some(checkpoint)) => Ok(checkpoint.parent().unwrap_or(Path::new(".")).to_owned()),
        (None, None) => {
            let name = model.canonicalize().ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
            let name = name.unwrap_or_else(|| "run".into());
            let free = (1..).map(|n| PathBuf::from("output").join(format!("{name}-{n}"))).find(|p| !p.exists());
            free.ok_or_else(|| Error::run("no free folder under output"))
        }
    }
}
