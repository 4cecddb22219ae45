//! What the values of a batch take, and where they lie: between layers, saved, in work. Needs no GPU.

use dpo_plugin_api::graph::ModelGraph;

use super::chunks::TILE;
use super::inputs::{Rows, TILE_BYTES, router_bytes};
use super::liveness::{Bytes, Layout, Passes};
use super::lowered::Lowered;
use super::program::{Cost, GRADIENT, INPUT, OUTPUT, Program, Step};
use super::saved::SavedActivations;
use super::segments::SEGMENT_BYTES;
use dpo_core::aux_loss::AuxLoss;
use dpo_core::storage::Place as Weights;

/// What values take, from which the arrangement of a batch follows.
pub(super) struct Footprint {
    /// Bytes a token takes between layers.
    edge: usize,
    /// The kind of block of every layer.
    kinds: Vec<usize>,
    /// Of every kind, for every level of [`SavedActivations`], and in a forward pass that has no backward pass.
    levels: Vec<[Level; 4]>,
    forward: Vec<Level>,
    /// Bytes a token takes in the embedding's block.
    embed: usize,
    /// Bytes an answer token takes in the head, and those of its logits.
    head: usize,
    logits: usize,
    /// Bytes of the largest stack that is dequantised before it is read, and bytes read and written to dequantise all of them once.
    dequantized: usize,
    dequantizing: usize,
    /// Bytes of the layers' frozen weights.
    weights: usize,
    /// Whether a layer's backward pass computes its output again.
    rewrites_output: bool,
    /// Time of a step, in multiply-adds of matmuls.
    work: Work,
}

/// What a layer takes.
#[derive(Clone, Debug)]
struct Level {
    /// Bytes a token.
    saved: usize,
    /// Ends of what is in scratch memory, of a batch that is computed at once and of one in chunks.
    scratch: [Vec<Bytes>; 2],
    /// Time of what is computed again, in multiply-adds of matmuls.
    again: Work,
}

/// Time that a token takes, and a row that predicts.
#[derive(Clone, Copy, Debug, Default)]
struct Work([f64; 2]);

impl Work {
    /// The sum of such times, each so often.
    fn sum(times: impl Iterator<Item = (Work, f64)>) -> Work {
        times.fold(Work::default(), |Work([a, b]), (Work([c, d]), n)| Work([a + c * n, b + d * n]))
    }

    /// That of a batch.
    fn of(self, tokens: usize, answers: usize) -> f64 {
        self.0[0] * tokens as f64 + self.0[1] * answers as f64
    }
}

/// How batches are computed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    /// Rows of logits at once.
    pub logits: usize,
    /// Rows at once of a layer's steps that do not mix rows.
    pub chunk: usize,
    /// Whether the layers' inputs may wait for the backward pass in host memory.
    pub offload: bool,
}

/// Where a buffer lies in the memory for values, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub at: usize,
    /// Whether it has the rows of a chunk alone.
    pub of_chunk: bool,
}

/// Where the values of a batch lie in the memory for values: between layers, saved, in work. Offsets and sizes in bytes.
#[derive(Clone, Debug)]
pub(super) struct Arrangement {
    /// Rows that every buffer has, but for those that have the rows of a chunk.
    pub rows: usize,
    /// Rows of a chunk, at most.
    pub chunk: usize,
    /// Bytes of a value between layers, of how many there is room, and whether others wait in host memory.
    edge: usize,
    edges: usize,
    pub offloads: bool,
    /// Of every layer, what is saved, and where it begins; of none in a pass that has no backward pass.
    pub saved: Vec<SavedActivations>,
    pub saved_at: Vec<usize>,
    /// Layers that there are.
    layers: usize,
    /// Where what is in work lies: of a layer a dequantised stack and then its buffers, of the head all.
    pub work: usize,
    pub scratch: usize,
    /// Rows of the head's buffers.
    pub answer_rows: usize,
    pub logits: usize,
    /// Rows of logits at once.
    pub logits_rows: usize,
    /// Rows of logits that there is room for.
    pub logits_room: usize,
    /// Time of what is computed again, as a share of the step's.
    pub again: f64,
}

impl Arrangement {
    /// Where a layer's input lies, which is the output of the one before it. Those that come back from host memory take turns in the places
    /// that the last two have.
    fn input(&self, layer: usize, backward: bool) -> usize {
        let last = self.layers.saturating_sub(1);
        let at = if self.offloads && backward && layer < last { last - (last - layer) % 2 } else { layer };
        at % self.edges * self.edge
    }

