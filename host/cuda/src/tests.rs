//! Lowered programs without a GPU. An emulator runs them in f32 in one piece of memory, laid out as on a card and full of
//! NaN wherever nothing was written, and has to find the log-probs and gradients of the CPU engine. What it cannot see is
//! the kernels: those are compared by `dpo-host selftest` on a GPU.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use dpo_plugin_api::graph::{Block, ModelGraph};

use super::footprint::{Arrangement, Footprint, LOGITS_ROWS};
use super::inputs::Rows;
use super::lowered::Lowered;
use super::matmul::Gates;
use super::ops::lm_head::LmHead;
use super::plan::{GpuPlan, LOST_TOKENS, Room};
use super::program::{GRADIENT, OUTPUT, Program, Slice, Step};
use super::saved::SavedActivations;
use super::weights::{NUMBERS, Stack};
use dpo_core::batch::Batch;
use dpo_core::device::Device;
use dpo_core::lora::{Adapter, AdapterConfig};
use dpo_core::ops;
use dpo_core::ops::answer_mask::AnswerMask;
use dpo_core::plan::MemoryOptions;
use dpo_core::testing::{
    FAMILIES, adapter, cpu, distance, examples, given, op_cases, patterned_adapter, subtracting_adapter,
};
use dpo_core::weights::BlockId;
use dpo_plugins::Registry;
use dpo_plugins::shapes;

/// A stack's `[[W, s·B], [A, 0]]`, its bias, and the gradients by A `[rank, inputs]` and B `[rank, outputs]`.
pub(crate) struct StackValues {
    weights: Vec<f32>,
    columns: usize,
    pub bias: Vec<f32>,
    pub gradients: [Vec<f32>; 2],
}

struct Emulator {
    graph: ModelGraph,
    adapter: Adapter,
    lowered: Lowered,
    arrangement: Arrangement,
    /// Of every layer, its stacks.
    stacks: Vec<Vec<StackValues>>,
    /// A value for every two bytes.
    memory: Vec<f32>,
    batch: Batch,
    /// `d logp / d hidden` of every answer token.
    dhidden: Vec<Vec<f32>>,
}

/// Where a program runs.
struct Pass<'a> {
    /// `None` for blocks without an adapter.
    layer: Option<usize>,
    program: &'a Program,
    block: &'a Block,
    prefix: &'a str,
    places: Vec<usize>,
}

/// A step that is being emulated: what it runs on.
pub(crate) struct Emulation<'a> {
    emulator: &'a mut Emulator,
    pass: &'a Pass<'a>,
    rows: usize,
}

