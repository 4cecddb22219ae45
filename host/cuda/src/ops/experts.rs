//! A mixture of experts: every token goes through some of many MLPs.
//!
//! Which rows an expert has is found first. Then tokens are written to all of their rows, so that those of an expert lie together, and every product is one launch
//! for all experts. Nothing is padded: a token takes the memory of `top_k` rows, whatever they are sent to.
//!
//! LoRA is as in `linear.rs`, an A and a B for every expert: `u` lies behind what a product reads, and `v` behind its gradient.

#[cfg(test)]
mod emulated;
mod lora;

use dpo_plugin_api::graph::Node;
use serde_json::Value;

use super::super::chunks::TILE;
use super::activation::Activation;
use super::dequantize::{self, dequantized};
use super::{
    Address, Args, Argument, BackwardReads, Cost, CudaOp, Execute, Groups, Launch, LoadedStack, Lowering, Matrix,
    Member, Recompute, Slice, Source, Stack, Step, Variant, View, count, multiple_of_8, number, whole,
};
use dpo_core::error::{Error, Result};
use dpo_core::storage::Numbers;

pub(super) static SOURCE: Source = Source::plain(
    "experts",
    concat!(include_str!("activations.cuh"), include_str!("experts.cu")),
    &[
        "experts_count",
        "experts_offsets",
        "experts_places",
        "experts_spread",
        "experts_sum",
        "experts_drouting",
        "experts_activation",
        "experts_activation_vjp",
        "experts_lora_vjp",
    ],
);

pub(super) const OP: CudaOp = CudaOp {
    prepare,
    backward_reads: BackwardReads { inputs: true, value: false },
    any_width: true,
    ..CudaOp::new("experts", forward, backward)
};

/// Tokens of a block that counts, and warps of one whose warps have a row each: as `experts.cu` has them.
const COUNTED: usize = 64;
const _: () = assert!(TILE.is_multiple_of(COUNTED));
const WARPS: usize = 8;

/// Of gpt-oss, as `experts.cu` counts it.
const SWIGLU_OAI: usize = 16;

/// A node of experts.
#[derive(Clone, Copy)]
struct Experts {
    count: usize,
    top_k: usize,
    hidden: usize,
    /// Columns of the activation, and of what goes into it.
    inner: usize,
    into: usize,
    interleaved: bool,
    activation: usize,
    limit: f32,
    /// Stacks of what goes into the activation and of what comes out of it, and their LoRA columns.
    stacks: [usize; 2],
    ranks: [usize; 2],
    /// Vectors of their biases.
    biases: [Option<usize>; 2],
}

/// Finds the rows of experts.
struct Plan(Experts);
/// Gives a token's values to all of its rows, which are so many elements apart.
struct Spread(Experts, usize);
/// The product of rows with a matrix of each expert, or with its transpose.
struct Product {
    own: Experts,
    /// Of both, which.
    matrix: usize,
    transposed: bool,
    numbers: Numbers,
}
struct Inner(Experts);
/// From the gradient of rows, without what they count: that of what goes into the activation, and that of what they count.
struct InnerVjp(Experts);
struct Sum(Experts);
/// Sums the gradients of rows by token, and puts those of what they count where routing has it.
struct SpreadVjp(Experts);

/// `struct Mlp` of `experts.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Mlp {
    biases: [Address; 2],
    width: i32,
    hidden: i32,
    kind: i32,
    gated: i32,
    interleaved: i32,
    limit: f32,
}

// SAFETY: two addresses of eight bytes, then six numbers of four.
unsafe impl Argument for Mlp {}

/// The role of what goes into the activation, and of its bias.
fn first_roles(node: &Node) -> [&'static str; 2] {
    if node.weight("up").is_some() { ["up", "up_bias"] } else { ["gate_up", "gate_up_bias"] }
}

fn prepare(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let (node, numbers) = (&l.nodes[index], l.numbers());
    if numbers == Numbers::F32 {
        return Err(Error::input(format!("experts kept as {numbers:?} have no CUDA kernel")));
    }
    for role in [first_roles(node)[0], "down"] {
        let Some([experts, rows, columns]) = node.weight(role).map(|w| w.shape.as_slice()) else {
            return Err(Error::run(format!("experts without their {role}")));
        };
        let mut stack = Stack::new(numbers, multiple_of_8(node, "its matrices' columns", *columns)?);
        (stack.groups, stack.outputs, stack.rank) = (*experts, experts * rows, l.rank(index, role));
        stack.members.push(Member { node: index, role, column: 0, rank_column: 0, width: stack.outputs });
        l.program.stacks.push(stack);
    }
    Ok(())
}

