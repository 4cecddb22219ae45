//! A model's weights on the GPU: stacked matrices, vectors, tables; and the adapter's parameters with their ways between the
//! flat buffer and the stacks.

use dpo_plugin_api::graph::{Block, ModelGraph, Weight};
use half::{bf16, f16};
use indicatif::ProgressBar;
use rayon::prelude::*;

use super::device::{Address, Args, Gpu, Memory, Pinned, View};
use super::kernels::Kernels;
use super::memory::{Lowered, aligned};
use super::plan::GpuPlan;
use super::program::Program;
use super::shard::Shard;
use dpo_core::error::{Error, Result};
use dpo_core::lora::Adapter;
use dpo_core::weights::{Checkpoint, blocks};

/// Where weights come from.
pub enum Source<'a> {
    /// Files.
    Checkpoint(&'a Checkpoint),
    /// Random ones of a published shape, for benchmarks.
    Random,
    /// What a function gives for a tensor's name and shape.
    Given(Given<'a>),
}

/// Values of a tensor, by its name and shape.
pub type Given<'a> = &'a dyn Fn(&str, &[usize]) -> Vec<f32>;

/// The stacked weights of a group, `[[W, s·B], [A, 0]]`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stack {
    pub at: Address,
    /// Elements from row to row.
    pub ld: usize,
    /// f32 gradients by A `[rank, inputs]` and, transposed, by B `[rank, outputs]`.
    pub gradients: [Address; 2],
    pub bias: Address,
}

/// A block's weights.
#[derive(Clone, Debug, Default)]
pub(super) struct BlockWeights {
    pub stacks: Vec<Stack>,
    /// Of nodes with a vector: its address.
    pub vectors: Vec<Address>,
}

/// All weights.
pub(super) struct Weights {
    pub layers: Vec<BlockWeights>,
    pub head: BlockWeights,
    /// `[vocab, hidden]` bf16, on the GPU or in pinned host memory.
    pub embedding: Address,
    pub projection: Address,
    /// Where ranks share the layers.
    pub shard: Option<Shard>,
    /// The f32 gradients of all stacks, one after the other.
    pub gradients: Memory,
    _memory: Memory,
    _table: Option<Pinned>,
}

/// Takes pieces of memory one after the other.
struct Arena {
    next: Address,
    end: Address,
}

impl Arena {
    fn of(memory: &Memory) -> Arena {
        Arena { next: memory.address, end: memory.address + memory.bytes as u64 }
    }

    fn take(&mut self, bytes: usize) -> Result<Address> {
        let at = self.next;
        self.next += aligned(bytes) as u64;
        if self.next > self.end {
            return Err(Error::run("weights take more memory than was planned"));
        }
        Ok(at)
    }
}

/// Bytes that go to the GPU at once.
const STAGE: usize = 64 << 20;

/// Copies tensors to the GPU through two pinned buffers, so that reading one overlaps sending the other.
struct Loader<'a> {
    gpu: &'a Gpu,
    kernels: &'a Kernels,
    source: &'a Source<'a>,
    stages: [Pinned; 2],
    at: usize,
    seed: u32,
    progress: &'a ProgressBar,
}

impl Loader<'_> {
    /// A matrix or a vector in rows that are `pitch` bytes apart.
    fn load(&mut self, prefix: &str, weight: &Weight, to: Address, pitch: usize) -> Result<()> {
        let columns = *weight.shape.last().unwrap_or(&1);
        let rows: usize = weight.shape.iter().rev().skip(1).product();
        let row = columns * 2;
        let checkpoint = match self.source {
            Source::Checkpoint(checkpoint) => checkpoint,
            Source::Given(values) => {
                let values = values(&format!("{prefix}{}", weight.tensor), &weight.shape);
                let bits: Vec<u16> = values.into_iter().map(|v| bf16::from_f32(v).to_bits()).collect();
                for (at, row) in bits.chunks_exact(columns).enumerate() {
                    self.gpu.upload(row, to + (at * pitch) as u64)?;
                }
                return self.gpu.finish();
            }
            Source::Random => {
                self.seed += 1;
                if weight.shape.len() == 1 {
                    let one = if weight.role == "bias" { 0.0 } else { 1.0 };
                    return self.gpu.upload(&vec![bf16::from_f32(one).to_bits(); columns], to);
                }
                let args = Args::default()
                    .with(View { at: to, ld: (pitch / 2) as i64 })
                    .with(rows as i64)
                    .with(columns as i32)
                    .with(0.02_f32)
                    .with(self.seed);
                return self.gpu.launch(self.kernels.get("random")?, [1024, 1, 1], [256, 1, 1], 0, args);
            }
        };
        let (dtype, bytes) = checkpoint.raw(prefix, weight)?;
        let word = dtype.size_in_bytes();
        let most = (STAGE / row).max(1);
        for first in (0..rows).step_by(most) {
            let count = most.min(rows - first);
            let from = &bytes[first * columns * word..(first + count) * columns * word];
            let stage = &mut self.stages[self.at].bytes_mut()[..count * row];
            match dtype {
                candle_core::DType::BF16 => {
                    stage
                        .par_chunks_mut(1 << 20)
                        .zip(from.par_chunks(1 << 20))
                        .for_each(|(to, from)| to.copy_from_slice(from));
                }
                candle_core::DType::F16 => {
                    convert(stage, from, |b: [u8; 2]| bf16::from_f32(f16::from_le_bytes(b).to_f32()))
                }
                _ => convert(stage, from, |b: [u8; 4]| bf16::from_f32(f32::from_le_bytes(b))),
            }
            // The other buffer's copy is done before it is written again.
            self.gpu.finish()?;
            self.gpu.upload_rows(
                &self.stages[self.at].bytes()[..count * row],
                to + (first * pitch) as u64,
                row,
                count,
                pitch,
            )?;
            self.at ^= 1;
            self.progress.inc((count * columns * word) as u64);
        }
        Ok(())
    }
}