impl Pass<'_> {
    fn at(&self, s: &Slice, row: usize) -> usize {
        self.places[s.buffer] + row * self.program.buffers[s.buffer].columns() + s.column
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
        self.emulator.row(self.pass, s, row)
    }

    pub(crate) fn write(&mut self, s: &Slice, row: usize, values: &[f32]) {
        self.emulator.write(self.pass, s, row, values);
    }

    /// Of a buffer with a number for every head; a number has four bytes.
    pub(crate) fn number(&mut self, s: &Slice, head: usize, row: usize) -> &mut f32 {
        &mut self.emulator.memory[self.pass.places[s.buffer] + (head * self.rows + row) * 2]
    }

    /// Computes rows one after the other: from what is read to what is written.
    pub(crate) fn each_row(
        &mut self,
        reads: &[Slice],
        writes: &[Slice],
        compute: impl Fn(usize, &[Vec<f32>], &mut [Vec<f32>]),
    ) {
        for row in 0..self.rows() {
            let read: Vec<Vec<f32>> = reads.iter().map(|s| self.row(s, row)).collect();
            let mut written = vec![Vec::new(); writes.len()];
            compute(row, &read, &mut written);
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

    /// The keys that a row sees in a window.
    pub(crate) fn seen_by(&self, row: usize, window: usize) -> Vec<usize> {
        let spans = &self.batch().layout.spans;
        let span = spans.iter().find(|s| (s.start..s.start + s.len()).contains(&row)).unwrap();
        let mask = AnswerMask::of(span, 0, window);
        (span.start..=row).filter(|key| mask.sees(row - span.start, key - span.start)).collect()
    }
}

impl Emulator {
    fn new(
        graph: &ModelGraph,
        adapter: &Adapter,
        batch: Batch,
        gates: Gates,
        allowed: &[SavedActivations],
        bytes: impl Fn(&Footprint) -> usize,
    ) -> Emulator {
        let adapter = adapter.clone();
        let lowered = Lowered::new(graph, &adapter, NUMBERS, gates).unwrap();
        let footprint = Footprint::new(graph, &lowered);
        let bytes = bytes(&footprint);
        let arrangement =
            footprint.arrange(batch.tokens(), batch.targets.len(), bytes, allowed, LOGITS_ROWS[0]).unwrap();
        let stacks = graph.layers.iter().enumerate().map(|(at, layer)| {
            let block = &graph.blocks[layer.block];
            let stacks = lowered.programs[layer.block].stacks.iter();
            stacks.map(|s| StackValues::new(s, block, &layer.prefix, at, &adapter)).collect()
        });
        let stacks = stacks.collect();
        let (graph, memory) = (graph.clone(), vec![f32::NAN; bytes / 2]);
        Emulator { graph, adapter, lowered, arrangement, stacks, memory, batch, dhidden: Vec::new() }
    }

    fn row(&self, pass: &Pass<'_>, s: &Slice, row: usize) -> Vec<f32> {
        let at = pass.at(s, row);
        self.memory[at..at + s.width].to_vec()
    }

    /// What has no place is left out.
    fn write(&mut self, pass: &Pass<'_>, s: &Slice, row: usize, values: &[f32]) {
        if pass.places[s.buffer] == NOWHERE {
            return;
        }
        let at = pass.at(s, row);
        self.memory[at..at + s.width].copy_from_slice(values);
    }

    /// Runs a pass of a layer.
    fn layer(&mut self, layer: usize, backward: bool) {
        let (graph, lowered) = (self.graph.clone(), std::mem::take(&mut self.lowered));
        let kind = graph.layers[layer].block;
        let places = self.arrangement.places(&lowered, kind, layer, true, backward);
        let pass = Pass {
            layer: Some(layer),
            program: &lowered.programs[kind],
            block: &graph.blocks[kind],
            prefix: &graph.layers[layer].prefix,
            places: elements(places),
        };
        // Nothing may be read from work space that another layer left.
        let (from, to) = (self.arrangement.scratch / 2, self.memory.len());
        self.memory[from..to].fill(f32::NAN);
        let scheduled = &lowered.schedules[kind][self.arrangement.saved[layer] as usize];
        self.run(&pass, if backward { &scheduled.steps } else { &lowered.programs[kind].forward });
        self.lowered = lowered;
    }

    fn embed(&mut self) {
        let (graph, lowered) = (self.graph.clone(), std::mem::take(&mut self.lowered));
        let places = elements(self.arrangement.embed_places(&lowered));
        let pass = Pass { layer: None, program: &lowered.embed, block: &graph.embed, prefix: "", places };
        self.run(&pass, &lowered.embed.forward);
        self.lowered = lowered;
    }

    fn forward(&mut self) -> Vec<f32> {
        self.embed();
        (0..self.graph.layers.len()).for_each(|layer| self.layer(layer, false));
        self.head(None)
    }

    /// The head forward; with a gradient by log-probs, backward.
    fn head(&mut self, dlogps: Option<&[f32]>) -> Vec<f32> {
        let (graph, lowered) = (self.graph.clone(), std::mem::take(&mut self.lowered));
        let hidden = graph.hidden_size;
        let gradient = self.arrangement.gradient / 2;
        let ld = lowered.programs[0].edge() / 2;
        let places = elements(self.arrangement.head_places(&lowered));
        let rows = self.batch.targets.len();
        let pass = Pass { layer: None, program: &lowered.head, block: &graph.head, prefix: "", places };
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
                    let h = self.row(&pass, &of(OUTPUT), row);
                    let target = self.batch.targets[row] as usize;
                    let (logp, grad) = log_prob(&h, (&projection, &table, bias.as_deref()), target);
                    logps.push(logp);
                    self.write(&pass, &of(GRADIENT), row, &grad);
                }
            }
            Some(dlogps) => {
                for (row, by) in dlogps.iter().enumerate() {
                    let scaled: Vec<f32> = self.dhidden[row].iter().map(|v| v * by).collect();
                    self.write(&pass, &of(GRADIENT), row, &scaled);
                }
                self.run(&pass, &lowered.head_schedule.steps);
                for row in 0..rows {
                    let values = self.row(&pass, &Slice::whole(GRADIENT, hidden), row);
                    self.memory[gradient + row * ld..][..hidden].copy_from_slice(&values);
                }
            }
        }
        if dlogps.is_none() {
            self.dhidden = (0..rows).map(|row| self.row(&pass, &of(GRADIENT), row)).collect();
        }
        self.lowered = lowered;
        logps
    }

    /// The adapter's gradient, laid out as its parameters.
    fn backward(&mut self, dlogps: &[f32]) -> Vec<f32> {
        self.head(Some(dlogps));
        (0..self.graph.layers.len()).rev().for_each(|layer| self.layer(layer, true));
        let mut gradient = vec![0.0; self.adapter.params.len()];
        for site in &self.adapter.sites {
            let (rank, scale) = (site.rank, site.scale as f32);
            let BlockId::Layer(layer) = site.node.0 else { panic!("{site:?} is in no layer") };
            let stacks = &self.lowered.programs[self.graph.layers[layer].block].stacks;
            let found = stacks.iter().zip(&self.stacks[layer]);
            let mut found = found.filter_map(|(stack, values)| Some((stack, values, stack.member(site.node.1)?)));
            let (stack, StackValues { gradients: [da, db], .. }, member) = found.next().unwrap();
            let [a, b] = self.adapter.ranges(site);
            gradient[a].copy_from_slice(&da[member.rank_column * stack.inputs..][..rank * stack.inputs]);
            for (i, to) in gradient[b].iter_mut().enumerate() {
                let (output, r) = (i / rank, i % rank);
                *to = scale * db[(member.rank_column + r) * stack.outputs + member.column + output];
            }
        }
        gradient
    }

    fn run(&mut self, pass: &Pass<'_>, steps: &[Step]) {
        for step in steps {
            let rows = match step.rows {
                Rows::Tokens => self.batch.tokens(),
                Rows::Predictors => self.batch.targets.len(),
            };
            step.run.emulate(&mut Emulation { emulator: self, pass, rows }, &step.reads, &step.writes);
        }
    }
}

