//! The loss doctor: looks at every line of the log and says, once each, what is wrong and what to try. Every rule is
//! explained, with a run that shows it, in `docs/loss-does-not-fall.md`.

use std::collections::VecDeque;

use serde_json::{Map, Value};

/// Lines over which a loss is taken together before it is compared with the first one.
const RECENT: usize = 10;

/// Remembers what it has said and what it has seen.
#[derive(Default)]
pub(super) struct Doctor {
    seen: Seen,
    said: Vec<&'static str>,
}

/// Numbers of a logged step.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    loss: f64,
    margin: f64,
    gradient: f64,
    learning_rate: f64,
    /// Of chosen and rejected.
    rewards: [f64; 2],
    logps: [f64; 2],
}

/// What the doctor looks at.
#[derive(Default)]
struct Seen {
    lines: usize,
    first: Line,
    now: Line,
    /// How far the margin has been from where it began.
    moved: f64,
    /// The last losses, up to [`RECENT`].
    losses: VecDeque<f64>,
    /// Whether this is the run's last step.
    last: bool,
    /// The loss of the last evaluation, and the least of all.
    evaluation: Option<[f64; 2]>,
}

impl Seen {
    fn flat(&self) -> bool {
        self.now.gradient > 0.0 && (self.lines >= RECENT && self.moved < 1e-3 || self.last && self.moved < 1e-2)
    }

    fn done(&self) -> bool {
        self.lines >= 2 && self.now.loss.abs() < 0.01 * self.first.loss.abs() && self.now.margin > self.first.margin
    }

    fn recent_loss(&self) -> f64 {
        self.losses.iter().sum::<f64>() / self.losses.len().max(1) as f64
    }
}

type Rule = (&'static str, fn(&Seen) -> bool, &'static str);

const RULES: &[Rule] = &[
    (
        "the gradient is zero: nothing is being learned",
        |s| s.now.gradient == 0.0 && !s.done(),
        "the answers of every pair are the same to the model, or the loss is saturated; look at `dpo-host data`, lower --beta",
    ),
    (
        "the margin between chosen and rejected stays flat",
        Seen::flat,
        "raise --learning-rate (LoRA wants 1e-5 to 2e-4) or --num-epochs; look at `dpo-host data` for pairs that hardly differ",
    ),
    (
        "the loss is rising above where it began",
        |s| s.lines >= 5 && s.now.margin < s.first.margin - 0.1 && s.recent_loss() > 1.3 * s.first.loss,
        "lower --learning-rate; pairs that contradict each other (see `dpo-host data`) do the same",
    ),
    (
        "the loss goes up and down around where it began",
        |s| s.lines >= 2 * RECENT && !s.flat() && (s.recent_loss() / s.first.loss - 1.0).abs() < 0.03,
        "pairs may contradict each other: look at `dpo-host data`; if not, raise --batch-size, or lower --learning-rate",
    ),
    (
        "both answers become less likely, the chosen one too",
        |s| {
            let less = s.now.logps[0] < s.first.logps[0] - 10.0;
            s.lines >= RECENT && s.now.rewards[0] < 0.0 && less && s.now.margin > 0.0
        },
        "usual for DPO, which only looks at the difference; add --rpo-alpha 0.1 if answers get worse",
    ),
    (
        "validation pairs get worse while training pairs get better",
        |s| s.evaluation.is_some_and(|[now, least]| now > 1.1 * least && s.now.loss < least),
        "the model learns the pairs by heart: take an earlier checkpoint, lower --num-epochs or --learning-rate, or add data",
    ),
    (
        "the loss is close to zero: there is nothing left to learn",
        |s| !s.last && s.done(),
        "further steps only push answers apart: lower --num-epochs or --learning-rate; if it came at once, see whether something \
         gives rejected answers away, such as their length",
    ),
];