impl Experts {
    fn of(l: &mut Lowering<'_>, index: usize) -> Result<Experts> {
        let (node, nodes) = (&l.nodes[index], l.nodes);
        let [role, bias] = first_roles(node);
        let (mut stacks, mut ranks) = ([0; 2], [0; 2]);
        for (at, role) in [role, "down"].into_iter().enumerate() {
            let found = l.program.stacks.iter().position(|s| s.member(index, role).is_some());
            stacks[at] = found.ok_or_else(|| Error::run("experts are in no stack"))?;
            ranks[at] = l.rank(index, role);
        }
        let mut biases = [None; 2];
        for (at, role) in biases.iter_mut().zip([bias, "down_bias"]) {
            *at = node.weight(role).is_some().then(|| l.vector(index, role)).transpose()?;
        }
        let shape = |role: &str| node.weight(role).map_or([0; 3], |w| [w.shape[0], w.shape[1], w.shape[2]]);
        let ([count, into, hidden], [_, _, inner]) = (shape(role), shape("down"));
        if count > Groups::MOST {
            return Err(Error::input(format!("{count} experts; CUDA has room for {}", Groups::MOST))
                .help("train with --device cpu"));
        }
        let text = node.attrs.get("activation").and_then(Value::as_str);
        let oai = text == Some("swiglu_oai");
        Ok(Experts {
            count,
            top_k: self::count(node, "top_k"),
            hidden,
            inner,
            into,
            interleaved: node.attrs.get("interleaved").and_then(Value::as_bool).unwrap_or(false),
            activation: if oai { SWIGLU_OAI } else { Activation::of(&nodes[index])?.kind },
            limit: number(node, "limit") as f32,
            stacks,
            ranks,
            biases,
        })
    }

    /// Rows that some tokens have, so many elements apart.
    fn rows(&self, l: &mut Lowering<'_>, ld: usize) -> Slice {
        l.buffer(self.top_k * ld, 0)
    }

    fn product(&self, l: &Lowering<'_>, matrix: usize, transposed: bool, [x, plan, y]: [Slice; 3]) -> Step {
        let run = Product { own: *self, matrix, transposed, numbers: l.numbers() };
        let label = if transposed { "matmul vjp of experts" } else { "matmul of experts" };
        let ([reads, makes], rank) = (self.sizes(matrix, transposed), self.ranks[matrix]);
        let cost = Cost::Matmul(self.top_k * (reads + rank) * makes);
        Step::new(label, [x, plan], [y], run).costs(cost, Recompute::Matmul)
    }

    /// Columns that a product with a matrix reads and makes.
    fn sizes(&self, matrix: usize, transposed: bool) -> [usize; 2] {
        let [reads, makes] = [[self.hidden, self.into], [self.inner, self.hidden]][matrix];
        if transposed { [makes, reads] } else { [reads, makes] }
    }

    /// Where the first row of every expert is told.
    fn begins(&self, on: &Launch<'_>, plan: View) -> Address {
        let blocks = on.rows.div_ceil(COUNTED);
        let before = 3 * blocks * COUNTED * self.top_k + blocks * self.count;
        plan.at + 4 * before as u64
    }

    /// Starts a product with matrices that are so many rows apart.
    fn start(
        &self,
        on: &Launch<'_>,
        (plan, apart): (View, usize),
        weight_rows: bool,
        [k, n]: [usize; 2],
        views: [View; 3],
    ) -> Result<()> {
        let groups = Groups { count: self.count, apart, begins: self.begins(on, plan) };
        groups.launch(weight_rows, on.for_matmuls(), [on.rows * self.top_k, n, k], views)
    }

    fn stack<'a>(&self, on: &'a Launch<'_>, matrix: usize) -> &'a LoadedStack {
        &on.weights.stacks[self.stacks[matrix]]
    }

    /// Elements from row to row of what a matrix reads and of what it makes, and of their gradients: behind both lie its LoRA columns.
    fn lds(&self, matrix: usize) -> [usize; 2] {
        self.sizes(matrix, false).map(|width| width + self.ranks[matrix])
    }

    /// What all kernels take last.
    fn sized(&self, on: &Launch<'_>, args: Args) -> Args {
        args.with(on.rows as i32).with(self.top_k as i32).with(self.count as i32)
    }

