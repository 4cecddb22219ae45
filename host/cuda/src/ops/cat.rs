//! Columns of a value, then those of another. Their gradients are parts of its gradient.

use super::{CudaOp, Lowering};
use dpo_core::error::Result;

pub(super) const OP: CudaOp = CudaOp::new("cat", forward, backward);

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let [a, b] = l.inputs(index)?;
    let y = l.place(index);
    l.copy(a, y.part(0, a.width))?;
    l.copy(b, y.part(a.width, b.width))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([a, b], nodes) = (l.inputs(index)?, l.nodes);
    let parts = [dy.part(0, a.width), dy.part(a.width, b.width)];
    nodes[index].inputs.iter().zip(parts).try_for_each(|(value, part)| l.pass_on(*value, part))
}
