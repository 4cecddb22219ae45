//! Linear attention with a decaying state over packed examples, in chunks: `linear_attention.cu` and `linear_attention_vjp.cu` have the
//! formulas. Which rule a state follows, the files of the ops say.
//!
//! What a chunk needs of its own tokens is a step, which makes the scores and, where a rule has one, the matrix that solves its system. The
//! walk along an example is another one. Its VJP walks once more, for the states between chunks, then back, then has all chunks at once.

#[cfg(test)]
mod emulated;

use dpo_plugin_api::graph::Node;

use super::super::segments::{CHUNK, TOKENS_PER_STATE};
#[cfg(test)]
use super::Slice;
use super::attention::most_shared;
use super::{Args, Argument, Cost, Execute, Launch, Lowering, Recompute, Source, Step, Variant, View, count};
use dpo_core::error::{Error, Result};

pub(super) static SOURCE: Source = Source {
    variants: Some(|capability| KINDS.map(|kind| kind.variant(capability)).to_vec()),
    ..Source::plain(
        "linear_attention",
        concat!(
            include_str!("mma.cuh"),
            include_str!("recurrence.cuh"),
            include_str!("linear_attention.cu"),
            include_str!("linear_attention_chunks.cu"),
            include_str!("linear_attention_vjp.cu")
        ),
        &[
            "recurrence_forward",
            "recurrence_states",
            "recurrence_backward",
            "recurrence_chunks",
            "recurrence_gradients",
        ],
    )
};

/// What the kernels are compiled for: columns of a key and of a value, and whether a chunk's system is solved.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    key: usize,
    value: usize,
    solves: bool,
}

/// Kinds that models have, to check that they compile.
const KINDS: [Kind; 6] = [
    Kind { key: 128, value: 128, solves: true },
    Kind { key: 64, value: 64, solves: true },
    Kind { key: 96, value: 192, solves: true },
    Kind { key: 128, value: 64, solves: false },
    Kind { key: 64, value: 64, solves: false },
    Kind { key: 32, value: 32, solves: false },
];

/// Shared memory that the kernels have beside what is asked for.
const STATIC: usize = 5 << 10;

/// Threads of the kernels of chunks and of gradients, as they have them.
const THREADS: [u32; 2] = [128, 512];

#[derive(Clone, Copy)]
pub(super) struct LinearAttention {
    pub heads: usize,
    pub key_heads: usize,
    pub kind: Kind,
    /// Which of the op's inputs are q, k, v, what the log decays are of and, where a system is solved, b.
    pub order: &'static [usize],
    /// Added to the sums of squares of q and k, where those are normalised.
    pub eps: f32,
    /// What time steps are clamped to.
    pub limit: [f32; 2],
    /// `A_log` and `dt_bias` of every head, and maybe factors of the values in the output.
    pub vectors: [Option<usize>; 3],
    /// Where a text's states lie among what it carries.
    pub state: usize,
}

struct Chunks(LinearAttention);
struct Walk(LinearAttention);
struct Vjp(LinearAttention);

/// `struct Rule` of `linear_attention.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Rule {
    vectors: [u64; 3],
    heads: i32,
    share: i32,
    tokens: i32,
    eps: f32,
    limit: [f32; 2],
}

// SAFETY: three addresses of eight bytes, then six numbers of four.
unsafe impl Argument for Rule {}

/// `struct Reads` of `linear_attention.cu`: q, k, v, the solving matrices, the scores; sums of log decays, factors of q and of k.
#[derive(Clone, Copy)]
#[repr(C)]
struct Reads {
    views: [View; 5],
    numbers: [u64; 3],
}

// SAFETY: five views of two numbers of eight bytes, then three addresses.
unsafe impl Argument for Reads {}

/// `struct Gradients` of `linear_attention_vjp.cu`: those of the value and by v, what is written, those by a, b, q and k; the states, and
/// theirs.
#[derive(Clone, Copy)]
#[repr(C)]
struct Gradients {
    views: [View; 7],
    states: [u64; 2],
}

// SAFETY: seven views of two numbers of eight bytes, then two addresses.
unsafe impl Argument for Gradients {}

/// What is not there.
const NOWHERE: View = View { at: 0, ld: 0 };

/// Bytes of so many rows of a tile.
fn tile(columns: usize, rows: usize) -> usize {
    rows * columns.next_multiple_of(64) * 2
}

impl Kind {
    /// Of a node with the columns of a key and of a value under these names.
    pub(super) fn of(node: &Node, names: [&str; 2], solves: bool) -> Result<Kind> {
        let [key, value] = names.map(|name| count(node, name));
        if key.is_multiple_of(32) && key <= 128 && value.is_multiple_of(32) {
            return Ok(Kind { key, value, solves });
        }
        let what = format!("op '{}': {} {key} and {} {value} are not supported on CUDA", node.op, names[0], names[1]);
        let help = format!(
            "{} of 32, 64, 96 or 128 and {} of a multiple of 32 are; train others with --device cpu",
            names[0], names[1]
        );
        Err(Error::input(what).help(help))
    }

