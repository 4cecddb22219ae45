//! The end of the head: log-probs of the answer tokens, without ever holding all logits.
//!
//! `logp = l[y] - ln Σ_v exp l[v]` with `l = W·h`. The forward pass also leaves `d logp / d h = W[y] - Σ_v p[v]·W[v]` for
//! every token, so that once the loss is known the head's backward is one scaling, and the vocabulary is walked once.
//! Rows are taken in chunks, so that only a bounded block of logits exists at a time.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};
use rayon::prelude::*;

use super::{Kernel, Op, Presence, weight_shape};
use crate::error::{Error, Result};
use crate::logprobs::STATISTICS;

pub(super) const OP: Op = Op {
    name: "lm_head",
    formula: "log softmax(x · weightᵀ)[token], answer tokens only",
    inputs: 1,
    weights: &[("weight", Presence::Required)],
    attrs: &[],
    check: |node, widths| weight_shape(node, "weight", &[node.width, widths[0]]),
    reads_layout: false,
    cached_inputs: &[],
    kernel: Kernel::LogProb,
};

/// Most logits held at once: 16 MiB in f32. Larger blocks gain nothing, and the system's allocator would give each back and
/// fault it in again.
const LOGITS: usize = 1 << 22;

/// Most bytes that the head holds in f32 beside its result: logits, their exponentials, and the same again on their way.
pub fn workspace(vocab: usize) -> usize {
    4 * size_of::<f32>() * LOGITS.max(vocab)
}

/// What the head makes of hidden rows.
pub struct Head {
    /// Log-prob of each row's target.
    pub logps: Vec<f64>,
    /// The [`STATISTICS`] of each row, in their order.
    pub statistics: [Vec<f64>; STATISTICS.len()],
    /// `d logp / d hidden`, `[rows, width]`, where asked for.
    pub grads: Option<Tensor>,
}

/// Log-probs of `targets` under hidden rows `[rows, width]` and the projection `[vocab, width]`.
pub fn log_probs(hidden: &Tensor, weight: &Tensor, targets: &[u32], grads: bool) -> Result<Head> {
    match hidden.dtype() {
        DType::F32 => chunks::<f32>(hidden, weight, targets, grads),
        DType::F64 => chunks::<f64>(hidden, weight, targets, grads),
        other => Err(Error::run(format!("log-probs of {other:?} are not computed on the CPU"))),
    }
}

/// Per row: log-prob, `ln Σ p²`, and the sum that turns `exp(l - max)` into probabilities.
type RowSums = (f64, f64, f64);

fn chunks<T: Real>(hidden: &Tensor, weight: &Tensor, targets: &[u32], grads: bool) -> Result<Head> {
    let vocab = weight.dim(0)?;
    let rows = (LOGITS / vocab.max(1)).max(1);
    let mut all = Head { logps: Vec::new(), statistics: Default::default(), grads: None };
    let mut grad_chunks = Vec::new();
    for (index, targets) in targets.chunks(rows).enumerate() {
        let h = hidden.narrow(0, index * rows, targets.len())?;
        let logits = h.matmul(&weight.t()?)?;
        let (exps, sums) = {
            let (storage, layout) = logits.storage_and_layout();
            let Storage::Cpu(cpu) = &*storage else { return Err(Error::run("the CPU head got a device tensor")) };
            let start = layout.start_offset();
            let values = &T::slice(cpu)?[start..start + targets.len() * vocab];
            softmax_rows(values, targets, vocab, grads)
        };
        all.logps.extend(sums.iter().map(|s| s.0));
        all.statistics[0].extend(sums.iter().map(|s| s.1));
        if grads {
            let exps = Tensor::from_vec(exps, (targets.len(), vocab), &Device::Cpu)?;
            let inverse: Vec<T> = sums.iter().map(|s| T::from_f64(1.0 / s.2)).collect();
            let inverse = Tensor::from_vec(inverse, (targets.len(), 1), &Device::Cpu)?;
            let expected = exps.matmul(weight)?.broadcast_mul(&inverse)?;
            let own = weight.index_select(&Tensor::new(targets, &Device::Cpu)?, 0)?;
            grad_chunks.push((own - expected)?);
        }
    }
    if grads && !grad_chunks.is_empty() {
        all.grads = Some(Tensor::cat(&grad_chunks, 0)?);
    }
    Ok(all)
}