fn convert<const N: usize>(to: &mut [u8], from: &[u8], one: impl Fn([u8; N]) -> bf16 + Sync) {
    to.par_chunks_exact_mut(2).zip(from.par_chunks_exact(N)).for_each(|(to, from)| {
        let mut bytes = [0; N];
        bytes.copy_from_slice(from);
        to.copy_from_slice(&one(bytes).to_le_bytes());
    });
}

impl Weights {
    /// Loads everything as planned, on a rank of those that share the layers.
    pub(super) fn load(
        gpu: &Gpu,
        kernels: &Kernels,
        graph: &ModelGraph,
        lowered: &Lowered,
        source: &Source<'_>,
        (plan, rank): (&GpuPlan, usize),
        progress: &ProgressBar,
    ) -> Result<Weights> {
        let layers: Vec<usize> = (0..graph.layers.len()).map(|layer| lowered.layer(graph, layer)).collect();
        let (rest, table) = lowered.rest(graph);
        let host_embedding = plan.host_embedding > 0;
        let shard = if plan.ranks > 1 { Some(Shard::new(gpu, &layers, rank, plan.ranks)?) } else { None };
        let here: usize = if shard.is_some() { 0 } else { layers.iter().sum() };
        let memory = gpu.allocate(here + rest + if host_embedding { 0 } else { table })?;
        let gradients = graph.layers.iter().map(|l| &lowered.programs[l.block]);
        let gradients: usize =
            gradients.map(|p| (0..p.groups.len()).flat_map(|g| lowered.stacked_gradients(p, g)).sum::<usize>()).sum();
        let gradients = gpu.allocate(gradients.max(256))?;
        let mut arena = Arena::of(&memory);
        // What is not written, such as B of a linear without an adapter, is zero.
        gpu.zero(memory.address, memory.bytes)?;
        gpu.zero(gradients.address, gradients.bytes)?;
        let stages = [gpu.pinned(STAGE)?, gpu.pinned(STAGE)?];
        let mut loader = Loader { gpu, kernels, source, stages, at: 0, seed: 0, progress };
        let mut next_gradient = gradients.address;
        let mut of_blocks = Vec::new();
        for (at, (block, prefix)) in blocks(graph).enumerate().skip(1) {
            let program = match graph.layers.get(at - 1) {
                Some(layer) => &lowered.programs[layer.block],
                None => &lowered.head,
            };
            let shared = shard.as_ref().filter(|_| at <= graph.layers.len()).map(|shard| (shard, at - 1));
            let mut place = match shared {
                Some((shard, layer)) => {
                    let place = shard.place(layer);
                    gpu.zero(place.address, place.bytes)?;
                    Some(Arena::of(place))
                }
                None => None,
            };
            let arena = place.as_mut().unwrap_or(&mut arena);
            of_blocks.push(load_block(&mut loader, arena, &mut next_gradient, lowered, program, block, prefix)?);
            if let Some((shard, layer)) = shared {
                shard.keep(gpu, layer)?;
            }
        }
        let row = graph.hidden_size * 2;
        let embedding_weight = &graph.embed.nodes[0].weights[0];
        let tied = Lowered::tied(graph);
        let (embedding, table) = if host_embedding && !tied {
            let mut table = gpu.pinned(table)?;
            match source {
                Source::Checkpoint(checkpoint) => {
                    let (dtype, bytes) = checkpoint.raw("", embedding_weight)?;
                    let to = table.bytes_mut();
                    match dtype {
                        candle_core::DType::BF16 => to.copy_from_slice(bytes),
                        candle_core::DType::F16 => {
                            convert(to, bytes, |b: [u8; 2]| bf16::from_f32(f16::from_le_bytes(b).to_f32()))
                        }
                        _ => convert(to, bytes, |b: [u8; 4]| bf16::from_f32(f32::from_le_bytes(b))),
                    }
                }
                Source::Random | Source::Given(_) => {
                    loader.load("", embedding_weight, table.address(), row)?;
                }
            }
            (table.address(), Some(table))
        } else {
            let at = arena.take(embedding_weight.shape.iter().product::<usize>() * 2)?;
            loader.load("", embedding_weight, at, row)?;
            (at, None)
        };
        let projection = match graph.head.nodes.last().and_then(|n| n.weights.first()) {
            Some(_) if tied => embedding,
            Some(weight) => {
                let at = arena.take(graph.vocab_size * row)?;
                loader.load("", weight, at, row)?;
                at
            }
            None => return Err(Error::run("the head has no projection")),
        };
        gpu.finish()?;
        let head = of_blocks.pop().unwrap_or_default();
        Ok(Weights { layers: of_blocks, head, embedding, projection, shard, gradients, _memory: memory, _table: table })
    }

