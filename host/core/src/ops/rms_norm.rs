//! `y = (offset + w) · x / sqrt(mean(x²) + eps)` over runs of `w`'s length: the whole row, or every head (Zhang and Sennrich 2019,
//! eq. 4). Gemma's weights count from 1. A norm without a weight has a factor of 1.

use candle_core::{D, Tensor};

use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, factor, number, run, same};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "rms_norm",
    formula: "(offset + weight) · x / sqrt(mean(x²) + eps), over runs of weight's length",
    inputs: 1,
    weights: &[("weight", Presence::Optional)],
    attrs: &[
        Attr { name: "eps", kind: AttrKind::Number, presence: Presence::Required },
        Attr { name: "offset", kind: AttrKind::Number, presence: Presence::Optional },
        Attr { name: "run", kind: AttrKind::Count, presence: Presence::Optional },
    ],
    check: |node, widths| {
        let shape = node.weight("weight").map(|w| w.shape.as_slice());
        let run = run(node);
        match shape {
            Some([own]) if *own != run => return Err(format!("a weight of {own} for runs of {run} columns")),
            None | Some([_]) => {}
            Some(other) => return Err(format!("a weight of shape {other:?}, needs one of [{run}]")),
        }
        if run == 0 || !node.width.is_multiple_of(run) {
            return Err(format!("runs of {run} do not divide {} columns", node.width));
        }
        same("the value", node.width, widths[0])
    },
    reads_layout: false,
    cached_inputs: &[],
    kernel: Kernel::Value { forward, vjp },
};

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
