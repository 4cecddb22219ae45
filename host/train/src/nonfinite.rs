//! Steps whose loss or gradient is no number: such a step is skipped, and the pair that made it so is named; after a few in a
//! row the run ends. The adapter is never touched by one.

use super::metrics::PairMetrics;
use super::step::Step;
use dpo_core::error::{Error, Result};
use dpo_ranks::Ranks;

/// Skipped steps in a row that end a run: by then it is not one pair's doing.
pub(super) const LIMIT: u64 = 3;

/// The place in the step of the pair whose numbers are worst: the first that has none, else the one with the least likely
/// answer. Each rank looks at its own.
pub(super) fn culprit(ranks: &mut Ranks, step: &Step) -> Result<usize> {
    let likelihood = |p: &PairMetrics| {
        let numbers = [p.logps[0], p.logps[1], p.rewards[0], p.rewards[1]];
        let least = numbers[0].min(numbers[1]);
        if numbers.iter().all(|n| n.is_finite()) { least } else { f64::NEG_INFINITY }
    };
    let worse = |a: &(f64, usize), b: &(f64, usize)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
    let own = step.pairs.iter().map(|(pair, numbers)| (likelihood(numbers), *pair)).min_by(worse);
    let own = serde_json::to_vec(&own.map(|(l, pair)| (l.to_bits(), pair))).unwrap_or_default();
    let all = ranks
        .gather(own)?
        .into_iter()
        .filter_map(|bytes| serde_json::from_slice::<Option<(u64, usize)>>(&bytes).ok()?);
    Ok(all.map(|(bits, pair)| (f64::from_bits(bits), pair)).min_by(worse).map_or(0, |(_, pair)| pair))
}

/// The error that ends a run.
pub(super) fn end(what: &str, place: &str) -> Error {
    Error::run(format!("{what}, as had the {} steps before", LIMIT - 1)).at(place).help(
        "lower --learning-rate and look at the rows that were named; checkpoints are whole and hold none of these steps",
    )
}
