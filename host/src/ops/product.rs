//! `x · Wᵀ`, also of weights that are kept in bf16. A model that only answers keeps them as its checkpoint has them: a token costs
//! the time in which they are read, and these are half the bytes.

use candle_core::{CpuStorage, Device, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Rows of W that are worth a thread's while.
const ROWS: usize = 64;

/// Sums that a processor adds to at once.
const LANES: usize = 16;

/// `[rows, width]` times `[outputs, width]` is `[rows, outputs]`, in x's type.
pub(crate) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if weight.dtype() == x.dtype() {
        Ok(x.matmul(&weight.t()?)?)
    } else if x.dim(0)? == 1 {
        of_one_row(x, weight)
    } else {
        Ok(x.matmul(&weight.to_dtype(x.dtype())?.t()?)?)
    }
}

/// A row of f32 times weights in bf16.
fn of_one_row(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (outputs, width) = weight.dims2()?;
    let x: Vec<f32> = x.flatten_all()?.to_vec1()?;
    let (storage, layout) = weight.storage_and_layout();
    let Storage::Cpu(CpuStorage::BF16(values)) = &*storage else {
        return Err(Error::run(format!("weights of type {:?} are not multiplied on the CPU", weight.dtype())));
    };
    let values = &values[layout.start_offset()..][..outputs * width];
    let y: Vec<f32> = values.par_chunks(width).with_min_len(ROWS).map(|row| dot(row, &x)).collect();
    Ok(Tensor::from_vec(y, (1, outputs), &Device::Cpu)?)
}

fn dot(row: &[bf16], x: &[f32]) -> f32 {
    // Without half's care for signalling NaNs, so that the compiler vectorises the loop.
    let wide = |value: bf16| f32::from_bits(u32::from(value.to_bits()) << 16);
    let mut lanes = [0.0_f32; LANES];
    let (rows, xs) = (row.chunks_exact(LANES), x.chunks_exact(LANES));
    let rest: f32 = rows.remainder().iter().zip(xs.remainder()).map(|(w, x)| wide(*w) * x).sum();
    for (row, x) in rows.zip(xs) {
        for lane in 0..LANES {
            lanes[lane] += wide(row[lane]) * x[lane];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn weights_in_bf16_give_what_they_give_in_f32() {
        for (rows, outputs, width) in [(1, 5, 7), (1, 300, 64), (1, 129, 100), (3, 9, 33)] {
            let values = |count: usize, step: usize| -> Vec<f32> {
                (0..count).map(|i| ((i * step) % 101) as f32 / 50.0 - 1.0).collect()
            };
            let x = Tensor::from_vec(values(rows * width, 37), (rows, width), &Device::Cpu).unwrap();
            let both = Tensor::from_vec(values(2 * outputs * width, 53), (2 * outputs, width), &Device::Cpu).unwrap();
            // One that does not begin where its memory does.
            let narrow = both.to_dtype(DType::BF16).unwrap().narrow(0, outputs, outputs).unwrap();
            let is: Vec<Vec<f32>> = product(&x, &narrow).unwrap().to_vec2().unwrap();
            let wide = narrow.to_dtype(DType::F32).unwrap();
            let expected: Vec<Vec<f32>> = product(&x, &wide).unwrap().to_vec2().unwrap();
            for (is, expected) in is.concat().iter().zip(expected.concat()) {
                assert!((is - expected).abs() < 1e-5 * width as f32, "{rows} {outputs} {width}: {is}, not {expected}");
            }
        }
    }
}
