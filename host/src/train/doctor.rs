//! The loss doctor: looks at every line of the log and says, once each, what is wrong and what to try.

use serde_json::{Map, Value};

/// Remembers what it has said and what it has seen.
#[derive(Default)]
pub(super) struct Doctor {
    lines: usize,
    first: Option<[f64; 2]>,
    said: Vec<&'static str>,
}

/// What the doctor looks at.
struct Seen {
    lines: usize,
    loss: f64,
    margin: f64,
    gradient: f64,
    learning_rate: f64,
    /// Rewards of chosen and rejected now.
    rewards: [f64; 2],
    /// Log-probs of chosen and rejected at the first line and now.
    first: [f64; 2],
    logps: [f64; 2],
}

type Rule = (&'static str, fn(&Seen) -> bool, &'static str);

const RULES: &[Rule] = &[
    (
        "the gradient is zero: nothing is being learned",
        |s| s.gradient == 0.0,
        "the answers of every pair are the same to the model, or the loss is saturated; look at `dpo-host data`, lower beta",
    ),
    (
        "the margin between chosen and rejected stays flat",
        |s| s.lines >= 10 && s.margin.abs() < 1e-3 && s.gradient > 0.0,
        "raise --learning-rate (LoRA wants 1e-5 to 2e-4), raise --lora-rank, and look at `dpo-host data` for pairs that hardly differ",
    ),
    (
        "the loss is rising above where it began",
        |s| s.lines >= 5 && s.margin < -0.1 && s.loss > 1.0,
        "lower --learning-rate; if margins fall from the first steps, chosen and rejected may be swapped in the data",
    ),
    (
        "both answers become less likely, the chosen one too",
        |s| s.lines >= 10 && s.rewards[0] < 0.0 && s.logps[0] < s.first[0] - 10.0 && s.margin > 0.0,
        "usual for DPO, which only looks at the difference; add --rpo-alpha 0.1 if answers get worse",
    ),
];

impl Doctor {
    /// Warnings about a line of the log that were not given before. A resumed run shows it the lines before, so that it goes
    /// on as if there had been no break.
    pub(super) fn look(&mut self, line: &Map<String, Value>) -> Vec<String> {
        let known = |name: &str| line.get(name).is_some_and(Value::is_number);
        // Lines of evaluations have no gradient, and a step that was skipped has none that is a number.
        if !known("loss") || !known("grad_norm") {
            return Vec::new();
        }
        let number = |name: &str| line.get(name).and_then(Value::as_f64).unwrap_or(0.0);
        self.lines += 1;
        let logps = [number("logps/chosen"), number("logps/rejected")];
        let seen = Seen {
            lines: self.lines,
            loss: number("loss"),
            margin: number("rewards/margins"),
            gradient: number("grad_norm"),
            learning_rate: number("learning_rate"),
            rewards: [number("rewards/chosen"), number("rewards/rejected")],
            first: *self.first.get_or_insert(logps),
            logps,
        };
        let new = RULES.iter().filter(|(what, holds, _)| {
            // A learning rate of 0, as in warm-up and at the end, explains a flat line by itself.
            seen.learning_rate > 0.0 && !self.said.contains(what) && holds(&seen)
        });
        let new: Vec<_> = new.collect();
        self.said.extend(new.iter().map(|(what, ..)| *what));
        new.into_iter().map(|(what, _, help)| format!("{what}\n  help: {help}")).collect()
    }
}
