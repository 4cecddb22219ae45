//! Gated activation: `y = activation(gate) · up` (Shazeer 2020).

use candle_core::Tensor;

use super::activation::Activation;
use super::real::Real;
use super::rows::{RowOp, over_rows};
use super::{Call, Gradients, Kernel, Op};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "glu", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

struct Glu(Activation);
struct Vjp(Activation);

impl RowOp<2, 1> for Glu {
    #[inline(always)]
    fn row<T: Real>(&self, [gate, up]: [&[T]; 2], [y]: [&mut [T]; 1]) {
        let (up, y) = (&up[..gate.len()], &mut y[..gate.len()]);
        self.0.each(gate, |at, (value, _)| y[at] = value * up[at]);
    }
}

impl RowOp<3, 2> for Vjp {
    #[inline(always)]
    fn row<T: Real>(&self, [gate, up, dy]: [&[T]; 3], [dgate, dup]: [&mut [T]; 2]) {
        let width = gate.len();
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
    let gradients = over_rows(&vjp, [call.inputs[0], call.inputs[1], dy], [call.node.width; 2])?;
    Ok(Gradients::of(gradients.into()))
}
