//! Columns of a value, then those of another. Their gradients are parts of its gradient; of heads, copies of columns of every head.

use super::heads::{self, Columns, Copied};
use super::{CudaOp, Lowering, count, multiple_of_8};
use dpo_core::error::Result;

pub(super) const OP: CudaOp = CudaOp::new("cat", forward, backward);

/// Of both inputs, where their heads lie in themselves and in the value.
fn parts(l: &Lowering<'_>, index: usize, heads: usize) -> Result<[(Columns, Columns); 2]> {
    let (node, inputs) = (&l.nodes[index], l.inputs::<2>(index)?);
    for part in inputs {
        multiple_of_8(node, "width of a head", part.width / heads)?;
    }
    let (run, [a, b]) = (node.width / heads, inputs.map(|part| part.width / heads));
    Ok([(a, 0), (b, a)].map(|(own, start)| (Columns { run: own, start: 0 }, Columns { run, start })))
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([a, b], heads) = (l.inputs(index)?, count(&l.nodes[index], "heads"));
    if heads > 1 {
        let parts = parts(l, index, heads)?.into_iter().enumerate();
        let copies = parts.map(|(at, (own, whole))| Copied { from: (at, own), to: (0, whole), length: own.run });
        let y = l.place(index);
        return l.push(heads::copy(&[a, b], &[y], heads, copies.collect()));
    }
    let y = l.place(index);
    l.copy(a, y.part(0, a.width))?;
    l.copy(b, y.part(a.width, b.width))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([a, b], nodes, heads) = (l.inputs(index)?, l.nodes, count(&l.nodes[index], "heads"));
    if heads > 1 {
        let (mut writes, mut after) = (Vec::new(), Vec::new());
        for value in &nodes[index].inputs {
            let (to, sum) = l.write_gradient(*value);
            writes.push(to);
            after.extend(sum);
        }
        let parts = parts(l, index, heads)?.into_iter().enumerate();
        let copies = parts.map(|(at, (own, whole))| Copied { from: (0, whole), to: (at, own), length: own.run });
        l.push(heads::copy(&[dy], &writes, heads, copies.collect()))?;
        return after.into_iter().try_for_each(|step| l.push(step));
    }
    let parts = [dy.part(0, a.width), dy.part(a.width, b.width)];
    nodes[index].inputs.iter().zip(parts).try_for_each(|(value, part)| l.pass_on(*value, part))
}
