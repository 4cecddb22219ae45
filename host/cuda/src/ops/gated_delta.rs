//! The gated delta rule over packed examples, in chunks: `gated_delta.cu` and `gated_delta_vjp.cu` have the formulas.
//!
//! What a chunk needs of its own tokens is a step, which makes the matrix that solves its system and the scores. The walk along an example
//! is another one. Its VJP walks once more, for the states between chunks, then back, then has all chunks at once.

#[cfg(test)]
mod emulated;

use dpo_plugin_api::graph::Node;

use super::super::segments::{CHUNK, TOKENS_PER_STATE};
#[cfg(test)]
use super::Slice;
use super::attention::most_shared;
use super::{
    Args, Argument, BackwardReads, Cost, CudaOp, Execute, Launch, Lowering, Recompute, Source, Step, Variant, View,
    count, number,
};
use dpo_core::error::{Error, Result};

pub(super) static SOURCE: Source = Source {
    variants: Some(|capability| KINDS.map(|kind| kind.variant(capability)).to_vec()),
    ..Source::plain(
        "gated_delta",
        concat!(
            include_str!("mma.cuh"),
            include_str!("recurrence.cuh"),
            include_str!("gated_delta.cu"),
            include_str!("gated_delta_vjp.cu")
        ),
        &["delta_chunks", "delta_forward", "delta_states", "delta_backward", "delta_gradients"],
    )
};

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    ..CudaOp::new("gated_delta", forward, backward)
};

/// What the kernels are compiled for: columns of a key and of a value.
#[derive(Clone, Copy)]
struct Kind {
    key: usize,
    value: usize,
}

/// Kinds that models have, to check that they compile.
const KINDS: [Kind; 4] = [
    Kind { key: 128, value: 128 },
    Kind { key: 64, value: 64 },
    Kind { key: 96, value: 192 },
    Kind { key: 32, value: 32 },
];

/// Shared memory that the kernels have beside what is asked for.
const STATIC: usize = 6 << 10;

#[derive(Clone, Copy)]
pub(super) struct Delta {
    heads: usize,
    key_heads: usize,
    kind: Kind,
    eps: f32,
    a_log: usize,
    dt_bias: usize,
}

struct Chunks(Delta);
struct Walk(Delta);
struct DeltaVjp(Delta);

/// `struct Delta` of `gated_delta.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Numbers {
    a_log: u64,
    dt_bias: u64,
    heads: i32,
    share: i32,
    tokens: i32,
    eps: f32,
}

// SAFETY: two addresses of eight bytes, then four numbers of four.
unsafe impl Argument for Numbers {}

/// `struct Reads` of `gated_delta.cu`: q, k, v, the solving matrices, the scores; sums of log decays, norms of q and of k.
#[derive(Clone, Copy)]
#[repr(C)]
struct Reads {
    views: [View; 5],
    numbers: [u64; 3],
}

// SAFETY: five views of two numbers of eight bytes, then three addresses.
unsafe impl Argument for Reads {}

/// `struct Gradients` of `gated_delta_vjp.cu`: those of the value and by v, what is written, those by a, b, q and k; the states, and theirs.
#[derive(Clone, Copy)]
#[repr(C)]
struct Gradients {
    views: [View; 7],
    states: [u64; 2],
}

// SAFETY: seven views of two numbers of eight bytes, then two addresses.
unsafe impl Argument for Gradients {}

/// Bytes of so many rows of a tile.
fn tile(columns: usize, rows: usize) -> usize {
    rows * columns.next_multiple_of(64) * 2
}

impl Kind {
    fn of(node: &Node) -> Result<Kind> {
        let kind = Kind { key: count(node, "key_dim"), value: count(node, "value_dim") };
        let fits = kind.key.is_multiple_of(32) && kind.key <= 128 && kind.value.is_multiple_of(32);
        let what = || format!("'{}' with keys of {} and values of {} columns", node.op, kind.key, kind.value);
        let refused = || Error::input(format!("op {} is not supported on CUDA", what()));
        let help =
            "keys of 32, 64, 96 or 128 columns and values of a multiple of 32 are; train others with --device cpu";
        if fits { Ok(kind) } else { Err(refused().help(help)) }
    }

