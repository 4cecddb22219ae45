//! `y = w · (x - mean) / sqrt(variance + eps) + b` over the whole row (Ba et al. 2016, eq. 4, with the gain and bias of section 3.1).

use candle_core::{D, Tensor};

use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, main_weight, number, same, weight, weight_shape};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "layer_norm",
    formula: "weight · (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) + bias",
    inputs: 1,
    weights: &[("weight", Presence::Required), ("bias", Presence::Optional)],
    attrs: &[Attr { name: "eps", kind: AttrKind::Number, presence: Presence::Required }],
    check: |node, widths| {
        weight_shape(node, "weight", &[node.width])?;
        weight_shape(node, "bias", &[node.width])?;
        same("the value", node.width, widths[0])
    },
    reads_layout: false,
    cached_inputs: &[],
    kernel: Kernel::Value { forward, vjp },
};

/// Rows with mean 0 and variance 1, and `1 / sqrt(variance + eps)` of each as `[tokens, 1]`.
fn normalised(call: &Call<'_>) -> Result<[Tensor; 2]> {
    let x = call.inputs[0];
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let inverse = (centred.sqr()?.mean_keepdim(D::Minus1)? + number(call.node, "eps"))?.powf(-0.5)?;
    Ok([centred.broadcast_mul(&inverse)?, inverse])
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let [rows, _] = normalised(call)?;
    let y = rows.broadcast_mul(main_weight(call)?)?;
    Ok(match weight(call, "bias") {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    })
}

/// With `g = dy · w` and the normalised row `n`: `dx = (g - mean(g) - n · mean(g · n)) / sqrt(variance + eps)`.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let [rows, inverse] = normalised(call)?;
    let g = dy.broadcast_mul(main_weight(call)?)?;
    let along = rows.broadcast_mul(&(&g * &rows)?.mean_keepdim(D::Minus1)?)?;
    let dx = (g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)? - along)?;
    Ok(Gradients::of(vec![dx.broadcast_mul(&inverse)?]))
}