/// `exp(l - max)` of every row (empty unless `keep`), and the rows' sums.
fn softmax_rows<T: Real>(logits: &[T], targets: &[u32], vocab: usize, keep: bool) -> (Vec<T>, Vec<RowSums>) {
    let mut exps = vec![T::zero(); if keep { logits.len() } else { 0 }];
    let row = |logits: &[T], exps: Option<&mut [T]>, target: u32| {
        let top = logits.iter().copied().fold(T::from_f64(f64::NEG_INFINITY), T::maximum);
        let (mut sum, mut squares) = (0.0, 0.0);
        let mut scratch = [T::zero(); BLOCK];
        let mut exps = exps;
        for (block, values) in logits.chunks(BLOCK).enumerate() {
            let out = match &mut exps {
                Some(exps) => &mut exps[block * BLOCK..block * BLOCK + values.len()],
                None => &mut scratch[..values.len()],
            };
            out.iter_mut().zip(values).for_each(|(o, v)| *o = (*v - top).fast_exp());
            // A block is summed in its own type, which vectorises; blocks are summed in f64.
            sum += T::sum_of(out);
            squares += T::sum_of_squares(out);
        }
        let logp = (logits[target as usize] - top).to_f64() - sum.ln();
        (logp, squares.ln() - 2.0 * sum.ln(), sum)
    };
    let rows = logits.par_chunks(vocab).zip(targets.par_iter());
    let sums = if keep {
        rows.zip(exps.par_chunks_mut(vocab)).map(|((l, t), e)| row(l, Some(e), *t)).collect()
    } else {
        rows.map(|(l, t)| row(l, None, *t)).collect()
    };
    (exps, sums)
}

const BLOCK: usize = 256;

/// f32 for training, f64 for the gradient tests.
trait Real: WithDType + Send + Sync {
    fn slice(storage: &CpuStorage) -> Result<&[Self]>;
    fn maximum(self, other: Self) -> Self;
    fn fast_exp(self) -> Self;
    fn sum_of(values: &[Self]) -> f64;
    fn sum_of_squares(values: &[Self]) -> f64;
}

impl Real for f64 {
    fn slice(storage: &CpuStorage) -> Result<&[f64]> {
        Ok(storage.as_slice()?)
    }
    fn maximum(self, other: f64) -> f64 {
        self.max(other)
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
    fn maximum(self, other: f32) -> f32 {
        self.max(other)
    }
    /// `eˣ` for `x <= 0` to 2 units in the last place, without branches, so that the compiler vectorises the loop around
    /// it: `2ⁿ · e^r` with `r` in `±ln 2 / 2`, the polynomial of Cephes' `expf`.
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
    fn sum_of(values: &[f32]) -> f64 {
        let mut lanes = [0.0_f32; 8];
        let chunks = values.chunks_exact(8);
        let rest: f32 = chunks.remainder().iter().sum();
        chunks.for_each(|c| lanes.iter_mut().zip(c).for_each(|(l, v)| *l += v));
        f64::from(lanes.iter().sum::<f32>() + rest)
    }
    fn sum_of_squares(values: &[f32]) -> f64 {
        let mut lanes = [0.0_f32; 8];
        let chunks = values.chunks_exact(8);
        let rest: f32 = chunks.remainder().iter().map(|v| v * v).sum();
        chunks.for_each(|c| lanes.iter_mut().zip(c).for_each(|(l, v)| *l += v * v));
        f64::from(lanes.iter().sum::<f32>() + rest)
    }
}

/// The head's backward: row `i` of the grads times `dlogps[i]`, `[answer tokens, width]`.
pub fn vjp(grads: &Tensor, dlogps: &[f32]) -> Result<Tensor> {
    let scale = Tensor::from_slice(dlogps, (dlogps.len(), 1), &Device::Cpu)?.to_dtype(grads.dtype())?;
    Ok(grads.broadcast_mul(&scale)?)
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
}
