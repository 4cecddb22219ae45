//! `factor · x` with a factor of the family, the checkpoint or both, which is its VJP too; in place where nothing else reads x.

use super::{Args, CudaOp, Execute, Launch, Lowering, Slice, Source, Step, View, number};
use dpo_core::error::Result;

pub(super) static SOURCE: Source = Source::plain("scale", include_str!("scale.cu"), &["scale"]);

pub(super) const OP: CudaOp = CudaOp { in_place: true, ..CudaOp::new("scale", forward, backward) };

struct Scale {
    width: usize,
    factor: f32,
    /// A factor of the checkpoint.
    weight: Option<usize>,
}

fn step(l: &mut Lowering<'_>, index: usize, x: Slice, y: Slice) -> Result<Step> {
    let node = &l.nodes[index];
    let weight = node.weight("factor").map(|_| l.vector(index, "factor")).transpose()?;
    let factor = if node.attrs.contains_key("factor") { number(node, "factor") as f32 } else { 1.0 };
    Ok(Step::new("scale", [x], [y], Scale { width: y.width, factor, weight }).in_place(&[(0, 0)]))
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let [x] = l.inputs(index)?;
    let y = l.place_over_input(index)?;
    let step = step(l, index, x, y)?;
    l.push(step)
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let from = l.nodes[index].inputs[0];
    let dx = l.place_over_gradient(from, dy);
    let step = step(l, index, dy, dx)?;
    l.push(step)?;
    l.pass_on(from, dx)
}

impl Execute for Scale {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let args = Args::default().with(reads[0]).with(writes[0]);
        let weight = self.weight.map_or(0, |at| on.weights.vectors[at]);
        let args = args.with(on.rows as i32).with(self.width as i32).with(self.factor).with(weight);
        on.by_columns("scale", on.rows, self.width, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let factor = self.factor * self.weight.map_or(1.0, |at| on.vector(at)[0]);
        on.each_row(reads, writes, |_, read, write| write[0] = read[0].iter().map(|x| factor * x).collect());
    }
}
