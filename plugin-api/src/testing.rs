//! Checks for an author's own tests: `testing::check_model(&Qwen2)` and the like panic with what is wrong.
//!
//! They need no host: what the host refuses in a family, they refuse in its words. The host alone reads a chat template
//! (`dpo-host data`) and weights (docs/plugins.md, "Compare it with transformers").

use crate::check::{check_graph, check_linears, check_name};
use crate::config_keys::Unread;
use crate::dataset::{DatasetFormat, Row};
use crate::graph::ModelGraph;
use crate::loss::{AlignmentLoss, Answer, Answers, Example, LossBatch, LossGrad, MAX_STATISTICS, Needs, Options};
use crate::model::{Config, ModelFamily};
use crate::{Error, Result, bail};

/// The graph of the family's example config, after checking all that the host checks: the family's name, the graph, the names of
/// linears, and that the family read every key of the config that matters.
///
/// # Panics
/// With what the host would say.
pub fn check_model(family: &dyn ModelFamily) -> ModelGraph {
    check_config(family, family.example_config())
}

/// [`check_model`] for another config.
///
/// # Panics
/// With what the host would say.
pub fn check_config(family: &dyn ModelFamily, config: &str) -> ModelGraph {
    checked(family, config).unwrap_or_else(|e| panic!("{}: {e}", family.name()))
}

fn checked(family: &dyn ModelFamily, config: &str) -> Result<ModelGraph> {
    check_name(family.name())?;
    if family.claims().iter().all(|claim| claim.is_empty()) {
        return bail!("claims no architecture");
    }
    let parsed = Config::parse(config)?;
    let graph = family.graph(&parsed)?;
    check_graph(&graph)?;
    check_linears(&graph, |_| true)?;
    let keys = serde_json::from_str(config).map_err(|e| Error::new(format!("config.json: {e}")))?;
    let unread = Unread::of(&keys, &graph.unread_config, family.claims());
    unread.refuse(family.name())?;
    match unread.warning(family.name()) {
        Some(unknown) => Err(Error::new(unknown).help("read a key that changes nothing, too: config.get(key)")),
        None => Ok(graph),
    }
}

/// Every example row is recognised by its own format and gives at least one record.
///
/// # Panics
/// With the row and what is wrong.
pub fn check_format(format: &dyn DatasetFormat) {
    let mut rows = 0;
    for line in format.examples().lines().filter(|l| !l.trim().is_empty()) {
        let row: Row = serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        assert!(format.recognises(&row) > 0, "{} does not recognise its own row {line}", format.name());
        let records = format.records(&row).unwrap_or_else(|e| panic!("{line}: {e}"));
        assert!(!records.is_empty(), "{} makes no record of {line}", format.name());
        rows += 1;
    }
    assert!(rows > 0, "{} has no example rows", format.name());
}

/// Derivatives of a loss against central differences, at several examples with answers of several lengths, as many as the loss
/// takes, with and without token weights.
///
/// # Panics
/// With the token and both derivatives.
pub fn check_loss(loss: &dyn AlignmentLoss) {
    check_loss_with(loss, &Options::defaults(loss));
}

/// [`check_loss`] with options other than the defaults.
///
/// # Panics
/// With the token and both derivatives.
pub fn check_loss_with(loss: &dyn AlignmentLoss, options: &Options) {
    check_loss_from(loss, options, &[]);
}

/// [`check_loss_with`] for a loss that remembers: with the state that an earlier step left.
///
/// # Panics
/// With the token and both derivatives.
pub fn check_loss_from(loss: &dyn AlignmentLoss, options: &Options, state: &[f64]) {
    for tail in [1.0, 0.3] {
        let batch = SyntheticBatch::new(&loss.needs(), tail);
        let grad = batch.eval(loss, options, state, None).grad();
        for (token, exact) in grad.iter().enumerate() {
            if batch.is_detached(token) {
                assert!(*exact == 0.0, "{}: token {token} of a detached answer has a derivative", loss.name());
                continue;
            }
            // f32 log-probs near -2 carry an error of 2e-7 each; a step of 2e-3 keeps that out of the quotient.
            let h = 2e-3_f32;
            let total = |by: f32| batch.eval(loss, options, state, Some((token, by))).losses().iter().sum::<f64>();
            let numeric = (total(h) - total(-h)) / (2.0 * f64::from(h));
            let exact = f64::from(*exact);
            let bound = 2e-3 * numeric.abs().max(exact.abs()).max(0.05);
            assert!(
                (exact - numeric).abs() <= bound,
                "{}: token {token}: derivative {exact}, central difference {numeric}",
                loss.name()
            );
        }
    }
}

