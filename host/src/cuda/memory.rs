//! Where everything lies on the GPU: buffers of a layer, what is kept of every layer, what a batch takes. Needs no GPU.

use dpo_plugin_api::graph::{ModelGraph, Node};

use super::kernels::{HEAD_DIMS, Heads};
use super::program::{Buffer, GRADIENT, INPUT, Keep, OUTPUT, Op, Program, padded};
use super::shard;
use crate::error::{Error, Result};
use crate::lora::Adapter;

/// A model lowered for CUDA.
pub(super) struct Lowered {
    /// Of every kind of block.
    pub programs: Vec<Program>,
    /// Of every kind of block, its passes for every [`Keep`].
    pub schedules: Vec<[Scheduled; 4]>,
    pub head: Program,
    pub head_schedule: Scheduled,
}

/// Where a block's buffers lie, in bytes a token.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    /// Of buffers in scratch memory.
    pub scratch: Vec<Option<usize>>,
    pub scratch_bytes: usize,
    /// Of buffers that are kept.
    pub kept: Vec<Option<usize>>,
    pub kept_bytes: usize,
}

/// A block's passes when this much of it is kept.
pub(super) struct Scheduled {
    pub forward: Layout,
    pub backward: Layout,
    pub ops: Vec<Op>,
}

impl Lowered {
    pub(super) fn new(graph: &ModelGraph, adapter: &Adapter) -> Result<Lowered> {
        let rank = adapter.config.rank.next_multiple_of(8);
        let room = graph.blocks.iter().map(|b| Program::room(b, rank)).max().unwrap_or(0);
        let lower = |kind: usize| {
            let layers = graph.layers.iter().enumerate().filter(|(_, l)| l.block == kind).map(|(i, _)| i + 1);
            let layers: Vec<usize> = layers.collect();
            let adapted = |node| adapter.sites.iter().any(|s| s.node.1 == node && layers.contains(&s.node.0));
            Program::lower(&graph.blocks[kind], graph.hidden_size, rank, room, &adapted)
        };
        if graph.embed.nodes.len() != 1 || graph.embed.nodes[0].op != "embedding" {
            return Err(
                Error::input("only a plain embedding table is supported on CUDA").help("train with --device cpu")
            );
        }
        let programs: Vec<Program> = (0..graph.blocks.len()).map(lower).collect::<Result<_>>()?;
        for Heads { dim, .. } in programs.iter().flat_map(Program::heads) {
            if !HEAD_DIMS.contains(&dim) {
                return Err(Error::input(format!(
                    "heads of {dim} columns are not supported on CUDA: {HEAD_DIMS:?} are"
                ))
                .help("train with --device cpu"));
            }
        }
        let head = Program::lower(&graph.head, graph.hidden_size, rank, 0, &|_| false)?;
        if !graph.vocab_size.is_multiple_of(8) {
            return Err(Error::input(format!(
                "a vocabulary of {} is not a multiple of 8, which CUDA needs",
                graph.vocab_size
            ))
            .help("train with --device cpu"));
        }
        let schedules = programs.iter().map(|p| Keep::ALL.map(|keep| schedule(p, keep))).collect();
        let head_schedule = schedule(&head, Keep::All);
        Ok(Lowered { programs, schedules, head, head_schedule })
    }

    /// Bytes of the stacked weights of a group, and of their rows.
    pub(super) fn stack(&self, program: &Program, group: usize) -> (usize, usize) {
        let g = &program.groups[group];
        let row = padded(g.inputs + g.rank) * 2;
        ((g.outputs + g.rank) * row, row)
    }

    /// Bytes of the f32 gradients of a group: by A `[rank, inputs]` and by B `[rank, outputs]`.
    pub(super) fn stacked_gradients(&self, program: &Program, group: usize) -> [usize; 2] {
        let g = &program.groups[group];
        [g.rank * g.inputs * 4, g.rank * g.outputs * 4]
    }