    /// The adapter's matrices with their places in the stacks.
    pub(super) fn parts(&self, lowered: &Lowered, graph: &ModelGraph, adapter: &Adapter) -> Result<Vec<[u64; 8]>> {
        let mut parts = Vec::new();
        for site in &adapter.sites {
            let layer = site.node.0 - 1;
            let program = &lowered.programs[graph.layers[layer].block];
            let found = program
                .groups
                .iter()
                .enumerate()
                .find_map(|(at, g)| Some((at, g, g.members.iter().find(|m| m.node == site.node.1)?)));
            let Some((at, group, member)) = found else { return Err(Error::run("an adapted linear is in no group")) };
            let stack = self.layers[layer].stacks[at];
            let [a, b] = adapter.ranges(site);
            let rank = adapter.config.rank;
            let element = |row: usize, column: usize| stack.at + ((row * stack.ld + column) * 2) as u64;
            // As `struct Part` of adamw.cu has them.
            let sizes = |rows: usize, columns: usize| rows as u64 | (columns as u64) << 32;
            let scale = |s: f64| u64::from((s as f32).to_bits());
            parts.push([
                a.start as u64,
                element(group.outputs + member.rank_column, 0),
                stack.gradients[0] + (member.rank_column * group.inputs * 4) as u64,
                stack.ld as u64,
                group.inputs as u64,
                1,
                sizes(rank, site.inputs),
                scale(1.0),
            ]);
            parts.push([
                b.start as u64,
                element(member.column, group.inputs + member.rank_column),
                stack.gradients[1] + ((member.rank_column * group.outputs + member.column) * 4) as u64,
                stack.ld as u64,
                1,
                group.outputs as u64,
                sizes(site.outputs, rank),
                scale(adapter.config.scale()),
            ]);
        }
        Ok(parts)
    }
}

fn load_block(
    loader: &mut Loader<'_>,
    arena: &mut Arena,
    next_gradient: &mut Address,
    lowered: &Lowered,
    program: &Program,
    block: &Block,
    prefix: &str,
) -> Result<BlockWeights> {
    let mut own = BlockWeights { stacks: Vec::new(), vectors: vec![0; block.nodes.len()] };
    for (at, group) in program.groups.iter().enumerate() {
        let (bytes, row) = lowered.stack(program, at);
        let mut stack = Stack { at: arena.take(bytes)?, ld: row / 2, ..Stack::default() };
        for (gradient, bytes) in stack.gradients.iter_mut().zip(lowered.stacked_gradients(program, at)) {
            *gradient = *next_gradient;
            *next_gradient += bytes as u64;
        }
        if group.bias {
            stack.bias = arena.take(group.outputs * 2)?;
        }
        for member in &group.members {
            for weight in &block.nodes[member.node].weights {
                if weight.role == "bias" {
                    loader.load(prefix, weight, stack.bias + (member.column * 2) as u64, weight.shape[0] * 2)?;
                } else {
                    loader.load(prefix, weight, stack.at + (member.column * row) as u64, row)?;
                }
            }
        }
        own.stacks.push(stack);
    }
    for (index, node) in block.nodes.iter().enumerate().filter(|(_, n)| n.op == "rms_norm") {
        let at = arena.take(node.weights[0].shape[0] * 2)?;
        loader.load(prefix, &node.weights[0], at, node.weights[0].shape[0] * 2)?;
        own.vectors[index] = at;
    }
    Ok(own)
}
