//! Alignment losses: from log-probs of an example's answers to a loss and its derivatives.
//!
//! An example is one prompt and one to [`MAX_ANSWERS`] answers to it, best first. A loss says in [`Needs::answers`] how many
//! it takes, and is a formula over their log-probs: [`LossBatch::each_pair`] for two, [`LossBatch::each_example`] for any number.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use crate::dual::MAX_ANSWERS;
use crate::dual::{Dual, PROMPT};
use crate::{Error, Result, bail};

/// Most statistics a loss may ask for.
pub const MAX_STATISTICS: usize = 4;

/// A loss such as DPO's sigmoid. The loss of a step is the mean of its examples' losses over all examples of the step.
pub trait AlignmentLoss: Send + Sync + 'static {
    /// What `--loss` takes and `dpo-host list` prints.
    fn name(&self) -> &'static str;

    /// One line for `dpo-host list`, with the paper.
    fn summary(&self) -> &'static str;

    /// The formula, as text for `dpo-host describe`.
    fn formula(&self) -> &'static str;

    /// Which other tools have it, under which name, and where they compute otherwise; empty for none.
    fn peers(&self) -> &'static str {
        ""
    }

    /// What the loss needs of the host.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// Options it understands, with defaults. `beta` is usual.
    fn options(&self) -> Vec<LossOption> {
        Vec::new()
    }

    /// Loss and derivatives of the examples given. Most losses are one call of [`LossBatch::each_pair`].
    ///
    /// `state` starts empty and is saved with checkpoints. All calls of a step see the one that the step before left; what is
    /// kept is what the loss leaves when it is given all examples of the step.
    fn eval(&self, batch: &LossBatch<'_>, options: &Options, state: &mut Vec<f64>) -> Result<LossGrad>;
}

/// How many answers a loss takes of an example, not counting detached ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answers {
    /// One: every answer that was liked, or is the best of several. In a sum with losses over pairs or rankings, whose examples have
    /// more, the loss reads the first.
    One,
    /// A better and a worse one. Of single answers to one prompt, every liked one is paired with every disliked one.
    #[default]
    Pair,
    /// A ranking of 2 to [`MAX_ANSWERS`], best first.
    Ranked,
    /// One, liked or not, as its label says: above 0 where it was. Each answer of a pair is an example of its own.
    Labelled,
}

impl Answers {
    /// Whether so many answers will do.
    pub fn takes(self, count: usize) -> bool {
        match self {
            Answers::One => count >= 1,
            Answers::Labelled => count == 1,
            Answers::Pair => count == 2,
            Answers::Ranked => (2..=MAX_ANSWERS).contains(&count),
        }
    }

    /// In words, for messages: `2 answers`.
    pub fn describe(self) -> String {
        match self {
            Answers::One => "1 answer".into(),
            Answers::Pair => "2 answers".into(),
            Answers::Ranked => format!("2 to {MAX_ANSWERS} answers"),
            Answers::Labelled => "1 answer, liked or not".into(),
        }
    }
}

/// What a loss needs of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needs {
    /// How many answers an example has.
    #[serde(default)]
    pub answers: Answers,
    /// Whether log-probs under the reference are read; where no loss of a run does, they are not computed.
    pub reference: bool,
    /// Whether an example's loss depends on other examples; then the loss is called once a step with all of them.
    pub whole_batch: bool,
    /// Whether each example has a mismatched answer behind its own, detached: that of another prompt, from which KTO estimates how
    /// far the policy has gone from the reference.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mismatched: bool,
    /// Whether log-probs of the prompt's tokens are read, under the policy alone: a likelihood over prompt and answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prompt: bool,
    /// Further statistics of each answer token, by name, under the policy and under the reference; an unknown one refuses the
    /// loss.
    #[serde(default)]
    pub statistics: Vec<String>,
}

impl Default for Needs {
    /// Pairs, the reference, example by example, no further statistics.
    fn default() -> Needs {
        let (whole_batch, mismatched, prompt) = (false, false, false);
        Needs { answers: Answers::Pair, reference: true, whole_batch, mismatched, prompt, statistics: Vec::new() }
    }
}

