//! One optimizer step's gradient, over as many ranks as there are and as many micro-batches as each needs.
//!
//! Every rank knows all examples of a step and computes its share of them. What a loss sees and how its state moves on does
//! not depend on how examples are shared.

use serde_json::{Map, Value, json};

use super::metrics::{ExampleMetrics, Sums, Window};
use super::objective::{Evaluated, Objective, Totals};
use dpo_core::aux_loss::{AuxLoss, RouterLoad};
use dpo_core::batch::{Batch, micro_batches, shares};
use dpo_core::collective::ProcessGroup;
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::example::Example;
use dpo_core::logprobs::{AnswerLogProbs, AnswerOffsets, gather};

/// Loss and metrics of a step, or of an evaluation, over all group.
pub struct Step {
    /// Loss.
    pub loss: f64,
    /// The auxiliary loss of routers without its coefficient, where it is computed.
    pub aux_loss: Option<f64>,
    /// Over its examples.
    pub sums: Sums,
    /// Of examples that this rank knows, with their places in the step.
    pub examples: Vec<(usize, ExampleMetrics)>,
}

/// A micro-batch and the places of its examples among the step's.
#[derive(Default)]
struct Packed {
    batch: Batch,
    examples: Vec<usize>,
}

/// Micro-batches of this rank's share of a step's examples. Where ranks share a base, as many as the rank with most needs:
/// empty ones are what a rank takes part in without computing.
fn pack(
    group: &mut dyn ProcessGroup,
    device: &dyn Device,
    examples: &[&Example],
    own: &[usize],
    keep: bool,
) -> Result<Vec<Packed>> {
    let budget = device.micro_batch_tokens(keep);
    let ends = AuxLoss::of(device.graph()).is_some();
    let lengths: Vec<usize> = own.iter().map(|e| examples[*e].laid_out(ends)).collect();
    let packed = micro_batches(&lengths, budget).into_iter().map(|batch| {
        let places: Vec<usize> = batch.into_iter().map(|e| own[e]).collect();
        Packed { batch: Batch::with_ends(places.iter().map(|e| examples[*e]), ends), examples: places }
    });
    let mut packed: Vec<Packed> = packed.collect();
    if device.shares_base() {
        let most = group.all_reduce_max(packed.len() as u64)? as usize;
        packed.resize_with(most, Packed::default);
    }
    Ok(packed)
}

/// Which examples each rank computes.
fn split(group: &dyn ProcessGroup, examples: &[&Example]) -> Vec<Vec<usize>> {
    shares(&examples.iter().map(|e| e.packed_tokens()).collect::<Vec<_>>(), group.size())
}

/// Fills in what other ranks have computed.
fn fill_in(logps: &mut AnswerLogProbs, group: &mut dyn ProcessGroup, split: &[Vec<usize>]) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let own = logps.gather(&split[group.rank()]).values();
    let all = group.all_gather(own.iter().flat_map(|v| v.to_le_bytes()).collect())?;
    for (rank, (examples, bytes)) in split.iter().zip(all).enumerate() {
        let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let offsets = logps.offsets.select(examples);
        let (got, tokens) = (values.len(), offsets.tokens());
        let part = AnswerLogProbs::from_values(offsets, &values)
            .ok_or_else(|| Error::run(format!("rank {rank} sent {got} values for {tokens} tokens")))?;
        logps.scatter(&part, examples);
    }
    Ok(())
}

/// Log-probs of examples under the present adapter, each rank computing its share. `done` is told after every micro-batch of
/// this rank how many examples it had.
pub fn score(
    group: &mut dyn ProcessGroup,
    device: &mut dyn Device,
    examples: &[&Example],
    done: impl FnMut(usize),
) -> Result<AnswerLogProbs> {
    Ok(score_and_count(group, device, examples, done)?.0)
}

