//! The loss doctor: looks at every line of the log and says, once each, what is wrong and what to try. Every rule is
//! explained, with a run that shows it, in `docs/loss-does-not-fall.md`.

use std::collections::VecDeque;

use dpo_core::console::Remark;
use serde_json::{Map, Value};

/// Lines that are taken together before they are compared with the first one.
const RECENT: usize = 10;
/// Norms below this are rounding: answers that are the same to the model leave about 1e-5 in f32, pairs that teach something 0.01
/// and more.
const NO_GRADIENT: f64 = 1e-4;

/// Remembers what it has reported and what it has seen.
#[derive(Default)]
pub(super) struct Doctor {
    seen: Seen,
    reported: Vec<&'static str>,
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
}

/// What the doctor looks at.
#[derive(Default)]
struct Seen {
    lines: usize,
    first: Line,
    now: Line,
    /// How far the margin has been from where it began.
    moved: f64,
    /// The last lines, up to [`RECENT`].
    recent: VecDeque<Line>,
    /// Whether the learning rate is higher than a line before: in a warm-up little moves, and that is no sign.
    warms_up: bool,
    /// Whether this is the run's last step.
    last: bool,
    /// The loss of the last evaluation, and the least of all.
    evaluation: Option<[f64; 2]>,
}

impl Seen {
    /// A run has to have three lines before its end says anything: the first one's margin is 0 whatever follows.
    fn flat(&self) -> bool {
        let little = self.lines >= RECENT && self.moved < 1e-3 || self.last && self.lines >= 3 && self.moved < 1e-2;
        little && !self.still() && !self.warms_up
    }

    fn still(&self) -> bool {
        self.now.gradient < NO_GRADIENT && !self.done()
    }

    fn done(&self) -> bool {
        self.lines >= 2 && self.now.loss.abs() < 0.01 * self.first.loss.abs() && self.now.margin > self.first.margin
    }

    /// The mean of the last lines.
    fn recent(&self, number: fn(&Line) -> f64) -> f64 {
        self.recent.iter().map(number).sum::<f64>() / self.recent.len().max(1) as f64
    }

    /// Losses close to the first one, some of the last ones above it and some below. A run that learns slowly stays below.
    fn wavers(&self) -> bool {
        let beyond = |side: f64| self.recent.iter().filter(|l| side * (l.loss - self.first.loss) > 0.0).count();
        let close = (self.recent(|l| l.loss) / self.first.loss - 1.0).abs() < 0.03;
        self.lines >= 2 * RECENT && close && beyond(1.0) >= 3 && beyond(-1.0) >= 3
    }

    /// A loss that has doubled for three lines, or that the run ends with; one five times as high; or one that rises slowly while the
    /// margin falls.
    fn rises(&self) -> bool {
        let by = |factor: f64, loss: f64| loss > factor * self.first.loss && self.first.loss > 0.0;
        let lines = if self.last { 1 } else { 3 };
        let doubled = self.lines > lines && self.recent.iter().rev().take(lines).all(|l| by(2.0, l.loss));
        let slowly = self.lines >= 5 && self.now.margin < self.first.margin - 0.1;
        by(1.3, self.recent(|l| l.loss)) && (doubled || slowly || by(5.0, self.now.loss))
    }

    /// The training loss has halved, that of validation examples is about where training began.
    fn overfits_from_the_start(&self) -> bool {
        let learned = self.lines >= 3 && self.recent(|l| l.loss) < 0.5 * self.first.loss;
        learned && self.evaluation.is_some_and(|[now, _]| now > 0.9 * self.first.loss)
    }

    /// Only told of losses with a reference, where rewards begin at 0: without one, batches differ by more than a run moves.
    fn both_fall(&self) -> bool {
        let reference = self.first.rewards.iter().all(|r| r.abs() < 1e-2);
        self.lines >= RECENT && reference && self.recent(|l| l.rewards[0]) < -1.0 && self.recent(|l| l.margin) > 0.0
    }
}

type Rule = (&'static str, fn(&Seen) -> bool, &'static str);

