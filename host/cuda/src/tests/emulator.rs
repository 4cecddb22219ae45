//! An emulator of lowered programs: it runs them in f32 in one piece of memory, laid out as on a card and full of NaN wherever nothing was
//! written.

use dpo_plugin_api::graph::{Block, ModelGraph};

use super::super::chunks;
use super::super::footprint::{Arrangement, Footprint, Place};
use super::super::inputs::Rows;
use super::super::lowered::Lowered;
use super::super::matmul::Gates;
use super::super::ops::lm_head::LmHead;
use super::super::program::{GRADIENT, OUTPUT, Program, Slice, Step};
use super::super::weights::{Layout, Mxfp4Layout, Stack};
use dpo_core::aux_loss::RouterLoad;
use dpo_core::batch::Batch;
use dpo_core::fp8::{dequantize_rows, quantize_rows};
use dpo_core::lora::{Adapter, Site};
use dpo_core::mxfp4;
use dpo_core::nf4::{BLOCK, SCALE_BLOCK, SCALES, VALUES, quantize};
use dpo_core::ops::answer_mask::AnswerMask;
use dpo_core::storage::Numbers;
use dpo_core::testing::given;
use dpo_core::weights::BlockId;
use half::bf16;

/// A stack's `[[W, s·B], [A, 0]]`, of every group, its bias, and the gradients by A `[groups, rank, inputs]` and B `[groups, rank, outputs / groups]`.
pub(crate) struct StackValues {
    weights: Vec<f32>,
    columns: usize,
    /// Where W is in e4m3, the scale of every row.
    pub scales: Vec<f32>,
    pub bias: Vec<f32>,
    pub gradients: [Vec<f32>; 2],
}

pub(super) struct Emulator {
    graph: ModelGraph,
    adapter: Adapter,
    lowered: Lowered,
    pub(super) arrangement: Arrangement,
    /// Of every layer, its stacks.
    stacks: Vec<Vec<StackValues>>,
    /// A value for every two bytes.
    memory: Vec<f32>,
    /// What waits in host memory.
    host: Vec<f32>,
    batch: Batch,
    /// `d logp / d hidden` of every answer token.
    dhidden: Vec<Vec<f32>>,
    /// What routers did since the forward pass began.
    pub(super) load: RouterLoad,
    pub(super) router_dprobs: Vec<f32>,
}

/// Where a program runs.
struct Pass<'a> {
    /// `None` for blocks without an adapter.
    layer: Option<usize>,
    program: &'a Program,
    block: &'a Block,
    prefix: &'a str,
    places: Vec<Option<Place>>,
    /// Rows of a chunk at most.
    chunk: usize,
}

/// A step that is being emulated: what it runs on.
pub(crate) struct Emulation<'a> {
    emulator: &'a mut Emulator,
    pass: &'a Pass<'a>,
    /// The first row of the chunk at hand, and how many it has.
    first: usize,
    rows: usize,
}

impl Pass<'_> {
    /// The row of a chunk that begins at `first`, as a place in memory; `None` for what has no place.
    fn at(&self, s: &Slice, first: usize, row: usize) -> Option<usize> {
        let place = self.places[s.buffer]?;
        let row = if place.of_chunk { row } else { first + row };
        Some(place.at / 2 + row * self.program.buffers[s.buffer].columns() + s.column)
    }
}