    fn bias(&self, on: &Launch<'_>, which: usize) -> Address {
        self.biases[which].map_or(0, |vector| on.weights.vectors[vector])
    }

    fn mlp(&self, on: &Launch<'_>) -> Mlp {
        Mlp {
            biases: [0, 1].map(|which| self.bias(on, which)),
            width: self.inner as i32,
            hidden: self.hidden as i32,
            kind: self.activation as i32,
            gated: (self.into > self.inner).into(),
            interleaved: self.interleaved.into(),
            limit: self.limit,
        }
    }
}

/// Columns of what a [`Plan`] knows of a token: three numbers of four bytes for every row, and its part of what lies there once for every
/// [`COUNTED`] tokens, a number for every expert twice and one more. Buffers have whole such parts.
fn plan_columns(experts: usize, top_k: usize) -> usize {
    6 * top_k + 2 * experts.div_ceil(COUNTED) + 2 * (experts + 1).div_ceil(COUNTED)
}

/// The rows of some tokens, so many columns each, one behind the other.
fn rows_of(view: View, width: usize) -> View {
    View { at: view.at, ld: width as i64 }
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([x, routing], own) = (l.inputs(index)?, Experts::of(l, index)?);
    multiple_of_8(&l.nodes[index], "width", own.hidden)?;
    let plan = l.buffer(plan_columns(own.count, own.top_k), 0);
    let [[gathered, before], [inner, after]] = [0, 1].map(|matrix| own.lds(matrix).map(|ld| own.rows(l, ld)));
    let y = l.place(index);
    l.leave(index, vec![plan, before, gathered, inner]);
    l.push(Step::new("experts plan", [routing], [plan], Plan(own)))?;
    l.push(Step::new("experts spread", [x, plan], [gathered], Spread(own, own.lds(0)[0])))?;
    own.lora(l, 0, [gathered, plan])?;
    l.push(own.product(l, 0, false, [gathered, plan, before]))?;
    l.push(Step::new("experts activation", [before, plan], [inner], Inner(own)))?;
    own.lora(l, 1, [inner, plan])?;
    l.push(own.product(l, 1, false, [inner, plan, after]))?;
    l.push(Step::new("experts sum", [after, plan, routing], [y], Sum(own)))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let own = Experts::of(l, index)?;
    let ([_, routing], [plan, before, x_rows, inner]) = (l.inputs(index)?, l.left(index)?);
    let (nodes, [dx_ld, _], [dinner_ld, dy_ld]) = (l.nodes, own.lds(0), own.lds(1));
    let [dy_rows, dinner, dx_rows, by_row] = [dy_ld, dinner_ld, dx_ld, 1].map(|ld| own.rows(l, ld));
    l.push(Step::new("experts spread", [dy, plan], [dy_rows], Spread(own, dy_ld)))?;
    own.lora_vjp(l, 1, [inner, dy_rows, plan], Some(routing))?;
    l.push(own.product(l, 1, true, [dy_rows, plan, dinner]))?;
    let reads = [before, dinner, dy_rows, plan, routing];
    // A row's columns are read before they are written.
    let step = Step::new("experts activation vjp", reads, [before, by_row], InnerVjp(own)).in_place(&[(0, 0)]);
    l.push(step)?;
    own.lora_vjp(l, 0, [x_rows, before, plan], None)?;
    l.push(own.product(l, 0, true, [before, plan, dx_rows]))?;
    let (dx, after_x) = l.write_gradient(nodes[index].inputs[0]);
    let (drouting, after_routing) = l.write_gradient(nodes[index].inputs[1]);
    l.push(Step::new("experts sum", [dx_rows, by_row, plan], [dx, drouting], SpreadVjp(own)))?;
    after_x.into_iter().chain(after_routing).try_for_each(|step| l.push(step))
}

impl Execute for Plan {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (own, plan) = (&self.0, writes[0].at);
        let (grid, block) = ([on.rows.div_ceil(COUNTED), 1, 1], [own.count.next_multiple_of(32) as u32, 1, 1]);
        let of_routing = || own.sized(on, Args::default().with(reads[0]).with(plan));
        on.gpu.launch(on.kernels.get("experts_count")?, grid, block, 0, of_routing())?;
        let (one, most) = ([1; 3], [Groups::MOST as u32, 1, 1]);
        let args = own.sized(on, Args::default().with(plan));
        on.gpu.launch(on.kernels.get("experts_offsets")?, one, most, 0, args)?;
        on.gpu.launch(on.kernels.get("experts_places")?, grid, block, 0, of_routing())
    }

    /// Of every row its expert, -1 behind the last.
    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let (top_k, width) = (self.0.top_k, plan_columns(self.0.count, self.0.top_k));
        on.each_row(reads, writes, |_, read, write| {
            let chosen = (0..self.0.count).filter(|e| read[0][*e] != 0.0).map(|e| e as f32);
            write[0] = chosen.take(top_k).chain(std::iter::repeat(-1.0)).take(width).collect();
        });
    }
}

