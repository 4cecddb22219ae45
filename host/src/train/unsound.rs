//! Steps whose loss or gradient is no number: such a step is skipped, and the pair that made it so is named; after a few in a
//! row the run ends. The adapter is never touched by one.

use super::step::Step;
use crate::data::TokenPair;
use crate::error::Error;

/// Skipped steps in a row that end a run: by then it is not one pair's doing.
pub(super) const LIMIT: u64 = 3;

/// Where the pair stands whose numbers are worst: the first that has none, else the one with the least likely answer.
pub(super) fn culprit<'a>(step: &Step, pairs: impl Iterator<Item = &'a TokenPair>) -> String {
    let likelihood = |at: usize| {
        let numbers = step.pairs.get(at).map_or([0.0; 4], |p| [p.logps[0], p.logps[1], p.rewards[0], p.rewards[1]]);
        let least = numbers[0].min(numbers[1]);
        if numbers.iter().all(|n| n.is_finite()) { least } else { f64::NEG_INFINITY }
    };
    let worst = pairs.enumerate().min_by(|(a, _), (b, _)| likelihood(*a).total_cmp(&likelihood(*b)));
    worst.map(|(_, pair)| pair.place.clone()).unwrap_or_default()
}

/// The error that ends a run.
pub(super) fn end(what: &str, place: &str) -> Error {
    Error::run(format!("{what}, as had the {} steps before", LIMIT - 1)).at(place).help(
        "lower --learning-rate and look at the rows that were named; checkpoints are whole and hold none of these steps",
    )
}
