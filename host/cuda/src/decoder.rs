//! A GPU that answers: the programs that train, with memory for the keys and values of a text for each variant.

use dpo_plugin_api::graph::ModelGraph;
use indicatif::ProgressBar;

use super::engine::CudaDevice;
use super::gpu::{Gpu, Memory, Pinned, View};
use super::launch::KvCache;
use super::loading::Source;
use super::lowered::Lowered;
use super::plan::{GpuPlan, Room};
use dpo_core::decoder::{CHUNK, Decoder, Variant};
use dpo_core::error::{Error, Result};
use dpo_core::lora::Adapter;
use dpo_core::memory::size;
use dpo_core::ops;
use dpo_core::plan::MemoryOptions;

/// Tokens of a text that are cached at most, where memory has room for more.
const MOST: usize = 32 << 10;

/// One GPU, in bf16.
pub struct CudaDecoder {
    device: CudaDevice,
    texts: Vec<Text>,
    /// [`KvCache::SCRATCH`] bytes.
    scratch: Memory,
    /// Room for logits.
    staged: Pinned,
    /// Where a layer's keys lie in a text's memory, in elements a token, and how many keys and values there are in a token's row.
    rows: Vec<(usize, [usize; 2])>,
    /// Where lies what a layer's ops carry from token to token, and how much that is of all layers.
    carried: (Vec<usize>, usize),
    /// Tokens that a text has room for.
    most: usize,
}

/// The KV cache of a variant's text.
struct Text {
    /// Keys `[tokens, columns]` and values of every layer, one after the other.
    memory: Memory,
    tokens: usize,
    /// What ops carry, behind all tokens, and as it was behind the first `kept`.
    carried: Memory,
    earlier: Memory,
    kept: usize,
}

impl CudaDecoder {
    /// Loads the frozen weights and the adapter, and plans the rest of the memory for texts.
    ///
    /// # Errors
    /// A model that does not fit, or whose blocks attend more than once.
    pub fn load(
        gpu: Gpu,
        graph: ModelGraph,
        source: &Source<'_>,
        adapter: Option<Adapter>,
        (room, options): (Room, MemoryOptions),
        progress: &ProgressBar,
    ) -> Result<CudaDecoder> {
        let (mut rows, mut width) = (Vec::new(), 0);
        for layer in &graph.layers {
            let nodes = &graph.blocks[layer.block].nodes;
            let caching = nodes.iter().map(|n| Ok((n, ops::find(&n.op)?.cached_inputs))).collect::<Result<Vec<_>>>()?;
            let caching: Vec<_> = caching.into_iter().filter(|(_, inputs)| !inputs.is_empty()).collect();
            let own = match caching.as_slice() {
                [] => [0; 2],
                // A value is made by the node before its number.
                [(node, [keys, values])] => [keys, values].map(|input| {
                    node.inputs[*input].checked_sub(1).map_or(graph.hidden_size, |maker| nodes[maker].width)
                }),
                _ => {
                    return Err(Error::input("a GPU answers with models whose every block attends once at most")
                        .help("--device cpu answers with any"));
                }
            };
            rows.push((width, own));
            width += own[0] + own[1];
        }
        let variants = if adapter.is_some() { 2 } else { 1 };
        let adapter = adapter.map_or_else(|| Adapter::idle(&graph), Ok)?;
        let options = MemoryOptions { micro_batch_tokens: Some(CHUNK), recompute: Some(true), ..options };
        let plan = GpuPlan::new(&graph, &adapter, CHUNK, 1.0 / CHUNK as f64, room, 1, options)?;
        let lowered = Lowered::new(&graph, &adapter, plan.layers.numbers, plan.gates)?;
        let (mut places, mut carried) = (Vec::new(), 0);
        for layer in &graph.layers {
            places.push(carried);
            carried += lowered.programs[layer.block].carried;
        }
        let states = variants * 2 * carried.max(1);
        let left = room.available.saturating_sub(plan.total() + KvCache::SCRATCH + states);
        let most = (left / (variants * width * 2).max(1)).min(MOST);
        if most < CHUNK {
            let need = size(variants * width * 2 * CHUNK);
            return Err(Error::input(format!("{} of the GPU are left for texts, {need} are needed", size(left)))
                .help("take a GPU with more memory, or answer with --device cpu"));
        }
        let staged = gpu.pinned(graph.vocab_size * 4)?;
        let scratch = gpu.allocate(KvCache::SCRATCH)?;
        gpu.zero(scratch.address, scratch.bytes)?;
        let mut texts = Vec::new();
        for _ in 0..variants {
            let [carried, earlier] = [gpu.allocate(carried.max(1))?, gpu.allocate(carried.max(1))?];
            texts.push(Text { memory: gpu.allocate((most * width * 2).max(1))?, tokens: 0, carried, earlier, kept: 0 });
        }
        let mut device = CudaDevice::load(gpu, graph, source, adapter, (plan, 0), progress)?;
        for tokens in [1, CHUNK] {
            device.warm_up_for(tokens)?;
        }
        Ok(CudaDecoder { device, texts, scratch, staged, rows, carried: (places, carried), most })
    }
}

impl Decoder for CudaDecoder {
    fn name(&self) -> String {
        format!("{} bfloat16", self.device.gpu().name)
    }

    fn append(&mut self, variant: Variant, ids: &[u32]) -> Result<Vec<f32>> {
        // Without an adapter both variants are one.
        let at = (variant as usize).min(self.texts.len() - 1);
        let (text, rows, most) = (&self.texts[at], &self.rows, self.most);
        if text.tokens + ids.len() > most {
            return Err(Error::run(format!(
                "the conversation is longer than the {most} tokens that the GPU has room for"
            )));
        }
        let (address, cached, scratch) = (text.memory.address, text.tokens, self.scratch.address);
        let (places, bytes) = &self.carried;
        // A state cannot be cut: it is kept as it was before several tokens came.
        let keeps = *bytes > 0 && ids.len() > 1;
        if keeps {
            self.device.gpu().copy(text.carried.address, text.earlier.address, *bytes)?;
        }
        let cache = |layer: usize| {
            let (before, [of_keys, of_values]) = rows[layer];
            let from = address + (before * most * 2) as u64;
            let keys = View { at: from, ld: of_keys as i64 };
            let values = View { at: from + (of_keys * most * 2) as u64, ld: of_values as i64 };
            KvCache { tokens: cached, keys, values, carried: text.carried.address + places[layer] as u64, scratch }
        };
        let logits = self.device.continue_text(&mut self.staged, ids, cached, cache, variant == Variant::Tuned)?;
        let text = &mut self.texts[at];
        text.tokens += ids.len();
        text.kept = if keeps { cached } else { text.kept };
        Ok(logits)
    }

    fn truncate(&mut self, variant: Variant, tokens: usize) -> usize {
        let at = (variant as usize).min(self.texts.len() - 1);
        let (text, bytes) = (&mut self.texts[at], self.carried.1);
        if tokens >= text.tokens {
            return text.tokens;
        }
        text.tokens = tokens;
        if bytes > 0 {
            // Back to where a state is kept, or to the beginning.
            let (from, to) = (text.earlier.address, text.carried.address);
            let kept = text.kept <= tokens && self.device.gpu().copy(from, to, bytes).is_ok();
            text.tokens = if kept { text.kept } else { 0 };
            text.kept = text.tokens;
        }
        text.tokens
    }
}
