//! What an operation of a program starts on the GPU.

use dpo_plugin_api::graph::Node;
use serde_json::Value;

use super::blas::{Operands, Product};
use super::device::{Address, Args, Argument, View};
use super::engine::CudaDevice;
use super::memory::columns;
use super::model::BlockWeights;
use super::program::{Attention, Op, Program, Slice};
use crate::error::{Error, Result};
use crate::ops::number;

/// Everything that an operation runs on.
pub(super) struct Run<'a> {
    pub program: &'a Program,
    pub weights: &'a BlockWeights,
    pub nodes: &'a [Node],
    pub places: &'a [Address],
    pub rows: usize,
    /// Whether the adapter takes part: without it a linear is its frozen weights alone.
    pub adapted: bool,
    /// Where a text is continued: what attention remembers of it.
    pub past: Option<Past>,
}

/// Keys and values of the tokens before, in rows of a text's memory, with room for the new ones behind them.
#[derive(Clone, Copy)]
pub(super) struct Past {
    pub tokens: usize,
    pub keys: View,
    pub values: View,
}

impl Past {
    /// The view whose row of a text's token is that token's: it begins as many rows before the new ones as there are old ones.
    fn of_text(&self, new: View) -> View {
        View { at: new.at.wrapping_sub(self.tokens as u64 * new.ld as u64 * 2), ld: new.ld }
    }
}

/// `struct Shape` of `attention.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AttentionShape {
    heads: i32,
    share: i32,
    tokens: i32,
    window: i32,
    scale: f32,
    softcap: f32,
}

// SAFETY: six numbers of four bytes.
unsafe impl Argument for AttentionShape {}

/// Frequencies and scale of a rope node.
pub(super) fn rope_numbers(node: &Node) -> (Vec<f32>, f32) {
    let frequencies = node.attrs.get("inv_freq").and_then(Value::as_array);
    let frequencies = frequencies.map(|l| l.iter().filter_map(Value::as_f64).map(|f| f as f32).collect());
    (frequencies.unwrap_or_default(), number(node, "scale") as f32)
}

impl CudaDevice {
    pub(super) fn view(&self, run: &Run<'_>, slice: Slice) -> View {
        let ld = columns(run.program.buffers[slice.buffer]) as i64;
        View { at: run.places[slice.buffer] + (slice.column * 2) as u64, ld }
    }

