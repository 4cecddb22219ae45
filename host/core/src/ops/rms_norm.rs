//! `y = w · x / sqrt(mean(x²) + eps)` over each run of `w`'s length: the whole row, or every head.

use candle_core::{D, Tensor};

use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, main_weight, number, same};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "rms_norm",
    formula: "weight · x / sqrt(mean(x²) + eps), over runs of weight's length",
    inputs: 1,
    weights: &[("weight", Presence::Required)],
    attrs: &[Attr { name: "eps", kind: AttrKind::Number, presence: Presence::Required }],
    check: |node, widths| match node.weights.first().map(|w| w.shape.as_slice()) {
        Some([run]) if *run > 0 && node.width.is_multiple_of(*run) => same("the value", node.width, widths[0]),
        shape => Err(format!("a weight of shape {shape:?} does not divide {} columns", node.width)),
    },
    reads_layout: false,
    cached_inputs: &[],
    kernel: Kernel::Value { forward, vjp },
};

/// `[tokens · runs, run]`, and `1 / rms` of each as `[tokens · runs, 1]`.
fn runs(call: &Call<'_>) -> Result<(Tensor, Tensor)> {
    let run = main_weight(call)?.dim(0)?;
    let x = call.inputs[0].contiguous()?.reshape(((), run))?;
    let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + number(call.node, "eps"))?.powf(-0.5)?;
    Ok((x, inverse))
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let (x, inverse) = runs(call)?;
    let y = x.broadcast_mul(&inverse)?.broadcast_mul(main_weight(call)?)?;
    Ok(y.reshape(call.inputs[0].shape())?)
}

/// With `g = dy · w` and `r = 1 / rms`: `dx = r · (g - x · r² · mean(g · x))`.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (x, inverse) = runs(call)?;
    let g = dy.contiguous()?.reshape(x.shape())?.broadcast_mul(main_weight(call)?)?;
    let along = ((&g * &x)?.mean_keepdim(D::Minus1)? * inverse.sqr()?)?;
    let dx = (g - x.broadcast_mul(&along)?)?.broadcast_mul(&inverse)?;
    Ok(Gradients::of(vec![dx.reshape(dy.shape())?]))
}
