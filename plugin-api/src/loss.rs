//! Alignment losses: from log-probs of a pair's answers to a loss and its derivatives.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::dual::Dual;
use crate::{Error, Result, bail};

/// A loss such as DPO's sigmoid. The loss of a step is the mean of its pairs' losses over all pairs of the step.
pub trait AlignmentLoss: Send + Sync + 'static {
    /// What `--loss` takes and `dpo-host list` prints.
    fn name(&self) -> &'static str;

    /// One line for `dpo-host list`, with the paper.
    fn summary(&self) -> &'static str;

    /// The formula, as text for `dpo-host describe`.
    fn formula(&self) -> &'static str;

    /// What the loss needs of the host.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// Options it understands, with defaults. `beta` is usual.
    fn options(&self) -> Vec<LossOption> {
        Vec::new()
    }

    /// Loss and derivatives of the pairs given. Most losses are one call of [`LossBatch::each_pair`].
    ///
    /// `state` starts empty and is saved with checkpoints. All calls of a step see the one that the step before left; what is
    /// kept is what the loss leaves when it is given all pairs of the step.
    fn eval(&self, batch: &LossBatch<'_>, options: &Options, state: &mut Vec<f64>) -> Result<LossGrad>;
}

/// What a loss needs of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// Whether log-probs under the reference are read; where no loss of a run does, they are not computed.
    pub reference: bool,
    /// Whether a pair's loss depends on other pairs; then the loss is called once a step with all of its pairs.
    pub whole_batch: bool,
    /// Further statistics of each answer token under the policy, by name; an unknown one refuses the loss.
    #[serde(default)]
    pub statistics: Vec<String>,
}

impl Default for Needs {
    /// The reference, pair by pair, no further statistics.
    fn default() -> Needs {
        Needs { reference: true, whole_batch: false, statistics: Vec::new() }
    }
}

