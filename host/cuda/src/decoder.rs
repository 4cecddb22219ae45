//! A GPU that answers: the programs that train, with memory for the keys and values of some sequences.

use dpo_plugin_api::graph::ModelGraph;
use indicatif::ProgressBar;

use super::engine::CudaDevice;
use super::gpu::{Gpu, Memory, Pinned, View};
use super::launch::KvCache;
use super::loading::Source;
use super::lowered::Lowered;
use super::plan::{GpuPlan, Room};
use dpo_core::batch::{Batch, Layout};
use dpo_core::cpu_decoder::no_room;
use dpo_core::decoder::{CHUNK, Decoder, Sequences};
use dpo_core::error::{Error, Result};
use dpo_core::lora::{Adapter, in_one_shape};
use dpo_core::memory::size;
use dpo_core::ops;
use dpo_core::plan::MemoryOptions;

/// One GPU, in bf16.
pub struct CudaDecoder {
    device: CudaDevice,
    /// Parameters of each adapter, where there are several; the device has those of one.
    adapters: Vec<Memory>,
    current: usize,
    sequences: Vec<Sequence>,
    /// Of every sequence, one after the other: keys `[tokens, columns]` and values of every layer.
    cache: Memory,
    /// What a pass says of its rows' sequences.
    rows: Memory,
    /// [`KvCache::SCRATCH`] bytes.
    scratch: Memory,
    /// Room for logits.
    staged: Pinned,
    /// Of every layer.
    columns: Vec<Columns>,
    /// Columns of all layers.
    width: usize,
    /// Where lies what a layer's ops carry from token to token, and how much that is of all layers.
    carried: (Vec<usize>, usize),
    /// Tokens that a sequence has room for.
    most: usize,
}

/// Where a layer's keys lie in a sequence's memory, in elements a token, and how many keys and values there are in a token's row.
type Columns = (usize, [usize; 2]);

/// What is known of a sequence.
struct Sequence {
    tokens: usize,
    /// What ops carry, behind all tokens, and as it was behind the first `kept`.
    carried: Memory,
    earlier: Memory,
    kept: usize,
}

impl CudaDecoder {
    /// Loads the frozen weights and the adapters, and plans the rest of the memory for sequences.
    ///
    /// # Errors
    /// A model that does not fit, or whose blocks attend more than once; adapters that cannot share a device.
    pub fn load(
        gpu: Gpu,
        graph: ModelGraph,
        source: &Source<'_>,
        adapters: Vec<Adapter>,
        wanted: Sequences,
        (room, options): (Room, MemoryOptions),
        progress: &ProgressBar,
    ) -> Result<CudaDecoder> {
        let (columns, width) = columns(&graph)?;
        let adapters = in_one_shape(adapters)?;
        let several = adapters.len() > 1;
        let adapter = adapters.first().map_or_else(|| Adapter::idle(&graph), |adapter| Ok(adapter.clone()))?;
        let kept = if several { adapters.len() * adapter.params.len() * 4 } else { 0 };
        let options = MemoryOptions { micro_batch_tokens: Some(CHUNK), recompute: Some(true), ..options };
        let longest = CHUNK.max(wanted.count);
        let scored = wanted.count as f64 / longest as f64;
        let plan = GpuPlan::new(&graph, &adapter, longest, scored, room, 1, options)?;
        let lowered = Lowered::new(&graph, &adapter, plan.layers.numbers, plan.gates)?;
        let (mut places, mut carried) = (Vec::new(), 0);
        for layer in &graph.layers {
            places.push(carried);
            carried += lowered.programs[layer.block].carried;
        }
        let states = wanted.count * 2 * carried.max(1);
        let left = room.available.saturating_sub(plan.total() + KvCache::SCRATCH + states + kept);
        let per_token = wanted.count * width * 2;
        let most = (left / per_token.max(1)).min(wanted.most);
        if most < wanted.least {
            let (need, left) = (size(per_token * wanted.least), size(left));
            let of = format!("{} sequences of {} tokens", wanted.count, wanted.least);
            return Err(Error::input(format!("{left} of the GPU are left for keys and values, {of} need {need}"))
                .help("take a GPU with more memory, fewer or shorter sequences, or --quantization nf4"));
        }
        let staged = gpu.pinned(wanted.count * lowered.projection.rows * 4)?;
        let scratch = gpu.allocate(KvCache::SCRATCH)?;
        gpu.zero(scratch.address, scratch.bytes)?;
        let cache = gpu.allocate((wanted.count * most * width * 2).max(1))?;
        let rows = gpu.allocate(longest * KvCache::SEQUENCE)?;
        let sequence = |_| {
            let [carried, earlier] = [gpu.allocate(carried.max(1))?, gpu.allocate(carried.max(1))?];
            Ok(Sequence { tokens: 0, carried, earlier, kept: 0 })
        };
        let sequences = (0..wanted.count).map(sequence).collect::<Result<Vec<_>>>()?;
        let keep = |adapter: &Adapter| {
            let memory = gpu.allocate(adapter.params.len() * 4)?;
            gpu.upload(&adapter.params, memory.address)?;
            gpu.finish()?;
            Ok(memory)
        };
        let kept = if several { adapters.iter().map(keep).collect::<Result<Vec<_>>>()? } else { Vec::new() };
        let mut device = CudaDevice::load(gpu, graph, source, adapter, (plan, 0), progress)?;
        device.warm_up_for_sequences(if carried > 0 { 1 } else { wanted.count })?;
        Ok(CudaDecoder {
            device,
            adapters: kept,
            current: 0,
            sequences,
            cache,
            rows,
            scratch,
            staged,
            columns,
            width,
            carried: (places, carried),
            most,
        })
    }

