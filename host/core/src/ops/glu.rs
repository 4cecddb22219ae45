//! Gated activation: `y = activation(gate) · up` (Shazeer 2020).

use candle_core::Tensor;
use serde_json::Value;

use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, same};
use crate::error::{Error, Result};

pub(super) const OP: Op = Op {
    name: "glu",
    formula: "activation(gate) · up",
    inputs: 2,
    weights: &[],
    attrs: &[Attr {
        name: "activation",
        kind: AttrKind::OneOf(&["silu", "gelu", "gelu_tanh", "gelu_pytorch_tanh"]),
        presence: Presence::Required,
    }],
    check: |node, widths| same("up", widths[1], widths[0]).and(same("the value", node.width, widths[0])),
    reads_layout: false,
    cached_inputs: &[],
    kernel: Kernel::Value { forward, vjp },
};

/// An activation and its derivative at `x`.
fn activation(call: &Call<'_>, x: &Tensor) -> Result<[Tensor; 2]> {
    // 1 + tanh(z) over 2 is sigmoid(2z), so that all three are x times a gate.
    let half_gelu = |z: &Tensor| (z.tanh()? + 1.0)? * 0.5;
    match call.node.attrs.get("activation").and_then(Value::as_str) {
        Some("silu") => {
            let gate = candle_sigmoid(x)?;
            let derivative = (&gate * ((x * (1.0 - &gate)?)? + 1.0)?)?;
            Ok([(x * gate)?, derivative])
        }
        Some("gelu") => {
            // Φ(x) = (1 + erf(x/√2)) / 2, φ(x) = exp(-x²/2) / √(2π); derivative Φ + x·φ.
            let cdf = (((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
            let density = ((x.sqr()? * -0.5)?.exp()? * (1.0 / (2.0 * std::f64::consts::PI).sqrt()))?;
            Ok([(x * &cdf)?, (cdf + (x * density)?)?])
        }
        Some("gelu_tanh" | "gelu_pytorch_tanh") => {
            // z = √(2/π)·(x + 0.044715·x³); derivative g + x·g·(1-g)·2·dz/dx with g = (1 + tanh z)/2.
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let z = ((x + (x.powf(3.0)? * 0.044_715)?)? * c)?;
            let gate = half_gelu(&z)?;
            let dz = (((x.sqr()? * (3.0 * 0.044_715))? + 1.0)? * (2.0 * c))?;
            let derivative = (&gate + ((x * (&gate * (1.0 - &gate)?)?)? * dz)?)?;
            Ok([(x * gate)?, derivative])
        }
        other => Err(Error::run(format!("glu runs with activation {other:?}"))),
    }
}

fn candle_sigmoid(x: &Tensor) -> candle_core::Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let [value, _] = activation(call, call.inputs[0])?;
    Ok((value * call.inputs[1])?)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let [value, derivative] = activation(call, call.inputs[0])?;
    Ok(Gradients::of(vec![(dy * call.inputs[1])?.mul(&derivative)?, (dy * value)?]))
}
