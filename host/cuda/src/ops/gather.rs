//! Rows of a value: those that predict scored tokens. Its VJP gives every row the sum of the gradients of those that were taken from it.

use super::{Args, CudaOp, Execute, Launch, Lowering, Source, Step, View, whole};
use dpo_core::error::Result;
use dpo_core::ops::GATHER;

pub(super) static SOURCE: Source = Source::plain("gather", include_str!("gather.cu"), &["gather_rows", "scatter_rows"]);

pub(super) const OP: CudaOp = CudaOp { any_width: true, ..CudaOp::new(GATHER, forward, backward) };

struct Gather {
    width: usize,
}

struct Scatter {
    width: usize,
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([x], width) = (l.inputs(index)?, whole(l.nodes[index].width));
    let y = l.place(index);
    l.push(Step::new("gather", [x], [y], Gather { width }).mixes_rows())
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let (node, width) = (&l.nodes[index], whole(l.nodes[index].width));
    let (dx, sum) = l.write_gradient(node.inputs[0]);
    l.push(Step::new("gather vjp", [dy], [dx], Scatter { width }).mixes_rows())?;
    sum.map_or(Ok(()), |step| l.push(step))
}

impl Execute for Gather {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let args = Args::default().with(reads[0]).with(on.batch.predictors).with(writes[0]);
        on.by_columns("gather_rows", on.rows, self.width, args.with(on.rows as i32).with(self.width as i32))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        for (row, predictor) in on.batch().layout.predictors.clone().into_iter().enumerate() {
            let values = on.row(&reads[0], predictor as usize);
            on.write(&writes[0], row, &values);
        }
    }
}

impl Execute for Scatter {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let args = Args::default().with(reads[0]).with(on.batch.taken).with(on.batch.next_taken).with(writes[0]);
        on.by_columns("scatter_rows", on.rows, self.width, args.with(on.rows as i32).with(self.width as i32))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        let mut sums = vec![0.0; on.rows() * self.width];
        for (row, predictor) in on.batch().layout.predictors.clone().into_iter().enumerate() {
            let to = &mut sums[predictor as usize * self.width..][..self.width];
            to.iter_mut().zip(on.row(&reads[0], row)).for_each(|(sum, v)| *sum += v);
        }
        sums.chunks(self.width).enumerate().for_each(|(row, values)| on.write(&writes[0], row, values));
    }
}