    /// Whether the projection is the embedding's table.
    pub(super) fn tied(graph: &ModelGraph) -> bool {
        let head = graph.head.nodes.last().and_then(|n| n.weights.first()).map(|w| &w.tensor);
        head == graph.embed.nodes[0].weights.first().map(|w| &w.tensor)
    }

    /// Bytes of frozen weights on a rank, where so many ranks share the layers: of the layers, the head and the projection;
    /// and of the embedding table where it is not the projection.
    pub(super) fn weights(&self, graph: &ModelGraph, ranks: usize) -> (usize, usize) {
        let (rest, table) = self.rest(graph);
        let layers: Vec<usize> = (0..graph.layers.len()).map(|layer| self.layer(graph, layer)).collect();
        (rest + if ranks == 1 { layers.iter().sum() } else { shard::bytes(&layers, ranks) }, table)
    }

    /// Bytes of a layer's frozen weights, every one at an aligned place.
    pub(super) fn layer(&self, graph: &ModelGraph, layer: usize) -> usize {
        let kind = graph.layers[layer].block;
        let (program, nodes) = (&self.programs[kind], &graph.blocks[kind].nodes);
        let stacks = (0..program.groups.len()).map(|g| aligned(self.stack(program, g).0));
        let biases = program.groups.iter().filter(|g| g.bias).map(|g| aligned(g.outputs * 2));
        stacks.chain(biases).chain(nodes.iter().filter_map(norm)).sum()
    }

    /// Bytes of what every rank has: of the head with the projection, and of the embedding table where it is not the same.
    pub(super) fn rest(&self, graph: &ModelGraph) -> (usize, usize) {
        let norms: usize = graph.head.nodes.iter().filter_map(norm).sum();
        let table = aligned(graph.vocab_size * graph.hidden_size * 2);
        let embedding = aligned(graph.embed.nodes[0].weights[0].shape.iter().product::<usize>() * 2);
        (norms + table, if Lowered::tied(graph) { 0 } else { embedding })
    }

    /// Bytes of the adapter's parameters and gradient, flat and in stacks.
    pub(super) fn adapter(&self, graph: &ModelGraph, parameters: usize) -> usize {
        let stacked = |program: &Program| {
            (0..program.groups.len()).map(|g| self.stacked_gradients(program, g).iter().sum::<usize>()).sum::<usize>()
        };
        parameters * 8 + graph.layers.iter().map(|l| stacked(&self.programs[l.block])).sum::<usize>()
    }
}

/// Bytes up to the next place that anything may begin at.
pub(super) fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}

/// Bytes of a norm's vector.
fn norm(node: &Node) -> Option<usize> {
    (node.op == "rms_norm").then(|| aligned(node.weights[0].shape[0] * 2))
}

/// A block's passes when this much of it is kept.
fn schedule(program: &Program, keep: Keep) -> Scheduled {
    let kept = program.kept(keep);
    let ops = program.replayed(&kept);
    Scheduled { forward: layout(program, &program.forward, &kept), backward: layout(program, &ops, &kept), ops }
}