impl Execute for Spread {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let own = &self.0;
        let args = Args::default().with(reads[0]).with(reads[1].at).with(rows_of(writes[0], self.1));
        let args = own.sized(on, args).with(own.hidden as i32);
        on.by_columns("experts_spread", on.rows, own.hidden, args)
    }

    /// In tests, the rows of a token lie in its own.
    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            let mut row = read[0].clone();
            row.resize(self.1, 0.0);
            write[0] = row.repeat(self.0.top_k);
        });
    }
}

impl Execute for Product {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        let gemm = Groups::gemm(!self.transposed).variants(capability);
        gemm.into_iter().chain(dequantize::variant(self.numbers)).collect()
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (own, stack, [k, n]) =
            (&self.own, self.own.stack(on, self.matrix), self.own.sizes(self.matrix, self.transposed));
        let ([columns, rows], all) = (own.sizes(self.matrix, false), own.ranks[self.matrix]);
        let rank = if on.adapted { all } else { 0 };
        let ld = (columns + all).next_multiple_of(64);
        let weights = dequantized(on, stack, (own.count * rows, rank, own.count), ld)?;
        let apart = rows + if matches!(stack.w, Matrix::Bf16(_)) { all } else { rank };
        let [x, y] = if self.transposed { [1, 0] } else { [0, 1] }.map(|side| own.lds(self.matrix)[side]);
        let views = [rows_of(reads[0], x), weights, rows_of(writes[0], y)];
        own.start(on, (reads[1], apart), !self.transposed, [k + rank, n], views)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        // Of [[W, s·B], [A, 0]], forward W and s·B are multiplied, backward W and A.
        let (own, rank) = (&self.own, self.own.ranks[self.matrix]);
        let ([columns, rows], [reads_ld, makes_ld]) = (own.sizes(self.matrix, false), own.lds(self.matrix));
        for token in 0..on.rows() {
            let (x, plan) = (on.row(&reads[0], token), on.row(&reads[1], token));
            let stack = on.stack(own.stacks[self.matrix]);
            let mut y = vec![0.0; own.top_k * if self.transposed { reads_ld } else { makes_ld }];
            for (at, expert) in emulated::rows(own, &plan) {
                let row = |row: usize| stack.row(expert * (rows + rank) + row);
                if self.transposed {
                    for (i, dy) in x[at * makes_ld..][..rows + rank].iter().enumerate() {
                        let to = &mut y[at * reads_ld..][..columns];
                        to.iter_mut().zip(row(i)).for_each(|(to, w)| *to += dy * w);
                    }
                } else {
                    let x = &x[at * reads_ld..][..columns + rank];
                    let of = |i: usize| row(i).iter().zip(x).map(|(w, x)| w * x).sum();
                    (0..rows).for_each(|i| y[at * makes_ld + i] = of(i));
                }
            }
            on.write(&writes[0], token, &y);
        }
    }
}

impl Execute for Inner {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let own = &self.0;
        let views = [rows_of(reads[0], own.lds(0)[1]), rows_of(writes[0], own.lds(1)[0])];
        let args = Args::default().with(views[0]).with(reads[1].at).with(views[1]).with(own.mlp(on));
        on.by_columns("experts_activation", on.rows * own.top_k, own.inner, own.sized(on, args))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let (own, biases) = (&self.0, emulated::biases(&self.0, on));
        on.each_row(reads, writes, |_, read, write| {
            write[0] = vec![0.0; own.top_k * own.lds(1)[0]];
            for (at, expert) in emulated::rows(own, &read[1]) {
                for i in 0..own.inner {
                    let [gate, up] = emulated::both(own, &read[0], &biases[0], (at, expert), i);
                    write[0][at * own.lds(1)[0] + i] = emulated::unit(own, gate, up)[0];
                }
            }
        });
    }
}

