//! Checkpoints: adapter, moments, place in the data.
//!
//! A folder is written beside its place with a manifest of its files, flushed, and renamed; then the marker `latest` names
//! it, and only then older ones go. So there is a whole checkpoint at every moment, and an incomplete or corrupt one is known as such.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config::Resume;
use super::evaluation::Best;
use super::manifest;
use super::metrics::Window;
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::lora::Adapter;
use dpo_core::optimizer::Moments;
use dpo_core::plan::Packing;
use dpo_core::{console, files, weights};

/// What a run needs to go on, besides the adapter and the moments.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// Steps taken.
    pub(super) global_step: u64,
    /// Steps that the run is to take.
    pub(super) total_steps: u64,
    /// Those of them that changed the adapter: not those that were skipped.
    pub(super) updates: u64,
    /// Steps skipped one after the other up to here.
    pub(super) skipped: u64,
    /// Epochs done, whole and part.
    pub(super) epoch: f64,
    /// How much was computed at once; a resumed run does the same.
    pub(super) packing: Packing,
    /// What decides every step; a resumed run must have the same.
    pub(super) settings: Map<String, Value>,
    /// States of the losses.
    pub(super) losses: Vec<Vec<f64>>,
    /// Sums since the last line of the log.
    pub(super) window: Window,
    /// The best evaluation, and how many have passed since.
    pub(super) best: Best,
}

const STATE: &str = "trainer_state.json";
const MOMENTS: &str = "optimizer.safetensors";
const LATEST: &str = "latest";
const FLAG: &str = "--resume-from-checkpoint";

/// The folder of the checkpoint behind a step.
pub(super) fn name(step: u64) -> String {
    format!("checkpoint-{step}")
}

/// Writes `checkpoint-N` and removes older ones beyond the limit, but for that of the best evaluation. The output folder must be there: one that vanished is not
/// made anew under another's feet.
pub(super) fn save(
    output: &Path,
    adapter: &Adapter,
    base_model: &str,
    moments: &Moments,
    state: &State,
    keep: Option<usize>,
) -> Result<()> {
    let name = name(state.global_step);
    let temporary = output.join(format!(".{name}.tmp"));
    let _ = fs::remove_dir_all(&temporary);
    let written = fs::create_dir(&temporary).writing(&temporary).and_then(|()| {
        adapter.save(&temporary, base_model)?;
        write_moments(&temporary.join(MOMENTS), moments)?;
        let text = serde_json::to_string_pretty(state).map_err(|e| Error::run(e.to_string()))?;
        files::write_into(&temporary.join(STATE), text.as_bytes())?;
        manifest::write(&temporary)
    });
    let placed = written.and_then(|()| place(&temporary, &output.join(&name)));
    if placed.is_err() {
        // What was written of it would fill a full disk for good.
        let _ = fs::remove_dir_all(&temporary);
    }
    placed?;
    files::write_into(&output.join(LATEST), format!("{name}\n").as_bytes())?;
    // Later ones are of a run that went on from an earlier checkpoint; this run comes to them yet.
    let past = list(output).into_iter().filter(|(step, _)| *step <= state.global_step);
    let old = past.rev().skip(keep.unwrap_or(usize::MAX).max(1));
    for (_, old) in old.filter(|(step, _)| state.best.found.is_none_or(|(best, _)| best != *step)) {
        fs::remove_dir_all(&old).writing(&old)?;
    }
    Ok(())
}

/// Puts a folder in its place, where one of the same step may be.
fn place(temporary: &Path, place: &Path) -> Result<()> {
    let aside = temporary.with_extension("old");
    if place.exists() {
        fs::rename(place, &aside).writing(place)?;
    }
    fs::rename(temporary, place).writing(place)?;
    let _ = fs::remove_dir_all(&aside);
    place.parent().map_or(Ok(()), files::sync_folder)
}

