//! Numbers that ops are computed in: f32 for training, f64 for the gradient tests.

use candle_core::{CpuStorage, WithDType};

use crate::error::Result;

/// Numbers that are summed side by side, in an order that is the same on every processor.
const LANES: usize = 16;

/// f32 or f64.
pub(super) trait Real: WithDType + Default + Send + Sync {
    fn slice(storage: &CpuStorage) -> Result<&[Self]>;
    fn maximum(self, other: Self) -> Self;
    fn magnitude(self) -> Self;
    /// `eˣ` for `x <= 0`.
    fn fast_exp(self) -> Self;
    fn sum_of(values: &[Self]) -> f64;
    fn sum_of_squares(values: &[Self]) -> f64;

    /// `1 / (1 + e⁻ˣ)`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let e = (Self::zero() - self.magnitude()).fast_exp();
        let top = if self < Self::zero() { e } else { Self::one() };
        top / (Self::one() + e)
    }
}

/// The sum over columns of a number of each.
#[inline(always)]
pub(super) fn sum_by<T: Real, const N: usize>(rows: [&[T]; N], of: impl Fn([T; N]) -> T) -> f64 {
    let chunks = rows.map(|row| row.as_chunks::<LANES>().0);
    let rests = rows.map(|row| row.as_chunks::<LANES>().1);
    let mut lanes = [T::zero(); LANES];
    for at in 0..chunks[0].len() {
        let chunk = chunks.map(|row| &row[at]);
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += of(chunk.map(|row| row[lane]));
        }
    }
    let mut sum = T::zero();
    lanes.iter().for_each(|lane| sum += *lane);
    (0..rests[0].len()).for_each(|at| sum += of(rests.map(|row| row[at])));
    sum.to_f64()
}

/// The largest number of a row; minus infinity of none.
#[inline(always)]
pub(super) fn largest<T: Real>(row: &[T]) -> T {
    let higher = |a: T, b: T| if a > b { a } else { b };
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [T::from_f64(f64::NEG_INFINITY); LANES];
    chunks.iter().for_each(|chunk| lanes.iter_mut().zip(chunk).for_each(|(top, v)| *top = higher(*v, *top)));
    lanes.iter().chain(rest).fold(lanes[0], |top, v| higher(*v, top))
}

impl Real for f64 {
    fn slice(storage: &CpuStorage) -> Result<&[f64]> {
        Ok(storage.as_slice()?)
    }
    fn maximum(self, other: f64) -> f64 {
        self.max(other)
    }
    fn magnitude(self) -> f64 {
        self.abs()
    }
    fn fast_exp(self) -> f64 {
        self.exp()
    }
    fn sum_of(values: &[f64]) -> f64 {
        values.iter().sum()
    }
    fn sum_of_squares(values: &[f64]) -> f64 {
        values.iter().map(|v| v * v).sum()
    }
}

impl Real for f32 {
    fn slice(storage: &CpuStorage) -> Result<&[f32]> {
        Ok(storage.as_slice()?)
    }
    #[inline(always)]
    fn maximum(self, other: f32) -> f32 {
        self.max(other)
    }
    #[inline(always)]
    fn magnitude(self) -> f32 {
        self.abs()
    }
    /// `eˣ` for `x <= 0` to 2 units in the last place, without branches, so that the compiler vectorises the loop around
    /// it: `2ⁿ · e^r` with `r` in `±ln 2 / 2`, the polynomial of Cephes' `expf`.
    #[inline(always)]
    fn fast_exp(self) -> f32 {
        let x = self.max(-87.0);
        // Adding and taking away 1.5 · 2²³ rounds to a whole number with plain additions.
        let n = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
        let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
        let p = 1.987_569_1e-4_f32;
        let p = p * r + 1.398_199_9e-3;
        let p = p * r + 8.333_452e-3;
        let p = p * r + 4.166_579_6e-2;
        let p = p * r + 1.666_666_5e-1;
        let p = p * r + 5.000_000_3e-1;
        let e = p * r * r + r + 1.0;
        // n is in -126..=0 here, so that the exponent field stays in range.
        e * f32::from_bits(((n as i32 + 127) as u32) << 23)
    }
    #[inline(always)]
    fn sum_of(values: &[f32]) -> f64 {
        sum_by([values], |[v]| v)
    }
    #[inline(always)]
    fn sum_of_squares(values: &[f32]) -> f64 {
        sum_by([values], |[v]| v * v)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_exp_is_exp() {
        for i in 0..100_000 {
            let x = -(i as f32) * 8.6e-4;
            let (fast, exact) = (x.fast_exp(), f64::from(x).exp());
            assert!((f64::from(fast) - exact).abs() <= 2.5e-7 * exact, "exp({x}) = {fast}, should be {exact}");
        }
        assert!((-1e30_f32).fast_exp() < 1e-37);
    }

    #[test]
    fn sigmoid_is_sigmoid() {
        for i in -10_000..10_000 {
            let x = i as f32 * 3e-3;
            let (fast, exact) = (x.sigmoid(), 1.0 / (1.0 + (-f64::from(x)).exp()));
            assert!((f64::from(fast) - exact).abs() <= 4e-7 * exact, "sigmoid({x}) = {fast}, should be {exact}");
        }
    }
}
