//! Columns `[start, start + length)` of a value, or of each of its heads: a part of a fused projection.

use candle_core::Tensor;
use dpo_plugin_api::graph::Node;

use super::{Call, Gradients, Kernel, Op, count};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "narrow", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

/// A value as `[tokens, heads, columns of a head]`, where a node names heads, else as one.
pub(super) fn by_head(node: &Node, x: &Tensor) -> Result<Tensor> {
    Ok(x.reshape((x.dim(0)?, count(node, "heads").max(1), ()))?)
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let part = by_head(call.node, call.inputs[0])?.narrow(2, count(call.node, "start"), count(call.node, "length"))?;
    Ok(part.flatten_from(1)?.contiguous()?)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (start, width) = (count(call.node, "start"), by_head(call.node, call.inputs[0])?.dim(2)?);
    let after = width - start - count(call.node, "length");
    Ok(Gradients::of(vec![by_head(call.node, dy)?.pad_with_zeros(2, start, after)?.flatten_from(1)?]))
}