    /// Where the last layer's output lies; when the head has read it, the gradient that goes from layer to layer.
    pub(super) fn gradient(&self) -> usize {
        self.input(self.layers, false)
    }

    /// What is copied beside a layer, forward to host memory and backward from there: the input of the layer before it, but for those that
    /// are still here when the backward pass begins. Its place here, its place there, and its bytes.
    pub(super) fn travels(&self, layer: usize, backward: bool) -> Option<[usize; 3]> {
        let before = layer.checked_sub(1).filter(|before| self.offloads && before + 2 < self.layers)?;
        Some([self.input(before, backward), before * self.edge, self.edge])
    }

    /// Places of a layer's buffers in a pass; `None` for one that the pass does not touch. A forward pass that does not
    /// `save` anything has no backward pass.
    pub(super) fn places(
        &self,
        lowered: &Lowered,
        kind: usize,
        layer: usize,
        save: bool,
        backward: bool,
    ) -> Vec<Option<Place>> {
        let program = &lowered.programs[kind];
        let level = if save || backward { self.saved[layer] } else { SavedActivations::BlockInput };
        let Passes { forward, backward: back } = lowered.schedules[kind][level as usize].passes(self.rows > self.chunk);
        let layout = if backward { back } else { forward };
        let place = |buffer| match buffer {
            INPUT => Some(Place::of(self.input(layer, backward))),
            OUTPUT => Some(Place::of(self.input(layer + 1, backward))),
            GRADIENT => Some(Place::of(self.gradient())),
            _ => match layout.saved[buffer] {
                Some(saved) => Some(Place::of(self.saved_at[layer] + saved * self.rows)),
                None => layout.scratch[buffer].map(|scratch| Place {
                    at: self.scratch + scratch.at.of(self.rows, self.chunk),
                    of_chunk: scratch.of_chunk,
                }),
            },
        };
        (0..program.buffers.len()).map(place).collect()
    }

    /// Places of the embedding block's buffers; its output is the first layer's input.
    pub(super) fn embed_places(&self, lowered: &Lowered) -> Vec<Option<Place>> {
        let scratch = &lowered.embed_schedule.whole.forward.scratch;
        let place = |buffer| match buffer {
            OUTPUT => Some(Place::of(0)),
            _ => scratch[buffer].map(|s| Place::of(self.scratch + s.at.row * self.rows)),
        };
        (0..lowered.embed.buffers.len()).map(place).collect()
    }

    /// Places of the head's buffers; its input is the last layer's output.
    pub(super) fn head_places(&self, lowered: &Lowered) -> Vec<Option<Place>> {
        let (program, rows) = (&lowered.head, self.answer_rows);
        let edge = program.edge() * rows;
        let Passes { forward, backward } = &lowered.head_schedule.whole;
        let place = |buffer| {
            let offset = match (buffer, forward.saved.get(buffer)) {
                (INPUT, _) => return Some(Place::of(self.gradient())),
                (OUTPUT | GRADIENT, _) => (buffer - OUTPUT) * edge,
                (_, Some(Some(saved))) => 2 * edge + saved * rows,
                _ => {
                    let scratch = forward.scratch[buffer].or(backward.scratch[buffer])?;
                    2 * edge + (forward.saved_bytes + scratch.at.row) * rows
                }
            };
            Some(Place::of(self.work + offset))
        };
        (0..program.buffers.len()).map(place).collect()
    }
}

/// Rows of a layer's buffers and of the head's: whole tiles keep every buffer at an aligned place. There are more answer tokens than tokens where a
/// row predicts several.
fn padded_rows(tokens: usize, answers: usize) -> [usize; 2] {
    [tokens.max(answers), answers].map(|rows| rows.next_multiple_of(TILE))
}

impl Place {
    /// Of a buffer that has all rows.
    fn of(at: usize) -> Place {
        Place { at, of_chunk: false }
    }
}

impl Level {
    /// Bytes of scratch memory for batches of up to so many rows: those that fit into a chunk are computed at once.
    fn scratch(&self, rows: usize, chunk: usize) -> usize {
        let most = |ends: &[Bytes], rows| ends.iter().map(|end| end.of(rows, chunk)).max().unwrap_or(0);
        let [whole, chunked] = &self.scratch;
        most(whole, rows.min(chunk)).max(if rows > chunk { most(chunked, rows) } else { 0 })
    }
}