/// The same, with what this rank's routers did, where they have an auxiliary loss.
fn score_and_count(
    group: &mut dyn ProcessGroup,
    device: &mut dyn Device,
    examples: &[&Example],
    mut done: impl FnMut(usize),
) -> Result<(AnswerLogProbs, RouterLoad)> {
    let split = split(group, examples);
    let mut logps = AnswerLogProbs::zeros(AnswerOffsets::of(examples.iter().copied()));
    let mut load = RouterLoad::of(device.graph());
    let rank = group.rank();
    for Packed { batch, examples } in pack(group, device, examples, &split[rank], false)? {
        logps.scatter(&device.forward(&batch, false)?, &examples);
        load.add(&device.router_load()?);
        done(examples.len());
    }
    fill_in(&mut logps, group, &split)?;
    Ok((logps, load))
}

/// Loss and metrics without a gradient, and the log-probs they are of: all examples as one step.
pub(super) fn evaluate(
    group: &mut dyn ProcessGroup,
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    examples: &[&Example],
    reference: Option<&AnswerLogProbs>,
) -> Result<(Step, AnswerLogProbs)> {
    let (logps, mut load) = score_and_count(group, device, examples, |_| {})?;
    let evaluated = objective.eval(examples, &logps, reference, Totals::of(examples), false)?;
    let mut step = whole_step(evaluated);
    if let Some(loss) = AuxLoss::of(device.graph()) {
        load.all_reduce(group)?;
        step.add_aux_loss(loss, &load);
    }
    Ok((step, logps))
}

/// Means over scored examples under the names of the log, and where they have several answers `chosen_more_likely`: the share
/// of examples whose best answer the policy finds the likeliest.
pub fn mean_metrics(
    objective: &mut Objective<'_>,
    examples: &[&Example],
    policy: &AnswerLogProbs,
    reference: &AnswerLogProbs,
) -> Result<Map<String, Value>> {
    let Evaluated { loss, examples, .. } =
        objective.eval(examples, policy, Some(reference), Totals::of(examples), false)?;
    let mut window = Window::default();
    window.add(loss, None, Sums::of(&examples), 0);
    let mut means = window.means("");
    if examples.iter().any(|e| e.compared) {
        let likelier = examples.iter().filter(|e| e.best_likeliest).count();
        means.insert("chosen_more_likely".into(), json!(likelier as f64 / examples.len() as f64));
    }
    Ok(means)
}

fn whole_step(evaluated: Evaluated) -> Step {
    let Evaluated { loss, examples, .. } = evaluated;
    Step { loss, aux_loss: None, sums: Sums::of(&examples), examples: examples.into_iter().enumerate().collect() }
}

impl Step {
    fn add_aux_loss(&mut self, loss: AuxLoss, load: &RouterLoad) {
        let value = loss.value(load);
        self.loss += loss.coefficient * value;
        self.aux_loss = Some(value);
    }
}

/// A step's loss, with its gradient, summed over ranks, left on the device. `reference` is of the step's examples.
pub fn gradient(
    group: &mut dyn ProcessGroup,
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    examples: &[&Example],
    reference: Option<&AnswerLogProbs>,
) -> Result<Step> {
    device.clear_gradient()?;
    let whole = objective.whole_batch() || AuxLoss::of(device.graph()).is_some();
    let own = if whole { whole_batch } else { batch_by_batch };
    let step = own(group, device, objective, examples, reference)?;
    device.sum_gradient(group)?;
    Ok(step)
}

