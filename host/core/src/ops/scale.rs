//! `factor · x`, with a factor of the family, of the checkpoint (a tensor of one number), or both.

use candle_core::Tensor;

use super::{Call, Gradients, Kernel, Op, number, weight};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "scale",
    cached_inputs: &[],
    kernel: Kernel::Value {
        forward: |call| scaled(call, call.inputs[0]),
        vjp: |call, dy| Ok(Gradients::of(vec![scaled(call, dy)?])),
    },
};

fn scaled(call: &Call<'_>, x: &Tensor) -> Result<Tensor> {
    let x = match call.node.attrs.contains_key("factor") {
        true => (x * number(call.node, "factor"))?,
        false => x.clone(),
    };
    Ok(match weight(call, "factor") {
        Some(factor) => x.broadcast_mul(&factor.reshape((1, 1))?)?,
        None => x,
    })
}
