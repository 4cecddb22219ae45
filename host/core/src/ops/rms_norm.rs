//! `y = (offset + w) · x / sqrt(mean(x²) + eps)` over runs of `w`'s length: the whole row, or every head (Zhang and Sennrich 2019,
//! eq. 4). Gemma's weights count from 1. A norm without a weight has a factor of 1.

use candle_core::{D, Tensor};

use super::{Call, Gradients, Kernel, Op, factor, number, run};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "rms_norm", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

/// `[tokens · runs, run]`, and `1 / rms` of each as `[tokens · runs, 1]`.
fn runs(call: &Call<'_>) -> Result<[Tensor; 2]> {
    let x = call.inputs[0].contiguous()?.reshape(((), run(call.node)))?;
    let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + number(call.node, "eps"))?.powf(-0.5)?;
    Ok([x, inverse])
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let [x, inverse] = runs(call)?;
    let y = factor(call, x.broadcast_mul(&inverse)?)?;
    Ok(y.reshape(call.inputs[0].shape())?)
}

/// With `g = dy · (offset + w)` and `r = 1 / rms`: `dx = r · (g - x · r² · mean(g · x))`.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let [x, inverse] = runs(call)?;
    let g = factor(call, dy.contiguous()?.reshape(x.shape())?)?;
    let along = ((&g * &x)?.mean_keepdim(D::Minus1)? * inverse.sqr()?)?;
    let dx = (g - x.broadcast_mul(&along)?)?.broadcast_mul(&inverse)?;
    Ok(Gradients::of(vec![dx.reshape(dy.shape())?]))
}