/// Three examples whose answers have different lengths, with fixed log-probs.
struct SyntheticBatch {
    /// Answers of every example.
    counts: [usize; 3],
    /// Whether the last of them is detached, and belongs to another prompt.
    mismatched: bool,
    answers: Answers,
    policy: Vec<Vec<f32>>,
    /// Log-probs of the examples' prompts, as far as they are read.
    prompts: [Vec<f32>; 3],
    reference: Vec<Vec<f32>>,
    weights: Vec<Vec<f32>>,
}

impl SyntheticBatch {
    fn new(needs: &Needs, tail: f32) -> SyntheticBatch {
        let Needs { answers, mismatched, .. } = *needs;
        let learned = match answers {
            Answers::One | Answers::Labelled => [1; 3],
            Answers::Pair => [2; 3],
            Answers::Ranked => [2, 5, 3],
        };
        let counts = learned.map(|count| count + usize::from(mismatched));
        let lengths = [3_usize, 2, 1, 4, 2, 2, 5, 1, 3, 2];
        // The second term keeps log-ratios of different answers apart: where two are equal, a loss that sorts has a bend.
        let value = |i: usize, j: usize, k: usize| {
            -0.4 - ((i * 7 + j * 5 + k * 3) % 11) as f32 * 0.17 - ((i + 1) * (k + 1)) as f32 * 0.013
        };
        let all: usize = counts.iter().sum();
        let rows = |k: usize| (0..all).map(|i| (0..lengths[i]).map(|j| value(i, j, k)).collect()).collect();
        let (mut weights, mut first) = (Vec::new(), 0);
        for count in counts {
            let own = &lengths[first..first + count];
            let shortest = own.iter().copied().min().unwrap_or(0);
            let weight = |j: usize| if j < shortest { 1.0 } else { tail };
            weights.extend(own.iter().map(|n| (0..*n).map(weight).collect()));
            first += count;
        }
        let prompts = [3, 0, 2].map(|n| (0..if needs.prompt { n } else { 0 }).map(|j| value(7, j, 2)).collect());
        SyntheticBatch { counts, mismatched, answers, policy: rows(0), prompts, reference: rows(1), weights }
    }

    /// Whether a token is a detached answer's.
    fn is_detached(&self, token: usize) -> bool {
        let mut policy = self.policy.iter();
        let of = |(count, prompt): (usize, &Vec<f32>)| {
            let answers = policy.by_ref().take(count).enumerate();
            let answers = answers.flat_map(|(i, ids)| vec![self.mismatched && i + 1 == count; ids.len()]);
            answers.chain(prompt.iter().map(|_| false)).collect::<Vec<bool>>()
        };
        self.counts.into_iter().zip(&self.prompts).flat_map(of).nth(token).unwrap_or(false)
    }

    fn eval(
        &self,
        loss: &dyn AlignmentLoss,
        options: &Options,
        state: &[f64],
        nudge: Option<(usize, f32)>,
    ) -> LossGrad {
        let (mut policy, mut prompts) = (self.policy.clone(), self.prompts.clone());
        if let Some((token, by)) = nudge {
            let mut answers = policy.iter_mut();
            let mut all = Vec::new();
            for (count, prompt) in self.counts.into_iter().zip(&mut prompts) {
                all.extend(answers.by_ref().take(count).flatten().chain(prompt));
            }
            **all.get_mut(token).unwrap_or_else(|| panic!("token {token} is not there")) += by;
        }
        let statistics = [-1.0_f32; 8];
        let (mut first, mut liked) = (0, false);
        let mut prompts = prompts.iter();
        let examples = self.counts.map(|count| {
            liked = !liked;
            let prompt = prompts.next().map_or(&[][..], Vec::as_slice);
            let answers = (first..first + count).map(|i| Answer {
                policy: &policy[i],
                reference: &self.reference[i],
                weights: &self.weights[i],
                label: match self.answers {
                    Answers::Labelled => f64::from(u8::from(liked)),
                    _ => (first + count - 1 - i) as f64,
                },
                detached: self.mismatched && i + 1 == first + count,
                statistics: [&statistics[..policy[i].len()]; MAX_STATISTICS],
                reference_statistics: [&statistics[..policy[i].len()]; MAX_STATISTICS],
            });
            let answers = answers.collect();
            first += count;
            Example { answers, prompt }
        });
        let batch = LossBatch::whole(examples.to_vec());
        loss.eval(&batch, options, &mut state.to_vec()).unwrap_or_else(|e| panic!("{}: {e}", loss.name()))
    }
}
