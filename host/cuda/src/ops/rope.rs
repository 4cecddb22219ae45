//! Rotary embedding of a head's columns, in place; its VJP turns back.

use super::{
    Address, Args, BatchTable, CudaOp, Execute, Launch, Lowering, Slice, Source, Step, View, count, multiple_of_8,
    number,
};
use dpo_core::error::{Error, Result};
use dpo_plugin_api::graph::Node;
use serde_json::Value;

pub(super) static SOURCE: Source =
    Source { waits: true, ..Source::plain("rope", include_str!("rope.cu"), &["rope_table", "rope"]) };

pub(super) const OP: CudaOp =
    CudaOp { in_place: true, table: |node| Some(table(node)), ..CudaOp::new("rope", forward, backward) };

struct Rope {
    table: BatchTable,
    width: usize,
    dim: usize,
    /// The first column of a head that turns.
    start: usize,
    /// Whether pairs are neighbours.
    interleaved: bool,
    /// 1 turns, -1 turns back.
    direction: f32,
}

/// Cosines and sines of every token, from frequencies; its numbers are the scale, and beta and period of the positions' factor.
fn table(node: &Node) -> BatchTable {
    let frequencies = node.attrs.get("inv_freq").and_then(Value::as_array);
    let constants: Vec<f32> = frequencies.into_iter().flatten().filter_map(Value::as_f64).map(|f| f as f32).collect();
    let numbers = ["scale", "position_beta", "position_period"].map(|name| number(node, name) as f32);
    BatchTable { bytes: constants.len() * 8, constants, numbers, fill }
}

fn fill(on: &Launch<'_>, table: &BatchTable, frequencies: Address, to: Address) -> Result<()> {
    let ((tokens, pairs), [scale, beta, period]) = ((on.batch.tokens, table.constants.len()), table.numbers);
    let args = Args::default().with(on.batch.positions).with(frequencies).with(to);
    let args = args.with(tokens as i32).with(pairs as i32).with(scale).with(beta).with(period as i32);
    let grid = [(tokens * pairs).div_ceil(256), 1, 1];
    on.gpu.launch(on.kernels.get("rope_table")?, grid, [256, 1, 1], 0, args)
}

fn step(node: &Node, x: Slice, direction: f32) -> Step {
    let (table, dim, start) = (table(node), count(node, "head_dim"), count(node, "start"));
    let interleaved = node.attrs.get("layout").and_then(Value::as_str) == Some("interleaved");
    Step::new("rope", [x], [x], Rope { table, width: x.width, dim, start, interleaved, direction }).in_place(&[(0, 0)])
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let node = &l.nodes[index];
    let dim = count(node, "head_dim");
    if !dim.is_multiple_of(16) {
        return Err(Error::input(format!("rope of heads of {dim} columns: CUDA needs a multiple of 16"))
            .help("train with --device cpu"));
    }
    multiple_of_8(node, "first column", count(node, "start"))?;
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
        let (heads, pairs) = (self.width / self.dim, self.table.constants.len());
        let args = Args::default().with(writes[0]).with(on.table(&self.table)?);
        let args = args.with(on.rows as i32).with(heads as i32).with(self.dim as i32).with(self.start as i32);
        let args = args.with(pairs as i32).with(i32::from(self.interleaved)).with(self.direction);
        let threads = on.rows * heads * pairs.div_ceil(8);
        on.gpu.launch(on.kernels.get("rope")?, [threads.div_ceil(256), 1, 1], [256, 1, 1], 0, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let positions = on.batch().layout.positions.clone();
        on.each_row(reads, writes, |row, read, write| {
            let mut values = read[0].clone();
            let [scale, beta, period] = self.table.numbers;
            let far = if period > 0.0 { (1.0 + (positions[row] as f32 / period).floor()).ln() } else { 0.0 };
            let scale = scale * (1.0 + beta * far);
            let pairs = self.table.constants.len();
            for head in values.chunks_mut(self.dim) {
                let head = &mut head[self.start..];
                for (j, frequency) in self.table.constants.iter().enumerate() {
                    let (sine, cosine) = (positions[row] as f32 * frequency).sin_cos();
                    let [sine, cosine] = [sine * self.direction, cosine].map(|v| v * scale);
                    let [low, high] = if self.interleaved { [2 * j, 2 * j + 1] } else { [j, j + pairs] };
                    let (a, b) = (head[low], head[high]);
                    head[low] = a * cosine - b * sine;
                    head[high] = b * cosine + a * sine;
                }
            }
            write[0] = values;
        });
    }
}