/// Gives buffers places: kept ones one after the other, the others where nothing lies that is still read.
fn layout(program: &Program, ops: &[Op], kept: &[bool]) -> Layout {
    let count = program.buffers.len();
    let mut layout = Layout { scratch: vec![None; count], kept: vec![None; count], ..Layout::default() };
    for (buffer, _) in kept.iter().enumerate().filter(|(_, k)| **k) {
        layout.kept[buffer] = Some(layout.kept_bytes);
        layout.kept_bytes += program.buffers[buffer].bytes();
    }
    let mut lives: Vec<Option<(usize, usize)>> = vec![None; count];
    for (at, op) in ops.iter().enumerate() {
        let (reads, writes) = op.touches(&program.groups);
        for buffer in reads.into_iter().chain(writes).filter(|b| *b > GRADIENT && !kept[*b]) {
            let life = lives[buffer].get_or_insert((at, at));
            life.1 = at;
        }
    }
    let mut order: Vec<usize> = (0..count).filter(|b| lives[*b].is_some()).collect();
    order.sort_by_key(|b| std::cmp::Reverse(program.buffers[*b].bytes()));
    for (done, buffer) in order.iter().enumerate() {
        let bytes = program.buffers[*buffer].bytes();
        let mut taken: Vec<(usize, usize)> = order[..done]
            .iter()
            .filter(|o| match (lives[**o], lives[*buffer]) {
                (Some(a), Some(b)) => a.0 <= b.1 && b.0 <= a.1,
                _ => false,
            })
            .filter_map(|o| Some((layout.scratch[*o]?, layout.scratch[*o]? + program.buffers[*o].bytes())))
            .collect();
        taken.sort_unstable();
        let mut at = 0;
        for (start, end) in taken {
            if at + bytes <= start {
                break;
            }
            at = at.max(end);
        }
        layout.scratch[*buffer] = Some(at);
        layout.scratch_bytes = layout.scratch_bytes.max(at + bytes);
    }
    layout
}

impl Program {
    /// Kinds of heads that attend.
    pub(super) fn heads(&self) -> Vec<Heads> {
        let kernels = |o: &Op| if let Op::Attend { a, .. } = o { Some(a.kernels()) } else { None };
        self.forward.iter().filter_map(kernels).collect()
    }

    /// Bytes a token takes between blocks.
    pub(super) fn edge(&self) -> usize {
        self.buffers[GRADIENT].bytes()
    }
}

/// Bytes of what a batch brings with it: ids, positions, places, tiles, targets, rope's tables.
pub(super) fn input_bytes(graph: &ModelGraph, tokens: usize, answers: usize) -> usize {
    let rope = graph.blocks.iter().flat_map(|b| &b.nodes).filter(|n| n.op == "rope");
    let widest = rope.map(|n| crate::ops::count(n, "head_dim") * 4).max().unwrap_or(0);
    tokens * (4 + 4 + 4 + 4 + 32 + widest * 2) + answers * 4 * 6 + (1 << 20)
}

/// What values take, from which the arrangement of a batch follows.
pub(super) struct Footprint {
    /// Bytes a token takes between layers.
    edge: usize,
    /// The kind of block of every layer.
    kinds: Vec<usize>,
    /// Of every kind, for every [`Keep`].
    levels: Vec<[Level; 4]>,
    /// Bytes an answer token takes in the head, and those of its logits.
    head: usize,
    logits: usize,
    /// Time of a step a token, in products' multiply-adds.
    work: f64,
}

/// What a token takes in a layer, in bytes.
#[derive(Clone, Copy, Debug)]
struct Level {
    kept: usize,
    scratch: usize,
    /// Time of what is computed again, in products' multiply-adds.
    again: f64,
}

/// Where the values of a batch lie in the memory for values: between layers, kept, in work. Offsets and sizes in bytes.
#[derive(Clone, Debug)]
pub(super) struct Arrangement {
    /// Rows that every buffer has.
    pub rows: usize,
    /// Of every layer, what is kept, and where it begins.
    pub keep: Vec<Keep>,
    pub kept_at: Vec<usize>,
    pub gradient: usize,
    pub scratch: usize,
    /// Rows of the head's buffers.
    pub answer_rows: usize,
    pub logits: usize,
    /// Rows of logits at once.
    pub logits_rows: usize,
    /// Time of what is computed again, as a share of the step's.
    pub again: f64,
}

