//! `factor · x`, with a factor of the family, of the checkpoint (a tensor of one number), or both.

use candle_core::Tensor;

use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, number, same, weight};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "scale",
    formula: "factor · x",
    inputs: 1,
    weights: &[("factor", Presence::Optional)],
    attrs: &[Attr { name: "factor", kind: AttrKind::Number, presence: Presence::Optional }],
    check: |node, widths| {
        match node.weight("factor") {
            Some(w) if w.shape.iter().product::<usize>() != 1 => {
                return Err(format!("factor '{}' is {:?}, needs one number", w.tensor, w.shape));
            }
            None if !node.attrs.contains_key("factor") => return Err("needs a factor".into()),
            _ => {}
        }
        same("the value", node.width, widths[0])
    },
    reads_layout: false,
    cached_inputs: &[],
    kernel: Kernel::Value {
        forward: |call| scaled(call, call.inputs[0]),
        vjp: |call, dy| Ok(Gradients::of(vec![scaled(call, dy)?])),
    },
};

fn scaled(call: &Call<'_>, x: &Tensor) -> Result<Tensor> {
    let x = match call.node.attrs.contains_key("factor") {
        true => (x * number(call.node, "factor"))?,
        false => x.clone(),
    };
    Ok(match weight(call, "factor") {
        Some(factor) => x.broadcast_mul(&factor.reshape((1, 1))?)?,
        None => x,
    })
}
