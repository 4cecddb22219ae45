//! Products of matrices, and sums of them in place.
//!
//! And `x · Wᵀ` of weights that are kept in bf16. A model that only answers keeps them as its checkpoint has them: a token costs the
//! time in which they are read, and these are half the bytes.

use candle_core::{CpuStorage, DType, Device, Layout, Storage, Tensor};
use gemm::{Parallelism, gemm};
use half::bf16;
use rayon::prelude::*;

use super::real::Real;
use crate::error::{Error, Result};

/// Numbers that are worth a thread's while.
pub(super) const WORK: usize = 1 << 16;

/// Numbers that are widened at once, 4 MiB of f32: they are still in the cache when they are multiplied.
const BLOCK: usize = 1 << 20;

/// Sums that a processor adds to at once.
const LANES: usize = 16;

/// `[rows, width]` times `[outputs, width]` is `[rows, outputs]`, in x's type.
pub fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (one, single) = (x.dim(0)? == 1, x.dtype() == DType::F32);
    let (storage, layout) = weight.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(w)), Some((from, to))) if single && one => of_one_row(x, &w[from..to]),
        (Storage::Cpu(CpuStorage::BF16(w)), Some((from, to))) if single && one => of_one_row(x, &w[from..to]),
        (Storage::Cpu(CpuStorage::BF16(w)), Some((from, to))) if single => of_rows(x, &w[from..to]),
        _ => sum_of_products(&[(x, &weight.t()?, 1.0)]),
    }
}

/// A matrix that is read: element `[row, column]` lies at `row · steps[0] + column · steps[1]`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    pub values: &'a [T],
    pub steps: [usize; 2],
}

impl<'a, T> Matrix<'a, T> {
    /// Rows that are so far from each other, of which each begins at `first`.
    pub(super) fn rows(values: &'a [T], step: usize, first: usize) -> Matrix<'a, T> {
        Matrix { values: &values[first.min(values.len())..], steps: [step, 1] }
    }

    /// Its columns as rows.
    pub(super) fn transposed(self) -> Matrix<'a, T> {
        Matrix { steps: [self.steps[1], self.steps[0]], ..self }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        let last = rows.saturating_sub(1) * self.steps[0] + columns.saturating_sub(1) * self.steps[1];
        rows * columns == 0 || last < self.values.len()
    }
}