/// An option of a loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossOption {
    /// Its name in `--loss-option NAME=VALUE`.
    pub name: String,
    /// Used where the user says nothing: a number or a text.
    pub default: Value,
    /// What it does.
    pub help: String,
}

impl LossOption {
    /// An option with its default and meaning.
    pub fn new(name: &str, default: impl Into<Value>, help: &str) -> LossOption {
        LossOption { name: name.into(), default: default.into(), help: help.into() }
    }
}

/// Values of a loss's options: the user's, else the defaults.
#[derive(Clone, Debug, Default)]
pub struct Options(pub(crate) Map<String, Value>);

impl Options {
    /// Options by name; what the host resolved, or what a test wants.
    pub fn new(values: Map<String, Value>) -> Options {
        Options(values)
    }

    /// The defaults of a loss.
    pub fn defaults(loss: &dyn AlignmentLoss) -> Options {
        Options(loss.options().into_iter().map(|o| (o.name, o.default)).collect())
    }

    /// The same options with one changed.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Options {
        self.0.insert(name.into(), value.into());
        self
    }

    fn shown(&self, name: &str) -> String {
        self.0.get(name).map_or_else(|| "missing".to_owned(), Value::to_string)
    }

    /// A number.
    pub fn float(&self, name: &str) -> Result<f64> {
        match self.0.get(name).and_then(Value::as_f64) {
            Some(number) => Ok(number),
            None => bail!("loss option '{name}' should be a number, is {}", self.shown(name)),
        }
    }

    /// A text.
    pub fn text(&self, name: &str) -> Result<&str> {
        match self.0.get(name).and_then(Value::as_str) {
            Some(text) => Ok(text),
            None => bail!("loss option '{name}' should be a text, is {}", self.shown(name)),
        }
    }
}

/// One answer: slices with a value for each of its tokens, EOS included.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// Log-probs under the policy.
    pub policy: &'a [f32],
    /// Log-probs under the reference; zeros where the loss does not need it.
    pub reference: &'a [f32],
    /// Weight of each token in the answer's log-prob: 1, but for LD-DPO, where tokens beyond the shortest answer have
    /// `--ld-alpha`.
    pub weights: &'a [f32],
    /// 1 for an answer that was preferred or liked, 0 for one that was not, or its score.
    pub label: f64,
    /// Whether no gradient flows through it.
    pub detached: bool,
    /// The statistics asked for, in the order of [`Needs::statistics`], under the policy.
    pub statistics: [&'a [f32]; MAX_STATISTICS],
    /// The same under the reference; zeros where the loss does not need it.
    pub reference_statistics: [&'a [f32]; MAX_STATISTICS],
}

impl Answer<'_> {
    /// Tokens.
    pub fn count(&self) -> f64 {
        self.policy.len() as f64
    }

    /// `log π / π_ref`, as a number without a gradient.
    pub fn ratio(&self) -> f64 {
        self.weighted(self.policy) - self.weighted(self.reference)
    }

    fn weighted(&self, logps: &[f32]) -> f64 {
        logps.iter().zip(self.weights).map(|(l, w)| f64::from(*l) * f64::from(*w)).sum()
    }

    /// `log π`, as the loss's differentiable input of an index.
    fn logp(&self, index: usize) -> Dual {
        self.input(self.weighted(self.policy), index)
    }

    fn sum(&self, index: usize) -> Dual {
        self.input(self.policy.iter().map(|l| f64::from(*l)).sum(), MAX_ANSWERS + index)
    }

    fn input(&self, value: f64, index: usize) -> Dual {
        if self.detached { Dual::constant(value) } else { Dual::input(value, index) }
    }

    fn reference_logp(&self) -> f64 {
        self.weighted(self.reference)
    }
}

/// The answers to one prompt, best first; detached ones behind all others. Its differentiable inputs are the answers' log-probs.
#[derive(Clone, Debug, Default)]
pub struct Example<'a> {
    /// The answers.
    pub answers: Vec<Answer<'a>>,
    /// Log-probs under the policy of the prompt's tokens from its second one on; empty unless [`Needs::prompt`] asks for them.
    pub prompt: &'a [f32],
}