    /// Runs an operation.
    pub(super) fn run(&self, run: &Run<'_>, op: &Op) -> Result<()> {
        let (rows, view) = (run.rows, |s: &Slice| self.view(run, *s));
        let t = rows as i32;
        match op {
            Op::Norm { node, x, y, dim, eps } => {
                let heads = x.width / dim;
                let args = Args::default().with(view(x)).with(run.weights.vectors[*node]).with(view(y)).with(t);
                let args = args.with(heads as i32).with(*dim as i32).with(*eps);
                self.rows("rms_norm", rows * heads, *dim, args)?;
            }
            Op::NormVjp { node, x, dy, before, dx, dim, eps } => {
                let heads = x.width / dim;
                let before = before.map_or(View { at: 0, ld: 0 }, |b| view(&b));
                let args = Args::default().with(view(x)).with(run.weights.vectors[*node]).with(view(dy)).with(before);
                let args = args.with(view(dx)).with(t).with(heads as i32).with(*dim as i32).with(*eps);
                self.rows("rms_norm_vjp", rows * heads, *dim, args)?;
            }
            Op::Rope { node, x, dim, back } => {
                let table = self.rope_table(&run.nodes[*node])?;
                let (heads, half) = (x.width / dim, dim / 2);
                let args = Args::default().with(view(x)).with(table).with(t).with(heads as i32).with(half as i32);
                let args = args.with(if *back { -1.0_f32 } else { 1.0 });
                let threads = rows * heads * (half / 8);
                self.gpu.launch(self.kernels.get("rope")?, [threads.div_ceil(256), 1, 1], [256, 1, 1], 0, args)?;
            }
            Op::Down { group } => {
                if run.adapted {
                    self.down(run, *group)?;
                }
            }
            Op::Product { group } => {
                let (g, stack) = (&run.program.groups[*group], &run.weights.stacks[*group]);
                let rank = if run.adapted { g.rank } else { 0 };
                let mut product = Product::new(rows, g.outputs, g.inputs + rank);
                product.b_transposed = true;
                product.add = g.residual.is_some();
                product.bias = g.bias;
                let (a, d) = (view(&g.x), view(&g.y));
                let b = View { at: stack.at, ld: stack.ld as i64 };
                let c = g.residual.map_or(d, |r| view(&r));
                self.blas.run(&self.gpu, product, Operands { a, b, c, d, bias: stack.bias })?;
            }
            Op::ProductVjp { group, dy, before, dx } => {
                self.low_rank_vjp(run, *group, view(dy))?;
                let (g, stack) = (&run.program.groups[*group], &run.weights.stacks[*group]);
                let mut product = Product::new(rows, g.inputs, g.outputs + g.rank);
                product.add = before.is_some();
                let b = View { at: stack.at, ld: stack.ld as i64 };
                let c = before.map_or(view(dx), |x| view(&x));
                self.blas.run(&self.gpu, product, Operands { a: view(dy), b, c, d: view(dx), bias: 0 })?;
            }
            Op::Attend { a, q, k, v, out, lse } => {
                let (tiles, count, shape) = self.attention_shape(a);
                let mut begins = self.inputs.at.begins;
                let (mut from, mut keys, mut values) = (view(q), view(k), view(v));
                let (mut to, mut sums) = (view(out), run.places[*lse]);
                if let Some(past) = &run.past {
                    for (new, all) in [(keys, past.keys), (values, past.values)] {
                        let end = View { at: all.at + past.tokens as u64 * all.ld as u64 * 2, ld: all.ld };
                        self.wide(
                            "copy",
                            rows,
                            k.width,
                            Args::default().with(new).with(end).with(t).with(k.width as i32),
                        )?;
                    }
                    (keys, values) = (past.keys, past.values);
                    (from, to) = (past.of_text(from), past.of_text(to));
                    [sums, begins] = [sums, begins].map(|at| at.wrapping_sub(past.tokens as u64 * 4));
                }
                let args = Args::default().with(tiles).with(begins).with(from).with(keys).with(values).with(to);
                let args = shape(args.with(sums));
                let (kernels, block) = (self.attention[&a.kernels()], [a.kernels().tile() as u32 * 2, 1, 1]);
                self.gpu.launch(kernels.forward, [a.heads, count, 1], block, kernels.shared[0], args)?;
            }
            Op::AttendVjp { a, q, k, v, out, lse, delta, dout, d, parts } => {
                let kernels = self.attention[&a.kernels()];
                let (lse, delta) = (run.places[*lse], run.places[*delta]);
                let args = Args::default().with(view(out)).with(view(dout)).with(delta).with(t).with(a.heads as i32);
                self.gpu.launch(kernels.delta, [(rows * a.heads).div_ceil(8), 1, 1], [32, 8, 1], 0, args)?;
                let (tiles, count, shape) = self.attention_shape(a);
                let (block, shared) = ([a.kernels().tile() as u32 * 2, 1, 1], kernels.shared);
                let reads = || {
                    let args = Args::default().with(tiles).with(self.inputs.at.begins);
                    args.with(view(q)).with(view(k)).with(view(v)).with(view(dout)).with(lse).with(delta)
                };
                let halves = if a.dim > 128 { 2 } else { 1 };
                let sums = [&d[1], &d[2]];
                let to = parts.as_ref().map_or(sums, |[dk, dv]| [dk, dv]);
                let args = shape(reads().with(view(to[0])).with(view(to[1])));
                self.gpu.launch(kernels.dkv, [a.heads, count, halves], block, shared[2], args)?;
                for (part, sum) in to.into_iter().zip(sums).filter(|(part, sum)| part != sum) {
                    let share = (a.heads / a.kv_heads) as i32;
                    let args = Args::default().with(view(part)).with(view(sum)).with(a.kv_heads as i32).with(share);
                    let grid = [(a.kv_heads * a.dim / 8).div_ceil(128), rows, 1];
                    self.gpu.launch(kernels.sum, grid, [128, 1, 1], 0, args)?;
                }
                self.gpu.mark("attention dk, dv")?;
                let args = shape(reads().with(view(&d[0])));
                self.gpu.launch(kernels.dq, [a.heads, count, 1], block, shared[1], args)?;
            }
            Op::Glu { kind, gate, up, y } => {
                let args = Args::default().with(view(gate)).with(view(up)).with(view(y));
                self.wide("glu", rows, y.width, args.with(t).with(y.width as i32).with(*kind))?;
            }
            Op::GluVjp { kind, gate, up, dy, d } => {
                let args =
                    Args::default().with(view(gate)).with(view(up)).with(view(dy)).with(view(&d[0])).with(view(&d[1]));
                self.wide("glu_vjp", rows, dy.width, args.with(t).with(dy.width as i32).with(*kind))?;
            }
            Op::Add { a, b, y } => {
                let args = Args::default().with(view(a)).with(view(b)).with(view(y)).with(t).with(y.width as i32);
                self.wide("add", rows, y.width, args)?;
            }
            Op::Copy { a, y } => {
                let args = Args::default().with(view(a)).with(view(y)).with(t).with(y.width as i32);
                self.wide("copy", rows, y.width, args)?;
            }
        }
        self.gpu.mark(op.label())
    }