/// An option of a loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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

    /// A number.
    pub fn float(&self, name: &str) -> Result<f64> {
        match self.0.get(name).and_then(Value::as_f64) {
            Some(number) => Ok(number),
            None => bail!("loss option '{name}' should be a number, is {:?}", self.0.get(name)),
        }
    }

    /// A text.
    pub fn text(&self, name: &str) -> Result<&str> {
        match self.0.get(name).and_then(Value::as_str) {
            Some(text) => Ok(text),
            None => bail!("loss option '{name}' should be a text, is {:?}", self.0.get(name)),
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
    /// Weight of each token in the answer's log-prob: 1, but for LD-DPO, where tokens beyond the shorter answer have
    /// `--ld-alpha`.
    pub weights: &'a [f32],
    /// The statistics asked for, in the order of [`Needs::statistics`].
    pub statistics: [&'a [f32]; MAX_STATISTICS],
}

/// Most statistics a loss may ask for.
pub const MAX_STATISTICS: usize = 4;

impl Answer<'_> {
    /// Tokens.
    pub fn count(&self) -> f64 {
        self.policy.len() as f64
    }

    fn weighted(&self, logps: &[f32]) -> f64 {
        logps.iter().zip(self.weights).map(|(l, w)| f64::from(*l) * f64::from(*w)).sum()
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
        Dual::input(self.chosen.weighted(self.chosen.policy), 0)
    }

    /// `log π(rejected)`.
    pub fn rejected_logp(&self) -> Dual {
        Dual::input(self.rejected.weighted(self.rejected.policy), 1)
    }

    /// The chosen answer's plain sum over tokens, whatever the weights: what a likelihood term is made of.
    pub fn chosen_sum(&self) -> Dual {
        Dual::input(self.chosen.policy.iter().map(|l| f64::from(*l)).sum(), 2)
    }

    /// The rejected answer's plain sum over tokens.
    pub fn rejected_sum(&self) -> Dual {
        Dual::input(self.rejected.policy.iter().map(|l| f64::from(*l)).sum(), 3)
    }

    /// `log π_ref(chosen)`.
    pub fn chosen_ref(&self) -> f64 {
        self.chosen.weighted(self.chosen.reference)
    }

    /// `log π_ref(rejected)`.
    pub fn rejected_ref(&self) -> f64 {
        self.rejected.weighted(self.rejected.reference)
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

/// The pairs of a micro-batch, or of the whole step where [`Needs::whole_batch`] says so.
#[derive(Clone, Debug)]
pub struct LossBatch<'a> {
    /// Pairs.
    pub pairs: Vec<Pair<'a>>,
    /// Pairs in the step, over all micro-batches and ranks.
    pub step_pairs: f64,
    /// Tokens of chosen answers in the step.
    pub step_chosen_tokens: f64,
    /// Tokens of rejected answers in the step.
    pub step_rejected_tokens: f64,
}

impl<'a> LossBatch<'a> {
    /// The loss of each pair by a formula.
    pub fn each_pair(&self, formula: impl Fn(&Pair<'a>) -> Dual) -> LossGrad {
        let mut grad = self.zero();
        for (i, pair) in self.pairs.iter().enumerate() {
            grad.add(i, i, formula(pair));
        }
        grad
    }

    /// A result to which terms are [added](LossGrad::add).
    pub fn zero(&self) -> LossGrad {
        let tokens = |answer: fn(&Pair<'a>) -> Answer<'a>| {
            self.pairs.iter().map(|p| answer(p).weights.to_vec()).collect::<Vec<_>>()
        };
        LossGrad {
            losses: vec![0.0; self.pairs.len()],
            chosen: tokens(|p| p.chosen).into_iter().map(TokenSlopes::new).collect(),
            rejected: tokens(|p| p.rejected).into_iter().map(TokenSlopes::new).collect(),
        }
    }
}

/// Losses of pairs, and their derivatives by the log-prob of every answer token.
#[derive(Clone, Debug)]
pub struct LossGrad {
    pub(crate) losses: Vec<f64>,
    pub(crate) chosen: Vec<TokenSlopes>,
    pub(crate) rejected: Vec<TokenSlopes>,
}

#[derive(Clone, Debug)]
pub(crate) struct TokenSlopes {
    weights: Vec<f32>,
    slopes: Vec<f64>,
}

impl TokenSlopes {
    fn new(weights: Vec<f32>) -> TokenSlopes {
        TokenSlopes { slopes: vec![0.0; weights.len()], weights }
    }

    /// Adds a slope by the weighted and one by the plain sum.
    fn add(&mut self, weighted: f64, plain: f64) {
        for (slope, weight) in self.slopes.iter_mut().zip(&self.weights) {
            *slope += weighted * f64::from(*weight) + plain;
        }
    }
}

impl LossGrad {
    /// Adds a term made from the chosen answer of one pair and the rejected answer of another (or the same).
    pub fn add(&mut self, chosen_of: usize, rejected_of: usize, term: Dual) {
        self.losses[chosen_of] += term.value;
        self.chosen[chosen_of].add(term.slope[0], term.slope[2]);
        self.rejected[rejected_of].add(term.slope[1], term.slope[3]);
    }

    /// Adds a derivative by single tokens' log-probs, for what no sum expresses.
    pub fn add_tokens(&mut self, pair: usize, loss: f64, chosen: &[f64], rejected: &[f64]) {
        self.losses[pair] += loss;
        let add = |to: &mut TokenSlopes, by: &[f64]| to.slopes.iter_mut().zip(by).for_each(|(s, b)| *s += b);
        add(&mut self.chosen[pair], chosen);
        add(&mut self.rejected[pair], rejected);
    }

    /// The loss of each pair.
    pub fn losses(&self) -> &[f64] {
        &self.losses
    }

    /// `d loss / d log-prob` for each token: of every pair the chosen answer's, then the rejected one's.
    pub fn slopes(&self) -> Vec<f32> {
        let pairs = self.chosen.iter().zip(&self.rejected);
        pairs.flat_map(|(c, r)| c.slopes.iter().chain(&r.slopes)).map(|s| *s as f32).collect()
    }

    /// Refuses a result that cannot be trained on.
    pub(crate) fn check(&self) -> Result<()> {
        match self.losses.iter().position(|l| !l.is_finite()) {
            Some(pair) => Err(Error::new(format!("the loss of pair {pair} is {}", self.losses[pair]))
                .help("the log-probs overflow: lower the learning rate, or look at that pair's data")),
            None => Ok(()),
        }
    }
}
