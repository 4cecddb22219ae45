//! What is logged: rewards, log-probs, accuracy, averaged over the steps between two lines of the log.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use dpo_core::example::Example;
use dpo_core::logprobs::AnswerLogProbs;

/// What is logged of a step and of an evaluation, under the names TRL and ms-swift give them.
pub(super) const NAMES: [&str; 9] = [
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "nll_loss",
    "aux_loss",
];

/// One example's numbers. Where it has more than two answers, the best one stands as the chosen answer, and the mean of the
/// others as the rejected one. A single answer is chosen where it was liked, else rejected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExampleMetrics {
    /// Log-prob of the chosen and of the rejected answer under the policy, weighted as the loss sees it.
    pub logps: [f64; 2],
    /// `beta · log-ratio` of both.
    pub rewards: [f64; 2],
    /// Whether there is a chosen answer, and a rejected one.
    pub has: [bool; 2],
    /// Whether there is another answer than the best.
    pub compared: bool,
    /// Part of the pairs of a better and a worse answer whose rewards are in this order.
    pub correct: f64,
    /// Whether its best answer is the likeliest.
    pub best_likeliest: bool,
    /// Sum of the chosen answer's token log-probs, unweighted, and its tokens.
    pub best_sum: f64,
    /// Tokens of the chosen answer.
    pub best_tokens: usize,
    /// Whether its log-probs, its loss and the derivatives are finite.
    pub finite: bool,
}

impl ExampleMetrics {
    /// Of an example whose answers' tokens are `at`.
    pub(super) fn of(
        example: &Example,
        at: impl Iterator<Item = Range<usize>>,
        policy: &AnswerLogProbs,
        reference: &AnswerLogProbs,
        weights: &[f32],
        beta: f64,
    ) -> ExampleMetrics {
        let sum = |values: &[f32], at: &Range<usize>| -> f64 {
            values[at.clone()].iter().zip(&weights[at.clone()]).map(|(v, w)| f64::from(*v) * f64::from(*w)).sum()
        };
        let learned = example.learned();
        let at: Vec<Range<usize>> = at.take(learned.len()).collect();
        let logps: Vec<f64> = at.iter().map(|at| sum(&policy.logps, at)).collect();
        let rewards: Vec<f64> =
            at.iter().zip(&logps).map(|(at, logp)| beta * (logp - sum(&reference.logps, at))).collect();
        let has = if learned.len() > 1 { [true; 2] } else { [learned[0].label > 0.0, learned[0].label <= 0.0] };
        let sides = |values: &[f64]| match values {
            [only] => has.map(|has| if has { *only } else { 0.0 }),
            [best, others @ ..] => [*best, others.iter().sum::<f64>() / others.len() as f64],
            [] => [0.0; 2],
        };
        let (mut ordered, mut pairs) = (0_u32, 0_u32);
        for (better, worse) in (0..learned.len()).flat_map(|b| (b + 1..learned.len()).map(move |w| (b, w))) {
            if learned[better].label > learned[worse].label {
                pairs += 1;
                ordered += u32::from(rewards[better] > rewards[worse]);
            }
        }
        ExampleMetrics {
            logps: sides(&logps),
            rewards: sides(&rewards),
            has,
            compared: learned.len() > 1,
            correct: if pairs == 0 { 0.0 } else { f64::from(ordered) / f64::from(pairs) },
            best_likeliest: logps[1..].iter().all(|other| logps[0] > *other),
            best_sum: if has[0] { policy.logps[at[0].clone()].iter().map(|l| f64::from(*l)).sum() } else { 0.0 },
            best_tokens: if has[0] { at[0].len() } else { 0 },
            finite: logps.iter().chain(&rewards).all(|n| n.is_finite()),
        }
    }
}

/// Sums over examples, by name, in a vector of fixed size, so that ranks can add theirs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    examples: f64,
    /// Examples with a chosen answer, and with a rejected one.
    has: [f64; 2],
    /// Examples with more than one answer.
    compared: f64,
    logps: [f64; 2],
    rewards: [f64; 2],
    correct: f64,
    best_sum: f64,
    best_tokens: f64,
}