impl StackValues {
    fn new(stack: &Stack, block: &Block, prefix: &str, layer: usize, adapter: &Adapter) -> StackValues {
        let columns = stack.inputs + stack.rank;
        let mut weights = vec![0.0; (stack.outputs + stack.rank) * columns];
        let mut bias = vec![0.0; stack.outputs];
        for member in &stack.members {
            for weight in &block.nodes[member.node].weights {
                let values = given(&format!("{prefix}{}", weight.tensor), &weight.shape);
                if weight.role == "bias" {
                    bias[member.column..member.column + member.width].copy_from_slice(&values);
                } else {
                    for (row, values) in values.chunks(stack.inputs).enumerate() {
                        weights[(member.column + row) * columns..][..stack.inputs].copy_from_slice(values);
                    }
                }
            }
            let Some(site) = adapter.sites.iter().find(|s| s.node == (BlockId::Layer(layer), member.node)) else {
                continue;
            };
            let ([a, b], rank) = (adapter.ranges(site), site.rank);
            // What is subtracted lies in the columns behind those of the site.
            let all = [(&adapter.params, 0, 1.0), (&adapter.subtracted, rank, -1.0)];
            for (params, behind, sign) in all.into_iter().filter(|(params, ..)| !params.is_empty()) {
                let first = member.rank_column + behind;
                for (r, row) in params[a.clone()].chunks(stack.inputs).enumerate() {
                    let to = (stack.outputs + first + r) * columns;
                    weights[to..to + stack.inputs].copy_from_slice(row);
                }
                for (output, row) in params[b.clone()].chunks(rank).enumerate() {
                    let to = (member.column + output) * columns + stack.inputs + first;
                    let scaled = row.iter().map(|v| v * sign * site.scale as f32);
                    weights[to..to + rank].iter_mut().zip(scaled).for_each(|(to, v)| *to = v);
                }
            }
        }
        let gradients = [vec![0.0; stack.rank * stack.inputs], vec![0.0; stack.rank * stack.outputs]];
        StackValues { weights, columns, bias, gradients }
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.weights[row * self.columns..][..self.columns]
    }
}

/// Gated activations are computed by matmuls, forward and backward.
const ALL_GATES: Gates = Gates { forward: true, backward: true };

/// The place of what has none: no memory is as large.
const NOWHERE: usize = usize::MAX / 4;

