//! Memory before the first step: what everything takes, how many tokens fit at once, what is recomputed.

use std::collections::BTreeMap;
use std::fmt;

use dpo_plugin_api::graph::{ModelGraph, Node};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::memory::{free_memory, size};
use crate::ops::{attention, experts, lm_head, recurrence};
use crate::storage::{Numbers, Quantization, Storage};
use crate::weights::{blocks, is_quantized};

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
    /// What the layers' matrices are kept as, where that is not f32.
    pub quantization: Option<Quantization>,
    /// Frozen weights on this rank.
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

/// What the user fixes of a plan, and what a run that resumes has fixed before.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryOptions {
    /// Memory limit in bytes; by default what the system has free.
    pub limit: Option<usize>,
    /// Tokens of a micro-batch.
    pub micro_batch_tokens: Option<usize>,
    /// Whether activations are recomputed in the backward pass.
    pub recompute: Option<bool>,
    /// Whether the frozen base weights are sharded over ranks.
    pub shard_base: Option<bool>,
    /// What the layers' frozen matrices are kept as; by default as the device computes.
    pub quantization: Option<Quantization>,
    /// What a checkpoint has them as that may stay so, where a device computes the same with it: a plan says whether it does.
    pub published: Option<Quantization>,
    /// Whether the layers' frozen weights are in host memory.
    pub offload_base: Option<bool>,
    /// The packing of the run that is resumed: it is used, or the plan is refused with the numbers.
    pub packing: Option<Packing>,
}

/// How much is computed at once. It is the part of a plan that decides bits: other micro-batches add the same floating-point
/// numbers in another order. So it is saved with a run and reused when that resumes, whatever memory is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packing {
    /// Tokens that micro-batches with a backward pass are filled up to.
    pub micro_batch_tokens: usize,
    /// Tokens that micro-batches without one, as for the reference, are filled up to.
    pub scoring_tokens: usize,
    /// Rows of logits at once, where that follows from memory.
    #[serde(default)]
    pub logits_rows: Option<usize>,
    /// Rows of a layer at once, where a longer batch is computed in chunks.
    #[serde(default)]
    pub chunk_rows: Option<usize>,
}

impl MemoryOptions {
    /// For a model whose checkpoint has matrices as such numbers, where bf16 has the same values.
    ///
    /// # Errors
    /// A quantisation that is for none of the model's weights.
    pub fn of_model(self, graph: &ModelGraph, published: Option<Quantization>) -> Result<MemoryOptions> {
        if let Some(kind) = self.quantization {
            let of_node = |id, node: &Node| node.weights.iter().any(|w| is_quantized(kind.numbers(), id, node, w));
            if !blocks(graph).any(|(id, _, nodes)| nodes.iter().any(|node| of_node(id, node))) {
                return Err(Error::input(format!("{} is for experts, which the model has not", kind.name()))
                    .at("--quantization")
                    .help("take nf4 or fp8"));
            }
        }
        Ok(MemoryOptions { published: self.published.filter(|kind| Some(*kind) == published), ..self })
    }
}

impl Packing {
    /// What fits on every rank that has one of these.
    pub fn least(self, other: Packing) -> Packing {
        Packing {
            micro_batch_tokens: self.micro_batch_tokens.min(other.micro_batch_tokens),
            scoring_tokens: self.scoring_tokens.min(other.scoring_tokens),
            logits_rows: self.logits_rows.zip(other.logits_rows).map(|(a, b)| a.min(b)),
            chunk_rows: [self.chunk_rows, other.chunk_rows].into_iter().flatten().min(),
        }
    }
}

