//! Checkpoints: adapter, moments, place in the data. A folder appears whole, by renaming.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use super::metrics::Window;
use super::optimizer::Moments;
use crate::error::{Error, IoContext, Result};
use crate::lora::Adapter;
use crate::{files, weights};

/// What a run needs to go on, besides the adapter and the moments.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// Steps taken.
    pub(super) global_step: u64,
    /// Epochs done, whole and part.
    pub(super) epoch: f64,
    /// What tells a run with the same data and settings from others; a resumed run must have the same.
    pub(super) fingerprint: String,
    /// States of the losses.
    pub(super) losses: Vec<Vec<f64>>,
    /// Sums since the last line of the log.
    pub(super) window: Window,
}

const STATE: &str = "trainer_state.json";
const MOMENTS: &str = "optimizer.safetensors";

/// Writes `checkpoint-N` and removes older ones beyond the limit.
pub(super) fn save(
    output: &Path,
    adapter: &Adapter,
    base_model: &str,
    moments: &Moments,
    state: &State,
    keep: Option<usize>,
) -> Result<()> {
    let name = format!("checkpoint-{}", state.global_step);
    let temporary = output.join(format!(".{name}.tmp"));
    let _ = fs::remove_dir_all(&temporary);
    fs::create_dir_all(&temporary).writing(&temporary)?;
    adapter.save(&temporary, base_model)?;
    write_moments(&temporary.join(MOMENTS), moments)?;
    let text = serde_json::to_string_pretty(state).map_err(|e| Error::run(e.to_string()))?;
    files::write(&temporary.join(STATE), text.as_bytes())?;
    let place = output.join(&name);
    if place.exists() {
        fs::remove_dir_all(&place).writing(&place)?;
    }
    fs::rename(&temporary, &place).writing(&place)?;
    for old in list(output).into_iter().rev().skip(keep.unwrap_or(usize::MAX).max(1)) {
        fs::remove_dir_all(&old).writing(&old)?;
    }
    Ok(())
}

/// The checkpoint folder that `--resume-from-checkpoint` means.
pub(super) fn find(output: Option<&Path>, value: &str) -> Result<PathBuf> {
    if value != "latest" {
        return Ok(PathBuf::from(value));
    }
    let flag = "--resume-from-checkpoint";
    let Some(output) = output else {
        return Err(Error::input("'latest' needs --output-dir").at(flag));
    };
    list(output).pop().ok_or_else(|| Error::input(format!("no checkpoint in {}", output.display())).at(flag))
}

/// Checkpoint folders from the oldest to the newest.
fn list(output: &Path) -> Vec<PathBuf> {
    let step = |p: &PathBuf| p.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    let entries = fs::read_dir(output).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
    let mut found: Vec<(u64, PathBuf)> = entries.filter_map(|p| Some((step(&p)?, p))).collect();
    found.sort();
    found.into_iter().map(|(_, p)| p).collect()
}

/// Reads moments and state; the adapter is read by its own module.
pub(super) fn load(folder: &Path, parameters: usize) -> Result<(Moments, State)> {
    let path = folder.join(STATE);
    let text = fs::read_to_string(&path).reading(&path)?;
    let state: State = serde_json::from_str(&text).map_err(|e| Error::input(e.to_string()).at(path.display()))?;
    let path = folder.join(MOMENTS);
    let mut tensors = weights::read_f32(&path)?;
    let mut take = |name: &str| match tensors.remove(name) {
        Some((_, values)) if values.len() == parameters => Ok(values),
        Some((shape, _)) => {
            Err(Error::input(format!("tensor '{name}' has shape {shape:?}, needs [{parameters}]")).at(path.display()))
        }
        None => Err(Error::input(format!("tensor '{name}' is missing")).at(path.display())),
    };
    Ok((Moments { first: take("first")?, second: take("second")?, steps: state.global_step }, state))
}

fn write_moments(path: &Path, moments: &Moments) -> Result<()> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let data = [("first", bytes(&moments.first)), ("second", bytes(&moments.second))];
    let failed = |e: safetensors::SafeTensorError| Error::run(e.to_string()).at(path.display());
    let views = data.iter().map(|(n, b)| Ok((*n, TensorView::new(Dtype::F32, vec![b.len() / 4], b)?)));
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(failed)?;
    let bytes = safetensors::serialize(views, None::<HashMap<String, String>>).map_err(failed)?;
    files::write(path, &bytes)
}