impl Sums {
    /// Numbers of [`Sums`].
    pub(super) const SIZE: usize = 11;

    pub(super) fn of(examples: &[ExampleMetrics]) -> Sums {
        let mut sums = Sums::default();
        for example in examples {
            sums.examples += 1.0;
            sums.compared += f64::from(u8::from(example.compared));
            for side in 0..2 {
                sums.has[side] += f64::from(u8::from(example.has[side]));
                sums.logps[side] += example.logps[side];
                sums.rewards[side] += example.rewards[side];
            }
            sums.correct += example.correct;
            sums.best_sum += example.best_sum;
            sums.best_tokens += example.best_tokens as f64;
        }
        sums
    }

    pub(super) fn to_array(self) -> [f64; Sums::SIZE] {
        let Sums {
            examples,
            has: [hc, hr],
            compared,
            logps: [lc, lr],
            rewards: [rc, rr],
            correct,
            best_sum,
            best_tokens,
        } = self;
        [examples, hc, hr, compared, lc, lr, rc, rr, correct, best_sum, best_tokens]
    }

    pub(super) fn from_array(values: [f64; Sums::SIZE]) -> Sums {
        let [examples, hc, hr, compared, lc, lr, rc, rr, correct, best_sum, best_tokens] = values;
        let (has, logps, rewards) = ([hc, hr], [lc, lr], [rc, rr]);
        Sums { examples, has, compared, logps, rewards, correct, best_sum, best_tokens }
    }
}

/// Sums over the steps since the last line of the log; all a resumed run needs to go on with it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Window {
    steps: u64,
    loss: f64,
    #[serde(default)]
    aux_loss: Option<f64>,
    sums: Sums,
    /// Unique tokens: of every example the prompt once and all answers.
    pub(super) tokens: f64,
}

impl Window {
    pub(super) fn add(&mut self, loss: f64, aux_loss: Option<f64>, sums: Sums, tokens: usize) {
        self.steps += 1;
        self.loss += loss;
        self.aux_loss = aux_loss.map(|aux_loss| self.aux_loss.unwrap_or(0.0) + aux_loss);
        self.tokens += tokens as f64;
        let (mut all, step) = (self.sums.to_array(), sums.to_array());
        all.iter_mut().zip(step).for_each(|(all, step)| *all += step);
        self.sums = Sums::from_array(all);
    }

    /// Means, under their [`NAMES`] with `prefix` before each, of what there is: no rejected answer where all were liked, and no
    /// accuracy where nothing is compared.
    pub(super) fn means(&self, prefix: &str) -> Map<String, Value> {
        let sums = &self.sums;
        // Where every step was skipped there is nothing to tell, which JSON writes as null.
        let count = sums.examples;
        let compared = sums.compared > 0.0 || count == 0.0;
        let [has_chosen, has_rejected] = sums.has.map(|has| has > 0.0 || count == 0.0);
        let mean = |values: [f64; 2]| [values[0] / sums.has[0], values[1] / sums.has[1]];
        let ([chosen, rejected], [chosen_logp, rejected_logp]) = (mean(sums.rewards), mean(sums.logps));
        let values = [
            (self.loss / self.steps as f64, true),
            (chosen, has_chosen),
            (rejected, has_rejected),
            (sums.correct / count, compared),
            (chosen - rejected, has_chosen && has_rejected),
            (chosen_logp, has_chosen),
            (rejected_logp, has_rejected),
            (-sums.best_sum / sums.best_tokens, has_chosen),
            (self.aux_loss.unwrap_or(0.0) / self.steps as f64, self.aux_loss.is_some()),
        ];
        let told = NAMES.into_iter().zip(values).filter(|(_, (_, told))| *told);
        told.map(|(name, (value, _))| (format!("{prefix}{name}"), json!(value))).collect()
    }
}