impl Emulation<'_> {
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn batch(&self) -> &Batch {
        &self.emulator.batch
    }

    pub(crate) fn row(&self, s: &Slice, row: usize) -> Vec<f32> {
        self.emulator.row(self.pass, s, (self.first, row))
    }

    pub(crate) fn write(&mut self, s: &Slice, row: usize, values: &[f32]) {
        self.emulator.write(self.pass, s, (self.first, row), values);
    }

    /// Of a buffer with a number for every head; a number has four bytes.
    pub(crate) fn number(&mut self, s: &Slice, head: usize, row: usize) -> &mut f32 {
        let at = self.pass.at(s, 0, 0).unwrap();
        &mut self.emulator.memory[at - s.column + (head * self.rows + row) * 2]
    }

    /// Computes rows one after the other: from the number of a row in the batch and what is read to what is written.
    pub(crate) fn each_row(
        &mut self,
        reads: &[Slice],
        writes: &[Slice],
        compute: impl Fn(usize, &[Vec<f32>], &mut [Vec<f32>]),
    ) {
        for row in 0..self.rows() {
            let read: Vec<Vec<f32>> = reads.iter().map(|s| self.row(s, row)).collect();
            let mut written = vec![Vec::new(); writes.len()];
            compute(self.first + row, &read, &mut written);
            writes.iter().zip(&written).for_each(|(s, values)| self.write(s, row, values));
        }
    }

    pub(crate) fn vector(&self, at: usize) -> Vec<f32> {
        let vector = &self.pass.program.vectors[at];
        self.weight(vector.node, vector.role)
    }

    pub(crate) fn table(&self, at: usize) -> Vec<f32> {
        self.weight(self.pass.program.tables[at], "weight")
    }

    fn weight(&self, node: usize, role: &str) -> Vec<f32> {
        let weight = self.pass.block.nodes[node].weight(role).unwrap();
        given(&format!("{}{}", self.pass.prefix, weight.tensor), &weight.shape)
    }

    pub(crate) fn stack(&mut self, at: usize) -> &mut StackValues {
        &mut self.emulator.stacks[self.pass.layer.unwrap()][at]
    }

    /// Counts what a router does with a row.
    pub(crate) fn count_load(&mut self, row: usize, probs: &[f32], chosen: &[bool]) {
        let texts = f64::from(self.batch().layout.texts[self.first + row]);
        let load = &mut self.emulator.load;
        load.tokens += texts;
        for (expert, (prob, chosen)) in probs.iter().zip(chosen).enumerate() {
            load.probs[expert] += texts * f64::from(*prob);
            load.counts[expert] += if *chosen { texts } else { 0.0 };
        }
    }

    /// Of every expert the derivative of the auxiliary loss by the probability that a token gives it.
    pub(crate) fn router_dprobs(&self) -> Vec<f32> {
        self.emulator.router_dprobs.clone()
    }

    /// The keys that a row sees in a window.
    pub(crate) fn seen_by(&self, row: usize, window: usize) -> Vec<usize> {
        let spans = &self.batch().layout.spans;
        let span = spans.iter().find(|s| (s.start..s.start + s.len()).contains(&row)).unwrap();
        let mask = AnswerMask::of(span, 0, window);
        (span.start..=row).filter(|key| mask.sees(row - span.start, key - span.start)).collect()
    }
}

impl Emulator {
    pub(super) fn new(
        graph: &ModelGraph,
        adapter: &Adapter,
        batch: Batch,
        gates: Gates,
        numbers: Numbers,
        arrange: impl Fn(&Footprint) -> (usize, Option<Arrangement>),
    ) -> Emulator {
        let adapter = adapter.clone();
        let lowered = Lowered::new(graph, &adapter, numbers, gates).unwrap();
        let footprint = Footprint::new(graph, &lowered);
        let (bytes, arrangement) = arrange(&footprint);
        let arrangement = arrangement.unwrap();
        let stacks = graph.layers.iter().enumerate().map(|(at, layer)| {
            let block = &graph.blocks[layer.block];
            let stacks = lowered.programs[layer.block].stacks.iter();
            stacks.map(|s| StackValues::new(s, block, &layer.prefix, at, (graph, &adapter))).collect()
        });
        let stacks = stacks.collect();
        let (graph, memory) = (graph.clone(), vec![f32::NAN; bytes / 2]);
        let (host, dhidden, router_dprobs) = Default::default();
        let load = RouterLoad::default();
        Emulator { graph, adapter, lowered, arrangement, stacks, memory, host, batch, dhidden, load, router_dprobs }
    }

    fn row(&self, pass: &Pass<'_>, s: &Slice, (first, row): (usize, usize)) -> Vec<f32> {
        let at = pass.at(s, first, row).unwrap();
        self.memory[at..at + s.width].to_vec()
    }

    /// What has no place is left out.
    fn write(&mut self, pass: &Pass<'_>, s: &Slice, (first, row): (usize, usize), values: &[f32]) {
        let Some(at) = pass.at(s, first, row) else { return };
        self.memory[at..at + s.width].copy_from_slice(values);
    }

