//! Columns `[start, start + length)` of a value: a part of a fused projection.

use candle_core::Tensor;

use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, count, same};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "narrow",
    formula: "columns start to start + length of x",
    inputs: 1,
    weights: &[],
    attrs: &[
        Attr { name: "start", kind: AttrKind::Index, presence: Presence::Optional },
        Attr { name: "length", kind: AttrKind::Count, presence: Presence::Required },
    ],
    check: |node, widths| {
        let (start, length) = (count(node, "start"), count(node, "length"));
        if start.checked_add(length).is_none_or(|end| end > widths[0]) {
            return Err(format!("{length} columns from {start} on of {}", widths[0]));
        }
        same("the value", node.width, length)
    },
    reads_layout: false,
    cached_inputs: &[],
    kernel: Kernel::Value { forward, vjp },
};

fn forward(call: &Call<'_>) -> Result<Tensor> {
    Ok(call.inputs[0].narrow(1, count(call.node, "start"), count(call.node, "length"))?.contiguous()?)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (start, width) = (count(call.node, "start"), call.inputs[0].dim(1)?);
    let after = width - start - count(call.node, "length");
    Ok(Gradients::of(vec![dy.pad_with_zeros(1, start, after)?]))
}