/// Places as numbers of values.
fn elements(places: Vec<Option<usize>>) -> Vec<usize> {
    places.into_iter().map(|p| p.map_or(NOWHERE, |p| p / 2)).collect()
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

/// Every graph of the self-test, at every level of what is saved and in just as many bytes as a mixture of levels takes.
#[test]
fn programs_compute_what_the_cpu_computes() {
    let registry = Registry::discover(&[], None);
    let families = FAMILIES
        .iter()
        .map(|(name, config)| (name.to_string(), registry.family(name).unwrap().runnable(config).unwrap()));
    for (name, graph) in op_cases().unwrap().into_iter().chain(families) {
        compare(&name, &graph, &adapter(&graph, false).unwrap());
    }
}

/// A stack has columns for the largest rank of every linear in layers of a kind; where a layer has less, they are zero.
#[test]
fn linears_may_have_ranks_and_scales_of_their_own() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let adapter = patterned_adapter(&graph).unwrap();
    let ranks: std::collections::BTreeSet<usize> = adapter.sites.iter().map(|s| s.rank).collect();
    assert!(ranks.into_iter().eq([3, 8, 12, 16]), "{:?}", adapter.sites);
    compare("patterns", &graph, &adapter);
}

/// The update is the difference of two products, of which one stays.
#[test]
fn what_an_adapter_began_with_is_subtracted() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let adapter = subtracting_adapter(&graph).unwrap();
    assert!(adapter.subtracted.len() == adapter.params.len() && adapter.subtracted != adapter.params);
    compare("subtracted", &graph, &adapter);
}

#[test]
fn kinds_of_adapter_without_kernels_are_refused() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let plain = || AdapterConfig::new(4, 8.0);
    for (config, flag) in [
        (AdapterConfig { dora: true, ..plain() }, "--use-dora"),
        (AdapterConfig { dropout: 0.1, ..plain() }, "--lora-dropout"),
    ] {
        let adapter = Adapter::planned(&graph, config).unwrap();
        let Err(error) = Lowered::new(&graph, &adapter, NUMBERS, Gates::default()) else { panic!("{flag} is taken") };
        assert!(error.to_string().contains(flag) && error.to_string().contains("--device cpu"), "{error}");
    }
}

/// Log-probs and gradient of a graph with an adapter, in the emulator and on the CPU.
fn compare(name: &str, graph: &ModelGraph, adapter: &Adapter) {
    let lengths: [&[usize]; 6] = [&[3, 1, 9], &[17, 5, 6], &[1, 1, 1], &[4, 3], &[2, 3, 1, 5], &[1, 2, 4, 1, 3, 1]];
    let batch = Batch::of(&examples(graph.vocab_size, &lengths, 5).unwrap());
    let dlogps: Vec<f32> = (0..batch.targets.len()).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut exact = cpu(graph, batch.tokens(), adapter.clone()).unwrap();
    let logps = exact.forward(&batch, true).unwrap().logps;
    exact.backward(&batch, &dlogps).unwrap();
    let (tokens, answers) = (batch.tokens(), batch.targets.len());
    let levels = SavedActivations::ALL.map(|level| (vec![level], level, 1.0)).into_iter();
    // Less than everything, so that layers save different parts.
    let mixed = [0.9, 0.97].map(|part| (SavedActivations::ALL.to_vec(), SavedActivations::All, part));
    let forward = Gates { forward: true, backward: false };
    let gates = [Gates::default(), forward, ALL_GATES];
    for ((allowed, level, part), gates) in levels.chain(mixed).flat_map(|l| gates.map(|g| (l.clone(), g))) {
        let bytes = |f: &Footprint| {
            let (whole, least) =
                (f.whole(tokens, answers, level), f.whole(tokens, answers, SavedActivations::BlockInput));
            least.max((whole as f64 * part) as usize).next_multiple_of(2)
        };
        let mut own = Emulator::new(graph, adapter, batch.clone(), gates, &allowed, bytes);
        let found = own.forward();
        let gradient = own.backward(&dlogps);
        let what = format!("{name}, {gates:?}, {allowed:?}, {:?}", own.arrangement.saved);
        let off = [distance(&found, &logps), distance(&gradient, exact.gradient())];
        assert!(off.iter().all(|d| *d < 1e-4), "{what}: log-probs and gradient are off by {off:?}");
    }
}

