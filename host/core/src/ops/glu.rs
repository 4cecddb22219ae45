//! Gated activation: `y = activation(gate) · up` (Shazeer 2020). A gate of fewer columns carries a run of up's with each.

use candle_core::Tensor;

use super::activation::Activation;
use super::real::{Real, sum_by};
use super::rows::{RowOp, over_rows};
use super::{Call, Gradients, Kernel, Op};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "glu", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

struct Glu(Activation);
struct Vjp(Activation);

impl RowOp<2, 1> for Glu {
    #[inline(always)]
    fn row<T: Real>(&self, [gate, up]: [&[T]; 2], [y]: [&mut [T]; 1]) {
        if gate.len() < up.len() {
            let run = up.len() / gate.len();
            self.0.each(gate, |at, (value, _)| {
                let own = at * run..(at + 1) * run;
                y[own.clone()].iter_mut().zip(&up[own]).for_each(|(y, up)| *y = value * *up);
            });
            return;
        }
        let (up, y) = (&up[..gate.len()], &mut y[..gate.len()]);
        self.0.each(gate, |at, (value, _)| y[at] = value * up[at]);
    }
}

impl RowOp<3, 2> for Vjp {
    #[inline(always)]
    fn row<T: Real>(&self, [gate, up, dy]: [&[T]; 3], [dgate, dup]: [&mut [T]; 2]) {
        let width = gate.len();
        if width < up.len() {
            let run = up.len() / width;
            self.0.each(gate, |at, (value, derivative)| {
                let own = at * run..(at + 1) * run;
                dgate[at] = T::from_f64(sum_by([&up[own.clone()], &dy[own.clone()]], |[up, dy]| up * dy)) * derivative;
                dup[own.clone()].iter_mut().zip(&dy[own]).for_each(|(dup, dy)| *dup = *dy * value);
            });
            return;
        }
        let (up, dy, dgate, dup) = (&up[..width], &dy[..width], &mut dgate[..width], &mut dup[..width]);
        self.0.each(gate, |at, (value, derivative)| {
            dgate[at] = dy[at] * up[at] * derivative;
            dup[at] = dy[at] * value;
        });
    }
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let glu = Glu(Activation::of(call.node)?);
    let [y] = over_rows(&glu, [call.inputs[0], call.inputs[1]], [call.node.width])?;
    Ok(y)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let vjp = Vjp(Activation::of(call.node)?);
    let widths = [call.inputs[0].dim(1)?, call.node.width];
    let gradients = over_rows(&vjp, [call.inputs[0], call.inputs[1], dy], widths)?;
    Ok(Gradients::of(gradients.into()))
}