/// The loss needs every example's log-probs before it can give a derivative for one, or that of routers all tokens. All ranks evaluate all
/// of it, and take the derivatives of their share.
fn whole_batch(
    group: &mut dyn ProcessGroup,
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    examples: &[&Example],
    reference: Option<&AnswerLogProbs>,
) -> Result<Step> {
    let split = split(group, examples);
    let rank = group.rank();
    let micro_batches = pack(group, device, examples, &split[rank], true)?;
    let mut logps = AnswerLogProbs::zeros(AnswerOffsets::of(examples.iter().copied()));
    let mut load = RouterLoad::of(device.graph());
    // What the last micro-batch saves is there for its backward pass; the others are computed once more.
    let (last, others) =
        micro_batches.split_last().map_or((None, [].as_slice()), |(last, others)| (Some(last), others));
    let of_others: Vec<usize> = others.iter().flat_map(|packed| packed.examples.iter().copied()).collect();
    let scored = pack(group, device, examples, &of_others, false)?;
    for (Packed { batch, examples }, keep) in scored.iter().map(|packed| (packed, false)).chain(last.map(|l| (l, true)))
    {
        logps.scatter(&device.forward(batch, keep)?, examples);
        load.add(&device.router_load()?);
    }
    fill_in(&mut logps, group, &split)?;
    let evaluated = objective.eval(examples, &logps, reference, Totals::of(examples), true)?;
    let aux_loss = AuxLoss::of(device.graph());
    if let Some(loss) = aux_loss {
        load.all_reduce(group)?;
        device.set_router_dprobs(loss.dprobs(&load));
    }
    for (Packed { batch, examples }, kept) in
        last.map(|l| (l, true)).into_iter().chain(others.iter().map(|p| (p, false)))
    {
        if !kept {
            device.forward(batch, true)?;
        }
        device.backward(batch, &gather(&logps.offsets, &evaluated.dlogps, examples))?;
    }
    let mut step = whole_step(evaluated);
    if let Some(loss) = aux_loss {
        step.add_aux_loss(loss, &load);
    }
    Ok(step)
}

/// Each micro-batch by itself. A loss with a state sees the same one throughout the step, and moves it on once, by all of
/// the step's examples.
fn batch_by_batch(
    group: &mut dyn ProcessGroup,
    device: &mut dyn Device,
    objective: &mut Objective<'_>,
    examples: &[&Example],
    reference: Option<&AnswerLogProbs>,
) -> Result<Step> {
    let (split, totals) = (split(group, examples), Totals::of(examples));
    let mut logps = AnswerLogProbs::zeros(AnswerOffsets::of(examples.iter().copied()));
    let (mut loss, mut remembers) = (0.0, false);
    let mut metrics: Vec<(usize, ExampleMetrics)> = Vec::new();
    let rank = group.rank();
    for Packed { batch, examples: places } in pack(group, device, examples, &split[rank], true)? {
        let policy = device.forward(&batch, true)?;
        logps.scatter(&policy, &places);
        let own: Vec<&Example> = places.iter().map(|e| examples[*e]).collect();
        let reference = reference.map(|r| r.gather(&places));
        let evaluated = objective.eval(&own, &policy, reference.as_ref(), totals, false)?;
        loss += evaluated.loss;
        remembers |= evaluated.remembers;
        metrics.extend(places.iter().copied().zip(evaluated.examples));
        device.backward(&batch, &evaluated.dlogps)?;
    }
    // In the order of examples, so that sums do not depend on micro-batches.
    metrics.sort_by_key(|(example, _)| *example);
    let known: Vec<ExampleMetrics> = metrics.iter().map(|(_, m)| *m).collect();
    let mut own = [0.0; Sums::SIZE + 2];
    own[..Sums::SIZE].copy_from_slice(&Sums::of(&known).to_array());
    own[Sums::SIZE..].copy_from_slice(&[loss, f64::from(u8::from(remembers))]);
    group.all_reduce_f64(&mut own)?;
    let [.., mut loss, remember] = own;
    if remember > 0.0 {
        fill_in(&mut logps, group, &split)?;
        let evaluated = objective.eval(examples, &logps, reference, totals, true)?;
        if !evaluated.loss.is_finite() {
            loss = evaluated.loss;
        }
    }
    let mut sums = [0.0; Sums::SIZE];
    sums.copy_from_slice(&own[..Sums::SIZE]);
    Ok(Step { loss, aux_loss: None, sums: Sums::from_array(sums), examples: metrics })
}