/// Parts of a fused projection, and their gradients, lie where the projection and its gradient do.
#[test]
fn parts_are_not_copied() {
    let cases = op_cases().unwrap();
    let graph = &cases.iter().find(|(name, _)| name == "fused projections").unwrap().1;
    let lowered = Lowered::new(graph, &adapter(graph, false).unwrap(), NUMBERS, Gates::default()).unwrap();
    let program = &lowered.programs[0];
    let labels = program.forward.iter().chain(&program.backward).map(|s| s.label);
    let moves: Vec<_> = labels.filter(|l| ["add, copy", "zero", "narrow vjp"].contains(l)).collect();
    assert!(moves.is_empty(), "{moves:?}");
    // And the gradients of gate and up lie where these were.
    let of = |label: &str| program.backward.iter().find(|s| s.label == label).unwrap();
    assert_eq!(of("glu vjp").reads[..2], of("glu vjp").writes);
}

/// A matmul computes the gated activation of what it makes: gate and up have no place where nobody reads them, and where they are
/// saved, the activation is computed again from them, not by the matmul.
#[test]
fn gated_activations_are_computed_by_the_matmul() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let lowered = Lowered::new(&graph, &adapter(&graph, false).unwrap(), NUMBERS, ALL_GATES).unwrap();
    let program = &lowered.programs[0];
    let gated = program.forward.iter().find(|s| s.cheaper.is_some()).unwrap();
    assert!(program.forward.iter().all(|s| s.label != "glu"));
    assert!(program.backward.iter().all(|s| s.label != "glu vjp"));
    let both = gated.writes[0].buffer;
    for level in SavedActivations::ALL {
        let scheduled = &lowered.schedules[0][level as usize];
        let again = |label: &str| {
            scheduled.steps.iter().filter(|s| s.label == label && s.writes(gated.writes[1].buffer)).count()
        };
        let (saved, placed) = (scheduled.forward.saved[both].is_some(), scheduled.forward.scratch[both].is_some());
        let expected = match level {
            SavedActivations::All => (true, [0, 0]),
            SavedActivations::Matmuls => (true, [1, 0]),
            SavedActivations::SmallMatmuls | SavedActivations::BlockInput => (false, [0, 1]),
        };
        assert_eq!((saved, [again("glu"), again("matmul")]), expected, "{level:?}");
        assert!(!placed && (saved || scheduled.backward.scratch[both].is_some()), "{level:?}");
    }
}

/// Behind its attention the last layer runs on the rows that predict, forward and backward; the others run on all.
#[test]
fn the_last_layer_runs_where_it_predicts() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let lowered = Lowered::new(&graph, &adapter(&graph, false).unwrap(), NUMBERS, Gates::default()).unwrap();
    let last = graph.layers.last().unwrap().block;
    for (kind, program) in lowered.programs.iter().enumerate() {
        let all = program.forward.iter().chain(&program.backward);
        if kind != last {
            assert!(all.clone().all(|s| s.rows == Rows::Tokens));
            continue;
        }
        let count = |label: &str, rows: Rows| all.clone().filter(|s| s.label == label && s.rows == rows).count();
        let both = |label: &str| [Rows::Tokens, Rows::Predictors].map(|rows| count(label, rows));
        // Of attention and of the residual stream.
        assert_eq!([both("gather"), both("gather vjp")], [[0, 2], [2, 0]]);
        // Queries, keys and values are one matmul; o, gate with up, down.
        assert_eq!([both("matmul"), both("matmul vjp")], [[1, 3], [1, 3]]);
        assert_eq!([both("norm"), both("glu"), both("attention")], [[1, 1], [0, 1], [1, 0]]);
    }
    assert!(lowered.head.forward.iter().chain(&lowered.head.backward).all(|s| s.rows == Rows::Predictors));
}

/// A plan stays within its memory, and more memory never makes it slower.
#[test]
fn plans_use_what_there_is() {
    let registry = Registry::discover(&[], None);
    let (family, config) = FAMILIES[0];
    let graph = registry.family(family).unwrap().runnable(config).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let plan =
        |memory: usize| GpuPlan::new(&graph, &adapter, 3000, 0.6, Room::of(memory, 1), 1, MemoryOptions::default());
    let least = (1..4096).map(|n| n << 20).find(|m| plan(*m).is_ok()).unwrap();
    let error = plan(least - (1 << 20)).unwrap_err().to_string();
    assert!(error.contains("3000 tokens") && error.contains("help: lower --max-length"), "{error}");
    let cost = |p: &GpuPlan| (1.0 + p.again) * (1.0 + LOST_TOKENS / p.micro_batch_tokens as f64);
    let mut before = f64::INFINITY;
    for memory in (0..40).map(|n| least + n * (16 << 20)) {
        let plan = plan(memory).unwrap();
        assert!(plan.total() <= memory, "{} of {memory}", plan.total());
        assert!(cost(&plan) <= before * 1.006, "more memory makes it slower: {plan}");
        before = cost(&plan);
    }
}

