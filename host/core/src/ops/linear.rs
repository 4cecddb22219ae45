//! `y = x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ`. W and b are frozen; this is the one place where LoRA enters.
//!
//! DoRA gives the rows of `W + scale·B·A` lengths m of their own: `y = (m/‖W + scale·B·A‖) ⊙ (x·(W + scale·B·A)ᵀ) + b`, where the norm
//! has no gradient (Liu et al. 2024, section 4.3), as in PEFT's `DoraLinearLayer`.

use candle_core::{D, Tensor};

use super::product::sum_of_products;
use super::{Call, Dropout, Gradients, Kernel, Lora, Op, add, lora, main_weight, product, weight};
use crate::batch::{Layout, mix};
use crate::error::{Error, Result};

pub(super) const OP: Op = Op { name: "linear", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let (x, w) = (call.inputs[0], main_weight(call)?);
    let y = match lora(call, "weight") {
        None => product(x, w)?,
        Some(lora) => adapted(call, x, w, lora)?,
    };
    match weight(call, "bias") {
        Some(bias) => Ok(y.broadcast_add(bias)?),
        None => Ok(y),
    }
}

fn adapted(call: &Call<'_>, x: &Tensor, w: &Tensor, lora: &Lora) -> Result<Tensor> {
    let mask = lora.dropout.map(|dropout| dropout.mask(x, call.layout)).transpose()?;
    let dropped = masked(x, mask.as_ref())?;
    let u = product(&dropped, &lora.a)?;
    let begun = lora.subtracted.as_ref().map(|[a, b]| Ok::<_, Error>((product(x, a)?, b.t()?))).transpose()?;
    let begun = begun.as_ref().map(|(u, b)| (u, b, -lora.scale));
    let (main, b) = (w.t()?, lora.b.t()?);
    match lora.factor(w)? {
        // One row, or a matrix in bf16.
        None if x.dim(0)? == 1 || w.dtype() != x.dtype() => {
            let update: Vec<_> = begun.into_iter().chain([(&u, &b, lora.scale)]).collect();
            add(&product(x, w)?, &sum_of_products(&update)?)
        }
        None => {
            let terms: Vec<_> = [(x, &main, 1.0), (&u, &b, lora.scale)].into_iter().chain(begun).collect();
            sum_of_products(&terms)
        }
        Some(factor) => {
            let mut y = product(x, w)?;
            let update = sum_of_products(&[(&u, &b, lora.scale)])?;
            if let Some(begun) = begun {
                y = add(&y, &sum_of_products(&[begun])?)?;
            }
            if mask.is_none() {
                return Ok((y + update)?.broadcast_mul(&factor)?);
            }
            // With dropout PEFT has W twice: of x itself, and in the part that m adds, of what is left of x.
            let more = product(&dropped, w)?.broadcast_mul(&(&factor - 1.0)?)?;
            Ok(((y + more)? + update.broadcast_mul(&factor)?)?)
        }
    }
}

/// `dx = dy·W + v·A`, `dA = vᵀ·x`, `dB = scale·dyᵀ·(x·Aᵀ)` with `v = scale·dy·B`. Of DoRA `dy` is first multiplied by the factor of
/// its column, and `dm = Σ dy ⊙ (x·(W + scale·B·A)ᵀ) / ‖W + scale·B·A‖`.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (x, w) = (call.inputs[0], main_weight(call)?);
    let Some(lora) = lora(call, "weight") else { return Ok(Gradients::of(vec![sum_of_products(&[(dy, w, 1.0)])?])) };
    let mask = lora.dropout.map(|dropout| dropout.mask(x, call.layout)).transpose()?;
    let dropped = masked(x, mask.as_ref())?;
    let factor = lora.factor(w)?;
    let by_update = factor.as_ref().map_or(Ok(dy.clone()), |factor| dy.broadcast_mul(factor))?;
    let v = sum_of_products(&[(&by_update, &lora.b, lora.scale)])?;
    let u = sum_of_products(&[(&dropped, &lora.a.t()?, lora.scale)])?;
    let mut parts =
        vec![sum_of_products(&[(&v.t()?, &dropped, 1.0)])?, sum_of_products(&[(&by_update.t()?, &u, 1.0)])?];
    if factor.is_some() {
        let sum = (product(&dropped, w)? + u.matmul(&lora.b.t()?)?)?;
        parts.push((dy * sum)?.sum(0)?.div(lora.norms(w)?)?);
    }
    let dx = call.input_gradients.then(|| {
        let begun = lora.subtracted.as_ref().map(|[a, b]| Ok::<_, Error>((sum_of_products(&[(dy, b, 1.0)])?, a)));
        let begun = begun.transpose()?;
        let begun = begun.as_ref().map(|(v, a)| (v, *a, -lora.scale));
        let first = match (&factor, &mask) {
            (None, None) => [(dy, w, 1.0), (&v, &lora.a, 1.0)],
            (Some(_), None) => [(&by_update, w, 1.0), (&v, &lora.a, 1.0)],
            (_, Some(mask)) => {
                let through = match &factor {
                    Some(_) => sum_of_products(&[(&(&by_update - dy)?, w, 1.0), (&v, &lora.a, 1.0)])?,
                    None => sum_of_products(&[(&v, &lora.a, 1.0)])?,
                };
                let plain: Vec<_> = [(dy, w, 1.0)].into_iter().chain(begun).collect();
                return add(&sum_of_products(&plain)?, &masked(&through, Some(mask))?);
            }
        };
        let terms: Vec<_> = first.into_iter().chain(begun).collect();
        sum_of_products(&terms)
    });
    Ok(Gradients { inputs: vec![dx.transpose()?], loras: vec![parts] })
}