/// `to (+)= scale · a · b`, `[m, k]` times `[k, n]`, where rows of `to` are `step` apart; `add` keeps what is there. On all threads, or on
/// this one. Sums over k are in an order that no number of threads changes.
///
/// # Panics
/// Where a matrix has fewer elements than that.
pub(super) fn multiply<T: Real>(
    (to, step): (&mut [T], usize),
    [m, n, k]: [usize; 3],
    (a, b): (Matrix<'_, T>, Matrix<'_, T>),
    scale: f64,
    add: bool,
    threads: bool,
) {
    if m * n == 0 {
        return;
    }
    assert!(a.holds(m, k) && b.holds(k, n) && step >= n && (m - 1) * step + n <= to.len(), "a matrix is too small");
    let parallelism = if threads { Parallelism::Rayon(rayon::current_num_threads()) } else { Parallelism::None };
    let (a_row, a_column) = (a.steps[0] as isize, a.steps[1] as isize);
    let (b_row, b_column) = (b.steps[0] as isize, b.steps[1] as isize);
    let (to, a, b) = (to.as_mut_ptr(), a.values.as_ptr(), b.values.as_ptr());
    let (kept, scale) = (if add { T::one() } else { T::zero() }, T::from_f64(scale));
    // SAFETY: all elements that are read or written lie in their slices, as asserted above; `to` is borrowed alone.
    unsafe {
        gemm(
            m,
            n,
            k,
            to,
            1,
            step as isize,
            add,
            a,
            a_column,
            a_row,
            b,
            b_column,
            b_row,
            kept,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// The sum of products `scale · a · b` of matrices in f32 or in f64, which may be transposed views; made in one place.
pub(super) fn sum_of_products(terms: &[(&Tensor, &Tensor, f64)]) -> Result<Tensor> {
    match terms.first().map(|(a, ..)| a.dtype()) {
        Some(DType::F32) => typed::<f32>(terms),
        Some(DType::F64) => typed::<f64>(terms),
        other => Err(Error::run(format!("products of {other:?} are not computed on the CPU"))),
    }
}

fn typed<T: Real>(terms: &[(&Tensor, &Tensor, f64)]) -> Result<Tensor> {
    let (m, n) = (terms[0].0.dim(0)?, terms[0].1.dim(1)?);
    let mut to = vec![T::zero(); m * n];
    for (at, (a, b, scale)) in terms.iter().enumerate() {
        let k = a.dim(1)?;
        if (a.dim(0)?, b.dims()) != (m, &[k, n][..]) {
            return Err(Error::run(format!("a product of {:?} and {:?} in a sum [{m}, {n}]", a.dims(), b.dims())));
        }
        let ((a, a_layout), (b, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
        let (a, b) = (matrix(&a, a_layout)?, matrix(&b, b_layout)?);
        multiply((&mut to, n), [m, n, k], (a, b), *scale, at > 0, true);
    }
    Ok(Tensor::from_vec(to, (m, n), &Device::Cpu)?)
}

fn matrix<'a, T: Real>(storage: &'a Storage, layout: &Layout) -> Result<Matrix<'a, T>> {
    match (storage, layout.stride()) {
        (Storage::Cpu(cpu), [row, column]) => {
            Ok(Matrix { values: &T::slice(cpu)?[layout.start_offset()..], steps: [*row, *column] })
        }
        _ => Err(Error::run("a product of what is no matrix of the CPU")),
    }
}

/// A weight's number, in f32.
pub(super) trait Number: Copy + Sync {
    fn wide(self) -> f32;
}

impl Number for f32 {
    fn wide(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    /// Without half's care for signalling NaNs, so that the compiler vectorises loops.
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// A row: every weight is read once, and what candle's product does around that would cost more than small ones take.
fn of_one_row<T: Number>(x: &Tensor, weight: &[T]) -> Result<Tensor> {
    let x: Vec<f32> = x.flatten_all()?.to_vec1()?;
    let width = x.len().max(1);
    let rows = weight.par_chunks_exact(width).with_min_len(WORK.div_ceil(width));
    let y: Vec<f32> = rows.map(|row| dot(row, &x)).collect();
    let outputs = y.len();
    Ok(Tensor::from_vec(y, (1, outputs), &Device::Cpu)?)
}

/// Many rows: weights are widened for all of them, a block at a time.
fn of_rows(x: &Tensor, weight: &[bf16]) -> Result<Tensor> {
    let width = x.dim(1)?.max(1);
    let blocks = weight.chunks((BLOCK / width).max(1) * width).map(|block| {
        let mut wide = vec![0.0; block.len()];
        let parts = wide.par_chunks_mut(WORK).zip(block.par_chunks(WORK));
        parts.for_each(|(to, from)| to.iter_mut().zip(from).for_each(|(to, from)| *to = from.wide()));
        let wide = Tensor::from_vec(wide, (block.len() / width, width), &Device::Cpu)?;
        Ok(x.matmul(&wide.t()?)?)
    });
    Ok(Tensor::cat(&blocks.collect::<Result<Vec<Tensor>>>()?, 1)?)
}

/// A row of W times x.
pub(super) fn dot<T: Number>(row: &[T], x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: this processor has AVX2.
        return unsafe { dot_avx2(row, x) };
    }
    dot_portable(row, x)
}

/// The same sums in the same order, but eight numbers at once: code for any x86-64 adds four.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dot_avx2<T: Number>(row: &[T], x: &[f32]) -> f32 {
    dot_portable(row, x)
}

#[inline(always)]
fn dot_portable<T: Number>(row: &[T], x: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (rows, xs) = (row.chunks_exact(LANES), x.chunks_exact(LANES));
    let rest: f32 = rows.remainder().iter().zip(xs.remainder()).map(|(w, x)| w.wide() * x).sum();
    for (row, x) in rows.zip(xs) {
        for lane in 0..LANES {
            lanes[lane] += row[lane].wide() * x[lane];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn numbers(shape: (usize, usize), step: usize) -> Tensor {
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|i| ((i * step) % 101) as f32 / 50.0 - 1.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// One row and many; widths that lanes do not divide; more than one block.
    #[test]
    fn weights_give_what_candles_product_gives() {
        for (rows, outputs, width) in [(1, 5, 7), (1, 300, 64), (1, 129, 100), (3, 9, 33), (2, 1100, 1000)] {
            let (x, both) = (numbers((rows, width), 37), numbers((2 * outputs, width), 53));
            for dtype in [DType::BF16, DType::F32] {
                // One that does not begin where its memory does.
                let weight = both.to_dtype(dtype).unwrap().narrow(0, outputs, outputs).unwrap();
                let is: Vec<Vec<f32>> = product(&x, &weight).unwrap().to_vec2().unwrap();
                let wide = weight.to_dtype(DType::F32).unwrap();
                let expected: Vec<Vec<f32>> = x.matmul(&wide.t().unwrap()).unwrap().to_vec2().unwrap();
                assert_eq!(is[0].len(), outputs);
                for (is, expected) in is.concat().iter().zip(expected.concat()) {
                    let error = (is - expected).abs();
                    assert!(error < 1e-5 * width as f32, "{rows} {outputs} {width}: {is}, not {expected}");
                }
            }
        }
    }

    /// Of rows, of transposed views and of parts of matrices; large enough that threads share them.
    #[test]
    fn sums_of_products_are_candles_and_the_same_on_any_number_of_threads() {
        for (m, n, k, rank) in [(1, 1, 1, 1), (70, 130, 33, 8), (300, 1100, 600, 4)] {
            let (a, w) = (numbers((2 * m, k), 37).narrow(0, m, m).unwrap(), numbers((n, k), 53).t().unwrap());
            let (u, b) = (numbers((rank, m), 29).t().unwrap(), numbers((n, rank), 17).t().unwrap());
            let terms = [(&a, &w, 1.0), (&u, &b, -0.5)];
            let on = |threads: usize| -> Vec<f32> {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| sum_of_products(&terms)).unwrap().flatten_all().unwrap().to_vec1().unwrap()
            };
            let expected = (a.matmul(&w).unwrap() - (u.matmul(&b).unwrap() * 0.5).unwrap()).unwrap();
            let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
            let sum = on(1);
            assert!(sum.iter().zip(&expected).all(|(is, wanted)| (is - wanted).abs() < 1e-6 * (k + rank) as f32));
            assert!([2, 3].into_iter().all(|threads| on(threads) == sum), "{m} {n} {k}");
        }
        assert!(sum_of_products(&[(&numbers((2, 3), 1), &numbers((4, 2), 1), 1.0)]).is_err());
    }

    #[test]
    fn every_processor_gives_the_same_bits() {
        let row: Vec<f32> = numbers((1, 1003), 37).flatten_all().unwrap().to_vec1().unwrap();
        let x: Vec<f32> = numbers((1, 1003), 53).flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(dot(&row, &x).to_bits(), dot_portable(&row, &x).to_bits());
    }
}