/// Rows of logits at once, at least and at most.
pub(super) const LOGITS_ROWS: [usize; 2] = [512, 2048];

/// Values between layers that there is room for in a forward pass that has no backward pass: before a layer and after it.
const FORWARD_EDGES: usize = 2;

/// The same where others wait in host memory: one more is on its way. In the backward pass, one has the gradient.
const OFFLOAD_EDGES: usize = 3;

/// What inputs of layers that wait in host memory cost beside the time of the bus, as a share of a step.
pub(super) const OFFLOAD_COST: f64 = 0.01;

/// Multiply-adds of matmuls that take as long as moving a byte to or from the memory, about, on every card there is.
const MATMUL_PER_BYTE: f64 = 120.0;

/// Multiply-adds of matmuls that take as long as moving a byte from host memory, about: 310 T/s to 54 GB/s on an H200, 80 T/s to 25 GB/s
/// on an RTX 4090.
const MATMUL_PER_BUS_BYTE: f64 = 5600.0;

impl Footprint {
    pub(super) fn new(graph: &ModelGraph, lowered: &Lowered) -> Footprint {
        let work = |kind: usize, steps: &[Step]| lowered.programs[kind].work(steps);
        let level = |kind: usize, level: SavedActivations| {
            let scheduled = &lowered.schedules[kind];
            let own = &scheduled[level as usize];
            let scratch = |chunked| {
                let Passes { forward, backward } = own.passes(chunked);
                [forward, backward].map(|pass| pass.ends.as_slice()).concat()
            };
            Level {
                saved: own.whole.forward.saved_bytes,
                scratch: [false, true].map(scratch),
                again: Work::sum(
                    [(work(kind, &own.steps), 1.0), (work(kind, &lowered.programs[kind].backward), -1.0)].into_iter(),
                ),
            }
        };
        let forward = |kind: usize| {
            let free = &lowered.schedules[kind][SavedActivations::BlockInput as usize];
            let scratch = [false, true].map(|chunked| free.passes(chunked).forward.ends.clone());
            Level { saved: 0, scratch, again: Work::default() }
        };
        let steps = lowered.schedules.iter().flatten().map(|scheduled| &scheduled.steps);
        let kinds: Vec<usize> = graph.layers.iter().map(|l| l.block).collect();
        let head = &lowered.head_schedule.whole;
        let scratch = [&head.forward, &head.backward].map(Layout::row_bytes).into_iter().max().unwrap_or(0);
        Footprint {
            edge: lowered.programs[0].edge(),
            levels: (0..lowered.programs.len()).map(|kind| SavedActivations::ALL.map(|l| level(kind, l))).collect(),
            forward: (0..lowered.programs.len()).map(forward).collect(),
            embed: lowered.embed_schedule.whole.forward.row_bytes(),
            head: 2 * lowered.head.edge() + head.forward.saved_bytes + scratch,
            logits: lowered.projection.rows * 4,
            dequantized: lowered.dequantized(),
            dequantizing: graph.layers.iter().map(|l| lowered.programs[l.block].dequantizing()).sum(),
            weights: lowered.layers(graph).iter().sum(),
            rewrites_output: steps.clone().flatten().any(|step| step.buffers().any(|b| b == OUTPUT)),
            work: Work::sum(kinds.iter().map(|k| (work(*k, &lowered.programs[*k].forward), 3.0))),
            kinds,
        }
    }

    /// Arranges a batch in so many bytes, with so many rows at once: what is saved is as much as fits, of the last layers first. Inputs of layers
    /// wait in host memory where that may be and more is saved for it. `None` where even the least of the allowed levels does not fit.
    pub(super) fn arrange(
        &self,
        tokens: usize,
        answers: usize,
        bytes: usize,
        allowed: &[SavedActivations],
        mode: Mode,
    ) -> Option<Arrangement> {
        let all = [false, true].into_iter().filter(|offload| mode.offload || !offload);
        let all = all.filter_map(|offload| self.arranged(tokens, answers, bytes, allowed, Mode { offload, ..mode }));
        let cost = |a: &Arrangement| a.again + if a.offloads { OFFLOAD_COST } else { 0.0 };
        all.min_by(|a, b| cost(a).total_cmp(&cost(b)))
    }

