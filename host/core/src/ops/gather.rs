//! Rows of a value: those that predict scored tokens, in the order of [`Layout::predictors`](crate::batch::Layout::predictors). No
//! graph names it: the host puts it where a model has no further use of the other rows ([`predictors`](crate::predictors)).

use candle_core::{Device, Tensor};

use super::{Call, Gradients, Kernel, Op};
use crate::error::Result;

/// What nodes call it.
pub const GATHER: &str = "gather";

pub(super) const OP: Op = Op { name: GATHER, cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

fn predictors(call: &Call<'_>) -> Result<Tensor> {
    Ok(Tensor::new(call.layout.predictors.as_slice(), &Device::Cpu)?)
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    Ok(call.inputs[0].index_select(&predictors(call)?, 0)?)
}

/// A row may predict several tokens, the first ones of a prompt's answers: their gradients add up. The other rows have none.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let zero = Tensor::zeros(call.inputs[0].shape(), dy.dtype(), &Device::Cpu)?;
    Ok(Gradients::of(vec![zero.index_add(&predictors(call)?, dy, 0)?]))
}
