//! Gated activation: `y = activation(gate) · up` (Shazeer 2020).

use candle_core::Tensor;

use super::activation::{GATES, activation};
use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, same};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "glu",
    formula: "activation(gate) · up",
    inputs: 2,
    weights: &[],
    attrs: &[Attr { name: "activation", kind: AttrKind::OneOf(GATES), presence: Presence::Required }],
    check: |node, widths| same("up", widths[1], widths[0]).and(same("the value", node.width, widths[0])),
    reads_layout: false,
    cached_inputs: &[],
    kernel: Kernel::Value { forward, vjp },
};

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let [value, _] = activation(call.node, call.inputs[0])?;
    Ok((value * call.inputs[1])?)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let [value, derivative] = activation(call.node, call.inputs[0])?;
    Ok(Gradients::of(vec![(dy * call.inputs[1])?.mul(&derivative)?, (dy * value)?]))
}