    /// Columns of values of a block.
    fn columns(self) -> usize {
        if self.value.is_multiple_of(64) { 64 } else { 32 }
    }

    /// Tiles in shared memory that are read while the next ones come, of a walk and of the gradients.
    fn stages(self, capability: u32) -> usize {
        let [walk, gradients] = self.shared_of(2);
        if walk.max(gradients) + STATIC <= most_shared(capability) { 2 } else { 1 }
    }

    /// Shared memory of a walk and of the gradients with so many stages.
    fn shared_of(self, stages: usize) -> [usize; 2] {
        let (keys, square) = (tile(self.key, CHUNK), tile(CHUNK, CHUNK));
        let slab = 3 * tile(self.columns(), CHUNK) + 2 * tile(self.key, self.columns());
        [stages * (2 * keys + 2 * square + tile(self.columns(), CHUNK)), 2 * keys + (stages * slab).max(2 * square)]
    }

    fn variant(self, capability: u32) -> Variant {
        let stages = self.stages(capability);
        let numbers = [("KEY", self.key), ("VALUE", self.value), ("STAGES", stages)];
        let [walk, gradients] = self.shared_of(stages);
        Variant {
            key: self.id(),
            label: format!("{} by {}", self.key, self.value),
            before: numbers.map(|(name, number)| format!("#define {name} {number}\n")).concat(),
            shared: vec![
                ("delta_chunks", 2 * tile(self.key, CHUNK) + CHUNK * CHUNK * 4),
                ("delta_forward", walk),
                ("delta_states", walk),
                ("delta_backward", walk),
                ("delta_gradients", gradients),
            ],
            ..Variant::plain(&SOURCE)
        }
    }

    /// What tells its kernels from others.
    fn id(self) -> usize {
        self.key << 16 | self.value
    }
}

impl Delta {
    fn of(l: &mut Lowering<'_>, index: usize) -> Result<Delta> {
        let (kind, [a_log, dt_bias]) =
            (Kind::of(&l.nodes[index])?, [l.vector(index, "A_log")?, l.vector(index, "dt_bias")?]);
        let node = &l.nodes[index];
        let (heads, key_heads) = (count(node, "heads"), count(node, "key_heads"));
        Ok(Delta { heads, key_heads, kind, eps: number(node, "eps") as f32, a_log, dt_bias })
    }

    /// Multiply-adds of a token in a walk: what the state gives to keys and to queries and what it gets, and two triangles.
    fn multiply_adds(&self) -> usize {
        self.heads * self.kind.value * (3 * self.kind.key + CHUNK)
    }

    fn numbers(&self, on: &Launch<'_>) -> Numbers {
        Numbers {
            a_log: on.weights.vectors[self.a_log],
            dt_bias: on.weights.vectors[self.dt_bias],
            heads: self.heads as i32,
            share: (self.heads / self.key_heads) as i32,
            tokens: on.rows as i32,
            eps: self.eps,
        }
    }

    /// Of q, k, v (or what takes its place), solving matrices and scores, sums of log decays, norms.
    fn reads(&self, on: &Launch<'_>, views: [View; 5], decays: View, norms: View) -> Reads {
        let k_norms = norms.at + (self.key_heads * on.rows * 4) as u64;
        Reads { views, numbers: [decays.at, norms.at, k_norms] }
    }

