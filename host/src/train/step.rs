//! One optimizer step's gradient, over as many micro-batches as its pairs need.

use super::metrics::PairMetrics;
use super::objective::{Evaluated, Logps, Objective, Totals};
use crate::batch::{Batch, laid_out, micro_batches};
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

/// Splits pairs into micro-batches by tokens.
fn batches(pairs: &[&TokenPair], budget: usize) -> Vec<Batch> {
    let lengths: Vec<usize> = pairs.iter().map(|p| laid_out(p)).collect();
    micro_batches(&lengths, budget).into_iter().map(|r| Batch::of(pairs[r].iter().copied())).collect()
}

/// Log-probs of pairs under a device's present adapter. `done` is told after every micro-batch how many pairs it had.
pub fn score(device: &mut dyn Device, pairs: &[&TokenPair], mut done: impl FnMut(usize)) -> Result<Scores> {
    let mut scores = Scores::default();
    for batch in batches(pairs, device.micro_batch_tokens(false)) {
        let forward = device.forward(&batch, false)?;
        done(batch.answers.len());
        scores.answers.extend(batch.answers);
        scores.logps.extend(forward.logps);
        scores.log_sum_sq.extend(forward.log_sum_sq);
    }
    Ok(scores)
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
    let batches = batches(pairs, device.micro_batch_tokens(true));
    let answers: Vec<[usize; 2]> = batches.iter().flat_map(|b| b.answers.clone()).collect();
    let totals = totals(&answers);
    let mut step = Step { loss: 0.0, pairs: Vec::new() };
    if objective.whole_batch() && batches.len() > 1 {
        // The loss needs every pair's log-probs before it can give a derivative for one.
        let scores = score(device, pairs, |_| {})?;
        let logps = Logps { answers: &answers, policy: &scores.logps, reference, log_sum_sq: &scores.log_sum_sq };
        let evaluated = objective.eval(logps, totals, true)?;
        let mut slopes = evaluated.slopes.as_slice();
        for batch in &batches {
            let (own, rest) = slopes.split_at(batch.targets.len());
            device.forward(batch, true)?;
            device.backward(batch, own)?;
            slopes = rest;
        }
        return Ok(Step { loss: evaluated.loss, pairs: evaluated.pairs });
    }
    let mut at = 0;
    for batch in &batches {
        let forward = device.forward(batch, true)?;
        let tokens = batch.targets.len();
        let own = if reference.is_empty() { reference } else { &reference[at..at + tokens] };
        at += tokens;
        let logps =
            Logps { answers: &batch.answers, policy: &forward.logps, reference: own, log_sum_sq: &forward.log_sum_sq };
        let evaluated = objective.eval(logps, totals, true)?;
        step.loss += evaluated.loss;
        step.pairs.extend(evaluated.pairs);
        device.backward(batch, &evaluated.slopes)?;
    }
    Ok(step)
}
