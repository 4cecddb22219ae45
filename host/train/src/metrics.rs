//! What is logged: rewards, log-probs, accuracy, averaged over the steps between two lines of the log.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// One pair's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairMetrics {
    /// Log-prob of the chosen and of the rejected answer under the policy, weighted as the loss sees it.
    pub logps: [f64; 2],
    /// `beta · log-ratio` of both.
    pub rewards: [f64; 2],
    /// Sum of the chosen answer's token log-probs, unweighted, and its tokens.
    pub chosen_sum: f64,
    /// Tokens of the chosen answer.
    pub chosen_tokens: usize,
}

impl PairMetrics {
    pub(super) fn of(
        span: &[Range<usize>; 2],
        policy: &[f32],
        reference: &[f32],
        weights: &[f32],
        beta: f64,
    ) -> PairMetrics {
        let sum = |values: &[f32], s: &Range<usize>| -> f64 {
            values[s.clone()].iter().zip(&weights[s.clone()]).map(|(v, w)| f64::from(*v) * f64::from(*w)).sum()
        };
        let logps = [0, 1].map(|i| sum(policy, &span[i]));
        let rewards = [0, 1].map(|i| beta * (logps[i] - sum(reference, &span[i])));
        let chosen_sum = policy[span[0].clone()].iter().map(|l| f64::from(*l)).sum();
        PairMetrics { logps, rewards, chosen_sum, chosen_tokens: span[0].len() }
    }
}

/// Sums over pairs, by name, in a vector of fixed size, so that ranks can add theirs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    pairs: f64,
    logps: [f64; 2],
    rewards: [f64; 2],
    correct: f64,
    chosen_sum: f64,
    chosen_tokens: f64,
}

impl Sums {
    /// Numbers of [`Sums`].
    pub(super) const SIZE: usize = 8;

    pub(super) fn of(pairs: &[PairMetrics]) -> Sums {
        let mut sums = Sums::default();
        for pair in pairs {
            sums.pairs += 1.0;
            for side in 0..2 {
                sums.logps[side] += pair.logps[side];
                sums.rewards[side] += pair.rewards[side];
            }
            sums.correct += f64::from(u8::from(pair.rewards[0] > pair.rewards[1]));
            sums.chosen_sum += pair.chosen_sum;
            sums.chosen_tokens += pair.chosen_tokens as f64;
        }
        sums
    }

    pub(super) fn to_array(self) -> [f64; Sums::SIZE] {
        let Sums { pairs, logps: [lc, lr], rewards: [rc, rr], correct, chosen_sum, chosen_tokens } = self;
        [pairs, lc, lr, rc, rr, correct, chosen_sum, chosen_tokens]
    }

    pub(super) fn from_array(values: [f64; Sums::SIZE]) -> Sums {
        let [pairs, lc, lr, rc, rr, correct, chosen_sum, chosen_tokens] = values;
        Sums { pairs, logps: [lc, lr], rewards: [rc, rr], correct, chosen_sum, chosen_tokens }
    }
}

/// Sums over the steps since the last line of the log; all a resumed run needs to go on with it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Window {
    steps: u64,
    loss: f64,
    sums: Sums,
    /// Unique tokens: a pair counts as prompt once + chosen + rejected.
    pub(super) tokens: f64,
}

impl Window {
    pub(super) fn add(&mut self, loss: f64, sums: Sums, tokens: usize) {
        self.steps += 1;
        self.loss += loss;
        self.tokens += tokens as f64;
        let (mut all, step) = (self.sums.to_array(), sums.to_array());
        all.iter_mut().zip(step).for_each(|(all, step)| *all += step);
        self.sums = Sums::from_array(all);
    }

    /// Means, under the names TRL and ms-swift give them, with `prefix` before each.
    pub(super) fn means(&self, prefix: &str) -> Map<String, Value> {
        let sums = &self.sums;
        // Where every step was skipped there is nothing to tell, which JSON writes as null.
        let pairs = sums.pairs;
        let [chosen, rejected] = sums.rewards.map(|r| r / pairs);
        let values = [
            ("loss", self.loss / self.steps as f64),
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/accuracies", sums.correct / pairs),
            ("rewards/margins", chosen - rejected),
            ("logps/chosen", sums.logps[0] / pairs),
            ("logps/rejected", sums.logps[1] / pairs),
            ("nll_loss", -sums.chosen_sum / sums.chosen_tokens),
        ];
        values.into_iter().map(|(name, value)| (format!("{prefix}{name}"), json!(value))).collect()
    }
}
