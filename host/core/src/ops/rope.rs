//! Rotary embedding: pairs of columns of every head turn by `position · inv_freq[j]` (Su et al. 2021, eq. 34). In the layout `half`
//! column `j` turns with column `j + n`, in `interleaved` column `2j` with `2j + 1`, where n is the number of frequencies and columns
//! count from `start` on. Those before it and from `start + 2n` on pass as they are (partial rotary).

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::real::Real;
use super::rows::{RowOp, over_rows};
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

/// Of a token's heads, its cosines and its sines.
struct Turn {
    dim: usize,
    /// The first column of a head that turns.
    start: usize,
    interleaved: bool,
}

impl RowOp<3, 1> for Turn {
    #[inline(always)]
    fn row<T: Real>(&self, [x, cos, sin]: [&[T]; 3], [y]: [&mut [T]; 1]) {
        let n = cos.len();
        for (x, y) in x.chunks_exact(self.dim).zip(y.chunks_exact_mut(self.dim)) {
            let (before, turning) = x.split_at(self.start);
            let (to_before, y) = y.split_at_mut(self.start);
            to_before.copy_from_slice(before);
            let x = turning;
            y[2 * n..].copy_from_slice(&x[2 * n..]);
            let sin = &sin[..n];
            if self.interleaved {
                let pairs = x[..2 * n].as_chunks::<2>().0.iter().zip(y[..2 * n].as_chunks_mut::<2>().0);
                for (([left, right], to), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
                    *to = [*left * *cos - *right * *sin, *right * *cos + *left * *sin];
                }
                continue;
            }
            let ((left, right), (to_left, to_right)) = (x[..2 * n].split_at(n), y[..2 * n].split_at_mut(n));
            for at in 0..n {
                to_left[at] = left[at] * cos[at] - right[at] * sin[at];
                to_right[at] = right[at] * cos[at] + left[at] * sin[at];
            }
        }
    }
}

fn turn(call: &Call<'_>, x: &Tensor, direction: f64) -> Result<Tensor> {
    let interleaved = call.node.attrs.get("layout").and_then(Value::as_str) == Some("interleaved");
    let [cos, sin] = table(call, direction, x.dtype())?;
    let turn = Turn { dim: count(call.node, "head_dim"), start: count(call.node, "start"), interleaved };
    let [y] = over_rows(&turn, [x, &cos, &sin], [x.dim(1)?])?;
    Ok(y)
}

/// Cosines and sines, `[tokens, frequencies]` each. Angles are products of f32 numbers, as transformers has them.
fn table(call: &Call<'_>, direction: f64, dtype: DType) -> Result<[Tensor; 2]> {
    let numbers = call.node.attrs.get("inv_freq").and_then(Value::as_array);
    let inv_freq: Vec<f32> = numbers.into_iter().flatten().filter_map(Value::as_f64).map(|f| f as f32).collect();
    let (scale, beta) = (number(call.node, "scale"), number(call.node, "position_beta"));
    let period = count(call.node, "position_period").max(1);
    // Tokens share positions: each is computed once.
    let positions = &call.layout.positions;
    let first = positions.iter().min().copied().unwrap_or(0);
    let end = positions.iter().max().map_or(0, |last| last + 1);
    let values = (first..end).flat_map(|p| {
        // Queries far from the start are made longer (Llama 4's attention temperature; transformers, `modeling_ministral3.py`).
        let scale = scale * (1.0 + beta * ((1 + p as usize / period) as f64).ln());
        inv_freq.iter().map(move |f| (f64::from(p as f32 * f), scale))
    });
    let (cos, sin): (Vec<f64>, Vec<f64>) = values.map(|(a, s)| (a.cos() * s, a.sin() * s * direction)).unzip();
    let places: Vec<u32> = positions.iter().map(|p| p - first).collect();
    let places = Tensor::new(places, &Device::Cpu)?;
    let tensor = |values: Vec<f64>| {
        let table = Tensor::from_vec(values, ((end - first) as usize, inv_freq.len()), &Device::Cpu)?;
        table.to_dtype(dtype)?.index_select(&places, 0)
    };
    Ok([tensor(cos)?, tensor(sin)?])
}
