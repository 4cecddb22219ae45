//! The end of the head: log-probs of the answer tokens, without ever holding all logits.
//!
//! `logp = l[y] - ln Σ_v exp l[v]` with `l = W·h + b`. The forward pass also leaves `d logp / d h = W[y] - Σ_v p[v]·W[v]` for
//! every token, so that once the loss is known the head's backward is one scaling, and the vocabulary is walked once.
//! With a soft cap `c` logits are `l = c·tanh(z / c)` (Gemma 2, section 2), and `1 - (l/c)²` is a factor on every row of W.
//! Rows are taken in chunks, so that only a bounded block of logits exists at a time.

use candle_core::{DType, Device, Storage, Tensor};
use dpo_plugin_api::graph::Node;
use rayon::prelude::*;

use super::real::Real;
use super::{Kernel, Op};
use crate::error::{Error, Result};
use crate::logprobs::STATISTICS;

pub(super) const OP: Op = Op { name: "lm_head", cached_inputs: &[], kernel: Kernel::LogProb };

/// Most logits held at once: 16 MiB in f32. Larger blocks gain nothing, and the system's allocator would give each back and
/// fault it in again.
const LOGITS: usize = 1 << 22;

/// Most bytes that the head holds in f32 beside its result: logits, their exponentials, derivatives of a soft cap, and the same again on their way.
pub fn workspace(vocab: usize) -> usize {
    6 * size_of::<f32>() * LOGITS.max(vocab)
}

/// From hidden rows to logits.
pub struct Projection<'a> {
    /// `[vocab, width]`.
    pub weight: &'a Tensor,
    /// `[vocab]`.
    pub bias: Option<&'a Tensor>,
    /// Logits `z` become `softcap · tanh(z / softcap)`.
    pub softcap: Option<f64>,
}

impl<'a> Projection<'a> {
    /// That of a checked node with its weights, in the node's order.
    pub fn of(node: &Node, weights: &'a [Tensor]) -> Result<Projection<'a>> {
        let weight = |role: &str| node.weights.iter().position(|w| w.role == role).and_then(|at| weights.get(at));
        let main = weight("weight").ok_or_else(|| Error::run("lm_head runs without its weight"))?;
        let softcap = node.attrs.get("softcap").and_then(serde_json::Value::as_f64);
        Ok(Projection { weight: main, bias: weight("bias"), softcap })
    }

    /// Logits of products with the weight.
    pub fn logits(&self, mut products: Tensor) -> Result<Tensor> {
        if let Some(bias) = self.bias {
            products = products.broadcast_add(bias)?;
        }
        Ok(match self.softcap {
            Some(cap) => ((products / cap)?.tanh()? * cap)?,
            None => products,
        })
    }

    /// The derivative of logits by what they were before the soft cap.
    fn softcap_derivative(&self, logits: &Tensor) -> Result<Option<Tensor>> {
        let derivative = |cap: f64| -> Result<Tensor> { Ok((1.0 - (logits / cap)?.sqr()?)?) };
        self.softcap.map(derivative).transpose()
    }
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

/// Log-probs of `targets` under hidden rows `[rows, width]`.
pub fn log_probs(hidden: &Tensor, projection: &Projection<'_>, targets: &[u32], grads: bool) -> Result<Head> {
    match hidden.dtype() {
        DType::F32 => chunks::<f32>(hidden, projection, targets, grads),
        DType::F64 => chunks::<f64>(hidden, projection, targets, grads),
        other => Err(Error::run(format!("log-probs of {other:?} are not computed on the CPU"))),
    }
}

/// Per row: log-prob, `ln Σ p²`, and the sum that turns `exp(l - max)` into probabilities.
type RowSums = (f64, f64, f64);

fn chunks<T: Real>(hidden: &Tensor, projection: &Projection<'_>, targets: &[u32], grads: bool) -> Result<Head> {
    let weight = projection.weight;
    let vocab = weight.dim(0)?;
    let rows = (LOGITS / vocab.max(1)).max(1);
    let mut all = Head { logps: Vec::new(), statistics: Default::default(), grads: None };
    let mut grad_chunks = Vec::new();
    for (index, targets) in targets.chunks(rows).enumerate() {
        let h = hidden.narrow(0, index * rows, targets.len())?;
        let logits = projection.logits(h.matmul(&weight.t()?)?)?;
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
            let mut exps = Tensor::from_vec(exps, (targets.len(), vocab), &Device::Cpu)?;
            let inverse: Vec<T> = sums.iter().map(|s| T::from_f64(1.0 / s.2)).collect();
            let inverse = Tensor::from_vec(inverse, (targets.len(), 1), &Device::Cpu)?;
            let targets = Tensor::new(targets, &Device::Cpu)?;
            let mut own = weight.index_select(&targets, 0)?;
            if let Some(derivative) = projection.softcap_derivative(&logits)? {
                exps = (exps * &derivative)?;
                own = own.broadcast_mul(&derivative.gather(&targets.unsqueeze(1)?, 1)?)?;
            }
            let expected = exps.matmul(weight)?.broadcast_mul(&inverse)?;
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

/// The head's backward: row `i` of the grads times `dlogps[i]`, `[answer tokens, width]`.
pub fn vjp(grads: &Tensor, dlogps: &[f32]) -> Result<Tensor> {
    let scale = Tensor::from_slice(dlogps, (dlogps.len(), 1), &Device::Cpu)?.to_dtype(grads.dtype())?;
    Ok(grads.broadcast_mul(&scale)?)
}
