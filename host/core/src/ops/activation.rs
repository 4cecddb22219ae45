//! `y = activation(x)`: of an MLP without a gate. [`glu`](super::glu) has the same ones.

use candle_core::cpu::erf::erf_f64;
use dpo_plugin_api::graph::Node;
use serde_json::Value;

use super::real::Real;
use super::rows::{RowOp, over_rows};
use super::{Gradients, Kernel, Op, number};
use crate::error::{Error, Result};

pub(super) const OP: Op = Op {
    name: "activation",
    cached_inputs: &[],
    kernel: Kernel::Value {
        forward: |call| {
            let [y] = over_rows(&Forward(Activation::of(call.node)?), [call.inputs[0]], [call.node.width])?;
            Ok(y)
        },
        vjp: |call, dy| {
            let [dx] = over_rows(&Vjp(Activation::of(call.node)?), [call.inputs[0], dy], [call.node.width])?;
            Ok(Gradients::of(vec![dx]))
        },
    },
};

/// An activation, by PyTorch's names; `relu2` is the square of relu (So et al. 2021).
#[derive(Clone, Copy)]
pub(super) enum Activation {
    Silu,
    Gelu,
    GeluTanh,
    Relu2,
    Sigmoid,
    Identity,
    /// `min(max(x, -limit), limit)`.
    Clamp(f64),
}

struct Forward(Activation);
struct Vjp(Activation);

impl RowOp<1, 1> for Forward {
    #[inline(always)]
    fn row<T: Real>(&self, [x]: [&[T]; 1], [y]: [&mut [T]; 1]) {
        self.0.each(x, |at, (value, _)| y[at] = value);
    }
}

impl RowOp<2, 1> for Vjp {
    #[inline(always)]
    fn row<T: Real>(&self, [x, dy]: [&[T]; 2], [dx]: [&mut [T]; 1]) {
        let dy = &dy[..x.len()];
        self.0.each(x, |at, (_, derivative)| dx[at] = dy[at] * derivative);
    }
}

impl Activation {
    /// That of a checked node.
    pub(super) fn of(node: &Node) -> Result<Activation> {
        Ok(match node.attrs.get("activation").and_then(Value::as_str).unwrap_or_default() {
            "silu" => Activation::Silu,
            "gelu" => Activation::Gelu,
            "gelu_tanh" => Activation::GeluTanh,
            "relu2" => Activation::Relu2,
            "sigmoid" => Activation::Sigmoid,
            "identity" => Activation::Identity,
            "clamp" => Activation::Clamp(number(node, "limit")),
            other => return Err(Error::run(format!("op '{}' runs with activation '{other}'", node.op))),
        })
    }

    /// Gives every column's value and derivative to `take`.
    #[inline(always)]
    pub(super) fn each<T: Real>(self, x: &[T], mut take: impl FnMut(usize, (T, T))) {
        let one = T::one();
        match self {
            Activation::Silu => x.iter().enumerate().for_each(|(at, x)| {
                let gate = x.sigmoid();
                take(at, (*x * gate, gate * (one + *x * (one - gate))));
            }),
            Activation::Gelu => x.iter().enumerate().for_each(|(at, x)| {
                // Φ(x) = (1 + erf(x/√2)) / 2, φ(x) = exp(-x²/2) / √(2π); derivative Φ + x·φ.
                let x = x.to_f64();
                let cdf = 0.5 * (1.0 + erf_f64(x * std::f64::consts::FRAC_1_SQRT_2));
                let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                take(at, (T::from_f64(x * cdf), T::from_f64(cdf + x * density)));
            }),
            Activation::GeluTanh => {
                // z = √(2/π)·(x + 0.044715·x³); the gate is (1 + tanh z) / 2, which is sigmoid(2z).
                let [c, cubic] = [2.0 * (2.0 / std::f64::consts::PI).sqrt(), 0.044_715].map(T::from_f64);
                let triple = T::from_f64(3.0 * 0.044_715);
                x.iter().enumerate().for_each(|(at, x)| {
                    let square = *x * *x;
                    let gate = (c * *x * (one + cubic * square)).sigmoid();
                    take(at, (*x * gate, gate + *x * gate * (one - gate) * c * (one + triple * square)));
                });
            }
            Activation::Relu2 => x.iter().enumerate().for_each(|(at, x)| {
                let positive = x.maximum(T::zero());
                take(at, (positive * positive, positive + positive));
            }),
            Activation::Sigmoid => x.iter().enumerate().for_each(|(at, x)| {
                let value = x.sigmoid();
                take(at, (value, value * (one - value)));
            }),
            Activation::Identity => x.iter().enumerate().for_each(|(at, x)| take(at, (*x, one))),
            Activation::Clamp(limit) => {
                let limit = T::from_f64(limit);
                x.iter().enumerate().for_each(|(at, x)| {
                    let inside = x.magnitude() <= limit;
                    let edge = if *x < T::zero() { T::zero() - limit } else { limit };
                    take(at, if inside { (*x, one) } else { (edge, T::zero()) });
                });
            }
        }
    }
}