const RULES: &[Rule] = &[
    (
        "the gradient is zero: nothing is being learned",
        Seen::still,
        "the answers of every pair are the same to the model; look at `dpo-host data`, raise --max-length if it cuts them alike",
    ),
    (
        "the margin between chosen and rejected stays flat",
        Seen::flat,
        "raise --learning-rate (LoRA wants 1e-5 to 2e-4) or --num-epochs; look at `dpo-host data` for pairs that hardly differ",
    ),
    (
        "the loss is rising above where it began",
        Seen::rises,
        "lower --learning-rate; pairs that contradict each other (see `dpo-host data`) do the same",
    ),
    (
        "the loss goes up and down around where it began",
        |s| s.wavers() && !s.flat() && !s.still(),
        "pairs may contradict each other: look at `dpo-host data`; if not, raise --batch-size, or lower --learning-rate",
    ),
    (
        "both answers become less likely, the chosen one too",
        Seen::both_fall,
        "usual for DPO, which only looks at the difference; add --rpo-alpha 0.1 if answers get worse",
    ),
    (
        "validation pairs get worse while training pairs get better",
        |s| s.evaluation.is_some_and(|[now, least]| now > 1.1 * least && s.now.loss < least),
        "overfitting: take an earlier checkpoint, lower --num-epochs or --learning-rate, or add data",
    ),
    (
        "training pairs are learned, validation pairs are not",
        Seen::overfits_from_the_start,
        "overfitting from the start: add rows, lower --num-epochs or --learning-rate; see whether both sets are of one kind",
    ),
    (
        "the loss is close to zero: there is nothing left to learn",
        |s| !s.last && s.done(),
        "further steps only push answers apart: lower --num-epochs or --learning-rate; if it came at once, see whether something \
         gives rejected answers away, such as their length",
    ),
];

impl Doctor {
    /// The loss of the first line and of the last, if there are two.
    pub(super) fn course(&self) -> Option<[f64; 2]> {
        (self.seen.lines > 1).then_some([self.seen.first.loss, self.seen.now.loss])
    }

    /// Warnings about a line of the log, the run's `last` one or not, that were not given before. A resumed run shows it the
    /// lines before, so that it goes on as if there had been no break.
    pub(super) fn look(&mut self, line: &Map<String, Value>, last: bool) -> Vec<Remark> {
        let number = |name: &str| line.get(name).and_then(Value::as_f64);
        let seen = &mut self.seen;
        // Of several sets the first.
        let evaluated = line.keys().find(|k| {
            k.starts_with("eval_") && k.ends_with("loss") && !k.ends_with("nll_loss") && !k.ends_with("aux_loss")
        });
        if let Some(loss) = evaluated.and_then(|name| number(name)) {
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
            };
            seen.warms_up = seen.recent.back().is_some_and(|before| before.learning_rate < seen.now.learning_rate);
            if seen.lines == 0 {
                seen.first = seen.now;
            }
            seen.moved = seen.moved.max((seen.now.margin - seen.first.margin).abs());
            seen.lines += 1;
            seen.recent.push_back(seen.now);
            if seen.recent.len() > RECENT {
                seen.recent.pop_front();
            }
        } else {
            // A step that was skipped has numbers that are none.
            return Vec::new();
        }
        seen.last = last;
        let new = RULES.iter().filter(|(what, holds, _)| {
            // A learning rate of 0, as in warm-up and at the end, explains a flat line by itself.
            let learns = self.seen.now.learning_rate > 0.0;
            learns && !self.reported.contains(what) && holds(&self.seen)
        });
        let new: Vec<_> = new.collect();
        self.reported.extend(new.iter().map(|(what, ..)| *what));
        new.into_iter().map(|(what, _, help)| Remark::from(*what).help(*help)).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use serde_json::json;

    use super::*;

    /// A line of the log, with the loss that DPO makes of a margin.
    fn line(margin: f64, rate: f64) -> Value {
        let loss = (-margin).exp().ln_1p();
        let (chosen, rejected) = (margin / 2.0, -margin / 2.0);
        json!({"loss": loss, "grad_norm": 1.0, "rewards/margins": margin, "rewards/chosen": chosen,
            "rewards/rejected": rejected, "learning_rate": rate})
    }