impl<'a> Example<'a> {
    /// Answers with a gradient: those that [`Needs::answers`] asks for.
    pub fn learned(&self) -> usize {
        self.answers.iter().filter(|a| !a.detached).count()
    }

    /// `log π(answer)`: the weighted sum over its tokens.
    pub fn logp(&self, answer: usize) -> Dual {
        self.answers[answer].logp(answer)
    }

    /// The answer's plain sum over tokens, whatever the weights: what a likelihood term is made of.
    pub fn sum(&self, answer: usize) -> Dual {
        self.answers[answer].sum(answer)
    }

    /// The sum over the prompt's tokens from its second one on, where [`Needs::prompt`] asks for it.
    pub fn prompt_sum(&self) -> Dual {
        Dual::input(self.prompt.iter().map(|l| f64::from(*l)).sum(), PROMPT)
    }

    /// `log π_ref(answer)`.
    pub fn reference(&self, answer: usize) -> f64 {
        self.answers[answer].reference_logp()
    }

    /// `log π(answer) / π_ref(answer)`.
    pub fn ratio(&self, answer: usize) -> Dual {
        self.logp(answer) - self.reference(answer)
    }

    /// The first two answers.
    ///
    /// # Panics
    /// Where there are fewer: a loss over pairs says [`Answers::Pair`] or [`Answers::Ranked`].
    pub fn pair(&self) -> Pair<'a> {
        match self.answers[..] {
            [chosen, rejected, ..] => Pair { chosen, rejected },
            _ => panic!("a pair of {} answers: let `needs` ask for pairs", self.answers.len()),
        }
    }
}

/// A pair of answers to one prompt. Its differentiable inputs are the answers' log-probs.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// The preferred answer.
    pub chosen: Answer<'a>,
    /// The other one.
    pub rejected: Answer<'a>,
}

impl Pair<'_> {
    /// `log π(chosen)`: the weighted sum over its tokens.
    pub fn chosen_logp(&self) -> Dual {
        self.chosen.logp(0)
    }

    /// `log π(rejected)`.
    pub fn rejected_logp(&self) -> Dual {
        self.rejected.logp(1)
    }

    /// The chosen answer's plain sum over tokens, whatever the weights: what a likelihood term is made of.
    pub fn chosen_sum(&self) -> Dual {
        self.chosen.sum(0)
    }

    /// The rejected answer's plain sum over tokens.
    pub fn rejected_sum(&self) -> Dual {
        self.rejected.sum(1)
    }

    /// `log π_ref(chosen)`.
    pub fn chosen_ref(&self) -> f64 {
        self.chosen.reference_logp()
    }

    /// `log π_ref(rejected)`.
    pub fn rejected_ref(&self) -> f64 {
        self.rejected.reference_logp()
    }

    /// `log π(chosen) / π_ref(chosen)`.
    pub fn chosen_ratio(&self) -> Dual {
        self.chosen_logp() - self.chosen_ref()
    }

    /// `log π(rejected) / π_ref(rejected)`.
    pub fn rejected_ratio(&self) -> Dual {
        self.rejected_logp() - self.rejected_ref()
    }
}

/// Sizes of the whole step, over all micro-batches and ranks; detached answers are not counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Totals {
    /// Examples.
    pub examples: f64,
    /// Answers.
    pub answers: f64,
    /// Tokens of every example's best answer.
    pub best_tokens: f64,
    /// Tokens of all answers.
    pub tokens: f64,
    /// Tokens of all prompts from their second one on, where [`Needs::prompt`] asks for them.
    pub prompt_tokens: f64,
}

/// The examples of a micro-batch, or of the whole step where [`Needs::whole_batch`] says so.
#[derive(Clone, Debug)]
pub struct LossBatch<'a> {
    /// Examples.
    pub examples: Vec<Example<'a>>,
    /// Sizes of the step.
    pub totals: Totals,
}