/// The checkpoint folder that `--resume-from-checkpoint` means: none where `latest` finds a run that was ended before its
/// first checkpoint. Incomplete or corrupt ones are told, and the one before is taken.
pub(super) fn find(output: Option<&Path>, resume: &Resume) -> Result<Option<PathBuf>> {
    if let Resume::From(folder) = resume {
        if !folder.is_dir() {
            return Err(Error::input(format!("'{}' is not a folder", folder.display()))
                .at(FLAG)
                .help("name a folder checkpoint-N of a run, or say 'latest' together with --output-dir"));
        }
        let corrupt = |cause: String| {
            Error::input(format!("the checkpoint is incomplete or corrupt: {cause}")).at(folder.display())
        };
        if folder.join("args.json").is_file() && !folder.join(STATE).is_file() {
            return Err(Error::input("is the folder of a run, not of a checkpoint")
                .at(format!("{FLAG} {}", folder.display()))
                .help(format!("--output-dir {} {FLAG} latest goes on from its last checkpoint", folder.display())));
        }
        manifest::verify(folder)
            .map_err(|e| corrupt(e).help(format!("name another one, or let {FLAG} latest find a whole one")))?;
        return Ok(Some(folder.clone()));
    }
    let Some(output) = output else {
        return Err(Error::input("'latest' needs --output-dir")
            .at(FLAG)
            .help("name the run's folder with it, or a checkpoint's folder in the place of 'latest'"));
    };
    let marked = fs::read_to_string(output.join(LATEST)).unwrap_or_default();
    let (first, rest): (Vec<_>, Vec<_>) =
        list(output).into_iter().rev().map(|(_, p)| p).partition(|p| p.ends_with(marked.trim()));
    let mut corrupt = 0;
    for folder in first.into_iter().chain(rest) {
        match manifest::verify(&folder) {
            Ok(()) => {
                console::line(format!("resuming    {}", folder.display()));
                return Ok(Some(folder));
            }
            Err(cause) => {
                console::warning(format!("{} is incomplete or corrupt and left out: {cause}", folder.display()))
            }
        }
        corrupt += 1;
    }
    if corrupt > 0 {
        return Err(Error::input("every checkpoint is incomplete or corrupt")
            .at(output.display())
            .help("remove the checkpoint folders to begin anew, or name another --output-dir"));
    }
    console::line(format!("resuming    no checkpoint in {}: the run starts from the beginning", output.display()));
    Ok(None)
}

/// Removes what a killed run left half done, and puts back what it had moved aside.
pub(super) fn remove_leftovers(output: &Path) {
    files::remove_leftovers(output);
    for entry in fs::read_dir(output).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let left = |n: &str| n.starts_with(".checkpoint-") && (n.ends_with(".tmp") || n.ends_with(".old"));
        if name.to_str().is_some_and(left) {
            // One that was moved aside for another of its step, which then did not come.
            let moved = name.to_str().and_then(|n| n.strip_prefix('.')?.strip_suffix(".old"));
            let back = moved.is_some_and(|name| fs::rename(entry.path(), output.join(name)).is_ok());
            if !back {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Checkpoint folders and their steps, from the oldest to the newest.
fn list(output: &Path) -> Vec<(u64, PathBuf)> {
    let step = |p: &PathBuf| p.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    let entries = fs::read_dir(output).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
    let mut found: Vec<(u64, PathBuf)> = entries.filter_map(|p| Some((step(&p)?, p))).collect();
    found.sort();
    found
}

/// The state of a checkpoint.
pub(super) fn load_state(folder: &Path) -> Result<State> {
    let path = folder.join(STATE);
    let text = fs::read_to_string(&path).reading(&path)?;
    serde_json::from_str(&text).map_err(|e| Error::input(e.to_string()).at(path.display()))
}

/// The moments of a checkpoint; the adapter is read by its own module.
pub(super) fn load_moments(folder: &Path, parameters: usize, steps: u64) -> Result<Moments> {
    let path = folder.join(MOMENTS);
    let mut tensors = weights::read_f32(&path)?;
    let mut take = |name: &str| match tensors.remove(name) {
        Some((_, values)) if values.len() == parameters => Ok(values),
        Some((shape, _)) => {
            Err(Error::input(format!("tensor '{name}' has shape {shape:?}, needs [{parameters}]")).at(path.display()))
        }
        None => Err(Error::input(format!("tensor '{name}' is missing")).at(path.display())),
    };
    Ok(Moments { first: take("first")?, second: take("second")?, steps })
}

fn write_moments(path: &Path, moments: &Moments) -> Result<()> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let data = [("first", bytes(&moments.first)), ("second", bytes(&moments.second))];
    let failed = |e: safetensors::SafeTensorError| Error::run(e.to_string()).at(path.display());
    let views = data.iter().map(|(n, b)| Ok((*n, TensorView::new(Dtype::F32, vec![b.len() / 4], b)?)));
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(failed)?;
    let bytes = safetensors::serialize(views, None::<HashMap<String, String>>).map_err(failed)?;
    files::write_into(path, &bytes)
}