    /// Starts a walk along every example.
    fn walk(&self, on: &Launch<'_>, kernel: &str, reads: Reads, to: View, states: Option<View>) -> Result<()> {
        let ((chunks, _), (walks, count)) = (on.batch.chunks, on.batch.walks);
        let args = Args::default().with(chunks).with(walks).with(reads).with(to);
        let args = if let Some(states) = states { args.with(states.at) } else { args };
        let columns = self.kind.columns();
        let grid = [self.heads * self.kind.value / columns, count, 1];
        let (kernel, shared) = on.kernels.variant(kernel, self.kind.id())?;
        on.gpu.launch(kernel, grid, [columns as u32 * 2, 1, 1], shared, args.with(self.numbers(on)))
    }
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([q, k, v, a, b], own) = (l.inputs(index)?, Delta::of(l, index)?);
    let squares = [(); 2].map(|()| l.buffer(own.heads * CHUNK, 0));
    let numbers = [l.heads(own.heads), l.heads(2 * own.key_heads)];
    let y = l.place(index);
    let made = [squares[0], squares[1], numbers[0], numbers[1]];
    l.leave(index, made.to_vec());
    l.push(Step::new("delta chunks", [q, k, a, b], made, Chunks(own)).mixes_rows())?;
    let reads = [q, k, v, squares[0], squares[1], numbers[0], numbers[1]];
    let step = Step::new("delta", reads, [y], Walk(own)).mixes_rows();
    l.push(step.costs(Cost::Matmul(own.multiply_adds()), Recompute::Matmul))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([q, k, v, a, b], own, nodes) = (l.inputs(index)?, Delta::of(l, index)?, l.nodes);
    let [solve, scores, decays, norms] = l.left(index)?;
    let (mut writes, mut after) = (Vec::new(), Vec::new());
    for value in &nodes[index].inputs {
        let (to, sum) = l.write_gradient(*value);
        writes.push(to);
        after.extend(sum);
    }
    let state = own.heads * own.kind.key * own.kind.value / TOKENS_PER_STATE;
    writes.extend([own.heads * own.kind.value, state, state].map(|width| l.buffer(width, 0)));
    let reads = [q, k, v, a, b, solve, scores, decays, norms, dy];
    let step = Step::new("delta vjp", reads, writes, DeltaVjp(own)).mixes_rows();
    l.push(step.costs(Cost::Matmul(5 * own.multiply_adds()), Recompute::Matmul))?;
    after.into_iter().try_for_each(|step| l.push(step))
}

impl Execute for Chunks {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        vec![self.0.kind.variant(capability)]
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (d, (chunks, count)) = (&self.0, on.batch.chunks);
        let ([q, k, a, b], [solve, scores, decays, norms]) = (reads, writes) else {
            return Err(Error::run("a delta rule lacks values"));
        };
        let k_norms = norms.at + (d.key_heads * on.rows * 4) as u64;
        let args = Args::default().with(chunks).with(on.batch.begins).with(*q).with(*k).with(*a).with(*b);
        let args = args.with(*solve).with(*scores).with(decays.at).with(norms.at).with(k_norms).with(d.numbers(on));
        let (kernel, shared) = on.kernels.variant("delta_chunks", d.kind.id())?;
        on.gpu.launch(kernel, [d.heads, count, 1], [128, 1, 1], shared, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        self.0.emulate_chunks(on, reads, writes);
    }
}

impl Execute for Walk {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        vec![self.0.kind.variant(capability)]
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let ([q, k, v, solve, scores, decays, norms], [y]) = (reads, writes) else {
            return Err(Error::run("a delta rule lacks values"));
        };
        let reads = self.0.reads(on, [*q, *k, *v, *solve, *scores], *decays, *norms);
        self.0.walk(on, "delta_forward", reads, *y, None)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        self.0.emulate_walk(on, reads, writes);
    }
}

impl Execute for DeltaVjp {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        vec![self.0.kind.variant(capability)]
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let ([q, k, v, a, b, solve, scores, decays, norms, dy], [dq, dk, dv, da, db, written, states, dstates]) =
            (reads, writes)
        else {
            return Err(Error::run("a delta rule lacks values"));
        };
        let (d, (chunks, count)) = (&self.0, on.batch.chunks);
        let of = |values: View| d.reads(on, [*q, *k, values, *solve, *scores], *decays, *norms);
        d.walk(on, "delta_states", of(*v), *written, Some(*states))?;
        on.gpu.mark("delta states")?;
        d.walk(on, "delta_backward", of(*dy), *dv, Some(*dstates))?;
        on.gpu.mark("delta back")?;
        let gradients = Gradients { views: [*dy, *dv, *written, *da, *db, *dq, *dk], states: [states.at, dstates.at] };
        let args = Args::default().with(chunks).with(on.batch.begins).with(of(*v)).with(*a).with(*b);
        let (kernel, shared) = on.kernels.variant("delta_gradients", d.kind.id())?;
        let args = args.with(gradients).with(d.numbers(on));
        on.gpu.launch(kernel, [d.key_heads, count, 1], [512, 1, 1], shared, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        self.0.emulate_vjp(on, reads, writes);
    }
}