    /// Runs a pass of a layer.
    fn layer(&mut self, layer: usize, backward: bool) {
        let (graph, lowered) = (self.graph.clone(), std::mem::take(&mut self.lowered));
        let kind = graph.layers[layer].block;
        let saves = !self.arrangement.saved.is_empty();
        let places = self.arrangement.places(&lowered, kind, layer, saves, backward);
        let pass = Pass {
            layer: Some(layer),
            program: &lowered.programs[kind],
            block: &graph.blocks[kind],
            prefix: &graph.layers[layer].prefix,
            places,
            chunk: self.arrangement.chunk,
        };
        // What is copied meanwhile is there when the layer is done, and not before.
        let moved = self.arrangement.travels(layer, backward).map(|moved| moved.map(|bytes| bytes / 2));
        if let Some([here, there, count]) = moved {
            self.host.resize(self.host.len().max(there + count), f32::NAN);
            if backward {
                self.memory[here..here + count].fill(f32::NAN);
            }
        }
        // Nothing may be read from work space that another layer left.
        let (from, to) = (self.arrangement.scratch / 2, self.memory.len());
        self.memory[from..to].fill(f32::NAN);
        let steps = match backward {
            true => &lowered.schedules[kind][self.arrangement.saved[layer] as usize].steps,
            false => &lowered.programs[kind].forward,
        };
        self.run(&pass, steps);
        self.lowered = lowered;
        if let Some([here, there, count]) = moved {
            match backward {
                true => self.memory[here..here + count].copy_from_slice(&self.host[there..there + count]),
                false => self.host[there..there + count].copy_from_slice(&self.memory[here..here + count]),
            }
        }
    }

    fn embed(&mut self) {
        let (graph, lowered) = (self.graph.clone(), std::mem::take(&mut self.lowered));
        let (places, chunk) = (self.arrangement.embed_places(&lowered), usize::MAX);
        let pass = Pass { layer: None, program: &lowered.embed, block: &graph.embed, prefix: "", places, chunk };
        self.run(&pass, &lowered.embed.forward);
        self.lowered = lowered;
    }

    pub(super) fn forward(&mut self) -> Vec<f32> {
        self.load = RouterLoad::of(&self.graph);
        self.embed();
        (0..self.graph.layers.len()).for_each(|layer| self.layer(layer, false));
        self.head(None)
    }

    /// The head forward; with a gradient by log-probs, backward.
    fn head(&mut self, dlogps: Option<&[f32]>) -> Vec<f32> {
        let (graph, lowered) = (self.graph.clone(), std::mem::take(&mut self.lowered));
        let hidden = graph.hidden_size;
        let gradient = self.arrangement.gradient() / 2;
        let ld = lowered.programs[0].edge() / 2;
        let (places, chunk) = (self.arrangement.head_places(&lowered), usize::MAX);
        let rows = self.batch.targets.len();
        let pass = Pass { layer: None, program: &lowered.head, block: &graph.head, prefix: "", places, chunk };
        let projection = lowered.projection;
        let of = |buffer| Slice::whole(buffer, projection.inputs);
        let mut logps = Vec::new();
        match dlogps {
            None => {
                self.run(&pass, &lowered.head.forward);
                let node = graph.head.nodes.last().unwrap();
                let [table, bias] =
                    ["weight", "bias"].map(|role| node.weight(role).map(|w| given(&w.tensor, &w.shape)));
                let table = table.unwrap();
                for row in 0..rows {
                    let h = self.row(&pass, &of(OUTPUT), (0, row));
                    let target = self.batch.targets[row] as usize;
                    let (logp, grad) = log_prob(&h, (&projection, &table, bias.as_deref()), target);
                    logps.push(logp);
                    self.write(&pass, &of(GRADIENT), (0, row), &grad);
                }
            }
            Some(dlogps) => {
                for (row, by) in dlogps.iter().enumerate() {
                    let scaled: Vec<f32> = self.dhidden[row].iter().map(|v| v * by).collect();
                    self.write(&pass, &of(GRADIENT), (0, row), &scaled);
                }
                self.run(&pass, &lowered.head_schedule.steps);
                for row in 0..rows {
                    let values = self.row(&pass, &Slice::whole(GRADIENT, hidden), (0, row));
                    self.memory[gradient + row * ld..][..hidden].copy_from_slice(&values);
                }
            }
        }
        if dlogps.is_none() {
            self.dhidden = (0..rows).map(|row| self.row(&pass, &of(GRADIENT), (0, row))).collect();
        }
        self.lowered = lowered;
        logps
    }

