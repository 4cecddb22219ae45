//! Log-probs under the reference: the adapter as it was at the start. They are computed once, before the first step, and
//! kept on disk under a hash of everything they depend on, so that further epochs and runs read them.

use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::step::score;
use dpo_core::batch::answer_tokens;
use dpo_core::console::{self, Remark};
use dpo_core::device::Device;
use dpo_core::error::Result;
use dpo_core::files;
use dpo_core::pair::TokenPair;
use dpo_ranks::Ranks;

/// Changed whenever the same inputs would give other numbers or another file.
const FORMAT: &str = "reference log-probs 1";

/// Log-probs of every pair's answer tokens under the reference.
pub struct Reference {
    /// Of every pair: chosen tokens, then rejected ones. Empty where no loss reads them.
    pairs: Vec<Vec<f32>>,
}

impl Reference {
    /// For objectives without one.
    pub fn none() -> Reference {
        Reference { pairs: Vec::new() }
    }

    /// Reads or computes, each rank its share. `model` identifies weights and config; `done` is told how many further
    /// pairs are ready here. Rank 0 has the cache, whose bytes do not depend on the number of ranks.
    pub fn of(
        ranks: &mut Ranks,
        device: &mut dyn Device,
        model: &str,
        pairs: &[TokenPair],
        mut done: impl FnMut(usize),
    ) -> Result<Reference> {
        let lengths: Vec<usize> = pairs.iter().map(answer_tokens).collect();
        let expected: usize = lengths.iter().sum();
        let path = ranks.is_first().then(|| cache_file(device, model, pairs));
        let cached = path.as_ref().and_then(|p| std::fs::read(p).ok()).unwrap_or_default();
        let cached = Some(ranks.broadcast(cached)?).filter(|bytes| bytes.len() == expected * 4);
        let flat: Vec<f32> = match cached {
            Some(bytes) => {
                done(pairs.len());
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            None => {
                let all: Vec<&TokenPair> = pairs.iter().collect();
                let scores = score(ranks, device, &all, done)?;
                // A cache that cannot be written costs time in the next run, not this run.
                if let Some(Err(e)) = path.map(|p| files::write(&p, &bytes(&scores.logps))) {
                    console::warning(Remark::because("reference log-probs are not cached", &e));
                }
                scores.logps
            }
        };
        let mut rest = flat.as_slice();
        let pairs = lengths.into_iter().map(|n| {
            let (own, after) = rest.split_at(n);
            rest = after;
            own.to_vec()
        });
        Ok(Reference { pairs: pairs.collect() })
    }

    /// Log-probs of some pairs, flat; empty where there is no reference.
    pub fn gather(&self, pairs: impl Iterator<Item = usize>) -> Vec<f32> {
        if self.pairs.is_empty() { Vec::new() } else { pairs.flat_map(|p| self.pairs[p].iter().copied()).collect() }
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn cache_file(device: &dyn Device, model: &str, pairs: &[TokenPair]) -> PathBuf {
    let mut hash = Sha256::new();
    let mut text = |t: &str| hash.update(format!("{}\n{t}\n", t.len()));
    text(FORMAT);
    text(env!("CARGO_PKG_VERSION"));
    text(&device.name());
    text(&serde_json::to_string(&device.packing()).unwrap_or_default());
    text(model);
    text(&serde_json::to_string(device.graph()).unwrap_or_default());
    let adapter = device.adapter();
    text(&format!("{} {:?}", adapter.config.scale(), adapter.sites.iter().map(|s| &s.module).collect::<Vec<_>>()));
    // With B zero the update is zero whatever A is, so that runs with other seeds share a reference.
    if !adapter.changes_nothing() {
        adapter.params.iter().for_each(|p| hash.update(p.to_le_bytes()));
    }
    for pair in pairs {
        for ids in [&pair.prompt, &pair.chosen, &pair.rejected] {
            hash.update((ids.len() as u64).to_le_bytes());
            ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        }
    }
    let name: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    files::cache_folder().join("reference").join(format!("{name}.f32"))
}