    /// The same, with inputs of layers in host memory if `mode` says so.
    pub(super) fn arranged(
        &self,
        tokens: usize,
        answers: usize,
        bytes: usize,
        allowed: &[SavedActivations],
        mode: Mode,
    ) -> Option<Arrangement> {
        let [rows, answer_rows] = padded_rows(tokens, answers);
        let Mode { logits: logits_rows, chunk, offload } = mode;
        let edges = self.edges(offload) * self.edge * rows;
        let level = |kind: usize, level: SavedActivations| &self.levels[kind][level as usize];
        let most = |least: SavedActivations| {
            let allowed = allowed.iter().filter(|a| **a <= least);
            let levels = allowed.flat_map(|a| self.kinds.iter().map(move |kind| level(*kind, *a)));
            let scratch = levels.map(|l| l.scratch(rows, chunk)).max().unwrap_or(0);
            self.dequantized + scratch.max(self.embed * rows)
        };
        let head = self.head(answers, logits_rows);
        let sum = |l: SavedActivations| self.kinds.iter().map(|kind| level(*kind, l).saved * rows).sum::<usize>();
        let need = |l: SavedActivations| edges + sum(l) + most(l).max(head);
        let least = allowed.iter().copied().find(|l| need(*l) <= bytes)?;
        let mut saved = vec![least; self.kinds.len()];
        let mut left = bytes - need(least);
        for better in allowed.iter().rev().filter(|k| **k < least) {
            for (own, kind) in saved.iter_mut().zip(&self.kinds).rev() {
                let more = level(*kind, *better).saved.saturating_sub(level(*kind, *own).saved) * rows;
                if more > left {
                    break;
                }
                left -= more;
                *own = *better;
            }
        }
        let mut saved_at = Vec::new();
        let mut at = edges;
        for (own, kind) in saved.iter().zip(&self.kinds) {
            saved_at.push(at);
            at += level(*kind, *own).saved * rows;
        }
        let logits = at + self.head * answer_rows;
        let again = Work::sum(saved.iter().zip(&self.kinds).map(|(own, kind)| (level(*kind, *own).again, 1.0)));
        Some(Arrangement {
            rows,
            chunk,
            edge: self.edge * rows,
            edges: self.edges(offload),
            offloads: offload,
            saved,
            saved_at,
            layers: self.kinds.len(),
            work: at,
            scratch: at + self.dequantized,
            answer_rows,
            logits,
            logits_rows: logits_rows.clamp(1, answers.max(1)),
            logits_room: (bytes - logits) / self.logits,
            again: again.of(tokens, answers) / self.work.of(tokens, answers),
        })
    }

    /// Time of a micro-batch's step with so much of it computed again, as a share of what it takes without waiting for weights: that of
    /// dequantising them, in each of so many turns of chunks, and where layers or their inputs are in host memory, that of the bus.
    pub(super) fn waits(
        &self,
        (tokens, answers): (usize, usize),
        again: f64,
        turns: f64,
        (place, offload): (Weights, bool),
    ) -> f64 {
        let all = self.work.of(tokens, answers);
        // Of a forward and a backward pass; what is computed again is of the forward pass, a third of the step.
        let dequantizing = turns * self.dequantizing as f64 * MATMUL_PER_BYTE / all;
        let passes = [1.0 / 3.0 + dequantizing, 2.0 / 3.0 + again + (1.0 + 3.0 * again) * dequantizing];
        let weights = if place == Weights::Host { self.weights } else { 0 };
        let inputs = self.host_inputs(tokens, answers).filter(|_| offload).unwrap_or(0);
        let bus = (weights + inputs) as f64 * MATMUL_PER_BUS_BYTE / all;
        (passes.into_iter().map(|pass| pass.max(bus)).sum::<f64>() - 1.0 - again).max(0.0)
    }

    /// Arranges a batch for a forward pass that has no backward pass.
    pub(super) fn arrange_forward(
        &self,
        tokens: usize,
        answers: usize,
        bytes: usize,
        mode: Mode,
    ) -> Option<Arrangement> {
        let ([rows, answer_rows], edges) = (padded_rows(tokens, answers), FORWARD_EDGES);
        let scratch = edges * self.edge * rows;
        let logits = scratch + self.head * answer_rows;
        (self.forward(tokens, answers, mode) <= bytes).then(|| Arrangement {
            rows,
            chunk: mode.chunk,
            edge: self.edge * rows,
            edges,
            offloads: false,
            saved: Vec::new(),
            saved_at: Vec::new(),
            layers: self.kinds.len(),
            work: scratch,
            scratch: scratch + self.dequantized,
            answer_rows,
            logits,
            logits_rows: mode.logits.clamp(1, answers.max(1)),
            logits_room: (bytes - logits) / self.logits,
            again: 0.0,
        })
    }

