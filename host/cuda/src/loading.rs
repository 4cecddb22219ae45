//! Loads a model's frozen weights onto the GPU, each to where its program reads it, and finds the adapter's places among them.

use candle_core::DType;
use dpo_plugin_api::graph::{ModelGraph, Node, Weight};
use half::{bf16, f16};
use indicatif::ProgressBar;
use rayon::prelude::*;

use super::arena::Arena;
use super::gpu::{Address, Gpu, Memory, Pinned, View};
use super::kernels::Kernels;
use super::lowered::{Lowered, projection, table_values};
use super::ops::{fp8, mxfp4, nf4};
use super::optimizer::{Group, Part, random};
use super::plan::GpuPlan;
use super::program::Program;
use super::weights::{BlockWeights, LayerStore, LoadedFp8, LoadedMxfp4, LoadedNf4, Matrix, NUMBERS, Stack};
use dpo_core::error::{Error, Result};
use dpo_core::fp8::{MAX, quantize_rows};
use dpo_core::lora::Adapter;
use dpo_core::mxfp4::{Mxfp4, quantize_rows as mxfp4_rows};
use dpo_core::nf4::{Nf4, quantize};
use dpo_core::storage::Place;
use dpo_core::weights::{BlockId, Checkpoint, blocks};

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

/// All weights.
pub(crate) struct Weights {
    /// Its tables are on the GPU or in pinned host memory.
    pub embed: BlockWeights,
    pub layers: Vec<BlockWeights>,
    pub head: BlockWeights,
    /// `[vocab, hidden]`, and `[vocab]` where it has a bias.
    pub projection: Address,
    pub projection_bias: Address,
    pub store: LayerStore,
    /// The f32 gradients of all stacks, one after the other.
    pub gradients: Memory,
    _memory: [Memory; 2],
    _tables: Vec<Pinned>,
}

/// Of random codes, the scale of their blocks' scales and what is added: magnitudes as those of a trained matrix.
const RANDOM_SCALES: [f32; 2] = [0.01, 0.05];

/// Of random codes of e4m3, the largest magnitude: a deviation of 0.02.
const RANDOM_LARGEST: f32 = 0.035;

/// Of random codes of mxfp4, the exponent of a scale plus 127: a deviation of 0.023.
const RANDOM_EXPONENT: u8 = 120;

/// Bytes that go to the GPU at once.
const STAGE: usize = 64 << 20;

/// Copies tensors to the GPU through two pinned buffers, so that reading one overlaps sending the other.
struct Loader<'a> {
    gpu: &'a Gpu,
    kernels: &'a Kernels,
    source: &'a Source<'a>,
    stages: [Pinned; 2],
    at: usize,
    /// Of the tensor that is quantised.
    values: Vec<f32>,
    seed: u32,
    progress: &'a ProgressBar,
}

/// How the rows of a tensor lie: their distance in bytes, how many lie one behind the other, and how many others lie between those and the next.
#[derive(Clone, Copy)]
struct Runs {
    pitch: usize,
    rows: usize,
    gap: usize,
}

impl Loader<'_> {
    /// A matrix or a vector in rows that are `pitch` bytes apart.
    fn load(&mut self, prefix: &str, weight: &Weight, to: Address, pitch: usize) -> Result<()> {
        self.load_runs(prefix, weight, to, Runs { pitch, rows: usize::MAX, gap: 0 })
    }

    /// The same in runs of rows.
    fn load_runs(&mut self, prefix: &str, weight: &Weight, to: Address, runs: Runs) -> Result<()> {
        let columns = *weight.shape.last().unwrap_or(&1);
        let rows: usize = weight.shape.iter().rev().skip(1).product();
        let Runs { pitch, .. } = runs;
        let place = |row: usize| to + ((row + row / runs.rows * runs.gap) * pitch) as u64;
        let row = NUMBERS.bytes(columns);
        let checkpoint = match self.source {
            Source::Checkpoint(checkpoint) => checkpoint,
            Source::Given(values) => {
                let values = values(&format!("{prefix}{}", weight.tensor), &weight.shape);
                let bits: Vec<u16> = values.into_iter().map(|v| bf16::from_f32(v).to_bits()).collect();
                for (at, row) in bits.chunks_exact(columns).enumerate() {
                    self.gpu.upload(row, place(at))?;
                }
                return self.gpu.finish();
            }
            Source::Random => {
                if weight.shape.len() == 1 {
                    let one = if weight.role == "bias" { 0.0 } else { 1.0 };
                    return self.gpu.upload(&vec![bf16::from_f32(one).to_bits(); columns], to);
                }
                return (0..rows).step_by(runs.rows).try_for_each(|first| {
                    self.seed += 1;
                    let shape = (runs.rows.min(rows - first), columns, pitch / NUMBERS.bytes(1));
                    random(self.gpu, self.kernels, place(first), shape, 0.02, self.seed)
                });
            }
        };
        let (dtype, bytes) = checkpoint.raw(prefix, weight)?;
        let word = dtype.size_in_bytes();
        let most = (STAGE / row).max(1);
        let mut next = 0;
        while next < rows {
            let first = next;
            let count = most.min(rows - first).min(runs.rows - first % runs.rows);
            next += count;
            let from = &bytes[first * columns * word..(first + count) * columns * word];
            let stage = &mut self.stages[self.at].bytes_mut()[..count * row];
            to_bf16(stage, from, dtype);
            // The other buffer's copy is done before it is written again.
            self.gpu.finish()?;
            self.gpu.upload_rows(&self.stages[self.at].bytes()[..count * row], place(first), row, count, pitch)?;
            self.at ^= 1;
            self.progress.inc((count * columns * word) as u64);
        }
        Ok(())
    }
}

