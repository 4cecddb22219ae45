//! Rotary embedding in the half-split layout: column `j` of a head turns with column `j + head_dim/2` by
//! `position · inv_freq[j]` (Su et al. 2021, eq. 34).

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, count, number, same};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "rope",
    formula: "every head's columns (j, j + head_dim/2) turned by position · inv_freq[j], times scale",
    inputs: 1,
    weights: &[],
    attrs: &[
        Attr { name: "head_dim", kind: AttrKind::Count, presence: Presence::Required },
        Attr { name: "inv_freq", kind: AttrKind::Numbers, presence: Presence::Required },
        Attr { name: "scale", kind: AttrKind::Number, presence: Presence::Required },
    ],
    check: |node, widths| {
        let (dim, frequencies) = (count(node, "head_dim"), node.attrs["inv_freq"].as_array().map_or(0, Vec::len));
        if frequencies * 2 != dim || !node.width.is_multiple_of(dim) {
            return Err(format!("{frequencies} frequencies for heads of {dim} in {} columns", node.width));
        }
        same("the value", node.width, widths[0])
    },
    reads_layout: true,
    cached_inputs: &[],
    kernel: Kernel::Value {
        forward: |call| turn(call, call.inputs[0], 1.0),
        // A rotation's transpose turns back.
        vjp: |call, dy| Ok(Gradients::of(vec![turn(call, dy, -1.0)?])),
    },
};

fn turn(call: &Call<'_>, x: &Tensor, direction: f64) -> Result<Tensor> {
    let dim = count(call.node, "head_dim");
    let (tokens, width) = x.dims2()?;
    let x = x.contiguous()?.reshape((tokens, width / dim, dim))?;
    let [cos, sin] = table(call, direction, x.dtype())?;
    let (left, right) = (x.narrow(2, 0, dim / 2)?, x.narrow(2, dim / 2, dim / 2)?);
    let turned_left = (left.broadcast_mul(&cos)? - right.broadcast_mul(&sin)?)?;
    let turned_right = (right.broadcast_mul(&cos)? + left.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[turned_left, turned_right], 2)?.reshape((tokens, width))?)
}

/// Cosines and sines, `[tokens, 1, head_dim / 2]` each. Angles are products of f32 numbers, as transformers has them.
fn table(call: &Call<'_>, direction: f64, dtype: DType) -> Result<[Tensor; 2]> {
    let numbers = call.node.attrs.get("inv_freq").and_then(Value::as_array);
    let inv_freq: Vec<f32> = numbers.into_iter().flatten().filter_map(Value::as_f64).map(|f| f as f32).collect();
    let scale = number(call.node, "scale");
    let positions = &call.layout.positions;
    let angles = positions.iter().flat_map(|p| inv_freq.iter().map(move |f| f64::from(*p as f32 * f)));
    let (cos, sin): (Vec<f64>, Vec<f64>) = angles.map(|a| (a.cos() * scale, a.sin() * scale * direction)).unzip();
    let shape = (positions.len(), 1, inv_freq.len());
    let tensor = |v: Vec<f64>| Tensor::from_vec(v, shape, &Device::Cpu)?.to_dtype(dtype);
    Ok([tensor(cos)?, tensor(sin)?])
}
