//! `factor · x`.

use candle_core::Tensor;

use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, number, same};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "scale",
    formula: "factor · x",
    inputs: 1,
    weights: &[],
    attrs: &[Attr { name: "factor", kind: AttrKind::Number, presence: Presence::Required }],
    check: |node, widths| same("the value", node.width, widths[0]),
    reads_layout: false,
    cached_inputs: &[],
    kernel: Kernel::Value {
        forward: |call| scaled(call, call.inputs[0]),
        vjp: |call, dy| Ok(Gradients::of(vec![scaled(call, dy)?])),
    },
};

fn scaled(call: &Call<'_>, x: &Tensor) -> Result<Tensor> {
    Ok((x * number(call.node, "factor"))?)
}