    /// The adapter's gradient, laid out as its parameters.
    pub(super) fn backward(&mut self, dlogps: &[f32]) -> Vec<f32> {
        self.head(Some(dlogps));
        (0..self.graph.layers.len()).rev().for_each(|layer| self.layer(layer, true));
        let mut gradient = vec![0.0; self.adapter.params.len()];
        for site in &self.adapter.sites {
            let (rank, scale) = (site.rank, site.scale as f32);
            let BlockId::Layer(layer) = site.node.0 else { panic!("{site:?} is in no layer") };
            let stacks = &self.lowered.programs[self.graph.layers[layer].block].stacks;
            let found = stacks.iter().zip(&self.stacks[layer]);
            let mut found = found.filter_map(|(stack, values)| {
                Some((stack, values, stack.member(site.node.1, role_of(&self.graph, site))?))
            });
            let (stack, StackValues { gradients: [da, db], .. }, member) = found.next().unwrap();
            let [a, b] = self.adapter.ranges(site);
            let groups = gradient[a].chunks_mut(rank * stack.inputs).zip(da.chunks(stack.rank * stack.inputs));
            groups.for_each(|(to, from)| to.copy_from_slice(&from[member.rank_column * stack.inputs..][..to.len()]));
            let (height, outputs) = (stack.height(), site.outputs);
            for (i, to) in gradient[b].iter_mut().enumerate() {
                let (group, output, r) = (i / rank / outputs, i / rank % outputs, i % rank);
                *to = scale * db[(group * stack.rank + member.rank_column + r) * height + member.column + output];
            }
        }
        gradient
    }

    fn run(&mut self, pass: &Pass<'_>, steps: &[Step]) {
        let (tokens, answers) = (self.batch.tokens(), self.batch.targets.len());
        let rows = |rows| match rows {
            Rows::Tokens => tokens,
            Rows::Predictors => answers,
        };
        let start = |step: &Step, first: usize, rows: usize| {
            step.run.emulate(&mut Emulation { emulator: self, pass, first, rows }, &step.reads, &step.writes);
            Ok(())
        };
        chunks::run(steps, rows, pass.chunk, start).unwrap();
    }
}

impl StackValues {
    fn new(
        stack: &Stack,
        block: &Block,
        prefix: &str,
        layer: usize,
        (graph, adapter): (&ModelGraph, &Adapter),
    ) -> StackValues {
        let columns = stack.inputs + stack.rank;
        let mut weights = vec![0.0; (stack.outputs + stack.groups * stack.rank) * columns];
        // Behind the rows of every group lie those of its A.
        let row_of = |row: usize| row + row / stack.height() * stack.rank;
        let (mut bias, mut scales) = (vec![0.0; stack.outputs], Vec::new());
        // Where W is kept in nf4 or mxfp4, its bytes as they lie on a card.
        let mut bytes = vec![0; stack.bytes()];
        for (at, member) in stack.members.iter().enumerate() {
            let roles = [member.role, "bias"];
            for weight in block.nodes[member.node].weights.iter().filter(|w| roles.contains(&w.role.as_str())) {
                let values = given(&format!("{prefix}{}", weight.tensor), &weight.shape);
                if weight.role == "bias" {
                    bias[member.column..member.column + values.len()].copy_from_slice(&values);
                } else if stack.numbers == Numbers::Nf4 {
                    stack.nf4().write(&mut bytes, at, &quantize(&values));
                } else if stack.numbers == Numbers::Mxfp4 {
                    let packed = mxfp4::quantize_rows(&values, stack.inputs);
                    stack.mxfp4().write(&mut bytes, member.column, &packed);
                } else {
                    let mut values = values;
                    if stack.numbers == Numbers::Fp8 {
                        let (codes, own) = quantize_rows(&values, stack.inputs);
                        dequantize_rows(&codes, &own, stack.inputs, &mut values);
                        scales.extend(own);
                    }
                    for (row, values) in values.chunks(stack.inputs).enumerate() {
                        weights[row_of(member.column + row) * columns..][..stack.inputs].copy_from_slice(values);
                    }
                }
            }
            let is = |s: &&Site| s.node == (BlockId::Layer(layer), member.node) && role_of(graph, s) == member.role;
            let Some(site) = adapter.sites.iter().find(is) else { continue };
            let ([a, b], rank) = (adapter.ranges(site), site.rank);
            // What is subtracted lies in the columns behind those of the site.
            let all = [(&adapter.params, 0, 1.0), (&adapter.subtracted, rank, -1.0)];
            for (params, behind, sign) in all.into_iter().filter(|(params, ..)| !params.is_empty()) {
                let first = member.rank_column + behind;
                for (r, row) in params[a.clone()].chunks(stack.inputs).enumerate() {
                    let (group, r) = (r / rank, r % rank);
                    let to = (group * (stack.height() + stack.rank) + stack.height() + first + r) * columns;
                    weights[to..to + stack.inputs].copy_from_slice(row);
                }
                for (output, row) in params[b.clone()].chunks(rank).enumerate() {
                    let to = row_of(member.column + output) * columns + stack.inputs + first;
                    let scaled = row.iter().map(|v| v * sign * site.scale as f32);
                    weights[to..to + rank].iter_mut().zip(scaled).for_each(|(to, v)| *to = v);
                }
            }
        }
        let (nf4, mxfp4) = (stack.nf4(), stack.mxfp4());
        for (row, column) in (0..stack.outputs).flat_map(|row| (0..stack.inputs).map(move |column| (row, column))) {
            weights[row_of(row) * columns + column] = match stack.numbers {
                Numbers::Nf4 => nf4_value(&nf4, &bytes, row * stack.inputs + column),
                Numbers::Mxfp4 => mxfp4_value(&mxfp4, &bytes, row * stack.inputs.div_ceil(mxfp4::BLOCK), column),
                _ => break,
            };
        }
        let gradients = [stack.groups * stack.inputs, stack.outputs].map(|n| vec![0.0; stack.rank * n]);
        StackValues { weights, columns, scales, bias, gradients }
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.weights[row * self.columns..][..self.columns]
    }
}