/// Layers that ranks share take a part of their bytes on each, and the places of two layers.
#[test]
fn a_shared_base_fits_where_a_whole_one_does_not() {
    let graph = shapes::Shape::named("qwen2.5-7b").unwrap().graph(&Registry::discover(&[], None)).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let plan = |ranks: usize| {
        GpuPlan::new(&graph, &adapter, 2048, 0.6, Room::of(12 << 30, ranks), ranks, MemoryOptions::default())
    };
    let error = plan(1).unwrap_err().to_string();
    assert!(error.contains("weights 13.2 GiB"), "{error}");
    let shared = plan(4).unwrap();
    assert!(shared.total() <= 12 << 30);
    let rest = Lowered::new(&graph, &adapter, NUMBERS, Gates::default()).unwrap().rest();
    let layers = shared.whole - rest;
    let (expected, layer) = (layers / 4 + 2 * layers / graph.layers.len(), 28 * 4 * 256);
    assert!((shared.weights - rest).abs_diff(expected) <= layer, "{} of {}", shared.weights, shared.whole);
}

/// Ops that only the CPU has.
const CPU_ONLY: &[&str] = &[];

/// Every op of the CPU has a file here or is listed, and no other has.
#[test]
fn every_op_of_the_cpu_is_known() {
    let set = |names: &mut dyn Iterator<Item = &'static str>| names.collect::<std::collections::BTreeSet<_>>();
    let own = super::ops::OPS.iter().chain(super::ops::INTERNAL).map(|o| o.name);
    let own = set(&mut own.chain(CPU_ONLY.iter().copied()));
    assert_eq!(own, set(&mut ops::OPS.iter().chain(ops::INTERNAL).map(|o| o.name)));
}

/// An op that changes a gradient in place which is another value's, too.
#[test]
fn a_step_that_overwrites_what_is_still_read_is_refused() {
    use super::lowering::{CudaOp, Frame};
    use super::{ops::find, sum::sum};
    static RASH: CudaOp = CudaOp::new(
        "rope",
        |l, index| {
            let [x] = l.inputs(index)?;
            let y = l.place(index);
            l.push(sum(x, x, y))
        },
        |l, index| {
            let Some(dy) = l.take_gradient(index) else { return Ok(()) };
            l.push(sum(dy, dy, dy))?;
            l.pass_on(l.nodes[index].inputs[0], dy)
        },
    );
    let with_rash = |name: &str| if name == RASH.name { Ok(&RASH) } else { find(name) };
    let cases = op_cases().unwrap();
    let lower = |name: &str| {
        let block = &cases.iter().find(|(n, _)| n == name).unwrap().1.blocks[0];
        let frame = Frame {
            widths: [104; 2],
            behind: 0,
            rank: &|_| 0,
            numbers: NUMBERS,
            backward: true,
            rows: Rows::Tokens,
            gates: Gates::default(),
        };
        Program::lower(block, (&block.nodes, block.output), with_rash, &frame).map(|_| ())
    };
    let error = lower("rope of a value, added to itself").unwrap_err().to_string();
    assert!(error.contains("step 'add, copy' would overwrite"), "{error}");
    assert!(lower("rms_norm of heads, rope").is_ok());
}

/// A published checkpoint of every family runs on a GPU.
#[test]
fn published_models_are_lowered() {
    let registry = Registry::discover(&[], None);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/models/dense/configs");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let refused = |path: &std::path::PathBuf| {
        let family = path.file_stem().unwrap().to_str().unwrap();
        let config = std::fs::read_to_string(path).unwrap();
        let mut graph = registry.family(family).unwrap().runnable(&config).unwrap();
        // A layer of every kind will do.
        let mut kinds = std::collections::BTreeSet::new();
        graph.layers.retain(|l| kinds.insert(l.block));
        let lowered = Lowered::new(&graph, &adapter(&graph, true).unwrap(), NUMBERS, Gates::default());
        Some(format!("{family}: {}", lowered.err()?))
    };
    assert!(files.len() > 30, "{files:?}");
    assert_eq!(files.iter().filter_map(refused).collect::<Vec<_>>(), Vec::<String>::new());
}
