//! `a + b`. A step that makes one of them may add the other itself.

use super::super::sum::sum;
use super::{CudaOp, Epilogue, Lowering};
use dpo_core::error::Result;

pub(super) const OP: CudaOp =
    CudaOp { prepare, epilogue: Some(Epilogue::Sum), ..CudaOp::new("add", forward, backward) };

fn prepare(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    l.share_gradient(index + 1, &l.nodes[index].inputs);
    Ok(())
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let [a, b] = l.inputs(index)?;
    let y = l.place(index);
    l.push(sum(a, b, y))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let nodes = l.nodes;
    nodes[index].inputs.iter().try_for_each(|value| l.pass_on(*value, dy))
}