impl Execute for InnerVjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (own, [x, dinner, dy, plan, routing]) = (&self.0, [reads[0], reads[1], reads[2], reads[3], reads[4]]);
        let ([_, into], [inner, hidden]) = (own.lds(0), own.lds(1));
        let args = Args::default().with(rows_of(x, into)).with(rows_of(dinner, inner)).with(rows_of(dy, hidden));
        let args = args.with(plan.at).with(routing).with(rows_of(writes[0], into));
        let args = own.sized(on, args.with(writes[1].at).with(own.mlp(on)));
        let grid = [(on.rows * own.top_k).div_ceil(WARPS), 1, 1];
        on.gpu.launch(on.kernels.get("experts_activation_vjp")?, grid, [32 * WARPS as u32, 1, 1], 0, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let (own, biases) = (&self.0, emulated::biases(&self.0, on));
        let ([_, into], [inner, hidden]) = (own.lds(0), own.lds(1));
        on.each_row(reads, writes, |_, read, write| {
            write[0] = vec![0.0; own.top_k * into];
            write[1] = vec![0.0; own.top_k];
            for (at, expert) in emulated::rows(own, &read[3]) {
                let weight = read[4][expert];
                for i in 0..own.inner {
                    let [gate, up] = emulated::both(own, &read[0], &biases[0], (at, expert), i);
                    let ([value, by_gate, by_up], d) = (emulated::unit(own, gate, up), read[1][at * inner + i]);
                    write[1][at] += value * d;
                    let (to_gate, to_up) = emulated::columns(own, i);
                    write[0][at * into + to_gate] = weight * d * by_gate;
                    if let Some(to_up) = to_up {
                        write[0][at * into + to_up] = weight * d * by_up;
                    }
                }
                let bias = &biases[1][expert * own.hidden..][..own.hidden];
                let dy = &read[2][at * hidden..][..own.hidden];
                write[1][at] += bias.iter().zip(dy).map(|(b, d)| b * d).sum::<f32>();
            }
        });
    }
}

impl Execute for Sum {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let own = &self.0;
        let rows = rows_of(reads[0], own.lds(1)[1]);
        let args = Args::default().with(rows).with(reads[1].at).with(reads[2]);
        let args = own.sized(on, args.with(own.bias(on, 1)).with(writes[0])).with(own.hidden as i32);
        on.by_columns("experts_sum", on.rows, own.hidden, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let (own, biases) = (&self.0, emulated::biases(&self.0, on));
        on.each_row(reads, writes, |_, read, write| {
            write[0] = vec![0.0; own.hidden];
            for (at, expert) in emulated::rows(own, &read[1]) {
                let bias = &biases[1][expert * own.hidden..];
                let values = read[0][at * own.lds(1)[1]..][..own.hidden].iter().zip(bias);
                write[0].iter_mut().zip(values).for_each(|(sum, (v, b))| *sum += read[2][expert] * (v + b));
            }
        });
    }
}

impl Execute for SpreadVjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (own, none) = (&self.0, View { at: 0, ld: 0 });
        let rows = rows_of(reads[0], own.lds(0)[0]);
        let args = Args::default().with(rows).with(reads[2].at).with(none).with(0_u64);
        let args = own.sized(on, args.with(writes[0])).with(own.hidden as i32);
        on.by_columns("experts_sum", on.rows, own.hidden, args)?;
        let args = own.sized(on, Args::default().with(reads[1].at).with(reads[2].at).with(writes[1]));
        let args = args.with(whole(own.count) as i32);
        on.by_columns("experts_drouting", on.rows, whole(own.count), args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let own = &self.0;
        on.each_row(reads, writes, |_, read, write| {
            (write[0], write[1]) = (vec![0.0; own.hidden], vec![0.0; whole(own.count)]);
            for (at, expert) in emulated::rows(own, &read[2]) {
                write[1][expert] = read[1][at];
                let values = &read[0][at * own.lds(0)[0]..][..own.hidden];
                write[0].iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{COUNTED, plan_columns};

    /// What is known of rows fits into the buffer of its tokens, whose rows are a multiple of [`COUNTED`].
    #[test]
    fn a_plan_fits_into_its_buffer() {
        for (experts, top_k) in [(1, 1), (8, 2), (60, 4), (128, 8), (512, 10)] {
            for blocks in [1, 2, 33] {
                let (tokens, bytes) = (blocks * COUNTED, 2 * plan_columns(experts, top_k));
                let needed = 4 * (3 * tokens * top_k + blocks * experts + experts + 1);
                assert!(needed <= bytes * tokens, "{experts} experts, {top_k} a token, {tokens} tokens");
            }
        }
    }
}