/// Values of a checkpoint in bf16.
fn to_bf16(to: &mut [u8], from: &[u8], dtype: DType) {
    match dtype {
        DType::BF16 => {
            to.par_chunks_mut(1 << 20).zip(from.par_chunks(1 << 20)).for_each(|(to, from)| to.copy_from_slice(from));
        }
        DType::F16 => convert(to, from, |b: [u8; 2]| bf16::from_f32(f16::from_le_bytes(b).to_f32())),
        _ => convert(to, from, |b: [u8; 4]| bf16::from_f32(f32::from_le_bytes(b))),
    }
}

/// Values from their bytes, rounded to bf16.
fn each<const N: usize>(to: &mut [f32], from: &[u8], one: impl Fn([u8; N]) -> bf16 + Sync) {
    const AT_ONCE: usize = 1 << 16;
    let parts = to.par_chunks_mut(AT_ONCE).zip(from.as_chunks::<N>().0.par_chunks(AT_ONCE));
    parts.for_each(|(to, from)| to.iter_mut().zip(from).for_each(|(to, from)| *to = one(*from).to_f32()));
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
    pub(crate) fn load(
        gpu: &Gpu,
        kernels: &Kernels,
        graph: &ModelGraph,
        lowered: &Lowered,
        source: &Source<'_>,
        (plan, rank): (&GpuPlan, usize),
        progress: &ProgressBar,
    ) -> Result<Weights> {
        let bytes = lowered.layers(graph);
        let store = LayerStore::new(gpu, plan.layers, &bytes, rank)?;
        let here: usize = if store.is_resident() { bytes.iter().sum() } else { 0 };
        let memory = gpu.allocate(here + lowered.rest() + lowered.table(graph, plan.table()))?;
        let apart = gpu.allocate(lowered.apart(graph))?;
        let gradients = gpu.allocate(lowered.gradients(graph).max(256))?;
        let (mut arena, mut beside) = (Arena::of(&memory), Arena::of(&apart));
        // What is not written, such as B of a linear without an adapter, is zero.
        for memory in [&memory, &apart, &gradients] {
            gpu.zero(memory.address, memory.bytes)?;
        }
        let stages = [gpu.pinned(STAGE)?, gpu.pinned(STAGE)?];
        let mut loader = Loader { gpu, kernels, source, stages, at: 0, values: Vec::new(), seed: 0, progress };
        let mut next_gradient = gradients.address;
        let (mut layers, mut head) = (Vec::new(), BlockWeights::default());
        for (id, prefix, nodes) in blocks(graph) {
            match id {
                BlockId::Layer(layer) => {
                    let program = &lowered.programs[graph.layers[layer].block];
                    let place = store.place(layer);
                    place.map_or(Ok(()), |place| gpu.zero(place.address, place.bytes))?;
                    let mut own = place.map(Arena::of);
                    let arena = own.as_mut().unwrap_or(&mut arena);
                    layers.push(loader.block([arena, &mut beside], &mut next_gradient, program, nodes, prefix)?);
                    store.keep(gpu, layer)?;
                }
                BlockId::Head => {
                    let places = [&mut arena, &mut beside];
                    head = loader.block(places, &mut next_gradient, &lowered.head, nodes, prefix)?;
                }
                BlockId::Embed | BlockId::Projection => {}
            }
        }
        let nodes = &graph.embed.nodes;
        let mut embed = loader.block([&mut arena, &mut beside], &mut next_gradient, &lowered.embed, nodes, "")?;
        let (mut projection, mut on_host) = (None, Vec::new());
        for (weight, tied) in lowered.embedding_tables(graph) {
            let table = match (tied, plan.table().place) {
                (false, Place::Host) => {
                    let table = loader.on_host(weight)?;
                    let at = table.address();
                    on_host.push(table);
                    at
                }
                _ => loader.table(&mut arena, weight)?,
            };
            projection = projection.or(tied.then_some(table));
            embed.tables.push(table);
        }
        let (node, _) = self::projection(graph)?;
        let projection = match projection {
            Some(table) => table,
            None => loader.table(&mut arena, weight(node, "weight")?)?,
        };
        let projection_bias = node.weight("bias").map(|bias| loader.table(&mut arena, bias)).transpose()?.unwrap_or(0);
        gpu.finish()?;
        Ok(Weights {
            embed,
            layers,
            head,
            projection,
            projection_bias,
            store,
            gradients,
            _memory: [memory, apart],
            _tables: on_host,
        })
    }

    /// The adapter's matrices with their places in the stacks; of every site A and B, then those that are subtracted.
    pub(crate) fn parts(&self, lowered: &Lowered, graph: &ModelGraph, adapter: &Adapter) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        for site in &adapter.sites {
            let (block, node) = site.node;
            let found = match block {
                BlockId::Layer(layer) => {
                    let stacks = lowered.programs[graph.layers[layer].block].stacks.iter();
                    let mut found = stacks.zip(&self.layers[layer].stacks);
                    let role = &graph.blocks[graph.layers[layer].block].nodes[node].weights[site.weight].role;
                    found.find_map(|(stack, loaded)| Some((stack, loaded, stack.member(node, role)?)))
                }
                BlockId::Embed | BlockId::Head | BlockId::Projection => None,
            };
            let Some((stack, loaded, member)) = found else {
                return Err(Error::run("an adapted linear is in no stack"));
            };
            // As `struct Part` of adamw.cu has them.
            let both = |low: usize, high: usize| low as u64 | (high as u64) << 32;
            let scaled = |height: usize, s: f64| height as u64 | u64::from((s as f32).to_bits()) << 32;
            let step = |view: View, rows: usize| (rows as i64 * view.ld) as u64;
            let mut pair = |flat: usize, rank_column: usize, scale: f64, groups: [Group; 2]| {
                let [a, b] = adapter.ranges(site);
                parts.push([
                    (flat + a.start) as u64,
                    loaded.a.row(rank_column).at,
                    loaded.gradients[0] + (rank_column * stack.inputs * 4) as u64,
                    loaded.a.ld as u64,
                    stack.inputs as u64,
                    1,
                    step(loaded.a, loaded.steps[0]),
                    (stack.rank * stack.inputs) as u64,
                    both(site.experts * site.rank, site.inputs),
                    scaled(site.rank, 1.0),
                    groups[0] as u64,
                ]);
                parts.push([
                    (flat + b.start) as u64,
                    loaded.sb.row(member.column).column(rank_column).at,
                    loaded.gradients[1] + ((rank_column * stack.height() + member.column) * 4) as u64,
                    loaded.sb.ld as u64,
                    1,
                    stack.height() as u64,
                    step(loaded.sb, loaded.steps[1]),
                    (stack.rank * stack.height()) as u64,
                    both(site.experts * site.outputs, site.rank),
                    scaled(site.outputs, scale),
                    groups[1] as u64,
                ]);
            };
            pair(0, member.rank_column, site.scale, [Group::A, Group::B]);
            if !adapter.subtracted.is_empty() {
                // Behind the parameters in their buffer, and behind the site's own columns in the stack.
                let column = member.rank_column + site.rank;
                pair(adapter.parameters(), column, -site.scale, [Group::Subtracted; 2]);
            }
        }
        Ok(parts)
    }
}