impl<'a> LossBatch<'a> {
    /// Examples that are the whole step.
    pub fn whole(examples: Vec<Example<'a>>) -> LossBatch<'a> {
        let learned = || examples.iter().map(|e| e.answers.iter().filter(|a| !a.detached));
        let totals = Totals {
            examples: examples.len() as f64,
            answers: learned().flatten().count() as f64,
            best_tokens: learned().filter_map(|mut answers| answers.next()).map(Answer::count).sum(),
            tokens: learned().flatten().map(Answer::count).sum(),
            prompt_tokens: examples.iter().map(|e| e.prompt.len() as f64).sum(),
        };
        LossBatch { examples, totals }
    }

    /// The first two answers of every example.
    pub fn pairs(&self) -> Vec<Pair<'a>> {
        self.examples.iter().map(Example::pair).collect()
    }

    /// The loss of each pair by a formula.
    pub fn each_pair(&self, formula: impl Fn(&Pair<'a>) -> Dual) -> LossGrad {
        self.each_example(|example| formula(&example.pair()))
    }

    /// The loss of each example by a formula.
    pub fn each_example(&self, formula: impl Fn(&Example<'a>) -> Dual) -> LossGrad {
        let mut grad = self.zero();
        for (i, example) in self.examples.iter().enumerate() {
            grad.add(i, formula(example));
        }
        grad
    }

    /// A result to which terms are [added](LossGrad::add).
    pub fn zero(&self) -> LossGrad {
        let answer = |answer: &Answer<'a>| AnswerGrad {
            grad: vec![0.0; answer.weights.len()],
            weights: answer.weights.to_vec(),
            detached: answer.detached,
        };
        let answers = self.examples.iter().map(|e| e.answers.iter().map(answer).collect()).collect();
        let prompts = self.examples.iter().map(|e| vec![0.0; e.prompt.len()]).collect();
        LossGrad { losses: vec![0.0; self.examples.len()], answers, prompts }
    }
}

/// Losses of examples, and their derivatives by the log-prob of every answer token.
#[derive(Clone, Debug)]
pub struct LossGrad {
    losses: Vec<f64>,
    /// Of every example, of every answer.
    answers: Vec<Vec<AnswerGrad>>,
    /// Of every example, of the prompt's tokens.
    prompts: Vec<Vec<f64>>,
}

#[derive(Clone, Debug)]
struct AnswerGrad {
    weights: Vec<f32>,
    grad: Vec<f64>,
    detached: bool,
}

impl AnswerGrad {
    /// Adds a derivative by the weighted and one by the plain sum.
    fn add(&mut self, by_weighted: f64, by_plain: f64) {
        for (grad, weight) in self.grad.iter_mut().zip(&self.weights) {
            *grad += by_weighted * f64::from(*weight) + by_plain;
        }
    }
}

impl LossGrad {
    /// Adds a term made from the answers of an example.
    pub fn add(&mut self, example: usize, term: Dual) {
        self.losses[example] += term.value;
        for (i, answer) in self.answers[example].iter_mut().enumerate() {
            answer.add(term.grad[i], term.grad[MAX_ANSWERS + i]);
        }
        self.prompts[example].iter_mut().for_each(|grad| *grad += term.grad[PROMPT]);
    }

    /// Adds a term made from the chosen answer of one pair and the rejected answer of another (or the same).
    pub fn add_across(&mut self, chosen_of: usize, rejected_of: usize, term: Dual) {
        self.losses[chosen_of] += term.value;
        for (example, answer) in [(chosen_of, 0), (rejected_of, 1)] {
            self.answers[example][answer].add(term.grad[answer], term.grad[MAX_ANSWERS + answer]);
        }
    }

    /// Adds a loss with its derivatives by single tokens' log-probs, of every answer of the example, for what no sum
    /// expresses. Those of a detached answer are left out.
    pub fn add_tokens(&mut self, example: usize, loss: f64, by: &[&[f64]]) {
        self.losses[example] += loss;
        for (answer, by) in self.answers[example].iter_mut().zip(by).filter(|(answer, _)| !answer.detached) {
            answer.grad.iter_mut().zip(*by).for_each(|(to, by)| *to += by);
        }
    }

    /// The loss of each example.
    pub fn losses(&self) -> &[f64] {
        &self.losses
    }

