//! The end of the head: log-probs of the answer tokens, without ever holding all logits.
//!
//! `logp = l[y] - ln Σ_v exp l[v]` with `l = W·h + b`. The forward pass also leaves `d logp / d h = W[y] - Σ_v p[v]·W[v]` for
//! every token, so that once the loss is known the head's backward is one scaling, and the vocabulary is walked once.
//! With a soft cap `c` logits are `l = c·tanh(z / c)` (Gemma 2, section 2), and `1 - (l/c)²` is a factor on every row of W.
//! Some rows and a part of the vocabulary are taken at a time, so that only a bounded block of logits exists. Sums over the vocabulary go on from
//! part to part with the largest logit so far (Milakov and Gimelshein 2018, algorithm 3).

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::Node;
use rayon::prelude::*;

use super::product::{Matrix, multiply};
use super::real::{Real, largest};
use super::rows::{values, widest};
use super::{Kernel, Op};
use crate::error::{Error, Result};
use crate::logprobs::STATISTICS;

pub(super) const OP: Op = Op { name: "lm_head", cached_inputs: &[], kernel: Kernel::LogProb };

/// Rows whose logits are computed at once, and for how many tokens of the vocabulary: 16 MiB in f32.
const ROWS: usize = 512;
const PART: usize = 8192;

/// Most bytes that the head holds in f32 beside its result: logits, which become their exponentials, sums of rows as wide as hidden states, and
/// as much again that a product packs.
pub fn workspace(width: usize) -> usize {
    2 * size_of::<f32>() * ROWS * (PART + width)
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

/// What is known of a row's logits when a part of the vocabulary is seen.
#[derive(Clone, Copy)]
struct Seen<T> {
    /// The largest logit.
    top: T,
    /// Sums of `exp(l - top)` and of its square.
    sum: f64,
    squares: f64,
    /// The target's logit, and its derivative by what it was before the soft cap.
    target: T,
    slope: T,
}

/// A part of the vocabulary: its first token, its bias, and the soft cap, 0 for none.
struct Part<'a, T> {
    first: usize,
    bias: Option<&'a [T]>,
    softcap: f64,
}

impl<T: Real> Seen<T> {
    fn nothing() -> Seen<T> {
        let lowest = T::from_f64(f64::NEG_INFINITY);
        Seen { top: lowest, sum: 0.0, squares: 0.0, target: lowest, slope: T::one() }
    }

    /// Goes on with products of a part, which become `exp(l - top)` times the slope of the soft cap; `expected`, a sum over those before,
    /// gets what they are to the new `top`.
    #[inline(always)]
    fn go_on(&mut self, products: &mut [T], part: &Part<'_, T>, target: usize, expected: &mut [T]) {
        if let Some(bias) = part.bias {
            products.iter_mut().zip(bias).for_each(|(z, bias)| *z += *bias);
        }
        if part.softcap > 0.0 {
            products.iter_mut().for_each(|z| *z = T::from_f64(part.softcap * (z.to_f64() / part.softcap).tanh()));
        }
        let slope = |logit: T| T::from_f64(1.0 - (logit.to_f64() / part.softcap).powi(2));
        if let Some(logit) = target.checked_sub(part.first).and_then(|at| products.get(at)) {
            self.target = *logit;
            self.slope = if part.softcap > 0.0 { slope(*logit) } else { T::one() };
        }
        let top = self.top.maximum(largest(products));
        let shrink = (self.top - top).fast_exp();
        self.top = top;
        self.sum *= shrink.to_f64();
        self.squares *= shrink.to_f64() * shrink.to_f64();
        if shrink != T::one() {
            expected.iter_mut().for_each(|e| *e *= shrink);
        }
        for block in products.chunks_mut(BLOCK) {
            if part.softcap > 0.0 {
                let slopes = block.iter().map(|logit| slope(*logit)).collect::<Vec<T>>();
                block.iter_mut().for_each(|v| *v = (*v - top).fast_exp());
                (self.sum, self.squares) = (self.sum + T::sum_of(block), self.squares + T::sum_of_squares(block));
                block.iter_mut().zip(slopes).for_each(|(e, slope)| *e *= slope);
                continue;
            }
            block.iter_mut().for_each(|v| *v = (*v - top).fast_exp());
            // A block is summed in its own type, which vectorises; blocks are summed in f64.
            self.sum += T::sum_of(block);
            self.squares += T::sum_of_squares(block);
        }
    }
}

