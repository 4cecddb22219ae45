//! `y = (offset + w) · (x - mean) / sqrt(variance + eps) + b` over runs of `w`'s columns (Ba et al. 2016, eq. 4, with the gain and
//! bias of section 3.1): the whole row, every head with one weight, or every head with its own. Nemotron's weights count from 1.

use candle_core::{D, Tensor};

use super::{Call, Gradients, Kernel, Op, factor, number, run, weight};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "layer_norm", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

/// Runs with mean 0 and variance 1 as `[tokens, runs, run]`, and `1 / sqrt(variance + eps)` of each as `[tokens, runs, 1]`.
fn normalised(call: &Call<'_>) -> Result<[Tensor; 2]> {
    let (tokens, width) = call.inputs[0].dims2()?;
    let run = run(call.node);
    let x = call.inputs[0].contiguous()?.reshape((tokens, width / run, run))?;
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let inverse = (centred.sqr()?.mean_keepdim(D::Minus1)? + number(call.node, "eps"))?.powf(-0.5)?;
    Ok([centred.broadcast_mul(&inverse)?, inverse])
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let [rows, _] = normalised(call)?;
    let y = factor(call, rows)?;
    let y = match weight(call, "bias") {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    Ok(y.reshape(call.inputs[0].shape())?)
}

/// With `g = dy · (offset + w)` and the normalised run `n`: `dx = (g - mean(g) - n · mean(g · n)) / sqrt(variance + eps)`.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let [rows, inverse] = normalised(call)?;
    let g = factor(call, dy.contiguous()?.reshape(rows.shape())?)?;
    let along = rows.broadcast_mul(&(&g * &rows)?.mean_keepdim(D::Minus1)?)?;
    let dx = (g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)? - along)?;
    Ok(Gradients::of(vec![dx.broadcast_mul(&inverse)?.reshape(dy.shape())?]))
}
