//! Steps whose loss or gradient is not finite: such a step is skipped, and the example that made it so is named; after a few in
//! a row the run ends. The adapter is never touched by one.

use super::metrics::ExampleMetrics;
use super::step::Step;
use dpo_core::collective::ProcessGroup;
use dpo_core::console::{self, Remark};
use dpo_core::error::{Error, Result};
use dpo_core::weights::Checkpoint;

/// Skipped steps in a row that end a run: by then it is not one example's doing.
pub(super) const LIMIT: u64 = 3;

/// The place in the step of the example whose numbers are worst: the first with some that are not finite, else the one with the
/// least likely answer. Each rank looks at its own.
pub(super) fn worst_example(group: &mut dyn ProcessGroup, step: &Step) -> Result<usize> {
    let likelihood = |e: &ExampleMetrics| if e.finite { e.logps[0].min(e.logps[1]) } else { f64::NEG_INFINITY };
    let worse = |a: &(f64, usize), b: &(f64, usize)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
    let own = step.examples.iter().map(|(example, numbers)| (likelihood(numbers), *example)).min_by(worse);
    let own = serde_json::to_vec(&own.map(|(l, example)| (l.to_bits(), example))).unwrap_or_default();
    let all = group
        .all_gather(own)?
        .into_iter()
        .filter_map(|bytes| serde_json::from_slice::<Option<(u64, usize)>>(&bytes).ok()?);
    Ok(all.map(|(bits, example)| (f64::from_bits(bits), example)).min_by(worse).map_or(0, |(_, example)| example))
}

/// Looks for the cause where log-probs before the first step are not finite: weights that are not. Where no log-prob is finite, the
/// checkpoint is refused; else rows whose log-probs are not finite are told when their steps are skipped.
pub(super) fn look_at_weights(checkpoint: &Checkpoint, logps: &[f32]) -> Result<()> {
    if logps.iter().all(|l| l.is_finite()) {
        return Ok(());
    }
    let Some(what) = checkpoint.first_not_finite()? else { return Ok(()) };
    let help = "the checkpoint is broken: fetch or export it again";
    if logps.iter().any(|l| l.is_finite()) {
        console::warning(Remark::from(what).help(help));
        return Ok(());
    }
    Err(Error::input(format!("no log-prob of the model is finite before the first step: {what}")).help(help))
}

/// What to do about losses and gradients that are not finite.
pub(super) const LOWER: &str = "lower --learning-rate and look at the rows that were named";
/// What to do about steps of the optimizer that are not finite.
pub(super) const USUAL: &str =
    "lower --learning-rate; --adam-epsilon 1e-8 is usual, and f32 has no number between 0 and 1e-45";

/// The error that ends a run.
pub(super) fn end(what: &str, place: &str, help: &str) -> Error {
    let error = Error::run(format!("{what}, as had the {} steps before", LIMIT - 1));
    let error = error.help(format!("{help}; checkpoints are whole and hold none of these steps"));
    if place.is_empty() { error } else { error.at(place) }
}