fn chunks<T: Real>(hidden: &Tensor, projection: &Projection<'_>, targets: &[u32], grads: bool) -> Result<Head> {
    let ([vocab, width], softcap) = (<[usize; 2]>::from(projection.weight.dims2()?), projection.softcap.unwrap_or(0.0));
    let hidden = hidden.contiguous()?;
    let ((hidden, layout), (weight, of_weight)) = (hidden.storage_and_layout(), projection.weight.storage_and_layout());
    let (hidden, weight) = (values::<T>(&hidden, layout)?, values::<T>(&weight, of_weight)?);
    let bias = projection.bias.map(Tensor::storage_and_layout);
    let bias = bias.as_ref().map(|(bias, layout)| values::<T>(bias, layout)).transpose()?;
    let mut all = Head { logps: Vec::new(), statistics: Default::default(), grads: None };
    let mut of_all: Vec<T> = Vec::new();
    for (index, targets) in targets.chunks(ROWS).enumerate() {
        let rows = targets.len();
        let hidden = Matrix::rows(hidden, width, index * ROWS * width);
        let mut seen = vec![Seen::nothing(); rows];
        // `Σ_v exp(l[v] - top) · W[v]` of every row.
        let mut expected = vec![T::zero(); rows * width];
        let mut products = vec![T::zero(); rows * PART.min(vocab)];
        for first in (0..vocab).step_by(PART) {
            let count = PART.min(vocab - first);
            let (weight, products) = (Matrix::rows(weight, width, first * width), &mut products[..rows * count]);
            multiply((products, count), [rows, count, width], (hidden, weight.transposed()), 1.0, false, true);
            let part = Part { first, bias: bias.map(|bias| &bias[first..first + count]), softcap };
            let states = seen.par_iter_mut().zip(expected.par_chunks_mut(width)).zip(targets);
            products.par_chunks_mut(count).zip(states).for_each(|(products, ((seen, expected), target))| {
                widest(|| seen.go_on(products, &part, *target as usize, expected));
            });
            if grads {
                multiply(
                    (&mut expected, width),
                    [rows, width, count],
                    (Matrix::rows(products, count, 0), weight),
                    1.0,
                    true,
                    true,
                );
            }
        }
        all.logps.extend(seen.iter().map(|s| (s.target - s.top).to_f64() - s.sum.ln()));
        all.statistics[0].extend(seen.iter().map(|s| s.squares.ln() - 2.0 * s.sum.ln()));
        if grads {
            for ((seen, expected), target) in seen.iter().zip(expected.chunks_mut(width)).zip(targets) {
                let (own, inverse) = (&weight[*target as usize * width..][..width], T::from_f64(1.0 / seen.sum));
                expected.iter_mut().zip(own).for_each(|(e, own)| *e = *own * seen.slope - *e * inverse);
            }
            of_all.extend(expected);
        }
    }
    if grads && !of_all.is_empty() {
        all.grads = Some(Tensor::from_vec(of_all, (targets.len(), width), &Device::Cpu)?);
    }
    Ok(all)
}

const BLOCK: usize = 256;

/// The head's backward: row `i` of the grads times `dlogps[i]`, `[answer tokens, width]`.
pub fn vjp(grads: &Tensor, dlogps: &[f32]) -> Result<Tensor> {
    let scale = Tensor::from_slice(dlogps, (dlogps.len(), 1), &Device::Cpu)?.to_dtype(grads.dtype())?;
    Ok(grads.broadcast_mul(&scale)?)
}
