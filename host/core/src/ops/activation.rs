//! `y = activation(x)`: of an MLP without a gate. [`glu`](super::glu) has the same ones.

use candle_core::Tensor;
use dpo_plugin_api::graph::Node;
use serde_json::Value;

use super::{Gradients, Kernel, Op, number};
use crate::error::{Error, Result};

pub(super) const OP: Op = Op {
    name: "activation",
    cached_inputs: &[],
    kernel: Kernel::Value {
        forward: |call| {
            let [value, _] = activation(call.node, call.inputs[0])?;
            Ok(value)
        },
        vjp: |call, dy| {
            let [_, derivative] = activation(call.node, call.inputs[0])?;
            Ok(Gradients::of(vec![(dy * derivative)?]))
        },
    },
};

fn name(node: &Node) -> &str {
    node.attrs.get("activation").and_then(Value::as_str).unwrap_or_default()
}

/// The activation of a node and its derivative at `x`.
pub(super) fn activation(node: &Node, x: &Tensor) -> Result<[Tensor; 2]> {
    // 1 + tanh(z) over 2 is sigmoid(2z), so that silu and the gelus are x times a gate.
    let half_gelu = |z: &Tensor| (z.tanh()? + 1.0)? * 0.5;
    match name(node) {
        "silu" => {
            let gate = sigmoid(x)?;
            let derivative = (&gate * ((x * (1.0 - &gate)?)? + 1.0)?)?;
            Ok([(x * gate)?, derivative])
        }
        "gelu" => {
            // Φ(x) = (1 + erf(x/√2)) / 2, φ(x) = exp(-x²/2) / √(2π); derivative Φ + x·φ.
            let cdf = (((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
            let density = ((x.sqr()? * -0.5)?.exp()? * (1.0 / (2.0 * std::f64::consts::PI).sqrt()))?;
            Ok([(x * &cdf)?, (cdf + (x * density)?)?])
        }
        "gelu_tanh" => {
            // z = √(2/π)·(x + 0.044715·x³); derivative g + x·g·(1-g)·2·dz/dx with g = (1 + tanh z)/2.
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let z = ((x + (x.powf(3.0)? * 0.044_715)?)? * c)?;
            let gate = half_gelu(&z)?;
            let dz = (((x.sqr()? * (3.0 * 0.044_715))? + 1.0)? * (2.0 * c))?;
            let derivative = (&gate + ((x * (&gate * (1.0 - &gate)?)?)? * dz)?)?;
            Ok([(x * gate)?, derivative])
        }
        "relu2" => {
            let positive = x.relu()?;
            Ok([positive.sqr()?, (positive * 2.0)?])
        }
        "sigmoid" => {
            let value = sigmoid(x)?;
            let derivative = (&value * (1.0 - &value)?)?;
            Ok([value, derivative])
        }
        "clamp" => {
            let limit = number(node, "limit");
            let inside = x.abs()?.le(limit)?.to_dtype(x.dtype())?;
            Ok([x.clamp(-limit, limit)?, inside])
        }
        other => Err(Error::run(format!("op '{}' runs with activation '{other}'", node.op))),
    }
}

fn sigmoid(x: &Tensor) -> candle_core::Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}
