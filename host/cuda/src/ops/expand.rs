//! A value for every head, side by side.

use super::heads::{self, Columns, Copied};
use super::{CudaOp, Lowering, count};
use dpo_core::error::Result;

pub(super) const OP: CudaOp = CudaOp::new("expand", forward, backward);

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([x], heads) = (l.inputs(index)?, count(&l.nodes[index], "heads"));
    let y = l.place(index);
    let (from, to) = ((0, Columns { run: 0, start: 0 }), (0, Columns { run: x.width, start: 0 }));
    l.push(heads::copy(&[x], &[y], heads, vec![Copied { from, to, length: x.width }]))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let (node, heads) = (&l.nodes[index], count(&l.nodes[index], "heads"));
    let (dx, after) = l.write_gradient(node.inputs[0]);
    l.push(heads::sum(dy, dx, heads))?;
    after.map_or(Ok(()), |step| l.push(step))
}