    /// What is reported of these lines, as the whole of a run.
    fn reported(lines: &[Value]) -> Vec<String> {
        let mut doctor = Doctor::default();
        let look = |(at, line): (usize, &Value)| doctor.look(line.as_object().unwrap(), at + 1 == lines.len());
        let all: Vec<Remark> = lines.iter().enumerate().flat_map(look).collect();
        all.into_iter().map(|what| what.text).collect()
    }

    fn of_margins(margins: impl IntoIterator<Item = f64>) -> Vec<Value> {
        margins.into_iter().map(|margin| line(margin, 1e-4)).collect()
    }

    const NOTHING: [&str; 0] = [];

    #[test]
    fn a_run_that_learns_is_left_alone() {
        let quick = (0..40).map(|n| 0.06 * f64::from(n));
        assert_eq!(reported(&of_margins(quick)), NOTHING);
        // So slowly that the loss is within 3% of ln 2 all the time, and unevenly.
        let slow = (0..60).map(|n| 6e-4 * f64::from(n) + if n % 3 == 2 { 2e-3 } else { 0.0 });
        assert_eq!(reported(&of_margins(slow)), NOTHING);
        // One step, from which nothing follows.
        assert_eq!(reported(&of_margins([0.0])), NOTHING);
        // A long warm-up, after which it learns.
        let warm_up = (0..40).map(|n| line(0.02 * f64::from(n - 20).max(0.0), 1e-6 * f64::from(n.min(25))));
        assert_eq!(reported(&warm_up.collect::<Vec<_>>()), NOTHING);
        // Without a reference, rewards are log-probs, and those of a batch of long answers are low.
        let bare = (0..20).map(|n| {
            let mut line = line(0.05 * f64::from(n), 1e-4);
            line["rewards/chosen"] = json!(if n < 5 { -10.0 } else { -30.0 });
            line
        });
        assert_eq!(reported(&bare.collect::<Vec<_>>()), NOTHING);
    }

    #[test]
    fn every_sign_is_named_once() {
        let flat = of_margins([0.0, 0.002, 0.005]);
        assert_eq!(reported(&flat), ["the margin between chosen and rejected stays flat"]);
        let mut still = of_margins([0.0; 12]);
        still.iter_mut().for_each(|line| line["grad_norm"] = json!(8e-6));
        assert_eq!(reported(&still), ["the gradient is zero: nothing is being learned"]);
        let rising = of_margins((0..12).map(|n| -0.2 * f64::from(n)));
        assert_eq!(reported(&rising), ["the loss is rising above where it began"]);
        let wavers = of_margins([0.0].into_iter().chain((0..30).map(|n| if n % 2 == 0 { 0.05 } else { -0.05 })));
        assert_eq!(reported(&wavers), ["the loss goes up and down around where it began"]);
        let mut both = of_margins((0..20).map(|n| 0.05 * f64::from(n)));
        both.iter_mut().enumerate().for_each(|(n, line)| line["rewards/chosen"] = json!(-0.2 * n as f64));
        assert_eq!(reported(&both), ["both answers become less likely, the chosen one too"]);
        let heart = (0..12).flat_map(|n: i32| {
            let evaluation = json!({"eval_loss": 0.6 + 0.03 * f64::from((n - 3).abs())});
            [line(0.1 * f64::from(n), 1e-4), evaluation]
        });
        assert_eq!(
            reported(&heart.collect::<Vec<_>>()),
            ["validation pairs get worse while training pairs get better"]
        );
        let twice = of_margins([0.0, -1.5]);
        assert_eq!(reported(&twice), ["the loss is rising above where it began"]);
        let mut apart = of_margins((0..6).map(|n| 0.8 * f64::from(n)));
        apart.push(json!({"eval_hard_loss": 1.27, "eval_hard_nll_loss": 0.1}));
        assert_eq!(reported(&apart), ["training pairs are learned, validation pairs are not"]);
        let done = of_margins((0..8).map(|n| 2.0 * f64::from(n)));
        assert_eq!(reported(&done), ["the loss is close to zero: there is nothing left to learn"]);
    }

    #[test]
    fn every_sign_is_explained() {
        let page = include_str!("../../../docs/loss-does-not-fall.md");
        for (what, _, help) in RULES {
            assert!(page.contains(&format!("| `{what}` |")), "no line of the table is about: {what}");
            assert!(page.contains(&format!("  help: {help}")), "no run shows: {help}");
        }
    }
}
