//! Columns `[start, start + length)` of a value: a part of a fused projection.

use candle_core::Tensor;

use super::{Call, Gradients, Kernel, Op, count};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "narrow", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

fn forward(call: &Call<'_>) -> Result<Tensor> {
    Ok(call.inputs[0].narrow(1, count(call.node, "start"), count(call.node, "length"))?.contiguous()?)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (start, width) = (count(call.node, "start"), call.inputs[0].dim(1)?);
    let after = width - start - count(call.node, "length");
    Ok(Gradients::of(vec![dy.pad_with_zeros(1, start, after)?]))
}
