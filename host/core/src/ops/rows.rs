//! Loops over rows: what an op computes of a row from the rows of its inputs, on all threads, and eight numbers at once where the
//! processor has AVX2. candle's own element-wise ops would read and write a whole matrix for every term of a formula.

use candle_core::{DType, Device, Layout, Storage, Tensor};
use rayon::prelude::*;

use super::real::Real;
use crate::error::{Error, Result};

/// Numbers that are worth a thread's while.
const WORK: usize = 1 << 14;

/// What is computed of a row: `OUT` rows from `IN` rows. It is inlined into the loop, so that it is compiled for AVX2, too.
pub(super) trait RowOp<const IN: usize, const OUT: usize>: Sync {
    fn row<T: Real>(&self, x: [&[T]; IN], y: [&mut [T]; OUT]);
}

/// Runs an op over matrices, of which those of one row are read for every row; the results have so many columns each.
pub(super) fn over_rows<const IN: usize, const OUT: usize>(
    op: &impl RowOp<IN, OUT>,
    inputs: [&Tensor; IN],
    widths: [usize; OUT],
) -> Result<[Tensor; OUT]> {
    match inputs[0].dtype() {
        DType::F32 => typed::<f32, IN, OUT>(op, inputs, widths),
        DType::F64 => typed::<f64, IN, OUT>(op, inputs, widths),
        other => Err(Error::run(format!("rows of {other:?} are not computed on the CPU"))),
    }
}

/// The numbers of a contiguous tensor.
pub(super) fn values<'a, T: Real>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((from, to))) => Ok(&T::slice(cpu)?[from..to]),
        _ => Err(Error::run("an op of the CPU got a tensor that is not its own")),
    }
}

fn typed<T: Real, const IN: usize, const OUT: usize>(
    op: &impl RowOp<IN, OUT>,
    inputs: [&Tensor; IN],
    widths: [usize; OUT],
) -> Result<[Tensor; OUT]> {
    let inputs: Vec<Tensor> = inputs.iter().map(|x| x.contiguous()).collect::<candle_core::Result<_>>()?;
    let stored: Vec<_> = inputs.iter().map(Tensor::storage_and_layout).collect();
    let slices: Vec<&[T]> = stored.iter().map(|(storage, layout)| values(storage, layout)).collect::<Result<_>>()?;
    let columns: Vec<usize> = inputs.iter().map(|x| x.dims().last().copied().unwrap_or(1).max(1)).collect();
    let rows = slices.iter().zip(&columns).map(|(x, columns)| x.len() / columns).max().unwrap_or(0);
    let x: [Input<'_, T>; IN] = std::array::from_fn(|i| Input {
        values: slices[i],
        columns: columns[i],
        step: if slices[i].len() == columns[i] { 0 } else { columns[i] },
    });
    let mut outputs = widths.map(|width| vec![T::zero(); rows * width]);
    let at_once = WORK.div_ceil(widths.iter().sum::<usize>().max(1));
    let mut parts: Vec<Vec<&mut [T]>> = (0..rows.div_ceil(at_once)).map(|_| Vec::with_capacity(OUT)).collect();
    for (output, width) in outputs.iter_mut().zip(widths) {
        parts.iter_mut().zip(output.chunks_mut(at_once * width)).for_each(|(part, chunk)| part.push(chunk));
    }
    parts.into_par_iter().enumerate().for_each(|(part, outputs)| {
        let mut outputs = outputs.into_iter();
        let y = std::array::from_fn(|_| outputs.next().unwrap_or_default());
        widest(|| run(op, &x, (y, widths), part * at_once));
    });
    let mut tensors =
        outputs.into_iter().zip(widths).map(|(y, width)| Tensor::from_vec(y, (rows, width), &Device::Cpu));
    let tensors: Vec<Tensor> = tensors.by_ref().collect::<candle_core::Result<_>>()?;
    tensors.try_into().map_err(|_| Error::run("an op made another number of values than it has"))
}

/// A matrix, or a row for all rows.
struct Input<'a, T> {
    values: &'a [T],
    columns: usize,
    /// From a row to the next one; 0 where there is one.
    step: usize,
}

type Outputs<'a, T, const OUT: usize> = ([&'a mut [T]; OUT], [usize; OUT]);

/// Runs loops as code for AVX2 where the processor has it: the same numbers, eight at once.
#[inline(always)]
pub(super) fn widest(loops: impl FnOnce()) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: this processor has AVX2.
        return unsafe { with_avx2(loops) };
    }
    loops();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2(loops: impl FnOnce()) {
    loops();
}

#[inline(always)]
fn run<T: Real, const IN: usize, const OUT: usize>(
    op: &impl RowOp<IN, OUT>,
    x: &[Input<'_, T>; IN],
    (mut y, widths): Outputs<'_, T, OUT>,
    first: usize,
) {
    let count = y[0].len() / widths[0].max(1);
    for row in 0..count {
        let read = std::array::from_fn(|i| &x[i].values[(first + row) * x[i].step..][..x[i].columns]);
        let mut written = y.each_mut().into_iter().zip(widths);
        let write = std::array::from_fn(|_| match written.next() {
            Some((y, width)) => &mut y[row * width..][..width],
            None => &mut [],
        });
        op.row(read, write);
    }
}
