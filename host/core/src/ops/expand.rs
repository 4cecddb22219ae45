//! A value for every head, side by side: what heads share, such as the part of keys that turns in multi-head latent attention.

use candle_core::Tensor;

use super::narrow::by_head;
use super::{Call, Gradients, Kernel, Op, count};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "expand", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let (rows, width) = call.inputs[0].dims2()?;
    let all = call.inputs[0].reshape((rows, 1, width))?.broadcast_as((rows, count(call.node, "heads"), width))?;
    Ok(all.contiguous()?.flatten_from(1)?)
}

/// The sum over heads.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    Ok(Gradients::of(vec![by_head(call.node, dy)?.sum(1)?]))
}