    /// The GPU, for times and memory.
    pub fn gpu(&self) -> &Gpu {
        self.device.gpu()
    }

    /// Has an adapter in the device's place for one.
    fn exchange(&mut self, adapter: usize) -> Result<()> {
        if adapter != self.current
            && let Some(params) = self.adapters.get(adapter)
        {
            self.device.exchange_adapter(params)?;
            self.current = adapter;
        }
        Ok(())
    }

    /// One pass: of several sequences a token each, or of one any number.
    fn pass(&mut self, adapted: bool, new: &[(usize, &[u32])]) -> Result<Vec<Vec<f32>>> {
        let own: Vec<Layout> =
            new.iter().map(|(at, ids)| Layout::after(self.sequences[*at].tokens, ids.len())).collect();
        let (each, first) = (new.iter().all(|(_, ids)| ids.len() == 1), new[0].0);
        let layout = if let [one] = own.as_slice() { one.clone() } else { Layout::beside(&own) };
        let ids: Vec<u32> = new.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
        let batch = Batch { ids, layout, targets: vec![0; new.len()], ..Batch::default() };
        let rows: Vec<u32> = new.iter().flat_map(|(at, _)| [*at as u32, self.sequences[*at].tokens as u32]).collect();
        self.device.gpu().upload(&rows, self.rows.address)?;
        // A state cannot be cut: it is kept as it was before several tokens came.
        let (places, bytes) = &self.carried;
        let keeps = *bytes > 0 && !each;
        let sequence = &self.sequences[first];
        if keeps {
            self.device.gpu().copy(sequence.carried.address, sequence.earlier.address, *bytes)?;
        }
        let tokens = new.iter().map(|(at, _)| self.sequences[*at].tokens).max().unwrap_or(0);
        let apart = self.most * self.width;
        let address = self.cache.address + if each { 0 } else { (first * apart * 2) as u64 };
        let (columns, most) = (&self.columns, self.most);
        let (sequences, scratch, carried) = (self.rows.address, self.scratch.address, sequence.carried.address);
        let cache = |layer: usize| {
            let (before, [of_keys, of_values]) = columns[layer];
            let from = address + (before * most * 2) as u64;
            let keys = View { at: from, ld: of_keys as i64 };
            let values = View { at: from + (of_keys * most * 2) as u64, ld: of_values as i64 };
            let carried = carried + places[layer] as u64;
            KvCache { tokens, each, keys, values, apart: apart as i64, sequences, carried, scratch }
        };
        let logits = self.device.continue_sequences(&mut self.staged, &batch, cache, adapted)?;
        for (at, ids) in new {
            let sequence = &mut self.sequences[*at];
            sequence.kept = if keeps { sequence.tokens } else { sequence.kept };
            sequence.tokens += ids.len();
        }
        Ok(logits)
    }
}