    /// Bytes of a batch in a forward pass that has no backward pass.
    pub(super) fn forward(&self, tokens: usize, answers: usize, mode: Mode) -> usize {
        let [rows, _] = padded_rows(tokens, answers);
        let layers =
            self.dequantized + self.forward.iter().map(|level| level.scratch(rows, mode.chunk)).max().unwrap_or(0);
        let most = layers.max(self.dequantized + self.embed * rows).max(self.head(answers, mode.logits));
        FORWARD_EDGES * self.edge * rows + most
    }

    /// Values between layers that there is room for.
    fn edges(&self, offload: bool) -> usize {
        if offload { OFFLOAD_EDGES } else { self.kinds.len() + 1 }
    }

    /// Bytes of host memory in which the inputs of layers wait, of up to so many tokens; `None` where nothing would be gained, or where
    /// the backward pass of a layer needs the place of its output.
    pub(super) fn host_inputs(&self, tokens: usize, answers: usize) -> Option<usize> {
        let [rows, _] = padded_rows(tokens, answers);
        let waiting = (self.kinds.len() + 1).checked_sub(OFFLOAD_EDGES).filter(|n| *n > 0 && !self.rewrites_output)?;
        Some(waiting * self.edge * rows)
    }

    /// Bytes a token takes between layers and saved in them.
    pub(super) fn per_token(&self, saved: &[SavedActivations], offload: bool) -> usize {
        let bytes = |(level, kind): (&SavedActivations, &usize)| self.levels[*kind][*level as usize].saved;
        self.edges(offload) * self.edge + saved.iter().zip(&self.kinds).map(bytes).sum::<usize>()
    }

    /// Bytes of the head for so many answer tokens, with so many rows of logits at once.
    pub(super) fn head(&self, answers: usize, logits_rows: usize) -> usize {
        self.head * answers.next_multiple_of(64) + logits_rows.min(answers) * self.logits
    }

    /// Bytes with which a batch is computed as fast as it goes with so much saved, in chunks of so many rows.
    pub(super) fn whole(&self, tokens: usize, answers: usize, saved: SavedActivations, mode: Mode) -> usize {
        let [rows, answer_rows] = padded_rows(tokens, answers);
        let level = |kind: &usize| &self.levels[*kind][saved as usize];
        let saved: usize = self.kinds.iter().map(|k| level(k).saved * rows).sum();
        let scratch = self.kinds.iter().map(|k| level(k).scratch(rows, mode.chunk)).max().unwrap_or(0);
        let scratch = self.dequantized + scratch.max(self.embed * rows);
        let head = self.head * answer_rows + LOGITS_ROWS[1].min(answers) * self.logits;
        self.edges(mode.offload) * self.edge * rows + saved + scratch.max(head)
    }
}

impl Program {
    /// Time of steps, in multiply-adds of matmuls.
    fn work(&self, steps: &[Step]) -> Work {
        let one = |step: &Step| match step.cost {
            Cost::Matmul(multiply_adds) => multiply_adds as f64,
            Cost::Memory => MATMUL_PER_BYTE * step.buffers().map(|b| self.buffers[b].bytes() as f64).sum::<f64>(),
        };
        Work::sum(steps.iter().map(|step| match step.rows {
            Rows::Tokens => (Work([one(step), 0.0]), 1.0),
            Rows::Predictors => (Work([0.0, one(step)]), 1.0),
        }))
    }
}

/// Bytes of what a batch brings with it: ids, positions, places, tiles, targets, tables, and what an auxiliary loss of routers reads.
pub(super) fn input_bytes(lowered: &Lowered, aux: Option<AuxLoss>, tokens: usize, answers: usize) -> usize {
    let bytes = || lowered.tables.iter().map(|t| t.bytes);
    // All tables, and room for two of the widest at least.
    let tables = bytes().sum::<usize>().max(bytes().max().unwrap_or(0) * 2);
    let of_routers = aux.map_or(0, |loss| tokens * 4 + router_bytes(loss.experts));
    tokens * (4 + 4 + 4 + 4 + TILE_BYTES + SEGMENT_BYTES + tables) + answers * 4 * 6 + of_routers + (1 << 20)
}