impl Arrangement {
    /// Offsets of a layer's buffers in a pass; `None` for one that the pass does not touch. A forward pass that need not
    /// `keep` anything has no backward pass.
    pub(super) fn places(
        &self,
        lowered: &Lowered,
        kind: usize,
        layer: usize,
        keep: bool,
        backward: bool,
    ) -> Vec<Option<usize>> {
        let program = &lowered.programs[kind];
        let keep = if keep || backward { self.keep[layer] } else { Keep::Input };
        let scheduled = &lowered.schedules[kind][keep as usize];
        let layout = if backward { &scheduled.backward } else { &scheduled.forward };
        let edge = program.edge() * self.rows;
        let place = |buffer| match buffer {
            INPUT => Some(layer * edge),
            OUTPUT => Some((layer + 1) * edge),
            GRADIENT => Some(self.gradient),
            _ => match (layout.kept[buffer], layout.scratch[buffer]) {
                (Some(kept), _) => Some(self.kept_at[layer] + kept * self.rows),
                (_, Some(scratch)) => Some(self.scratch + scratch * self.rows),
                _ => None,
            },
        };
        (0..program.buffers.len()).map(place).collect()
    }

    /// Offsets of the head's buffers.
    pub(super) fn head_places(&self, lowered: &Lowered) -> Vec<Option<usize>> {
        let (program, rows) = (&lowered.head, self.answer_rows);
        let edge = program.edge() * rows;
        let (forward, backward) = (&lowered.head_schedule.forward, &lowered.head_schedule.backward);
        let place = |buffer| {
            let offset = match (buffer, forward.kept.get(buffer)) {
                (INPUT | OUTPUT | GRADIENT, _) => buffer * edge,
                (_, Some(Some(kept))) => 3 * edge + kept * rows,
                _ => {
                    let scratch = forward.scratch[buffer].or(backward.scratch[buffer])?;
                    3 * edge + (forward.kept_bytes + scratch) * rows
                }
            };
            Some(self.scratch + offset)
        };
        (0..program.buffers.len()).map(place).collect()
    }
}

/// Rows of logits at once, at least and at most.
const LOGITS_ROWS: [usize; 2] = [512, 2048];

/// Multiply-adds of products that take as long as moving a byte to or from the memory, about, on every card there is.
const PRODUCTS_PER_BYTE: f64 = 120.0;

impl Footprint {
    pub(super) fn new(graph: &ModelGraph, lowered: &Lowered) -> Footprint {
        let free = |kind: &[Scheduled; 4]| kind[Keep::Input as usize].forward.scratch_bytes;
        let level = |kind: usize, keep: Keep| {
            let scheduled = &lowered.schedules[kind];
            let own = &scheduled[keep as usize];
            Level {
                kept: own.forward.kept_bytes,
                scratch: own.forward.scratch_bytes.max(own.backward.scratch_bytes).max(free(scheduled)),
                again: lowered.programs[kind].work(&own.ops)
                    - lowered.programs[kind].work(&lowered.programs[kind].backward),
            }
        };
        let kinds: Vec<usize> = graph.layers.iter().map(|l| l.block).collect();
        let head = &lowered.head_schedule;
        let scratch = head.forward.scratch_bytes.max(head.backward.scratch_bytes);
        Footprint {
            edge: lowered.programs[0].edge(),
            levels: (0..lowered.programs.len()).map(|kind| Keep::ALL.map(|keep| level(kind, keep))).collect(),
            head: 3 * lowered.head.edge() + head.forward.kept_bytes + scratch,
            logits: graph.vocab_size * 4,
            work: kinds.iter().map(|k| lowered.programs[*k].work(&lowered.programs[*k].forward) * 3.0).sum(),
            kinds,
        }
    }

