//! Log-probs and statistics under the reference: the adapter as it was at the start. They are computed once, before the first step, and
//! kept on disk under a hash of everything they depend on, so that further epochs and runs read them.

use super::step::score;
use dpo_core::cache;
use dpo_core::collective::ProcessGroup;
use dpo_core::console::{self, Remark};
use dpo_core::device::Device;
use dpo_core::error::Result;
use dpo_core::logprobs::STATISTICS;
use dpo_core::logprobs::{AnswerLogProbs, AnswerOffsets};
use dpo_data::Examples;

/// Where they are cached.
const CACHE: &str = "reference";
/// Examples that are laid out at once.
const AT_ONCE: usize = 16_384;

/// Log-probs of every example's answer tokens under the reference, with their statistics.
pub struct Reference {
    /// `None` where no loss reads them.
    logps: Option<AnswerLogProbs>,
}

impl Reference {
    /// For objectives without one.
    pub fn none() -> Reference {
        Reference { logps: None }
    }

    /// Reads or computes, each rank its share. `model` identifies weights and config. Rank 0 has the cache, whose bytes do not
    /// depend on the number of ranks.
    pub fn of(
        group: &mut dyn ProcessGroup,
        device: &mut dyn Device,
        model: &str,
        examples: &Examples,
    ) -> Result<Reference> {
        let mut offsets = AnswerOffsets::default();
        for example in examples.iter() {
            offsets.push(example?.scored_lengths());
        }
        let name = if group.is_first() { Some(cache_name(device, model, examples)?) } else { None };
        let cached = name.as_ref().and_then(|name| cache::read(CACHE, name)).unwrap_or_default();
        let cached: Vec<f32> = group.broadcast(cached)?.chunks_exact(4).map(f32_of).collect();
        let logps = match AnswerLogProbs::from_values(offsets, &cached) {
            Some(logps) => logps,
            None => {
                let own = examples.len().div_ceil(group.size()) as u64;
                console::line(format!("reference   log-probs of {} examples", examples.len()));
                let bar = console::bar(own, "reference   {bar:30} {pos}/{len} examples {eta} left");
                let mut logps = AnswerLogProbs::default();
                for first in (0..examples.len()).step_by(AT_ONCE) {
                    let some = examples.gather(first..(first + AT_ONCE).min(examples.len()))?;
                    logps.append(&score(group, device, &some.iter().collect::<Vec<_>>(), |n| bar.inc(n as u64))?);
                }
                bar.finish_and_clear();
                // A cache that cannot be written costs time in the next run, not this run.
                if let Some(Err(e)) = name.map(|name| cache::write(CACHE, &name, &bytes(&logps.values()))) {
                    console::warning(Remark::because("reference log-probs are not cached", &e));
                }
                logps
            }
        };
        Ok(Reference { logps: Some(logps) })
    }

    /// Those of some examples.
    pub fn gather(&self, examples: &[usize]) -> Option<AnswerLogProbs> {
        self.logps.as_ref().map(|logps| logps.gather(examples))
    }

    /// Those of all examples.
    pub(super) fn all(&self) -> Option<&AnswerLogProbs> {
        self.logps.as_ref()
    }
}

fn f32_of(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The name of the cache's entry, from everything that log-probs depend on.
fn cache_name(device: &dyn Device, model: &str, examples: &Examples) -> Result<String> {
    let adapter = device.adapter();
    // With B zero the update is zero whatever A is, so that runs with other seeds share a reference.
    let params = if adapter.changes_nothing() { Vec::new() } else { bytes(&adapter.params) };
    let examples = examples.digest()?;
    Ok(cache::name(&[
        env!("CARGO_PKG_VERSION").as_bytes(),
        STATISTICS.join(" ").as_bytes(),
        device.name().as_bytes(),
        &serde_json::to_vec(&device.packing()).unwrap_or_default(),
        model.as_bytes(),
        &serde_json::to_vec(device.graph()).unwrap_or_default(),
        adapter.shape().as_bytes(),
        &params,
        &examples,
    ]))
}