/// The role of the weight that a site adapts.
fn role_of<'a>(graph: &'a ModelGraph, site: &Site) -> &'a str {
    let BlockId::Layer(layer) = site.node.0 else { panic!("{site:?} is in no layer") };
    &graph.blocks[graph.layers[layer].block].nodes[site.node.1].weights[site.weight].role
}

/// A value of W from its bytes, as `nf4.cu` reads it.
fn nf4_value(layout: &Layout, bytes: &[u8], at: usize) -> f32 {
    let pair = bytes[layout.codes.start + at / 2];
    let code = if at.is_multiple_of(2) { pair >> 4 } else { pair & 15 };
    let block = at / BLOCK;
    let [first, group] = *layout.members.iter().rev().find(|m| m[0] as usize <= block).unwrap();
    let group = group as usize + (block - first as usize) / SCALE_BLOCK;
    let number = |at: usize| f32::from_le_bytes(bytes[layout.groups.start + at..][..4].try_into().unwrap());
    let scale = SCALES[usize::from(bytes[layout.scales.start + block])] * number(group * 8) + number(group * 8 + 4);
    bf16::from_f32(VALUES[usize::from(code)] * scale).to_f32()
}

/// One of a row whose blocks begin there, as `mxfp4.cu` reads it.
fn mxfp4_value(layout: &Mxfp4Layout, bytes: &[u8], first: usize, column: usize) -> f32 {
    let (block, within) = (first + column / mxfp4::BLOCK, column % mxfp4::BLOCK);
    let pair = bytes[layout.codes.start + block * mxfp4::BYTES + within / 2];
    let code = pair >> (4 * (within % 2)) & 15;
    mxfp4::VALUES[usize::from(code)] * mxfp4::scale(bytes[layout.scales.start + block])
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The log-prob of a target and its gradient by the hidden state.
fn log_prob(hidden: &[f32], (own, table, bias): (&LmHead, &[f32], Option<&[f32]>), target: usize) -> (f32, Vec<f32>) {
    let rows: Vec<&[f32]> = table.chunks(hidden.len()).collect();
    let mut logits: Vec<f32> = rows.iter().map(|row| dot(row, hidden)).collect();
    own.bend(&mut logits, bias);
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum = max + logits.iter().map(|z| (z - max).exp()).sum::<f32>().ln();
    let mut grad: Vec<f32> = rows[target].iter().map(|w| w * own.slope(logits[target])).collect();
    for (row, z) in rows.iter().zip(&logits) {
        grad.iter_mut().zip(*row).for_each(|(s, w)| *s -= (z - sum).exp() * own.slope(*z) * w);
    }
    (logits[target] - sum, grad)
}