    /// `u = x · Aᵀ` behind `x`.
    fn down(&self, run: &Run<'_>, group: usize) -> Result<()> {
        let (g, stack) = (&run.program.groups[group], &run.weights.stacks[group]);
        let mut product = Product::new(run.rows, g.rank, g.inputs);
        product.b_transposed = true;
        let a = self.view(run, g.x);
        let b = View { at: stack.at + (g.outputs * stack.ld * 2) as u64, ld: stack.ld as i64 };
        let d = View { at: a.at + (g.inputs * 2) as u64, ld: a.ld };
        self.blas.run(&self.gpu, product, Operands { a, b, c: d, d, bias: 0 })
    }

    /// `v = dy · s·B` behind `dy`, and the gradients by A and B.
    fn low_rank_vjp(&self, run: &Run<'_>, group: usize, dy: View) -> Result<()> {
        let (g, stack) = (&run.program.groups[group], &run.weights.stacks[group]);
        if g.rank == 0 {
            return Ok(());
        }
        let v = View { at: dy.at + (g.outputs * 2) as u64, ld: dy.ld };
        let b = View { at: stack.at + (g.inputs * 2) as u64, ld: stack.ld as i64 };
        let product = Product::new(run.rows, g.rank, g.outputs);
        self.blas.run(&self.gpu, product, Operands { a: dy, b, c: v, d: v, bias: 0 })?;
        let x = self.view(run, g.x);
        let u = View { at: x.at + (g.inputs * 2) as u64, ld: x.ld };
        for (low, wide, width, to) in [(v, x, g.inputs, stack.gradients[0]), (u, dy, g.outputs, stack.gradients[1])] {
            let mut product = Product::new(g.rank, width, run.rows);
            (product.a_transposed, product.wide, product.add) = (true, true, true);
            let d = View { at: to, ld: width as i64 };
            self.blas.run(&self.gpu, product, Operands { a: low, b: wide, c: d, d, bias: 0 })?;
        }
        self.gpu.mark("low-rank vjp")
    }

    /// Tiles of the batch, their number, and what puts the attention's numbers behind the arguments.
    fn attention_shape(&self, a: &Attention) -> (Address, usize, impl Fn(Args) -> Args + use<>) {
        let (tiles, count) = self.inputs.at.tiles[usize::from(a.kernels().tile() == 32)];
        let shape = AttentionShape {
            heads: a.heads as i32,
            share: (a.heads / a.kv_heads) as i32,
            tokens: self.inputs.at.tokens as i32,
            window: a.window as i32,
            scale: a.scale,
            softcap: a.softcap,
        };
        (tiles, count, move |args: Args| args.with(shape))
    }

    /// A kernel with some lanes of a warp for every row of `dim` columns; their number is its last argument.
    fn rows(&self, kernel: &str, rows: usize, dim: usize, args: Args) -> Result<()> {
        let lanes = (dim / 8).next_power_of_two().min(32);
        let grid = [rows.div_ceil(8 * 32 / lanes), 1, 1];
        self.gpu.launch(self.kernels.get(kernel)?, grid, [32, 8, 1], 0, args.with(lanes as i32))
    }

    /// A kernel with a thread for every eight columns.
    pub(super) fn wide(&self, kernel: &str, rows: usize, width: usize, args: Args) -> Result<()> {
        let threads = (width / 8).next_multiple_of(32).min(256);
        let grid = [(width / 8).div_ceil(threads), rows, 1];
        self.gpu.launch(self.kernels.get(kernel)?, grid, [threads as u32, 1, 1], 0, args)
    }

    fn rope_table(&self, node: &Node) -> Result<Address> {
        let (inv_freq, scale) = rope_numbers(node);
        let table = self.ropes.iter().find(|t| t.inv_freq == inv_freq && t.scale == scale);
        let table = table.ok_or_else(|| Error::run("a rope without its table"))?;
        Ok(self.inputs.at.ropes + (table.offset * self.inputs.at.tokens) as u64)
    }
}