    /// Arranges a batch in so many bytes: what is kept is as much as fits, of the last layers first. `None` where even the
    /// least of the allowed levels does not fit.
    pub(super) fn arrange(&self, tokens: usize, answers: usize, bytes: usize, allowed: &[Keep]) -> Option<Arrangement> {
        // Whole tiles keep every buffer at an aligned place.
        let (rows, answer_rows) = (tokens.next_multiple_of(64), answers.next_multiple_of(64));
        let edges = (self.kinds.len() + 2) * self.edge * rows;
        let level = |kind: usize, keep: Keep| self.levels[kind][keep as usize];
        let most = |keep: Keep| {
            let levels =
                self.kinds.iter().flat_map(|kind| allowed.iter().filter(|a| **a <= keep).map(|a| level(*kind, *a)));
            levels.map(|l| l.scratch).max().unwrap_or(0) * rows
        };
        let head = self.head(answers);
        let sum = |keep: Keep| self.kinds.iter().map(|kind| level(*kind, keep).kept * rows).sum::<usize>();
        let need = |keep: Keep| edges + sum(keep) + most(keep).max(head);
        let least = allowed.iter().copied().find(|keep| need(*keep) <= bytes)?;
        let mut keep = vec![least; self.kinds.len()];
        let mut left = bytes - need(least);
        for better in allowed.iter().rev().filter(|k| **k < least) {
            for (own, kind) in keep.iter_mut().zip(&self.kinds).rev() {
                let more = level(*kind, *better).kept.saturating_sub(level(*kind, *own).kept) * rows;
                if more > left {
                    break;
                }
                left -= more;
                *own = *better;
            }
        }
        let mut kept_at = Vec::new();
        let mut at = edges;
        for (keep, kind) in keep.iter().zip(&self.kinds) {
            kept_at.push(at);
            at += level(*kind, *keep).kept * rows;
        }
        let logits = at + self.head * answer_rows;
        let again: f64 = keep.iter().zip(&self.kinds).map(|(keep, kind)| level(*kind, *keep).again).sum();
        Some(Arrangement {
            rows,
            keep,
            kept_at,
            gradient: edges - self.edge * rows,
            scratch: at,
            answer_rows,
            logits,
            logits_rows: ((bytes - logits) / self.logits).min(LOGITS_ROWS[1]).clamp(1, answers.max(1)),
            again: again / self.work,
        })
    }

    /// Bytes a token takes between layers and kept in them.
    pub(super) fn per_token(&self, keep: &[Keep]) -> usize {
        let kept = |(keep, kind): (&Keep, &usize)| self.levels[*kind][*keep as usize].kept;
        (self.kinds.len() + 2) * self.edge + keep.iter().zip(&self.kinds).map(kept).sum::<usize>()
    }

    /// Least bytes of the head for so many answer tokens.
    pub(super) fn head(&self, answers: usize) -> usize {
        self.head * answers.next_multiple_of(64) + LOGITS_ROWS[0].min(answers) * self.logits
    }

    /// Bytes with which a batch is computed without computing anything again, as fast as it goes.
    pub(super) fn whole(&self, tokens: usize, answers: usize, keep: Keep) -> usize {
        let (rows, answer_rows) = (tokens.next_multiple_of(64), answers.next_multiple_of(64));
        let level = |kind: &usize| self.levels[*kind][keep as usize];
        let kept: usize = self.kinds.iter().map(|k| level(k).kept * rows).sum();
        let scratch = self.kinds.iter().map(|k| level(k).scratch * rows).max().unwrap_or(0);
        let head = self.head * answer_rows + LOGITS_ROWS[1].min(answers) * self.logits;
        (self.kinds.len() + 2) * self.edge * rows + kept + scratch.max(head)
    }
}

impl Program {
    /// Time of operations a token, in products' multiply-adds.
    fn work(&self, ops: &[Op]) -> f64 {
        let bytes = |buffers: Vec<usize>| buffers.iter().map(|b| self.buffers[*b].bytes() as f64).sum::<f64>();
        let one = |op: &Op| match op {
            Op::Product { group } | Op::ProductVjp { group, .. } => {
                let g = &self.groups[*group];
                ((g.inputs + g.rank) * (g.outputs + g.rank)) as f64
            }
            _ => {
                let (reads, writes) = op.touches(&self.groups);
                PRODUCTS_PER_BYTE * (bytes(reads) + bytes(writes))
            }
        };
        ops.iter().map(one).sum()
    }
}

/// Columns of a buffer; 0 for one of heads.
pub(super) fn columns(buffer: Buffer) -> usize {
    match buffer {
        Buffer::Columns(n) => n,
        Buffer::Heads(_) => 0,
    }
}
