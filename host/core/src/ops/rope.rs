//! Rotary embedding: pairs of columns of every head turn by `position · inv_freq[j]` (Su et al. 2021, eq. 34). In the layout `half`
//! column `j` turns with column `j + n`, in `interleaved` column `2j` with `2j + 1`, where n is the number of frequencies. Columns
//! from 2n on pass as they are (partial rotary).

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::{Call, Gradients, Kernel, Op, count, number};
use crate::error::Result;

pub(super) const OP: Op = Op {
    name: "rope",
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
    let n = cos.dim(2)?;
    let interleaved = call.node.attrs.get("layout").and_then(Value::as_str) == Some("interleaved");
    let turned = x.narrow(2, 0, 2 * n)?;
    let turned = if interleaved {
        let pairs = turned.reshape((tokens, width / dim, n, 2))?;
        let [left, right] = [0, 1].map(|side| pairs.narrow(3, side, 1).and_then(|half| half.squeeze(3)));
        let [left, right] = rotate(&left?, &right?, &cos, &sin)?;
        Tensor::stack(&[left, right], 3)?.reshape((tokens, width / dim, 2 * n))?
    } else {
        let [left, right] = rotate(&turned.narrow(2, 0, n)?, &turned.narrow(2, n, n)?, &cos, &sin)?;
        Tensor::cat(&[left, right], 2)?
    };
    let all = if 2 * n == dim { turned } else { Tensor::cat(&[turned, x.narrow(2, 2 * n, dim - 2 * n)?], 2)? };
    Ok(all.reshape((tokens, width))?)
}

fn rotate(left: &Tensor, right: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<[Tensor; 2]> {
    let turned_left = (left.broadcast_mul(cos)? - right.broadcast_mul(sin)?)?;
    Ok([turned_left, (right.broadcast_mul(cos)? + left.broadcast_mul(sin)?)?])
}

/// Cosines and sines, `[tokens, 1, frequencies]` each. Angles are products of f32 numbers, as transformers has them.
fn table(call: &Call<'_>, direction: f64, dtype: DType) -> Result<[Tensor; 2]> {
    let numbers = call.node.attrs.get("inv_freq").and_then(Value::as_array);
    let inv_freq: Vec<f32> = numbers.into_iter().flatten().filter_map(Value::as_f64).map(|f| f as f32).collect();
    let (scale, beta) = (number(call.node, "scale"), number(call.node, "position_beta"));
    let period = count(call.node, "position_period").max(1);
    let positions = &call.layout.positions;
    let values = positions.iter().flat_map(|p| {
        // Queries far from the start are made longer (Llama 4's attention temperature; transformers, `modeling_ministral3.py`).
        let scale = scale * (1.0 + beta * ((1 + *p as usize / period) as f64).ln());
        inv_freq.iter().map(move |f| (f64::from(*p as f32 * f), scale))
    });
    let (cos, sin): (Vec<f64>, Vec<f64>) = values.map(|(a, s)| (a.cos() * s, a.sin() * s * direction)).unzip();
    let shape = (positions.len(), 1, inv_freq.len());
    let tensor = |v: Vec<f64>| Tensor::from_vec(v, shape, &Device::Cpu)?.to_dtype(dtype);
    Ok([tensor(cos)?, tensor(sin)?])
}
