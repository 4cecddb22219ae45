//! The CPU as a decoder: the engine that trains, with a KV cache for each sequence.

use dpo_plugin_api::graph::ModelGraph;
use rayon::ThreadPool;

use crate::base::Base;
use crate::decoder::{Decoder, Sequences};
use crate::engine::{Engine, Loras};
use crate::error::{Error, Result};
use crate::lora::Adapter;
use crate::memory::{free_memory, size};
use crate::ops::{self, KvCache};
use crate::plan::{MemoryOptions, weights};
use crate::storage::Quantization;
use crate::weights::Checkpoint;

/// The CPU, in f32. Weights are kept as the checkpoint has them, where that is bf16: they are the same numbers. Those that are
/// quantised are made whole for every token, a layer at a time.
pub struct CpuDecoder {
    engine: Engine,
    adapters: Vec<Loras>,
    threads: ThreadPool,
    caches: Vec<KvCache>,
    most: usize,
}

impl CpuDecoder {
    /// Loads the frozen weights, unless they do not fit.
    ///
    /// # Errors
    /// A checkpoint that cannot be read, or takes more memory than there is.
    pub fn load(
        graph: &ModelGraph,
        checkpoint: &Checkpoint,
        adapters: &[Adapter],
        sequences: Sequences,
        options: MemoryOptions,
    ) -> Result<CpuDecoder> {
        let needs = |quantization: Option<Quantization>| match quantization {
            None => checkpoint.kept_bytes(graph),
            Some(kind) => Ok(weights(graph, Some(kind), 1)),
        };
        let free = free_memory().unwrap_or(usize::MAX);
        // What is published small stays so where it does not fit otherwise.
        let published = options.published.filter(|_| needs(None).is_ok_and(|needs| needs > free));
        let quantization = options.quantization.or(published);
        let needs = needs(quantization)?;
        if needs > free {
            let (needs, free) = (size(needs), size(free));
            return Err(Error::input(format!("the weights take {needs}, there are {free}"))
                .at("--model")
                .help("take a machine with more memory, or a smaller model"));
        }
        let most = most_tokens(graph, sequences, free - needs)?;
        let sequences = Sequences { most, ..sequences };
        let base = Base::load_kept(graph, checkpoint, quantization)?;
        CpuDecoder::of(Engine::new(graph.clone(), base, Adapter::idle(graph)?)?, adapters, sequences)
    }

    /// An engine that has its weights already; its own adapter takes no part.
    ///
    /// # Errors
    /// Threads that the system does not give.
    pub fn of(engine: Engine, adapters: &[Adapter], sequences: Sequences) -> Result<CpuDecoder> {
        let threads = engine.threads()?;
        let adapters = adapters.iter().map(Loras::of).collect::<Result<_>>()?;
        let caches = (0..sequences.count).map(|_| KvCache::default()).collect();
        Ok(CpuDecoder { engine, adapters, threads, caches, most: sequences.most })
    }
}

/// Tokens that every sequence may have at once, in so many bytes. Caches grow with what is in them, to the next power of two.
fn most_tokens(graph: &ModelGraph, sequences: Sequences, bytes: usize) -> Result<usize> {
    let mut columns = 0;
    for nodes in graph.layers.iter().map(|layer| &graph.blocks[layer.block].nodes) {
        for node in nodes {
            // A value is made by the node before its number.
            let width =
                |input: &usize| node.inputs[*input].checked_sub(1).map_or(graph.hidden_size, |at| nodes[at].width);
            columns += ops::find(&node.op)?.cached_inputs.iter().map(width).sum::<usize>();
        }
    }
    let per_token = sequences.count * columns * size_of::<f32>();
    let room = bytes / per_token.max(1);
    // The largest power of two that there is room for: beyond it a cache would take twice as much.
    let most = sequences.most.min(if room == 0 { 0 } else { 1 << room.ilog2() });
    if most < sequences.least {
        let (need, left) = (size(per_token * sequences.least.next_power_of_two()), size(bytes));
        let of = format!("{} sequences of {} tokens", sequences.count, sequences.least);
        return Err(Error::input(format!("{left} of memory are left for keys and values, {of} need {need}"))
            .help("take a machine with more memory, or fewer or shorter sequences"));
    }
    Ok(most)
}

impl Decoder for CpuDecoder {
    fn name(&self) -> String {
        self.engine.name()
    }

    fn sequences(&self) -> (usize, usize) {
        (self.caches.len(), self.most)
    }

    fn append(&mut self, adapter: Option<usize>, new: &[(usize, &[u32])]) -> Result<Vec<Vec<f32>>> {
        let loras = adapter.map(|at| self.adapters.get(at).ok_or_else(no_adapter)).transpose()?;
        let mut caches: Vec<Option<&mut KvCache>> = self.caches.iter_mut().map(Some).collect();
        let mut continued = Vec::new();
        for (sequence, ids) in new {
            let cache = caches.get_mut(*sequence).and_then(Option::take).ok_or_else(no_sequence)?;
            if cache.tokens() + ids.len() > self.most {
                return Err(no_room(self.most));
            }
            continued.push((*ids, cache));
        }
        // Within its threads: to hand them every product from outside costs as much as some of them take.
        let engine = &mut self.engine;
        self.threads.install(move || engine.logits(&mut continued, loras))
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) -> usize {
        self.caches.get_mut(sequence).map_or(0, |cache| cache.truncate(tokens))
    }
}

/// That a sequence is as long as there is room for.
pub fn no_room(most: usize) -> Error {
    Error::run(format!("the conversation is longer than the {most} tokens that there is room for"))
}

fn no_adapter() -> Error {
    Error::run("there is no adapter of that place")
}

fn no_sequence() -> Error {
    Error::run("there is no sequence of that place, or it is named twice")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;
    use crate::testing::op_cases;

    #[test]
    fn caches_fit() {
        let (_, graph) = op_cases().unwrap().into_iter().find(|(name, _)| name.starts_with("attention")).unwrap();
        let wanted = Sequences { count: 3, most: 1000, least: 8 };
        let most = |bytes: usize| most_tokens(&graph, wanted, bytes);
        let of_one = (1..).find(|bytes| most(bytes * 8).is_ok()).unwrap() * 8;
        // So many bytes are 8 tokens of each; up to twice as many are no more, since a cache would grow to 16.
        assert_eq!([of_one, 2 * of_one - 8, 2 * of_one].map(|bytes| most(bytes).unwrap()), [8, 8, 16]);
        assert_eq!(most(usize::MAX).unwrap(), 1000);
        assert!(most(of_one - 8).unwrap_err().to_string().contains("3 sequences of 8 tokens"));
    }
}
