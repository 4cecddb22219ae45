//! `y = x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ`. W and b are frozen; this is the one place where LoRA enters.

use candle_core::Tensor;

use super::{Call, Gradients, Kernel, Op, main_weight, product, weight};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "linear", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let x = call.inputs[0];
    let mut y = product(x, main_weight(call)?)?;
    if let Some(bias) = weight(call, "bias") {
        y = y.broadcast_add(bias)?;
    }
    if let Some(lora) = call.lora {
        let update = product(&product(x, &lora.a)?, &lora.b)?;
        y = (y + (update * lora.scale)?)?;
    }
    Ok(y)
}

/// `dx = dy·W + v·A`, `dA = vᵀ·x`, `dB = scale·dyᵀ·(x·Aᵀ)` with `v = scale·dy·B`.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let x = call.inputs[0];
    let dx = dy.matmul(main_weight(call)?)?;
    let Some(lora) = call.lora else { return Ok(Gradients::of(vec![dx])) };
    let v = (dy.matmul(&lora.b)? * lora.scale)?;
    let u = (x.matmul(&lora.a.t()?)? * lora.scale)?;
    let da = v.t()?.matmul(x)?;
    let db = dy.t()?.matmul(&u)?;
    let dx = (dx + v.matmul(&lora.a)?)?;
    Ok(Gradients { inputs: vec![Some(dx)], lora: Some([da, db]) })
}
