//! What everything takes on the GPU, known before the first step: which values of which layer are kept, and where every
//! buffer lies. Needs no GPU.

use dpo_plugin_api::graph::ModelGraph;
use serde::Serialize;

use super::blas::WORKSPACE;
use super::kernels::HEAD_DIMS;
use super::program::{Buffer, GRADIENT, Keep, Op, Program, padded};
use crate::error::{Error, Result};
use crate::lora::Adapter;
use crate::plan::{Wishes, size};
use crate::weights::blocks;

/// Tokens at once that fill an H100; more gain nothing.
const ENOUGH_TOKENS: usize = 4096;

/// What a context, its kernels and cuBLASLt take on a card before anything is allocated.
pub(super) const CONTEXT: usize = 640 << 20;

/// A model lowered for CUDA.
pub(super) struct Lowered {
    /// Of every kind of block.
    pub programs: Vec<Program>,
    pub head: Program,
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

/// The plan of a run on one GPU; sizes in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct GpuPlan {
    /// Memory to plan with.
    pub available: usize,
    /// Context, kernels, libraries.
    pub context: usize,
    /// Frozen weights on the GPU, with the adapter's bf16 copy.
    pub weights: usize,
    /// The embedding table, where it stays in host memory.
    pub host_embedding: usize,
    /// Parameters, gradient and moments of the adapter in f32.
    pub adapter: usize,
    /// cuBLASLt's workspace.
    pub workspace: usize,
    /// Values that go from layer to layer, and what is kept of every layer.
    pub kept: usize,
    /// Values and gradients of the layer in work; logits.
    pub scratch: usize,
    /// Tokens computed at once.
    pub micro_batch_tokens: usize,
    /// Answer tokens among them, at most.
    pub answers: usize,
    /// Of every layer, what is kept.
    pub keep: Vec<Keep>,
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
        for dim in programs.iter().flat_map(Program::head_dims) {
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
        Ok(Lowered { programs, head })
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

    /// Bytes of frozen weights: of the layers and the head, and of the embedding table where it is not the head's.
    pub(super) fn weights(&self, graph: &ModelGraph) -> (usize, usize) {
        let mut bytes = 0;
        for layer in &graph.layers {
            let program = &self.programs[layer.block];
            bytes += (0..program.groups.len()).map(|g| self.stack(program, g).0).sum::<usize>();
        }
        for (block, _) in blocks(graph) {
            let vectors = block.nodes.iter().filter(|n| n.op != "embedding").flat_map(|n| &n.weights);
            bytes +=
                vectors.filter(|w| w.shape.len() == 1).map(|w| (w.shape[0] * 2).next_multiple_of(256)).sum::<usize>();
        }
        let table = graph.vocab_size * graph.hidden_size * 2;
        let embedding = graph.embed.nodes[0].weights[0].shape.iter().product::<usize>() * 2;
        (bytes + table, if Lowered::tied(graph) { 0 } else { embedding })
    }

    /// Bytes of everything that belongs to the adapter.
    pub(super) fn adapter(&self, graph: &ModelGraph, parameters: usize) -> usize {
        let stacked = |program: &Program| {
            (0..program.groups.len()).map(|g| self.stacked_gradients(program, g).iter().sum::<usize>()).sum::<usize>()
        };
        parameters * 16 + graph.layers.iter().map(|l| stacked(&self.programs[l.block])).sum::<usize>()
    }

    /// A block's passes when this much of it is kept.
    pub(super) fn schedule(program: &Program, keep: Keep) -> Result<Scheduled> {
        let kept = program.kept(keep);
        let ops = program.replayed(&kept)?;
        Ok(Scheduled { forward: layout(program, &program.forward, &kept), backward: layout(program, &ops, &kept), ops })
    }
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
    /// Widths of heads that attend.
    pub(super) fn head_dims(&self) -> Vec<usize> {
        self.forward.iter().filter_map(|o| if let Op::Attend { a, .. } = o { Some(a.dim) } else { None }).collect()
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
    tokens * (4 + 4 + 8 + 20 + widest * 2) + answers * 4 * 5 + (1 << 20)
}

impl GpuPlan {
    /// Plans pairs of up to `longest` tokens, at most `answers` of every token an answer's; refuses what does not fit.
    pub fn new(
        graph: &ModelGraph,
        adapter: &Adapter,
        longest: usize,
        answers: f64,
        available: usize,
        wishes: Wishes,
    ) -> Result<GpuPlan> {
        let lowered = Lowered::new(graph, adapter)?;
        let (weights, table) = lowered.weights(graph);
        let adapter = lowered.adapter(graph, adapter.params.len());
        let wanted = wishes.micro_batch_tokens.unwrap_or(ENOUGH_TOKENS).max(longest);
        // Whole tiles keep every buffer at an aligned place.
        let round = |tokens: usize| tokens.next_multiple_of(64);
        let least = round(longest);
        let mut sizes = vec![round(wanted)];
        while wishes.micro_batch_tokens.is_none() && sizes[sizes.len() - 1] > least {
            sizes.push(round(sizes[sizes.len() - 1] * 3 / 4).max(least));
        }
        let recompute = match wishes.recompute {
            Some(true) => &Keep::ALL[3..],
            Some(false) => &Keep::ALL[..1],
            None => &Keep::ALL[..],
        };
        let mut tightest = None;
        // Full speed first; then smaller micro-batches; then the table in host memory; then everything again.
        let narrow = recompute.iter().copied().filter(|k| *k <= Keep::Narrow).max();
        let last = recompute.iter().copied().max();
        for least_kept in [narrow, last].into_iter().flatten() {
            for on_host in [false, true] {
                for tokens in &sizes {
                    let fixed = |keep: &[Keep]| -> Result<GpuPlan> {
                        let answers = ((*tokens as f64 * answers).ceil() as usize).next_multiple_of(8).max(8);
                        let (kept, scratch) = values(graph, &lowered, *tokens, answers, keep)?;
                        Ok(GpuPlan {
                            available,
                            context: CONTEXT,
                            weights: weights + if on_host { 0 } else { table },
                            host_embedding: if on_host { table } else { 0 },
                            adapter,
                            workspace: WORKSPACE,
                            kept,
                            scratch,
                            micro_batch_tokens: *tokens,
                            answers,
                            keep: keep.to_vec(),
                        })
                    };
                    let mut plan = fixed(&vec![least_kept; graph.layers.len()])?;
                    if plan.total() > available {
                        tightest = Some(plan);
                        continue;
                    }
                    // As many layers as fit keep more, the last ones first.
                    for better in recompute.iter().rev().filter(|k| **k < least_kept) {
                        let (mut low, mut high) = (0, graph.layers.len());
                        while low < high {
                            let middle = (low + high).div_ceil(2);
                            let mut keep = plan.keep.clone();
                            let first = keep.len() - middle;
                            keep[first..].fill(*better);
                            if fixed(&keep)?.total() <= available { low = middle } else { high = middle - 1 }
                        }
                        let first = plan.keep.len() - low;
                        let mut keep = plan.keep.clone();
                        keep[first..].fill(*better);
                        plan = fixed(&keep)?;
                    }
                    return Ok(plan);
                }
            }
        }
        let need = tightest.map(|p| p.total()).unwrap_or_default();
        Err(Error::input(format!(
            "the longest pair has {longest} tokens and needs {} on the GPU, there are {}: weights {}, adapter {}",
            size(need),
            size(available),
            size(weights),
            size(adapter)
        ))
        .help("lower --max-length or --lora-rank, take a smaller model, or a GPU with more memory"))
    }

    /// Bytes of the whole process on the GPU.
    pub fn total(&self) -> usize {
        self.context + self.weights + self.adapter + self.workspace + self.kept + self.scratch
    }
}

/// Bytes kept for the backward pass, and bytes of scratch memory, for a micro-batch.
pub(super) fn values(
    graph: &ModelGraph,
    lowered: &Lowered,
    tokens: usize,
    answers: usize,
    keep: &[Keep],
) -> Result<(usize, usize)> {
    let edge = lowered.programs[0].edge();
    let mut kept = (graph.layers.len() + 2) * edge * tokens + input_bytes(graph, tokens, answers);
    let mut scratch = head_bytes(graph, lowered, answers, MIN_LOGITS.min(answers))?;
    let mut known: Vec<(usize, Keep, usize, usize)> = Vec::new();
    for (layer, keep) in graph.layers.iter().zip(keep) {
        let found = known.iter().find(|(b, k, ..)| *b == layer.block && k == keep).copied();
        let (_, _, own, work) = match found {
            Some(found) => found,
            None => {
                let scheduled = Lowered::schedule(&lowered.programs[layer.block], *keep)?;
                let free = Lowered::schedule(&lowered.programs[layer.block], Keep::Input)?;
                let passes = [&scheduled.forward, &scheduled.backward, &free.forward];
                let work = passes.iter().map(|l| l.scratch_bytes).max().unwrap_or(0);
                known.push((layer.block, *keep, scheduled.forward.kept_bytes, work));
                known[known.len() - 1]
            }
        };
        kept += own * tokens;
        scratch = scratch.max(work * tokens);
    }
    Ok((kept, scratch))
}

/// Rows of logits at once, at least.
const MIN_LOGITS: usize = 512;

/// Bytes of the head with so many rows of logits at once: its input, output and gradient, its scratch, the logits.
pub(super) fn head_bytes(graph: &ModelGraph, lowered: &Lowered, answers: usize, rows: usize) -> Result<usize> {
    let scheduled = Lowered::schedule(&lowered.head, Keep::All)?;
    let passes = [&scheduled.forward, &scheduled.backward];
    let own = passes.iter().map(|l| l.scratch_bytes).max().unwrap_or(0) + scheduled.forward.kept_bytes;
    Ok((own + 3 * lowered.head.edge()) * answers.next_multiple_of(64) + rows * graph.vocab_size * 4)
}

impl std::fmt::Display for GpuPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "memory      {} of the GPU, {} planned", size(self.available), size(self.total()))?;
        let table = match self.host_embedding {
            0 => String::new(),
            bytes => format!(" (embedding table of {} in host memory)", size(bytes)),
        };
        writeln!(f, "            weights {}{table}, adapter {}", size(self.weights), size(self.adapter))?;
        writeln!(
            f,
            "            kept values {}, values in work {}, CUDA {}, workspace {}",
            size(self.kept),
            size(self.scratch),
            size(self.context),
            size(self.workspace)
        )?;
        let names = [
            (Keep::All, "keep all"),
            (Keep::Products, "keep products"),
            (Keep::Narrow, "keep narrow products"),
            (Keep::Input, "keep their input"),
        ];
        let counts = names.iter().map(|(k, n)| (self.keep.iter().filter(|o| *o == k).count(), n));
        let how: Vec<String> = counts.filter(|(n, _)| *n > 0).map(|(n, name)| format!("{n} layers {name}")).collect();
        write!(f, "micro-batch {} tokens, {}", self.micro_batch_tokens, how.join(", "))
    }
}

/// Columns of a buffer; 0 for one of heads.
pub(super) fn columns(buffer: Buffer) -> usize {
    match buffer {
        Buffer::Columns(n) => n,
        Buffer::Heads(_) => 0,
    }
}