/// Columns of every layer, and how many there are in all.
fn columns(graph: &ModelGraph) -> Result<(Vec<Columns>, usize)> {
    let (mut columns, mut width) = (Vec::new(), 0);
    for layer in &graph.layers {
        let nodes = &graph.blocks[layer.block].nodes;
        let caching = nodes.iter().map(|n| Ok((n, ops::find(&n.op)?.cached_inputs))).collect::<Result<Vec<_>>>()?;
        let caching: Vec<_> = caching.into_iter().filter(|(_, inputs)| !inputs.is_empty()).collect();
        let own = match caching.as_slice() {
            [] => [0; 2],
            // A value is made by the node before its number.
            [(node, [keys, values])] => [keys, values]
                .map(|input| node.inputs[*input].checked_sub(1).map_or(graph.hidden_size, |maker| nodes[maker].width)),
            _ => {
                return Err(Error::input("a GPU answers with models whose every block attends once at most")
                    .help("--device cpu answers with any"));
            }
        };
        columns.push((width, own));
        width += own[0] + own[1];
    }
    Ok((columns, width))
}

impl Decoder for CudaDecoder {
    fn name(&self) -> String {
        format!("{} bfloat16", self.device.gpu().name)
    }

    fn sequences(&self) -> (usize, usize) {
        (self.sequences.len(), self.most)
    }

    fn append(&mut self, adapter: Option<usize>, new: &[(usize, &[u32])]) -> Result<Vec<Vec<f32>>> {
        for (at, ids) in new {
            let sequence = self.sequences.get(*at).ok_or_else(|| Error::run("there is no sequence of that place"))?;
            if ids.is_empty() || ids.len() > CHUNK {
                return Err(Error::run(format!("{} tokens at once, of 1 to {CHUNK}", ids.len())));
            }
            if sequence.tokens + ids.len() > self.most {
                return Err(no_room(self.most));
            }
        }
        adapter.map_or(Ok(()), |adapter| self.exchange(adapter))?;
        // Those with a state go one by one: a state is of one sequence.
        let (one, more): (Vec<usize>, Vec<usize>) =
            (0..new.len()).partition(|at| new[*at].1.len() == 1 && self.carried.1 == 0);
        let mut logits = vec![Vec::new(); new.len()];
        for group in [one].into_iter().filter(|group| !group.is_empty()).chain(more.into_iter().map(|at| vec![at])) {
            let own: Vec<_> = group.iter().map(|at| new[*at]).collect();
            for (at, of_sequence) in group.into_iter().zip(self.pass(adapter.is_some(), &own)?) {
                logits[at] = of_sequence;
            }
        }
        Ok(logits)
    }

    fn truncate(&mut self, sequence: usize, tokens: usize) -> usize {
        let (Some(sequence), bytes) = (self.sequences.get_mut(sequence), self.carried.1) else { return 0 };
        if tokens >= sequence.tokens {
            return sequence.tokens;
        }
        sequence.tokens = tokens;
        if bytes > 0 {
            // Back to where a state is kept, or to the beginning.
            let (from, to) = (sequence.earlier.address, sequence.carried.address);
            let kept = sequence.kept <= tokens && self.device.gpu().copy(from, to, bytes).is_ok();
            sequence.tokens = if kept { sequence.kept } else { 0 };
            sequence.kept = sequence.tokens;
        }
        sequence.tokens
    }
}