    /// `d loss / d log-prob` for each token of every answer of every example; those of its prompt follow, where it is read.
    pub fn grad(&self) -> Vec<f32> {
        let of = |(answers, prompt): (&'_ Vec<AnswerGrad>, &'_ Vec<f64>)| {
            answers.iter().flat_map(|answer| &answer.grad).chain(prompt).map(|g| *g as f32).collect::<Vec<f32>>()
        };
        self.answers.iter().zip(&self.prompts).flat_map(of).collect()
    }
}

/// Refuses examples with another number of answers than a loss asks for, or with more than it can be differentiated by.
pub(crate) fn check_answers(needs: &Needs, examples: &[Example<'_>]) -> Result<()> {
    let fits = |e: &Example<'_>| needs.answers.takes(e.learned()) && e.answers.len() <= MAX_ANSWERS;
    match examples.iter().position(|e| !fits(e)) {
        None => Ok(()),
        Some(at) => {
            let (learned, all) = (examples[at].learned(), examples[at].answers.len());
            Err(Error::new(format!("example {at} has {learned} answers, {all} with detached ones"))
                .help(format!("the loss takes {}, and {MAX_ANSWERS} at most", needs.answers.describe())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [&[f32]; MAX_STATISTICS] = [&[]; MAX_STATISTICS];

    fn answer(policy: &'static [f32], weights: &'static [f32], label: f64, detached: bool) -> Answer<'static> {
        let reference = &[-1.0, -1.0, -1.0][..policy.len()];
        Answer { policy, reference, weights, label, detached, statistics: NONE, reference_statistics: NONE }
    }

    /// A term's derivatives go to the tokens of its own answers, by their weights, and not to those of detached ones.
    #[test]
    fn derivatives_find_their_tokens() {
        let example = Example {
            answers: vec![
                answer(&[-1.0, -2.0], &[1.0, 0.5], 2.0, false),
                answer(&[-3.0], &[1.0], 1.0, false),
                answer(&[-0.5, -0.5, -4.0], &[1.0, 1.0, 0.5], 1.0, false),
                answer(&[-9.0], &[1.0], 0.0, true),
            ],
            prompt: &[-0.5, -0.25],
        };
        let batch = LossBatch::whole(vec![example]);
        let totals = Totals { examples: 1.0, answers: 3.0, best_tokens: 2.0, tokens: 6.0, prompt_tokens: 2.0 };
        assert_eq!((batch.totals, batch.examples[0].learned()), (totals, 3));
        let grad =
            batch.each_example(|e| 2.0 * e.ratio(0) + 3.0 * e.sum(2) - e.logp(1) * e.logp(3) + 4.0 * e.prompt_sum());
        assert_eq!(grad.losses(), [2.0 * (-2.0 + 1.5) + 3.0 * -5.0 - 27.0 - 3.0]);
        assert_eq!(grad.grad(), [2.0, 1.0, 9.0, 3.0, 3.0, 3.0, 0.0, 4.0, 4.0]);
        let mut grad = batch.zero();
        grad.add_tokens(0, 1.0, &[&[1.0, 2.0], &[3.0], &[4.0, 5.0, 6.0], &[7.0]]);
        assert_eq!(grad.grad(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn other_numbers_of_answers_are_refused() {
        let of = |learned: usize, detached: usize| Example {
            answers: (0..learned + detached).map(|i| answer(&[-1.0], &[1.0], 0.0, i >= learned)).collect(),
            prompt: &[],
        };
        let refused = |answers: Answers, learned: usize, detached: usize| {
            check_answers(&Needs { answers, ..Needs::default() }, &[of(2, 0), of(learned, detached)][1..]).is_err()
        };
        for (answers, count, wrong) in [
            (Answers::One, 1, false),
            (Answers::Labelled, 2, true),
            (Answers::Pair, 2, false),
            (Answers::Pair, 1, true),
        ] {
            assert_eq!([refused(answers, count, 0), refused(answers, count, 3)], [wrong; 2], "{answers:?} {count}");
        }
        let ranked = [1, 2, 16, 17].map(|count| refused(Answers::Ranked, count, 0));
        assert_eq!(ranked, [true, false, false, true]);
        assert!(refused(Answers::Ranked, 15, 2));
    }
}