impl Doctor {
    /// Warnings about a line of the log, the run's `last` one or not, that were not given before. A resumed run shows it the
    /// lines before, so that it goes on as if there had been no break.
    pub(super) fn look(&mut self, line: &Map<String, Value>, last: bool) -> Vec<String> {
        let number = |name: &str| line.get(name).and_then(Value::as_f64);
        let seen = &mut self.seen;
        if let Some(loss) = number("eval_loss") {
            let least = seen.evaluation.map_or(loss, |[_, least]| least.min(loss));
            seen.evaluation = Some([loss, least]);
        } else if let (Some(loss), Some(gradient)) = (number("loss"), number("grad_norm")) {
            let other = |name: &str| number(name).unwrap_or(0.0);
            seen.now = Line {
                loss,
                gradient,
                margin: other("rewards/margins"),
                learning_rate: other("learning_rate"),
                rewards: [other("rewards/chosen"), other("rewards/rejected")],
                logps: [other("logps/chosen"), other("logps/rejected")],
            };
            if seen.lines == 0 {
                seen.first = seen.now;
            }
            seen.moved = seen.moved.max((seen.now.margin - seen.first.margin).abs());
            seen.lines += 1;
            seen.losses.push_back(loss);
            if seen.losses.len() > RECENT {
                seen.losses.pop_front();
            }
        } else {
            // A step that was skipped has numbers that are none.
            return Vec::new();
        }
        seen.last = last;
        let new = RULES.iter().filter(|(what, holds, _)| {
            // A learning rate of 0, as in warm-up and at the end, explains a flat line by itself.
            let learns = self.seen.now.learning_rate > 0.0;
            learns && !self.said.contains(what) && holds(&self.seen)
        });
        let new: Vec<_> = new.collect();
        self.said.extend(new.iter().map(|(what, ..)| *what));
        new.into_iter().map(|(what, _, help)| format!("{what}\n  help: {help}")).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use serde_json::json;

    use super::*;

    /// What is said of steps with these losses and margins; each has a gradient of 1 and is followed by an evaluation where
    /// there is a loss for one.
    fn said(steps: &[(f64, f64, Option<f64>)]) -> Vec<String> {
        let mut doctor = Doctor::default();
        let mut all = Vec::new();
        for (at, (loss, margin, evaluation)) in steps.iter().enumerate() {
            let line = json!({"loss": loss, "grad_norm": 1.0, "rewards/margins": margin, "learning_rate": 1e-4});
            all.extend(doctor.look(line.as_object().unwrap(), at + 1 == steps.len()));
            if let Some(loss) = evaluation {
                all.extend(doctor.look(json!({"eval_loss": loss}).as_object().unwrap(), false));
            }
        }
        all.iter().map(|what| what.lines().next().unwrap().to_owned()).collect()
    }

    #[test]
    fn a_run_that_learns_is_left_alone() {
        let steps = (0..40).map(|n| (0.693 - 0.012 * n as f64, 0.03 * n as f64, Some(0.7 - 0.01 * n as f64)));
        assert_eq!(said(&steps.collect::<Vec<_>>()), Vec::<String>::new());
    }

    #[test]
    fn every_sign_is_named_once() {
        let flat = [(0.693, 0.0, None), (0.692, 0.002, None), (0.69, 0.005, None)];
        assert_eq!(said(&flat), ["the margin between chosen and rejected stays flat"]);
        let rising: Vec<_> = (0..12).map(|n| (0.693 + 0.2 * n as f64, -0.2 * n as f64, None)).collect();
        assert_eq!(said(&rising), ["the loss is rising above where it began"]);
        let noise: Vec<_> = (0..30).map(|n| if n % 2 == 0 { (0.68, 0.1, None) } else { (0.70, -0.05, None) }).collect();
        assert_eq!(said(&noise), ["the loss goes up and down around where it began"]);
        let heart: Vec<_> = (0..12)
            .map(|n| (0.693 - 0.05 * n as f64, 0.1 * n as f64, Some(0.6 + 0.03 * (n as f64 - 3.0).abs())))
            .collect();
        assert_eq!(said(&heart), ["validation pairs get worse while training pairs get better"]);
        let done: Vec<_> = (0..8).map(|n| (0.693 * 0.2_f64.powi(n), 2.0 * f64::from(n), None)).collect();
        assert_eq!(said(&done), ["the loss is close to zero: there is nothing left to learn"]);
    }
}
