//! The CPU as a decoder: the engine that trains, with a memory for each variant.

use dpo_plugin_api::graph::ModelGraph;
use rayon::ThreadPool;

use crate::base::Base;
use crate::decoder::{Decoder, Variant};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::lora::Adapter;
use crate::memory::{free_memory, size};
use crate::ops::KvCache;
use crate::plan::{MemoryOptions, weights};
use crate::storage::Quantization;
use crate::weights::Checkpoint;

/// The CPU, in f32. Weights are kept as the checkpoint has them, where that is bf16: they are the same numbers. Those that are
/// quantised are made whole for every token, a layer at a time.
pub struct CpuDecoder {
    engine: Engine,
    threads: ThreadPool,
    caches: [KvCache; 2],
}

impl CpuDecoder {
    /// Loads the frozen weights, unless they do not fit.
    ///
    /// # Errors
    /// A checkpoint that cannot be read, or takes more memory than there is.
    pub fn load(
        graph: &ModelGraph,
        checkpoint: &Checkpoint,
        adapter: Option<Adapter>,
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
        let adapter = adapter.map_or_else(|| Adapter::idle(graph), Ok)?;
        CpuDecoder::of(Engine::new(graph.clone(), Base::load_kept(graph, checkpoint, quantization)?, adapter)?)
    }

    /// An engine that has its weights already.
    ///
    /// # Errors
    /// Threads that the system does not give.
    pub fn of(engine: Engine) -> Result<CpuDecoder> {
        Ok(CpuDecoder { threads: engine.threads()?, engine, caches: Default::default() })
    }
}

impl Decoder for CpuDecoder {
    fn name(&self) -> String {
        self.engine.name()
    }

    fn append(&mut self, variant: Variant, ids: &[u32]) -> Result<Vec<f32>> {
        // Within its threads: to hand them every product from outside costs as much as some of them take.
        let (engine, cache) = (&mut self.engine, &mut self.caches[variant as usize]);
        self.threads.install(move || engine.logits(ids, cache, variant == Variant::Tuned))
    }

    fn truncate(&mut self, variant: Variant, tokens: usize) -> usize {
        self.caches[variant as usize].truncate(tokens)
    }
}