/// Lengths of the rows of `W + scale·B·A`, `[out]`, in A's type.
///
/// # Errors
/// Shapes that do not fit.
pub fn row_norms(w: &Tensor, lora: &Lora) -> Result<Tensor> {
    let sum = (w.to_dtype(lora.a.dtype())? + (lora.b.matmul(&lora.a)? * lora.scale)?)?;
    Ok(sum.sqr()?.sum(D::Minus1)?.sqrt()?)
}

impl Lora {
    /// What rows of the sum are multiplied with: their lengths by those that they have without.
    fn factor(&self, w: &Tensor) -> Result<Option<Tensor>> {
        let Some(magnitude) = &self.magnitude else { return Ok(None) };
        Ok(Some(magnitude.div(self.norms(w)?)?))
    }

    fn norms(&self, w: &Tensor) -> Result<&Tensor> {
        if self.norms.get().is_none() {
            // Another thread may have found the same numbers meanwhile.
            let _ = self.norms.set(row_norms(w, self)?);
        }
        self.norms.get().ok_or_else(|| Error::run("norms that were just computed"))
    }
}

fn masked(x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    Ok(mask.map_or(Ok(x.clone()), |mask| x * mask)?)
}

impl Dropout {
    /// 0 or `1/(1-p)` of every number of x.
    fn mask(&self, x: &Tensor, layout: &Layout) -> Result<Tensor> {
        let (rows, columns) = x.dims2()?;
        if layout.keys.len() != rows {
            return Err(Error::run(format!(
                "{} tokens have a key for dropout, {rows} are computed",
                layout.keys.len()
            )));
        }
        let keep = (1.0 / (1.0 - self.p)) as f32;
        let below = (self.p * (1_u64 << 32) as f64) as u64;
        let of_row = |key: &u64| {
            let row = mix(self.key, *key);
            (0..columns as u64).map(move |column| if mix(row, column) >> 32 < below { 0.0 } else { keep })
        };
        let mask: Vec<f32> = layout.keys.iter().flat_map(of_row).collect();
        let mask = Tensor::from_vec(mask, (rows, columns), x.device())?;
        Ok(mask.to_dtype(x.dtype())?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn dropout_drops_as_many_as_it_says() {
        let layout = Layout { keys: (0..64).chain(0..64).collect(), ..Layout::default() };
        let x = Tensor::ones((128, 500), DType::F32, &Device::Cpu).unwrap();
        for p in [0.05, 0.5] {
            let mask: Vec<f32> =
                Dropout { p, key: 3 }.mask(&x, &layout).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let dropped = mask.iter().filter(|v| **v == 0.0).count() as f64 / mask.len() as f64;
            // Five deviations of 32,000 draws.
            assert!((dropped - p).abs() < 5.0 * (p * (1.0 - p) / 32e3).sqrt(), "{dropped} for {p}");
            assert!(mask.iter().all(|v| *v == 0.0 || (f64::from(*v) - 1.0 / (1.0 - p)).abs() < 1e-6));
            // Tokens with one key have one mask.
            assert_eq!(mask[..mask.len() / 2], mask[mask.len() / 2..]);
        }
    }
}
