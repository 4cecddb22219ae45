//! `y = (offset + w) · x / sqrt(mean(x²) + eps)` over runs of columns: the whole row, every head, or groups with their own weights
//! (Zhang and Sennrich 2019, eq. 4). Gemma's weights count from 1. A norm without a weight has a factor of 1.

use candle_core::{Device, Tensor};

use super::real::{Real, sum_by};
use super::rows::{RowOp, over_rows};
use super::{Call, Gradients, Kernel, Op, number, run, weight};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "rms_norm", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

/// Of a run and the weights.
struct Norm {
    run: usize,
    eps: f64,
    offset: f64,
}

/// Of the run, the weights, and the gradient of its value.
struct Vjp(Norm);

impl Norm {
    #[inline(always)]
    fn inverse<T: Real>(&self, x: &[T]) -> f64 {
        1.0 / (T::sum_of_squares(x) / x.len() as f64 + self.eps).sqrt()
    }
}

/// Runs of a row, each with its weights: those of all runs, or a run's own.
#[inline(always)]
fn runs<T>(weights: &[T], run: usize) -> impl Iterator<Item = &[T]> {
    weights.chunks_exact(run).cycle()
}

impl RowOp<2, 1> for Norm {
    #[inline(always)]
    fn row<T: Real>(&self, [x, w]: [&[T]; 2], [y]: [&mut [T]; 1]) {
        let offset = T::from_f64(self.offset);
        for ((x, y), w) in x.chunks_exact(self.run).zip(y.chunks_exact_mut(self.run)).zip(runs(w, self.run)) {
            let inverse = T::from_f64(self.inverse(x));
            y.iter_mut().zip(x).zip(w).for_each(|((y, x), w)| *y = *x * inverse * (offset + *w));
        }
    }
}

/// With `g = dy · (offset + w)` and `r = 1 / rms`: `dx = r · (g - x · r² · mean(g · x))`.
impl RowOp<3, 1> for Vjp {
    #[inline(always)]
    fn row<T: Real>(&self, [x, w, dy]: [&[T]; 3], [dx]: [&mut [T]; 1]) {
        let (run, offset) = (self.0.run, T::from_f64(self.0.offset));
        let parts = x.chunks_exact(run).zip(dy.chunks_exact(run)).zip(dx.chunks_exact_mut(run)).zip(runs(w, run));
        for (((x, dy), dx), w) in parts {
            let inverse = self.0.inverse(x);
            let along = sum_by([x, w, dy], |[x, w, dy]| dy * (offset + w) * x) / x.len() as f64;
            let (along, inverse) = (T::from_f64(along * inverse * inverse), T::from_f64(inverse));
            for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(w).zip(dy) {
                *dx = (*dy * (offset + *w) - *x * along) * inverse;
            }
        }
    }
}

/// The norm, and the weights as a row.
fn of(call: &Call<'_>) -> Result<(Norm, Tensor)> {
    let run = run(call.node);
    let norm = |offset| Norm { run, eps: number(call.node, "eps"), offset };
    Ok(match weight(call, "weight") {
        Some(weight) => (norm(number(call.node, "offset")), weight.clone()),
        None => (norm(0.0), Tensor::ones(run, call.inputs[0].dtype(), &Device::Cpu)?),
    })
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let (norm, weight) = of(call)?;
    let [y] = over_rows(&norm, [call.inputs[0], &weight], [call.node.width])?;
    Ok(y)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (norm, weight) = of(call)?;
    let [dx] = over_rows(&Vjp(norm), [call.inputs[0], &weight, dy], [call.node.width])?;
    Ok(Gradients::of(vec![dx]))
}