    /// Columns of values of a block.
    fn columns(self) -> usize {
        if self.value.is_multiple_of(64) { 64 } else { 32 }
    }

    /// Tiles in shared memory that are read while the next ones come, of a walk and of the gradients.
    fn stages(self, capability: u32) -> usize {
        let [walk, gradients] = self.shared(2);
        if walk.max(gradients) + STATIC <= most_shared(capability) { 2 } else { 1 }
    }

    /// Shared memory of a walk and of the gradients with so many stages.
    fn shared(self, stages: usize) -> [usize; 2] {
        let (keys, square) = (tile(self.key, CHUNK), tile(CHUNK, CHUNK));
        let slab = 3 * tile(self.columns(), CHUNK) + 2 * tile(self.key, self.columns());
        let squares = if self.solves { 2 } else { 1 };
        // Squares of the gradients lie behind two slabs, or in the place of one.
        let gradients = if stages > 1 { stages * slab + 2 * square } else { slab.max(2 * square) };
        [stages * (2 * keys + squares * square + tile(self.columns(), CHUNK)), 2 * keys + gradients]
    }

    fn variant(self, capability: u32) -> Variant {
        let stages = self.stages(capability);
        let numbers =
            [("KEY", self.key), ("VALUE", self.value), ("STAGES", stages), ("SOLVES", usize::from(self.solves))];
        let [walk, gradients] = self.shared(stages);
        Variant {
            key: self.id(),
            label: format!("{} by {}{}", self.key, self.value, if self.solves { ", solved" } else { "" }),
            before: numbers.map(|(name, number)| format!("#define {name} {number}\n")).concat(),
            shared: vec![
                ("recurrence_chunks", 2 * tile(self.key, CHUNK) + CHUNK * CHUNK * 4),
                ("recurrence_forward", walk),
                ("recurrence_states", walk),
                ("recurrence_backward", walk),
                ("recurrence_gradients", gradients),
            ],
            ..Variant::plain(&SOURCE)
        }
    }

    /// What tells its kernels from others.
    fn id(self) -> usize {
        (self.key << 16 | self.value) * 2 + usize::from(self.solves)
    }
}

impl LinearAttention {
    /// Multiply-adds of a token in a walk: what the state gives to keys and to queries and what it gets, and two triangles.
    fn multiply_adds(&self) -> usize {
        let (states, triangles) = if self.kind.solves { (3, 2) } else { (2, 1) };
        self.heads * self.kind.value * (states * self.kind.key + triangles * CHUNK / 2)
    }

    fn rule(&self, on: &Launch<'_>) -> Rule {
        Rule {
            vectors: self.vectors.map(|vector| vector.map_or(0, |at| on.weights.vectors[at])),
            heads: self.heads as i32,
            share: (self.heads / self.key_heads) as i32,
            tokens: on.rows as i32,
            eps: self.eps,
            limit: self.limit,
        }
    }

    /// Addresses of the factors of q and of k.
    fn factors(&self, on: &Launch<'_>, norms: View) -> [u64; 2] {
        [norms.at, norms.at + (self.heads * on.rows * 4) as u64]
    }

    /// Of q, k and v (or what takes its place), then scores, sums of log decays, factors, and the solving matrices.
    fn reads(&self, on: &Launch<'_>, [q, k, v]: [View; 3], made: &[View]) -> Reads {
        let [q_factors, k_factors] = self.factors(on, made[2]);
        let solve = made.get(3).copied().unwrap_or(NOWHERE);
        Reads { views: [q, k, v, solve, made[0]], numbers: [made[1].at, q_factors, k_factors] }
    }

    /// Starts a walk along every example.
    fn walk(&self, on: &Launch<'_>, kernel: &str, reads: Reads, to: View, states: Option<View>) -> Result<()> {
        let ((chunks, _), (walks, count)) = (on.batch.chunks, on.batch.walks);
        let args = Args::default().with(chunks).with(walks).with(reads).with(to);
        // Where a text is continued, the states behind it, in f32.
        let text = on.cache.map_or(0, |cache| cache.carried + self.state as u64);
        let args = args.with(states.map_or(text, |states| states.at));
        let columns = self.kind.columns();
        let grid = [self.heads * self.kind.value / columns, count, 1];
        let (kernel, shared) = on.kernels.variant(kernel, self.kind.id())?;
        on.gpu.launch(kernel, grid, [columns as u32 * 2, 1, 1], shared, args.with(self.rule(on)))
    }
}

