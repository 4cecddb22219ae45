//! `factor · x`, which is its VJP too; in place where nothing else reads x.

use super::{Args, CudaOp, Execute, Launch, Lowering, Slice, Source, Step, View, number};
use dpo_core::error::Result;

pub(super) static SOURCE: Source = Source::plain("scale", include_str!("scale.cu"), &["scale"]);

pub(super) const OP: CudaOp = CudaOp { in_place: true, ..CudaOp::new("scale", forward, backward) };

struct Scale {
    width: usize,
    factor: f32,
}

fn step(l: &Lowering<'_>, index: usize, x: Slice, y: Slice) -> Step {
    let run = Scale { width: y.width, factor: number(&l.nodes[index], "factor") as f32 };
    Step::new("scale", [x], [y], run).in_place(&[(0, 0)])
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let [x] = l.inputs(index)?;
    let y = l.place_over_input(index)?;
    l.push(step(l, index, x, y))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let from = l.nodes[index].inputs[0];
    let dx = l.place_over_gradient(from, dy);
    l.push(step(l, index, dy, dx))?;
    l.pass_on(from, dx)
}

impl Execute for Scale {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let args = Args::default().with(reads[0]).with(writes[0]);
        let args = args.with(on.rows as i32).with(self.width as i32).with(self.factor);
        on.by_columns("scale", on.rows, self.width, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        on.each_row(reads, writes, |_, read, write| write[0] = read[0].iter().map(|x| self.factor * x).collect());
    }
}
