//! Columns of one value, then those of another.

use candle_core::Tensor;

use super::{Call, Gradients, Kernel, Op};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "cat", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

fn forward(call: &Call<'_>) -> Result<Tensor> {
    Ok(Tensor::cat(&call.inputs, 1)?)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (a, b) = (call.inputs[0].dim(1)?, call.inputs[1].dim(1)?);
    Ok(Gradients::of(vec![dy.narrow(1, 0, a)?.contiguous()?, dy.narrow(1, a, b)?.contiguous()?]))
}
