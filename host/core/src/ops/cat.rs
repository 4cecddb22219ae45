//! Columns of one value, then those of another; of every head, where heads are named.

use candle_core::{D, Tensor};

use super::narrow::by_head;
use super::{Call, Gradients, Kernel, Op};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "cat", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let parts = [by_head(call.node, call.inputs[0])?, by_head(call.node, call.inputs[1])?];
    Ok(Tensor::cat(&parts, D::Minus1)?.flatten_from(1)?)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (dy, a) = (by_head(call.node, dy)?, by_head(call.node, call.inputs[0])?.dim(2)?);
    let parts = [dy.narrow(2, 0, a)?, dy.narrow(2, a, dy.dim(2)? - a)?];
    let parts = parts.iter().map(|part| part.flatten_from(1)?.contiguous());
    Ok(Gradients::of(parts.collect::<candle_core::Result<_>>()?))
}
