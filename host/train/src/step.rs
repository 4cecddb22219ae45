//! One optimizer step's gradient, over as many ranks as there are and as many micro-batches as each needs.
//!
//! Every rank knows all pairs of a step and computes its share of them. What a loss sees and how its state moves on does
//! not depend on how pairs are shared.

use std::ops::Range;

use serde_json::{Map, Value, json};

use super::metrics::{PairMetrics, Sums, Window};
use super::objective::{Evaluated, Logps, Objective, Totals};
use dpo_core::batch::{Batch, answer_tokens, laid_out, micro_batches, shares};
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::pair::TokenPair;
use dpo_ranks::Ranks;

/// Loss and metrics of a step, or of an evaluation, over all ranks.
pub struct Step {
    /// Loss.
    pub loss: f64,
    /// Over its pairs.
    pub sums: Sums,
    /// Of pairs that this rank knows, with their places in the step.
    pub pairs: Vec<(usize, PairMetrics)>,
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
#[derive(Default)]
struct Packed {
    batch: Batch,
    pairs: Vec<usize>,
}

/// Micro-batches of this rank's share of a step's pairs. Where ranks share a base, as many as the rank with most needs:
/// empty ones are what a rank takes part in without computing.
fn pack(
    ranks: &mut Ranks,
    device: &dyn Device,
    pairs: &[&TokenPair],
    own: &[usize],
    keep: bool,
) -> Result<Vec<Packed>> {
    let budget = device.micro_batch_tokens(keep);
    let lengths: Vec<usize> = own.iter().map(|p| laid_out(pairs[*p])).collect();
    let packed = micro_batches(&lengths, budget).into_iter().map(|batch| {
        let places: Vec<usize> = batch.into_iter().map(|p| own[p]).collect();
        Packed { batch: Batch::of(places.iter().map(|p| pairs[*p])), pairs: places }
    });
    let mut packed: Vec<Packed> = packed.collect();
    if device.shares_base() {
        let most = ranks.most(packed.len() as u64)? as usize;
        packed.resize_with(most, Packed::default);
    }
    Ok(packed)
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

/// Which pairs each rank computes.
fn split(ranks: &Ranks, pairs: &[&TokenPair]) -> Vec<Vec<usize>> {
    shares(&pairs.iter().map(|p| laid_out(p)).collect::<Vec<_>>(), ranks.size())
}

impl Scores {
    /// Log-probs that are known, flat over the pairs' answer tokens.
    pub(super) fn of(pairs: &[&TokenPair], logps: Vec<f32>) -> Scores {
        Scores { answers: answers(pairs), logps, log_sum_sq: Vec::new() }
    }

    fn zero(pairs: &[&TokenPair], places: &Places) -> Scores {
        let flat = || vec![0.0; places.tokens()];
        Scores { answers: answers(pairs), logps: flat(), log_sum_sq: flat() }
    }

    fn put(&mut self, places: &Places, pairs: &[usize], logps: &[f32], log_sum_sq: &[f32]) {
        places.scatter(logps, pairs, &mut self.logps);
        places.scatter(log_sum_sq, pairs, &mut self.log_sum_sq);
    }

    /// Fills in what other ranks have computed.
    fn gather(&mut self, ranks: &mut Ranks, places: &Places, split: &[Vec<usize>]) -> Result<()> {
        if ranks.size() == 1 {
            return Ok(());
        }
        let own = &split[ranks.rank()];
        let values = [places.gather(&self.logps, own), places.gather(&self.log_sum_sq, own)].concat();
        let all = ranks.gather(values.iter().flat_map(|v| v.to_le_bytes()).collect())?;
        for (rank, (pairs, bytes)) in split.iter().zip(all).enumerate() {
            let values: Vec<f32> =
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let tokens: usize = pairs.iter().map(|p| places.0[*p].len()).sum();
            if values.len() != 2 * tokens {
                let got = values.len();
                return Err(Error::run(format!("rank {rank} sent {got} values for {tokens} tokens")));
            }
            self.put(places, pairs, &values[..tokens], &values[tokens..]);
        }
        Ok(())
    }

    fn logps<'a>(&'a self, reference: &'a [f32]) -> Logps<'a> {
        Logps { answers: &self.answers, policy: &self.logps, reference, log_sum_sq: &self.log_sum_sq }
    }
}

/// Log-probs of pairs under the present adapter, each rank computing its share. `done` is told after every micro-batch of
/// this rank how many pairs it had.
pub fn score(
    ranks: &mut Ranks,
    device: &mut dyn Device,
    pairs: &[&TokenPair],
    mut done: impl FnMut(usize),
) -> Result<Scores> {
    let (places, split) = (Places::of(pairs), split(ranks, pairs));
    let mut scores = Scores::zero(pairs, &places);
    for Packed { batch, pairs } in pack(ranks, device, pairs, &split[ranks.rank()], false)? {
        let forward = device.forward(&batch, false)?;
        scores.put(&places, &pairs, &forward.logps, &forward.log_sum_sq);
        done(pairs.len());
    }
    scores.gather(ranks, &places, &split)?;
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

/// Loss and metrics without a gradient, and the log-probs they are of: all pairs as one step.
pub(super) fn evaluate(
    ranks: &mut Ranks,
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    pairs: &[&TokenPair],
    reference: &[f32],
) -> Result<(Step, Scores)> {
    let scores = score(ranks, device, pairs, |_| {})?;
    let Evaluated { loss, pairs, .. } = objective.eval(scores.logps(reference), totals(&scores.answers), false)?;
    Ok((Step { loss, sums: Sums::of(&pairs), pairs: pairs.into_iter().enumerate().collect() }, scores))
}

/// Means over scored pairs under the names of the log, given the reference's log-probs of their answer tokens, and
/// `chosen_more_likely`: the share of pairs whose chosen answer the policy finds the likelier one.
pub fn appraise(objective: &mut Objective<'_>, scores: &Scores, reference: &[f32]) -> Result<Map<String, Value>> {
    let Evaluated { loss, pairs, .. } = objective.eval(scores.logps(reference), totals(&scores.answers), false)?;
    let mut window = Window::default();
    window.add(loss, Sums::of(&pairs), 0);
    let mut means = window.means("");
    let likelier = pairs.iter().filter(|p| p.logps[0] > p.logps[1]).count();
    means.insert("chosen_more_likely".into(), json!(likelier as f64 / pairs.len() as f64));
    Ok(means)
}

fn totals(answers: &[[usize; 2]]) -> Totals {
    let tokens = answers.iter().fold([0, 0], |[c, r], a| [c + a[0], r + a[1]]);
    Totals { pairs: answers.len(), tokens }
}

/// A step's loss, with its gradient, summed over ranks, left on the device. `reference` is flat over the step's answer
/// tokens, or empty.
pub fn gradient(
    ranks: &mut Ranks,
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    pairs: &[&TokenPair],
    reference: &[f32],
) -> Result<Step> {
    device.clear_gradient()?;
    let own = if objective.whole_batch() { whole_batch } else { pair_by_pair };
    let step = own(ranks, device, objective, pairs, reference)?;
    device.sum_gradient(ranks)?;
    Ok(step)
}

/// The loss needs every pair's log-probs before it can give a derivative for one. All ranks evaluate all of it, and take
/// the derivatives of their share.
fn whole_batch(
    ranks: &mut Ranks,
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    pairs: &[&TokenPair],
    reference: &[f32],
) -> Result<Step> {
    let (places, split) = (Places::of(pairs), split(ranks, pairs));
    let micro_batches = pack(ranks, device, pairs, &split[ranks.rank()], true)?;
    let scores = match micro_batches.as_slice() {
        [Packed { batch, pairs: own }] => {
            let forward = device.forward(batch, true)?;
            let mut scores = Scores::zero(pairs, &places);
            scores.put(&places, own, &forward.logps, &forward.log_sum_sq);
            scores.gather(ranks, &places, &split)?;
            scores
        }
        _ => score(ranks, device, pairs, |_| {})?,
    };
    let Evaluated { loss, slopes, pairs, .. } =
        objective.eval(scores.logps(reference), totals(&scores.answers), true)?;
    for Packed { batch, pairs } in &micro_batches {
        if micro_batches.len() > 1 {
            device.forward(batch, true)?;
        }
        device.backward(batch, &places.gather(&slopes, pairs))?;
    }
    Ok(Step { loss, sums: Sums::of(&pairs), pairs: pairs.into_iter().enumerate().collect() })
}

/// Each micro-batch by itself. A loss with a state sees the same one throughout the step, and moves it on once, by all of
/// the step's pairs.
fn pair_by_pair(
    ranks: &mut Ranks,
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    pairs: &[&TokenPair],
    reference: &[f32],
) -> Result<Step> {
    let (places, split) = (Places::of(pairs), split(ranks, pairs));
    let mut scores = Scores::zero(pairs, &places);
    let totals = totals(&scores.answers);
    let (mut loss, mut remembers) = (0.0, false);
    let mut metrics: Vec<(usize, PairMetrics)> = Vec::new();
    for Packed { batch, pairs } in pack(ranks, device, pairs, &split[ranks.rank()], true)? {
        let forward = device.forward(&batch, true)?;
        scores.put(&places, &pairs, &forward.logps, &forward.log_sum_sq);
        let reference = places.gather(reference, &pairs);
        let logps = Logps {
            answers: &batch.answers,
            policy: &forward.logps,
            reference: &reference,
            log_sum_sq: &forward.log_sum_sq,
        };
        let evaluated = objective.eval(logps, totals, false)?;
        loss += evaluated.loss;
        remembers |= evaluated.remembers;
        metrics.extend(pairs.iter().copied().zip(evaluated.pairs));
        device.backward(&batch, &evaluated.slopes)?;
    }
    // In the order of pairs, so that sums do not depend on micro-batches.
    metrics.sort_by_key(|(pair, _)| *pair);
    let known: Vec<PairMetrics> = metrics.iter().map(|(_, m)| *m).collect();
    let mut own = [0.0; Sums::SIZE + 2];
    own[..Sums::SIZE].copy_from_slice(&Sums::of(&known).to_array());
    own[Sums::SIZE..].copy_from_slice(&[loss, f64::from(u8::from(remembers))]);
    let all = ranks.sum_f64(own)?;
    let [.., loss, remember] = all;
    if remember > 0.0 {
        scores.gather(ranks, &places, &split)?;
        objective.eval(scores.logps(reference), totals, true)?;
    }
    let mut sums = [0.0; Sums::SIZE];
    sums.copy_from_slice(&all[..Sums::SIZE]);
    Ok(Step { loss, sums: Sums::from_array(sums), pairs: metrics })
}
