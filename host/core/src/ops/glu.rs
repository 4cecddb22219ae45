//! Gated activation: `y = activation(gate) · up` (Shazeer 2020).

use candle_core::Tensor;

use super::activation::activation;
use super::{Call, Gradients, Kernel, Op};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "glu", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let [value, _] = activation(call.node, call.inputs[0])?;
    Ok((value * call.inputs[1])?)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let [value, derivative] = activation(call.node, call.inputs[0])?;
    Ok(Gradients::of(vec![(dy * call.inputs[1])?.mul(&derivative)?, (dy * value)?]))
}
