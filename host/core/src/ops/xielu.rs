//! xIELU, an activation with learned parameters (Huang and Schlag 2024, eq. 8; transformers, `activations.py`): with
//! `p = softplus(alpha_p)` and `n = beta + softplus(alpha_n)`, `p·x² + beta·x` above 0, else
//! `n · (expm1(min(x, eps)) - x) + beta·x`.

use candle_core::Tensor;

use super::{Call, Gradients, Kernel, Op, weight};
use crate::error::{Error, Result};

const WEIGHTS: [&str; 4] = ["alpha_p", "alpha_n", "beta", "eps"];

pub(super) const OP: Op = Op {
    name: "xielu",
    cached_inputs: &[],
    kernel: Kernel::Value {
        forward: |call| Ok(xielu(call)?[0].clone()),
        vjp: |call, dy| Ok(Gradients::of(vec![(dy * &xielu(call)?[1])?])),
    },
};

/// The value and its derivative, which is `2·p·x + beta` above 0, else `n · (exp(x) - 1) + beta` below `eps` and `beta - n` from
/// there on.
fn xielu(call: &Call<'_>) -> Result<[Tensor; 2]> {
    let numbers = WEIGHTS.iter().map(|role| scalar(call, role)).collect::<Result<Vec<f64>>>()?;
    let [alpha_p, alpha_n, beta, eps] = numbers[..] else { return Err(Error::run("xielu lacks a weight")) };
    let softplus = |a: f64| a.max(0.0) + (-a.abs()).exp().ln_1p();
    let (p, n) = (softplus(alpha_p), beta + softplus(alpha_n));
    let x = call.inputs[0];
    let is_positive = x.gt(0.0)?;
    let power = expm1(&x.minimum(eps)?)?;
    let above = (((x * p)? + beta)? * x)?;
    let below = (((&power - x)? * n)? + (x * beta)?)?;
    let is_curved = x.lt(eps)?.to_dtype(x.dtype())?;
    let derivative_above = ((x * (2.0 * p))? + beta)?;
    let derivative_below = (((((power + 1.0)? * is_curved)? - 1.0)? * n)? + beta)?;
    Ok([is_positive.where_cond(&above, &below)?, is_positive.where_cond(&derivative_above, &derivative_below)?])
}

/// `exp(x) - 1` without the cancellation near 0: `2 · sinh(x/2) · exp(x/2)`, its sinh by a series where x is small.
fn expm1(x: &Tensor) -> candle_core::Result<Tensor> {
    let small = x.abs()?.lt(0.1)?;
    // x · (1 + x/2 · (1 + x/3 · (1 + x/4 · …))): below 0.1 seven terms are beyond f64's rounding of the rest.
    let mut series = x.ones_like()?;
    for n in (2..=9).rev() {
        series = ((series * (x / f64::from(n))?)? + 1.0)?;
    }
    small.where_cond(&(x * series)?, &(x.exp()? - 1.0)?)
}

fn scalar(call: &Call<'_>, role: &str) -> Result<f64> {
    let tensor = weight(call, role).ok_or_else(|| Error::run(format!("xielu runs without its {role}")))?;
    Ok(tensor.to_dtype(candle_core::DType::F64)?.flatten_all()?.get(0)?.to_scalar()?)
}
