//! Memory before the first step: what everything takes, how many tokens fit at once, what is recomputed.

use std::collections::BTreeMap;
use std::fmt;

use dpo_plugin_api::graph::ModelGraph;
use serde::Serialize;

use crate::base::{blocks, is_shared};
use crate::error::{Error, Result};
use crate::ops::{attention, count, lm_head};

/// Bytes of an f32.
const WORD: usize = 4;

/// More tokens at once gain nothing on a CPU.
const MOST_TOKENS: usize = 8192;

/// The plan of a run on the CPU. Sizes in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Memory to plan with.
    pub available: usize,
    /// Ranks that share the frozen weights; 1 where each has all.
    pub parts: usize,
    /// Frozen weights in f32 on this rank.
    pub weights: usize,
    /// All of them.
    pub whole: usize,
    /// Adapter, gradient and moments.
    pub adapter: usize,
    /// Logits, attention scores and what else an op holds while it runs.
    pub workspace: usize,
    /// Values kept for one token, over all layers.
    pub per_token: usize,
    /// Layers whose inner values are computed again.
    pub recomputed: usize,
    /// Tokens computed at once.
    pub micro_batch_tokens: usize,
}

/// What the user fixes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// Memory to plan with; by default what the system has free.
    pub memory: Option<usize>,
    /// Tokens at once.
    pub micro_batch_tokens: Option<usize>,
    /// Whether layers are recomputed.
    pub recompute: Option<bool>,
    /// Whether ranks share the frozen weights.
    pub shard_base: Option<bool>,
}

impl Plan {
    /// Plans for examples of up to `longest` tokens and an adapter of `parameters`, with the frozen weights shared by so many
    /// `parts`; refuses what does not fit.
    pub fn new(graph: &ModelGraph, parameters: usize, longest: usize, parts: usize, wishes: Wishes) -> Result<Plan> {
        let available = wishes.memory.or_else(free_memory).unwrap_or(usize::MAX);
        let [weights, whole] = [parts, 1].map(|parts| weights(graph, parts));
        let adapter = parameters * WORD * 4;
        let kept: usize = graph.layers.iter().map(|l| inner(graph, l.block)).sum();
        // A layer in work holds its values, and gradients of about as many.
        let widest = graph.layers.iter().map(|l| inner(graph, l.block)).max().unwrap_or(0) * 3;
        let inputs = graph.layers.len() * graph.hidden_size * WORD;
        let workspace = workspace(graph, longest);
        let fixed = weights + adapter + workspace;
        let rest = available.saturating_sub(fixed);
        let fits = |per_token: usize| rest / per_token.max(1);
        let wanted = longest.min(wishes.micro_batch_tokens.unwrap_or(longest));
        let recompute = wishes.recompute.unwrap_or(fits(kept + inputs + widest) < wanted);
        let per_token = inputs + widest + if recompute { 0 } else { kept };
        if fits(per_token) < longest {
            let need = fixed + per_token * longest;
            return Err(Error::input(format!(
                "the longest example has {longest} tokens and needs {}, there are {}: weights {}, adapter {}, workspace {}, \
                 {} a token",
                size(need),
                size(available),
                share(weights, whole, parts),
                size(adapter),
                size(workspace),
                size(per_token)
            ))
            .help("lower --max-length, or --lora-rank, or take a smaller model"));
        }
        let tokens =
            wishes.micro_batch_tokens.unwrap_or_else(|| fits(per_token).clamp(longest, MOST_TOKENS.max(longest)));
        let recomputed = if recompute { graph.layers.len() } else { 0 };
        Ok(Plan {
            available,
            parts,
            weights,
            whole,
            adapter,
            workspace,
            per_token,
            recomputed,
            micro_batch_tokens: tokens,
        })
    }
}

/// Most bytes that an op holds beside the values it reads and makes: attention's scores over an example of up to `longest`
/// tokens, or the head's logits.
fn workspace(graph: &ModelGraph, longest: usize) -> usize {
    let nodes = graph.blocks.iter().flat_map(|b| &b.nodes).filter(|n| n.op == "attention");
    let scores = nodes.map(|n| attention::workspace(longest, count(n, "heads"), count(n, "kv_heads")));
    scores.max().unwrap_or(0).max(lm_head::workspace(graph.vocab_size))
}

/// Bytes of frozen weights on a rank. Where ranks share them: its part, and the two largest blocks that follow each other.
fn weights(graph: &ModelGraph, parts: usize) -> usize {
    let (mut kept, mut whole) = (BTreeMap::new(), Vec::new());
    for (prefix, nodes) in blocks(graph) {
        let mut gathered = 0;
        for weight in nodes.iter().flat_map(|n| &n.weights) {
            let values: usize = weight.shape.iter().product();
            let shared = parts > 1 && is_shared(weight);
            gathered += if shared { values * WORD } else { 0 };
            // A tied projection is the embedding's tensor.
            let own = if shared { values.div_ceil(parts) } else { values };
            kept.insert(format!("{prefix}{}", weight.tensor), own * WORD);
        }
        whole.push(gathered);
    }
    kept.values().sum::<usize>() + whole.windows(2).map(|two| two[0] + two[1]).max().unwrap_or(0)
}

/// `58.0 MiB`, or `58.0 MiB of 132.0 MiB, shared by 4 ranks`.
pub(crate) fn share(weights: usize, whole: usize, parts: usize) -> String {
    match parts {
        1 => size(weights),
        _ => format!("{} of {}, shared by {parts} ranks", size(weights), size(whole)),
    }
}

/// Bytes a token's values take in one layer.
fn inner(graph: &ModelGraph, block: usize) -> usize {
    graph.blocks[block].nodes.iter().map(|n| n.width * WORD).sum()
}

/// Memory that the system can give without swapping.
pub fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<usize>().ok()? * 1024)
}

/// Bytes for people.
pub fn size(bytes: usize) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.iter().find(|(_, shift)| bytes >= 1 << shift);
    match unit {
        Some((name, shift)) => format!("{:.1} {name}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

/// Bytes of a text such as `24GiB`, `900MB` or a plain number.
pub fn parse_size(text: &str) -> Result<usize> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kib" | "k" => 1024.0,
        "mib" | "m" => 1024.0 * 1024.0,
        "gib" | "g" => 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => return Err(Error::input(format!("'{text}' is no size")).help("write it as 24GiB")),
    };
    let number: f64 =
        number.parse().map_err(|_| Error::input(format!("'{text}' is no size")).help("write it as 24GiB"))?;
    Ok((number * factor) as usize)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values = self.per_token * self.micro_batch_tokens;
        writeln!(
            f,
            "memory      {} free, {} planned",
            size(self.available),
            size(self.weights + self.adapter + self.workspace + values)
        )?;
        writeln!(
            f,
            "            weights {}, adapter {}, workspace {}",
            share(self.weights, self.whole, self.parts),
            size(self.adapter),
            size(self.workspace)
        )?;
        let how = if self.recomputed > 0 { "layers recomputed" } else { "values kept" };
        write!(f, "micro-batch {} tokens of {}, {how}", self.micro_batch_tokens, size(self.per_token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("24GiB").unwrap(), 24 << 30);
        assert_eq!(parse_size("1.5 GB").unwrap(), 1_500_000_000);
        assert!(parse_size("much").is_err());
        assert_eq!(size(3 << 29), "1.5 GiB");
    }
}
