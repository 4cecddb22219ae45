//! One optimizer step's gradient, over as many micro-batches as its pairs need.

use std::ops::Range;

use super::metrics::PairMetrics;
use super::objective::{Evaluated, Logps, Objective, Totals};
use crate::batch::{Batch, answer_tokens, laid_out, micro_batches};
use crate::data::TokenPair;
use crate::device::Device;
use crate::error::Result;

/// Loss and metrics of a step, or of an evaluation.
pub struct Step {
    /// Loss.
    pub loss: f64,
    /// Of every pair.
    pub pairs: Vec<PairMetrics>,
}

/// Log-probs of pairs' answer tokens.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// Answer tokens of every pair: chosen, rejected.
    pub answers: Vec<[usize; 2]>,
    /// Log-probs, flat.
    pub logps: Vec<f32>,
    /// `ln Σ p²`, flat.
    pub log_sum_sq: Vec<f32>,
}

/// A micro-batch and the places of its pairs among the step's.
struct Packed {
    batch: Batch,
    pairs: Vec<usize>,
}

fn pack(pairs: &[&TokenPair], budget: usize) -> impl Iterator<Item = Packed> {
    let lengths: Vec<usize> = pairs.iter().map(|p| laid_out(p)).collect();
    let packed = micro_batches(&lengths, budget).into_iter();
    packed.map(|own| Packed { batch: Batch::of(own.iter().map(|p| pairs[*p])), pairs: own })
}

/// Where every pair's answer tokens lie in a flat array over pairs.
struct Places(Vec<Range<usize>>);

impl Places {
    fn of(pairs: &[&TokenPair]) -> Places {
        let mut at = 0;
        let next = |pair: &&TokenPair| {
            at += answer_tokens(pair);
            at - answer_tokens(pair)..at
        };
        Places(pairs.iter().map(next).collect())
    }

    /// The values of some pairs, one after the other; none from an array that is empty.
    fn gather(&self, flat: &[f32], pairs: &[usize]) -> Vec<f32> {
        if flat.is_empty() {
            Vec::new()
        } else {
            pairs.iter().flat_map(|p| &flat[self.0[*p].clone()]).copied().collect()
        }
    }

    /// Puts the values of some pairs back.
    fn scatter(&self, mut values: &[f32], pairs: &[usize], flat: &mut [f32]) {
        for pair in pairs {
            let (own, rest) = values.split_at(self.0[*pair].len());
            flat[self.0[*pair].clone()].copy_from_slice(own);
            values = rest;
        }
    }

    fn tokens(&self) -> usize {
        self.0.last().map_or(0, |r| r.end)
    }
}

/// Log-probs of pairs under a device's present adapter. `done` is told after every micro-batch how many pairs it had.
pub fn score(device: &mut dyn Device, pairs: &[&TokenPair], mut done: impl FnMut(usize)) -> Result<Scores> {
    let places = Places::of(pairs);
    let flat = || vec![0.0; places.tokens()];
    let mut scores = Scores { answers: answers(pairs), logps: flat(), log_sum_sq: flat() };
    for Packed { batch, pairs } in pack(pairs, device.micro_batch_tokens(false)) {
        let forward = device.forward(&batch, false)?;
        places.scatter(&forward.logps, &pairs, &mut scores.logps);
        places.scatter(&forward.log_sum_sq, &pairs, &mut scores.log_sum_sq);
        done(pairs.len());
    }
    Ok(scores)
}

/// Answer tokens of every pair: chosen, rejected.
fn answers(pairs: &[&TokenPair]) -> Vec<[usize; 2]> {
    let of = |pair: &&TokenPair| {
        let unpredicted = usize::from(pair.prompt.is_empty());
        [pair.chosen.len() - unpredicted, pair.rejected.len() - unpredicted]
    };
    pairs.iter().map(of).collect()
}

/// Loss and metrics without a gradient: all pairs as one step.
pub(super) fn evaluate(
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    pairs: &[&TokenPair],
    reference: &[f32],
) -> Result<Step> {
    let scores = score(device, pairs, |_| {})?;
    let logps = Logps { answers: &scores.answers, policy: &scores.logps, reference, log_sum_sq: &scores.log_sum_sq };
    let Evaluated { loss, pairs, .. } = objective.eval(logps, totals(&scores.answers), false)?;
    Ok(Step { loss, pairs })
}

fn totals(answers: &[[usize; 2]]) -> Totals {
    let tokens = answers.iter().fold([0, 0], |[c, r], a| [c + a[0], r + a[1]]);
    Totals { pairs: answers.len(), tokens }
}

/// A step's loss, with its gradient left on the device. `reference` is flat over the step's answer
/// tokens, or empty.
pub fn gradient(
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    pairs: &[&TokenPair],
    reference: &[f32],
) -> Result<Step> {
    device.clear_gradient()?;
    let (places, answers) = (Places::of(pairs), answers(pairs));
    let totals = totals(&answers);
    let micro_batches: Vec<Packed> = pack(pairs, device.micro_batch_tokens(true)).collect();
    if objective.whole_batch() && micro_batches.len() > 1 {
        // The loss needs every pair's log-probs before it can give a derivative for one.
        let scores = score(device, pairs, |_| {})?;
        let logps = Logps { answers: &answers, policy: &scores.logps, reference, log_sum_sq: &scores.log_sum_sq };
        let evaluated = objective.eval(logps, totals, true)?;
        for Packed { batch, pairs } in &micro_batches {
            device.forward(batch, true)?;
            device.backward(batch, &places.gather(&evaluated.slopes, pairs))?;
        }
        return Ok(Step { loss: evaluated.loss, pairs: evaluated.pairs });
    }
    let mut loss = 0.0;
    let mut metrics = Vec::new();
    for Packed { batch, pairs } in &micro_batches {
        let forward = device.forward(batch, true)?;
        let reference = places.gather(reference, pairs);
        let logps = Logps {
            answers: &batch.answers,
            policy: &forward.logps,
            reference: &reference,
            log_sum_sq: &forward.log_sum_sq,
        };
        let evaluated = objective.eval(logps, totals, true)?;
        loss += evaluated.loss;
        metrics.extend(pairs.iter().copied().zip(evaluated.pairs));
        device.backward(batch, &evaluated.slopes)?;
    }
    metrics.sort_by_key(|(pair, _)| *pair);
    Ok(Step { loss, pairs: metrics.into_iter().map(|(_, m)| m).collect() })
}