/// The numbers of an op's node.
type Of = fn(&mut Lowering<'_>, usize) -> Result<LinearAttention>;

pub(super) fn forward(l: &mut Lowering<'_>, index: usize, of: Of) -> Result<()> {
    let own = of(l, index)?;
    let own = LinearAttention { state: l.carry(own.heads * own.kind.key * own.kind.value * 4), ..own };
    let inputs = own.order.iter().map(|at| l.home(l.nodes[index].inputs[*at])).collect::<Result<Vec<_>>>()?;
    let mut made = vec![l.buffer(own.heads * CHUNK, 0), l.heads(own.heads), l.heads(2 * own.heads)];
    if own.kind.solves {
        made.push(l.buffer(own.heads * CHUNK, 0));
    }
    let y = l.place(index);
    l.leave(index, made.clone());
    let reads: Vec<_> = inputs[..2].iter().chain(&inputs[3..]).copied().collect();
    l.push(Step::new("recurrence chunks", reads, made.clone(), Chunks(own)).mixes_rows())?;
    let reads: Vec<_> = inputs[..3].iter().chain(&made).copied().collect();
    let step = Step::new("recurrence", reads, [y], Walk(own)).mixes_rows();
    l.push(step.costs(Cost::Matmul(own.multiply_adds()), Recompute::Matmul))
}

pub(super) fn backward(l: &mut Lowering<'_>, index: usize, of: Of) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let (own, nodes) = (of(l, index)?, l.nodes);
    let values = own.order.iter().map(|at| nodes[index].inputs[*at]);
    let inputs = values.clone().map(|value| l.home(value)).collect::<Result<Vec<_>>>()?;
    let made = l.all_left(index);
    let (mut gradients, mut after) = (Vec::new(), Vec::new());
    for value in values {
        let (to, sum) = l.write_gradient(value);
        gradients.push(to);
        after.extend(sum);
    }
    let state = own.heads * own.kind.key * own.kind.value / TOKENS_PER_STATE;
    let mut writes = gradients[..4].to_vec();
    writes.extend([state; 2].map(|width| l.buffer(width, 0)));
    writes.extend(gradients.get(4));
    if own.kind.solves {
        writes.push(l.buffer(own.heads * own.kind.value, 0));
    }
    let reads: Vec<_> = inputs[..4].iter().chain([&dy]).chain(&made).chain(inputs.get(4)).copied().collect();
    let step = Step::new("recurrence vjp", reads, writes, Vjp(own)).mixes_rows();
    l.push(step.costs(Cost::Matmul(5 * own.multiply_adds()), Recompute::Matmul))?;
    after.into_iter().try_for_each(|step| l.push(step))
}

impl Execute for Chunks {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        vec![self.0.kind.variant(capability)]
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (own, (chunks, count)) = (&self.0, on.batch.chunks);
        let ([q, k, a, rest @ ..], [scores, decays, norms, solve @ ..]) = (reads, writes) else {
            return Err(Error::run("a recurrence lacks values"));
        };
        let [b, solve] = [rest, solve].map(|views| views.first().copied().unwrap_or(NOWHERE));
        let [q_factors, k_factors] = own.factors(on, *norms);
        let args = Args::default().with(chunks).with(on.batch.begins).with(*q).with(*k).with(*a).with(b);
        let args = args.with(solve).with(*scores).with(decays.at).with(q_factors).with(k_factors).with(own.rule(on));
        let (kernel, shared) = on.kernels.variant("recurrence_chunks", own.kind.id())?;
        on.gpu.launch(kernel, [own.heads, count, 1], [THREADS[0], 1, 1], shared, args)
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
        let reads = self.0.reads(on, [reads[0], reads[1], reads[2]], &reads[3..]);
        self.0.walk(on, "recurrence_forward", reads, writes[0], None)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        self.0.emulate_walk(on, reads, writes);
    }
}

impl Execute for Vjp {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        vec![self.0.kind.variant(capability)]
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let ([q, k, v, a, dy, rest @ ..], [dq, dk, dv, da, states, dstates, solved @ ..]) = (reads, writes) else {
            return Err(Error::run("a recurrence lacks values"));
        };
        let (own, (chunks, count)) = (&self.0, on.batch.chunks);
        let b = if own.kind.solves { rest[rest.len() - 1] } else { NOWHERE };
        // A state space writes its values as they are.
        let [db, written] = if let [db, written] = solved { [*db, *written] } else { [NOWHERE, *v] };
        let of = |values: View| own.reads(on, [*q, *k, values], rest);
        own.walk(on, "recurrence_states", of(*v), written, Some(*states))?;
        on.gpu.mark("recurrence states")?;
        own.walk(on, "recurrence_backward", of(*dy), *dv, Some(*dstates))?;
        on.gpu.mark("recurrence back")?;
        let gradients = Gradients { views: [*dy, *dv, written, *da, db, *dq, *dk], states: [states.at, dstates.at] };
        let args = Args::default().with(chunks).with(on.batch.begins).with(of(*v)).with(*a).with(b);
        let (kernel, shared) = on.kernels.variant("recurrence_gradients", own.kind.id())?;
        let args = args.with(gradients).with(own.rule(on));
        on.gpu.launch(kernel, [own.key_heads, count, 1], [THREADS[1], 1, 1], shared, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        self.0.emulate_vjp(on, reads, writes);
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::kernels::ARCHITECTURES;
    use super::{KINDS, STATIC, most_shared};

    #[test]
    fn tiles_fit_into_the_shared_memory_of_every_card() {
        for (kind, capability) in KINDS.iter().flat_map(|kind| ARCHITECTURES.iter().map(move |c| (kind, *c))) {
            for (kernel, bytes) in kind.variant(capability).shared {
                assert!(bytes + STATIC <= most_shared(capability), "{kernel}: {bytes} on {capability}");
            }
        }
    }
}