impl Loader<'_> {
    /// The stacks and vectors of a block: in the first place, what stacks have apart in the other.
    fn block(
        &mut self,
        [arena, beside]: [&mut Arena; 2],
        next_gradient: &mut Address,
        program: &Program,
        nodes: &[Node],
        prefix: &str,
    ) -> Result<BlockWeights> {
        let mut own = BlockWeights::default();
        for stack in &program.stacks {
            let mut places = [0; 3];
            for (place, bytes) in places.iter_mut().zip(stack.apart()) {
                *place = beside.take(bytes)?;
            }
            let mut loaded = stack.at(arena.take(stack.bytes())?, places);
            for (gradient, bytes) in loaded.gradients.iter_mut().zip(stack.gradient_bytes()) {
                *gradient = *next_gradient;
                *next_gradient += bytes as u64;
            }
            if stack.bias {
                loaded.bias = arena.take(stack.bias_bytes())?;
            }
            if let Matrix::Nf4(w) = &loaded.w {
                self.gpu.upload(stack.nf4().members.as_flattened(), places[2])?;
                self.nf4(prefix, nodes, stack, w)?;
            }
            if let Matrix::Fp8(w) = &loaded.w {
                self.fp8(prefix, nodes, stack, w)?;
            }
            if let Matrix::Mxfp4(w) = &loaded.w {
                self.mxfp4(prefix, nodes, stack, w)?;
            }
            for member in &stack.members {
                let node = &nodes[member.node];
                if let Matrix::Bf16(whole) = &loaded.w {
                    let (to, pitch) = (whole.row(member.column), NUMBERS.bytes(whole.ld as usize));
                    let rows = if stack.groups > 1 { stack.height() } else { usize::MAX };
                    let runs = Runs { pitch, rows, gap: stack.rank };
                    self.load_runs(prefix, weight(node, member.role)?, to.at, runs)?;
                }
                if let Some(bias) = node.weight("bias") {
                    let to = loaded.bias + NUMBERS.bytes(member.column) as u64;
                    self.load(prefix, bias, to, NUMBERS.bytes(member.width))?;
                }
            }
            own.stacks.push(loaded);
        }
        for vector in &program.vectors {
            let at = arena.take(vector.bytes())?;
            let weight = weight(&nodes[vector.node], vector.role)?;
            match vector.numbers {
                NUMBERS => self.load(prefix, weight, at, row_bytes(weight))?,
                _ => self.wide(prefix, weight, at)?,
            }
            own.vectors.push(at);
        }
        Ok(own)
    }

    /// W of a stack, quantised here unless it is random; all of it is sent at once.
    fn nf4(&mut self, prefix: &str, nodes: &[Node], stack: &Stack, w: &LoadedNf4) -> Result<()> {
        let layout = stack.nf4();
        if matches!(self.source, Source::Random) {
            self.seed += 1;
            nf4::random(self.gpu, self.kernels, (w.codes, layout.groups.start), self.seed)?;
            let groups = vec![RANDOM_SCALES; layout.groups.len() / size_of_val(&RANDOM_SCALES)];
            return self.gpu.upload(groups.as_flattened(), w.codes + layout.groups.start as u64);
        }
        let mut bytes = vec![0; layout.bytes()];
        for (at, member) in stack.members.iter().enumerate() {
            layout.write(&mut bytes, at, &self.codes(prefix, weight(&nodes[member.node], member.role)?)?);
        }
        self.gpu.upload(&bytes, w.codes)
    }

    /// The same of one in e4m3.
    fn fp8(&mut self, prefix: &str, nodes: &[Node], stack: &Stack, w: &LoadedFp8) -> Result<()> {
        let layout = stack.fp8();
        if matches!(self.source, Source::Random) {
            self.seed += 1;
            fp8::random(self.gpu, self.kernels, (w.codes, layout.codes.len()), self.seed)?;
            return self.gpu.upload(&vec![RANDOM_LARGEST / MAX; stack.outputs], w.scales);
        }
        let mut bytes = vec![0; layout.bytes()];
        for member in &stack.members {
            self.values(prefix, weight(&nodes[member.node], member.role)?)?;
            let (codes, scales) = quantize_rows(&self.values, stack.inputs);
            let rows = bytes[member.column * layout.ld..].chunks_mut(layout.ld);
            rows.zip(codes.chunks(stack.inputs)).for_each(|(to, codes)| to[..codes.len()].copy_from_slice(codes));
            let to = bytes[layout.scales.start + member.column * 4..].chunks_mut(4);
            to.zip(&scales).for_each(|(to, scale)| to.copy_from_slice(&scale.to_le_bytes()));
        }
        self.gpu.upload(&bytes, w.codes)
    }

    /// The same of one in mxfp4.
    fn mxfp4(&mut self, prefix: &str, nodes: &[Node], stack: &Stack, w: &LoadedMxfp4) -> Result<()> {
        let layout = stack.mxfp4();
        if matches!(self.source, Source::Random) {
            self.seed += 1;
            mxfp4::random(self.gpu, self.kernels, (w.codes, layout.codes.len()), self.seed)?;
            return self.gpu.upload(&vec![RANDOM_EXPONENT; layout.scales.len()], w.scales);
        }
        let mut bytes = vec![0; layout.bytes()];
        for member in &stack.members {
            let values = self.mxfp4_of(prefix, weight(&nodes[member.node], member.role)?)?;
            layout.write(&mut bytes, member.column, &values);
        }
        self.gpu.upload(&bytes, w.codes)
    }

    /// Codes and scales: the checkpoint's own, or made of a weight's values as they are in bf16.
    fn mxfp4_of(&mut self, prefix: &str, weight: &Weight) -> Result<Mxfp4> {
        if let Source::Checkpoint(checkpoint) = self.source
            && let Some(values) = checkpoint.mxfp4(prefix, weight)?
        {
            // Checkpoints count what is quantised as bf16.
            self.progress.inc(NUMBERS.bytes(weight.shape.iter().product()) as u64);
            return Ok(values);
        }
        self.values(prefix, weight)?;
        Ok(mxfp4_rows(&self.values, *weight.shape.last().unwrap_or(&1)))
    }

    /// A weight's codes: the checkpoint's own, or made of its values as they are in bf16.
    fn codes(&mut self, prefix: &str, weight: &Weight) -> Result<Nf4> {
        if let Source::Checkpoint(checkpoint) = self.source
            && let Some(codes) = checkpoint.nf4(prefix, weight)?
        {
            self.progress.inc(codes.codes.len() as u64);
            return Ok(codes);
        }
        self.values(prefix, weight)?;
        Ok(quantize(&self.values))
    }

    /// Reads a weight's values, as they are in bf16.
    fn values(&mut self, prefix: &str, weight: &Weight) -> Result<()> {
        let values = &mut self.values;
        values.resize(weight.shape.iter().product(), 0.0);
        match self.source {
            Source::Checkpoint(checkpoint) => {
                let (dtype, bytes) = checkpoint.raw(prefix, weight)?;
                match dtype {
                    DType::BF16 => each(values, &bytes, bf16::from_le_bytes),
                    DType::F16 => each(values, &bytes, |b| bf16::from_f32(f16::from_le_bytes(b).to_f32())),
                    _ => each(values, &bytes, |b| bf16::from_f32(f32::from_le_bytes(b))),
                }
                self.progress.inc(bytes.len() as u64);
            }
            Source::Given(given) => {
                let given = given(&format!("{prefix}{}", weight.tensor), &weight.shape);
                values.iter_mut().zip(given).for_each(|(to, v)| *to = bf16::from_f32(v).to_f32());
            }
            Source::Random => {}
        }
        Ok(())
    }

    /// A vector in f32.
    fn wide(&mut self, prefix: &str, weight: &Weight, to: Address) -> Result<()> {
        let values: Vec<f32> = match self.source {
            Source::Checkpoint(checkpoint) => {
                let (dtype, bytes) = checkpoint.raw(prefix, weight)?;
                let halves = bytes.as_chunks::<2>().0.iter();
                match dtype {
                    DType::BF16 => halves.map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
                    DType::F16 => halves.map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
                    _ => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
                }
            }
            Source::Given(given) => given(&format!("{prefix}{}", weight.tensor), &weight.shape),
            Source::Random => vec![1.0; weight.shape.iter().product()],
        };
        self.gpu.upload(&values, to)?;
        self.gpu.finish()
    }

    /// A table `[rows, columns]`, or a vector of as many values as a table has rows.
    fn table(&mut self, arena: &mut Arena, weight: &Weight) -> Result<Address> {
        let at = arena.take(NUMBERS.bytes(table_values(weight)))?;
        self.load("", weight, at, row_bytes(weight))?;
        Ok(at)
    }

    /// A table in host memory that the GPU reads.
    fn on_host(&mut self, weight: &Weight) -> Result<Pinned> {
        let mut table = self.gpu.pinned(NUMBERS.bytes(weight.shape.iter().product()))?;
        match self.source {
            Source::Checkpoint(checkpoint) => {
                let (dtype, bytes) = checkpoint.raw("", weight)?;
                to_bf16(table.bytes_mut(), &bytes, dtype);
            }
            Source::Random | Source::Given(_) => self.load("", weight, table.address(), row_bytes(weight))?,
        }
        Ok(table)
    }
}

fn row_bytes(weight: &Weight) -> usize {
    NUMBERS.bytes(*weight.shape.last().unwrap_or(&1))
}

/// The weight of a role.
fn weight<'a>(node: &'a Node, role: &str) -> Result<&'a Weight> {
    node.weight(role).ok_or_else(|| Error::run(format!("op '{}' lacks its {role}", node.op)))
}
