//! `y = (offset + w) · x / sqrt(mean(x²) + eps)` over runs of `w`'s length: the whole row, or every head (Zhang and Sennrich 2019,
//! eq. 4). Gemma's weights count from 1. A norm without a weight has a factor of 1.

use candle_core::{Device, Tensor};

use super::real::{Real, sum_by};
use super::rows::{RowOp, over_rows};
use super::{Call, Gradients, Kernel, Op, number, run, weight};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "rms_norm", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

/// Of a run and the weights.
struct Norm {
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

impl RowOp<2, 1> for Norm {
    #[inline(always)]
    fn row<T: Real>(&self, [x, w]: [&[T]; 2], [y]: [&mut [T]; 1]) {
        let (inverse, offset) = (T::from_f64(self.inverse(x)), T::from_f64(self.offset));
        y.iter_mut().zip(x).zip(w).for_each(|((y, x), w)| *y = *x * inverse * (offset + *w));
    }
}

/// With `g = dy · (offset + w)` and `r = 1 / rms`: `dx = r · (g - x · r² · mean(g · x))`.
impl RowOp<3, 1> for Vjp {
    #[inline(always)]
    fn row<T: Real>(&self, [x, w, dy]: [&[T]; 3], [dx]: [&mut [T]; 1]) {
        let (inverse, offset) = (self.0.inverse(x), T::from_f64(self.0.offset));
        let along = sum_by([x, w, dy], |[x, w, dy]| dy * (offset + w) * x) / x.len() as f64;
        let (along, inverse) = (T::from_f64(along * inverse * inverse), T::from_f64(inverse));
        for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(w).zip(dy) {
            *dx = (*dy * (offset + *w) - *x * along) * inverse;
        }
    }
}

/// The norm, a matrix in rows of its runs, and the weights as a row.
fn of(call: &Call<'_>, x: &Tensor) -> Result<(Norm, Tensor, Tensor)> {
    let run = run(call.node);
    let norm = |offset| Norm { eps: number(call.node, "eps"), offset };
    let (norm, weight) = match weight(call, "weight") {
        Some(weight) => (norm(number(call.node, "offset")), weight.clone()),
        None => (norm(0.0), Tensor::ones(run, x.dtype(), &Device::Cpu)?),
    };
    Ok((norm, x.contiguous()?.reshape(((), run))?, weight))
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let (norm, x, weight) = of(call, call.inputs[0])?;
    let [y] = over_rows(&norm, [&x, &weight], [run(call.node)])?;
    Ok(y.reshape(call.inputs[0].shape())?)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (norm, x, weight) = of(call, call.inputs[0])?;
    let runs = dy.contiguous()?.reshape(x.shape())?;
    let [dx] = over_rows(&Vjp(norm), [&x, &weight, &runs], [run(call.node)])?;
    Ok(Gradients::of(vec![dx.reshape(dy.shape())?]))
}