impl Plan {
    /// Plans for examples of up to `longest` tokens and an adapter that takes so many bytes, with the frozen weights sharded over so many
    /// `parts`; refuses what does not fit.
    pub fn new(
        graph: &ModelGraph,
        adapter: usize,
        longest: usize,
        parts: usize,
        options: MemoryOptions,
    ) -> Result<Plan> {
        if let (Some(kind), None) = (options.published, options.quantization) {
            let [whole, kept] = [None, Some(kind)].map(|quantization| {
                let options = MemoryOptions { quantization, published: None, ..options };
                move || Plan::new(graph, adapter, longest, parts, options)
            });
            // To dequantise takes time; but what ranks share is the same on all of them.
            return if parts > 1 { kept() } else { whole().or_else(|_| kept()) };
        }
        let available = options.limit.or_else(free_memory).unwrap_or(usize::MAX);
        let quantization = options.quantization;
        let [weights, whole] = [parts, 1].map(|parts| weights(graph, quantization, parts));
        let kept: usize = graph.layers.iter().map(|l| inner(graph, l.block)).sum();
        // A layer in work holds its values, and gradients of about as many.
        let widest =
            graph.layers.iter().map(|l| inner(graph, l.block) * 3 + of_experts(graph, l.block)).max().unwrap_or(0);
        let inputs = graph.layers.len() * graph.hidden_size * WORD;
        let workspace = workspace(graph, longest);
        let fixed = weights + adapter + workspace;
        let rest = available.saturating_sub(fixed);
        let fits = |per_token: usize| rest / per_token.max(1);
        let fixed_tokens = options.packing.map(|p| p.micro_batch_tokens).or(options.micro_batch_tokens);
        let most = longest.max(fixed_tokens.unwrap_or(0));
        let recompute = options.recompute.unwrap_or(fits(kept + inputs + widest) < most);
        let per_token = inputs + widest + if recompute { 0 } else { kept };
        if fits(per_token) < most {
            let need = fixed + per_token * most;
            return Err(Error::input(format!(
                "{} and needs {}, there are {}: weights {}, adapter {}, workspace {}, {} a token",
                of_tokens(longest, most),
                size(need),
                size(available),
                share(weights, whole, parts),
                size(adapter),
                size(workspace),
                size(per_token)
            ))
            .help(match options.packing {
                Some(_) => RESUMED,
                None => "lower --max-length, --micro-batch-tokens or --lora-rank, or take a smaller model",
            }));
        }
        // In powers of two, so that two runs with about as much memory have the same micro-batches.
        let packed = || (0..usize::BITS).map(|n| MOST_TOKENS >> n).find(|tokens| *tokens <= fits(per_token));
        let tokens = fixed_tokens.unwrap_or_else(|| packed().unwrap_or(0).max(longest));
        let recomputed = if recompute { graph.layers.len() } else { 0 };
        Ok(Plan {
            available,
            parts,
            quantization,
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

impl Plan {
    /// What of it a run saves and reuses.
    pub fn packing(&self) -> Packing {
        let tokens = self.micro_batch_tokens;
        Packing { micro_batch_tokens: tokens, scoring_tokens: tokens, logits_rows: None, chunk_rows: None }
    }
}

/// What does not fit: the longest example, or micro-batches that are longer.
pub fn of_tokens(longest: usize, most: usize) -> String {
    match most > longest {
        true => format!("a micro-batch has {most} tokens"),
        false => format!("the longest example has {longest} tokens"),
    }
}

/// What to do about a resumed run that does not fit.
pub const RESUMED: &str = "free memory, so that the run goes on with the micro-batches that it began with, or start a new run from its \
                           adapter with --init-adapter";

/// Most bytes that an op holds beside the values it reads and makes: attention's scores over an example of up to `longest`
/// tokens, or of a recurrence its states, or the head's logits.
fn workspace(graph: &ModelGraph, longest: usize) -> usize {
    let nodes = graph.blocks.iter().flat_map(|block| &block.nodes);
    let of_states = nodes.map(|node| recurrence::workspace(node, longest)).max().unwrap_or(0);
    attention::workspace(longest).max(lm_head::workspace(graph.hidden_size)).max(of_states)
}

/// Bytes of frozen weights on a rank. Where some are made whole when their block comes: what is kept of them, and the two largest
/// blocks that follow each other.
pub(crate) fn weights(graph: &ModelGraph, quantization: Option<Quantization>, parts: usize) -> usize {
    let (mut kept, mut whole) = (BTreeMap::new(), Vec::new());
    for (id, prefix, nodes) in blocks(graph) {
        let mut made = 0;
        for (node, weight) in nodes.iter().flat_map(|n| n.weights.iter().map(move |w| (n, w))) {
            let quantization = quantization.filter(|kind| is_quantized(kind.numbers(), id, node, weight));
            let numbers = quantization.map_or(Numbers::F32, Quantization::numbers);
            let storage = Storage::of(weight, numbers, parts);
            if quantization.is_some() || storage.is_sharded() {
                made += Numbers::F32.bytes_of(&weight.shape);
            }
            // A tied projection is the embedding's tensor.
            kept.insert(format!("{prefix}{}", weight.tensor), storage.bytes_of(&weight.shape));
        }
        whole.push(made);
    }
    kept.values().sum::<usize>() + whole.windows(2).map(|two| two[0] + two[1]).max().unwrap_or(0)
}

/// `58.0 MiB`, or `58.0 MiB of 132.0 MiB, sharded over 4 ranks`.
pub fn share(weights: usize, whole: usize, parts: usize) -> String {
    match parts {
        1 => size(weights),
        _ => format!("{} of {}, sharded over {parts} ranks", size(weights), size(whole)),
    }
}

/// Bytes a token's values take in one layer.
fn inner(graph: &ModelGraph, block: usize) -> usize {
    graph.blocks[block].nodes.iter().map(|n| n.width * WORD).sum()
}

/// Bytes a token that the experts of a layer hold beside its values.
fn of_experts(graph: &ModelGraph, block: usize) -> usize {
    let experts = graph.blocks[block].nodes.iter().filter(|n| n.op == "experts");
    experts.map(|n| experts::workspace(n) * WORD).max().unwrap_or(0)
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
            "            {}weights {}, adapter {}, workspace {}",
            self.quantization.map(|kind| format!("{} ", kind.name())).unwrap_or_default(),
            share(self.weights, self.whole, self.parts),
            size(self.adapter),
            size(self.workspace)
        )?;
        let how = if self.recomputed > 0 { "layers recomputed" } else { "activations saved" };
        write!(f, "micro-batch {} tokens of {}, {how}", self.micro_batch_tokens, size(self.per_token))
    }
}
