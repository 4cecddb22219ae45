//! Rotary embedding in the half-split layout, in place; its VJP turns back.

use super::{Address, Args, BatchTable, CudaOp, Execute, Launch, Lowering, Slice, Source, Step, View, count, number};
use dpo_core::error::{Error, Result};
use dpo_plugin_api::graph::Node;
use serde_json::Value;

pub(super) static SOURCE: Source = Source::plain("rope", include_str!("rope.cu"), &["rope_table", "rope"]);

pub(super) const OP: CudaOp =
    CudaOp { in_place: true, table: |node| Some(table(node)), ..CudaOp::new("rope", forward, backward) };

struct Rope {
    table: BatchTable,
    width: usize,
    dim: usize,
    /// 1 turns, -1 turns back.
    direction: f32,
}

/// Cosines and sines of every token, from frequencies and their scale.
fn table(node: &Node) -> BatchTable {
    let frequencies = node.attrs.get("inv_freq").and_then(Value::as_array);
    let constants: Vec<f32> = frequencies.into_iter().flatten().filter_map(Value::as_f64).map(|f| f as f32).collect();
    BatchTable { bytes: constants.len() * 8, constants, scale: number(node, "scale") as f32, fill }
}

fn fill(on: &Launch<'_>, table: &BatchTable, frequencies: Address, to: Address) -> Result<()> {
    let (tokens, half) = (on.batch.tokens, table.constants.len());
    let args = Args::default().with(on.batch.positions).with(frequencies).with(to);
    let args = args.with(tokens as i32).with(half as i32).with(table.scale);
    let grid = [(tokens * half).div_ceil(256), 1, 1];
    on.gpu.launch(on.kernels.get("rope_table")?, grid, [256, 1, 1], 0, args)
}

fn step(node: &Node, x: Slice, direction: f32) -> Step {
    let (table, dim) = (table(node), count(node, "head_dim"));
    Step::new("rope", [x], [x], Rope { table, width: x.width, dim, direction }).in_place(&[(0, 0)])
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let node = &l.nodes[index];
    let dim = count(node, "head_dim");
    if !dim.is_multiple_of(16) {
        return Err(Error::input(format!("rope of heads of {dim} columns: CUDA needs a multiple of 16"))
            .help("train with --device cpu"));
    }
    let [x] = l.inputs(index)?;
    let y = l.place_over_input(index)?;
    l.copy(x, y)?;
    l.push(step(node, y, 1.0))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let node = &l.nodes[index];
    let dx = l.place_over_gradient(node.inputs[0], dy);
    l.copy(dy, dx)?;
    l.push(step(node, dx, -1.0))?;
    l.pass_on(node.inputs[0], dx)
}

impl Execute for Rope {
    fn launch(&self, on: &Launch<'_>, _: &[View], writes: &[View]) -> Result<()> {
        let (heads, half) = (self.width / self.dim, self.dim / 2);
        let args = Args::default().with(writes[0]).with(on.table(&self.table)?);
        let args = args.with(on.rows as i32).with(heads as i32).with(half as i32).with(self.direction);
        let threads = on.rows * heads * (half / 8);
        on.gpu.launch(on.kernels.get("rope")?, [threads.div_ceil(256), 1, 1], [256, 1, 1], 0, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let positions = on.batch().layout.positions.clone();
        on.each_row(reads, writes, |row, read, write| {
            let mut values = read[0].clone();
            for head in values.chunks_mut(self.dim) {
                for (j, frequency) in self.table.constants.iter().enumerate() {
                    let (sine, cosine) = (positions[row] as f32 * frequency).sin_cos();
                    let [sine, cosine] = [sine * self.direction, cosine].map(|v| v * self.table.scale);
                    let (a, b) = (head[j], head[j + self.dim / 2]);
                    head[j] = a * cosine - b * sine;
                    head[j + self.dim / 2] = b * cosine + a * sine;
                }
            }
            write[0] = values;
        });
    }
}
