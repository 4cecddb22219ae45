//! What is minimised: a weighted sum of losses, each called through its plugin.

use std::ops::Range;

use dpo_plugin_api::abi::{RawAnswer, RawPair};
use dpo_plugin_api::loss::MAX_STATISTICS;
use serde_json::{Map, Value};

use super::metrics::PairMetrics;
use dpo_core::error::{Error, Result};
use dpo_plugins::{Loss, LossCall, Registry};

/// What the user says about the objective.
#[derive(Clone, Debug, Default)]
pub struct ObjectiveOptions {
    /// Names of losses.
    pub losses: Vec<String>,
    /// Their weights; empty for 1 each.
    pub weights: Vec<f64>,
    /// Options by name: those the user set.
    pub options: Map<String, Value>,
    /// Weight of a further `sft` loss, as RPO has it.
    pub rpo_alpha: Option<f64>,
    /// LD-DPO's weight of tokens beyond the shorter answer (Liu et al. 2024).
    pub ld_alpha: Option<f64>,
    /// Whether pairs are weighted by how likely the policy finds them (WPO, Zhou et al. 2024, eq. 2).
    pub weighting: bool,
}

/// A weighted sum of losses.
pub struct Objective<'r> {
    terms: Vec<Term<'r>>,
    ld_alpha: Option<f32>,
    weighting: bool,
    /// Factor that turns log-ratios into the rewards that are logged.
    beta: f64,
}

struct Term<'r> {
    loss: &'r Loss,
    weight: f64,
    options: String,
    state: Vec<f64>,
}

/// Sizes of a whole step, known before its micro-batches run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Pairs.
    pub pairs: usize,
    /// Tokens of chosen and of rejected answers.
    pub tokens: [usize; 2],
}

/// Log-probs of some pairs' answer tokens, flat as a batch has them.
#[derive(Clone, Copy)]
pub struct Logps<'a> {
    /// Answer tokens of every pair: chosen, rejected.
    pub answers: &'a [[usize; 2]],
    /// Under the policy.
    pub policy: &'a [f32],
    /// Under the reference; empty where there is none.
    pub reference: &'a [f32],
    /// `ln Σ p²` under the policy.
    pub log_sum_sq: &'a [f32],
}

/// What an objective makes of some pairs.
pub struct Evaluated {
    /// Their part of the step's loss.
    pub loss: f64,
    /// `d step loss / d logp` of every answer token.
    pub slopes: Vec<f32>,
    /// For the log.
    pub pairs: Vec<PairMetrics>,
    /// Whether a loss leaves a state to its next call.
    pub remembers: bool,
}

impl<'r> Objective<'r> {
    /// Resolves names, weights and options.
    pub fn new(registry: &'r Registry, options: &ObjectiveOptions) -> Result<Objective<'r>> {
        if !options.weights.is_empty() && options.weights.len() != options.losses.len() {
            let (w, l) = (options.weights.len(), options.losses.len());
            return Err(Error::input(format!("{w} weights for {l} losses"))
                .at("--loss-weights")
                .help("name one weight for each loss, in the order of --loss"));
        }
        let weight = |i: usize| options.weights.get(i).copied().unwrap_or(1.0);
        let mut named: Vec<(&str, f64)> =
            options.losses.iter().enumerate().map(|(i, name)| (name.as_str(), weight(i))).collect();
        named.extend(options.rpo_alpha.filter(|a| *a != 0.0).map(|a| ("sft", a)));
        let mut terms = Vec::new();
        for (name, weight) in named {
            let loss = registry.loss(name).map_err(|e| e.at("--loss"))?;
            let value =
                |o: &dpo_plugin_api::loss::LossOption| options.options.get(&o.name).unwrap_or(&o.default).clone();
            let values: Map<String, Value> = loss.options.iter().map(|o| (o.name.clone(), value(o))).collect();
            terms.push(Term { loss, weight, options: Value::Object(values).to_string(), state: Vec::new() });
        }
        let known = || terms.iter().flat_map(|t| t.loss.options.iter().map(|o| o.name.as_str()));
        if let Some(unknown) = options.options.keys().find(|k| !known().any(|n| n == k.as_str())) {
            let losses = options.losses.join(", ");
            return Err(Error::unknown(&format!("option of {losses}:"), unknown, known()));
        }
        if options.weighting && terms.iter().any(|t| t.loss.needs.whole_batch) {
            return Err(Error::input("weights of pairs have no meaning for a loss over the whole batch")
                .at("--use-weighting")
                .help("leave it out, or choose a loss over pairs such as sigmoid"));
        }
        let default_beta = || terms[0].loss.options.iter().find(|o| o.name == "beta")?.default.as_f64();
        let stated = options.options.get("beta").and_then(Value::as_f64);
        let beta = stated.or_else(|| terms.first().and_then(|_| default_beta())).unwrap_or(0.1);
        Ok(Objective { ld_alpha: options.ld_alpha.map(|a| a as f32), weighting: options.weighting, beta, terms })
    }

    /// Whether a pair's loss depends on the other pairs of its step.
    pub fn whole_batch(&self) -> bool {
        self.terms.iter().any(|t| t.loss.needs.whole_batch)
    }

    /// Whether log-probs under the reference are read.
    pub fn needs_reference(&self) -> bool {
        self.terms.iter().any(|t| t.loss.needs.reference)
    }

    /// The losses' states, to be saved with a checkpoint.
    pub fn states(&self) -> Vec<Vec<f64>> {
        self.terms.iter().map(|t| t.state.clone()).collect()
    }

    /// Puts saved states back.
    pub fn restore(&mut self, states: Vec<Vec<f64>>) {
        self.terms.iter_mut().zip(states).for_each(|(t, s)| t.state = s);
    }

    /// Loss, derivatives and metrics of some pairs of a step. `learn` keeps the states that losses leave.
    pub fn eval(&mut self, logps: Logps<'_>, totals: Totals, learn: bool) -> Result<Evaluated> {
        let zeros = vec![0.0; logps.policy.len()];
        let reference = if logps.reference.is_empty() { &zeros } else { logps.reference };
        let weights = token_weights(logps.answers, self.ld_alpha);
        let spans = spans(logps.answers);
        let slopes = vec![0.0; logps.policy.len()];
        let mut all = Evaluated { loss: 0.0, slopes, pairs: Vec::new(), remembers: false };
        let importance: Vec<f64> =
            spans.iter().map(|s| if self.weighting { weighting(logps, s) } else { 1.0 }).collect();
        all.pairs = spans.iter().map(|s| PairMetrics::of(s, logps.policy, reference, &weights, self.beta)).collect();
        if logps.policy.iter().chain(reference).any(|l| !l.is_finite()) {
            // No loss is asked about numbers that are none; the step is the caller's to skip.
            return Ok(Evaluated { loss: f64::NAN, ..all });
        }
        if logps.answers.is_empty() {
            return Ok(all);
        }
        for term in &mut self.terms {
            // The one statistic on offer; the registry has refused any other name.
            let wants = term.loss.needs.statistics.len();
            let answer = |span: &Range<usize>| RawAnswer {
                policy: logps.policy[span.clone()].into(),
                reference: reference[span.clone()].into(),
                weights: weights[span.clone()].into(),
                statistics: std::array::from_fn::<_, MAX_STATISTICS, _>(|i| {
                    if i < wants { logps.log_sum_sq[span.clone()].into() } else { [].as_slice().into() }
                }),
            };
            let pair = |s: &[Range<usize>; 2]| RawPair { chosen: answer(&s[0]), rejected: answer(&s[1]) };
            let pairs: Vec<RawPair<'_>> = spans.iter().map(pair).collect();
            let call = LossCall {
                options: &term.options,
                pairs: &pairs,
                step_pairs: totals.pairs,
                step_tokens: totals.tokens,
                state: &term.state,
            };
            let result = term.loss.eval(&call)?;
            let scale = term.weight / totals.pairs as f64;
            all.loss += result.losses.iter().zip(&importance).map(|(l, w)| l * w * scale).sum::<f64>();
            for (span, importance) in spans.iter().zip(&importance) {
                let whole = span[0].start..span[1].end;
                let own = all.slopes[whole.clone()].iter_mut().zip(&result.slopes[whole]);
                own.for_each(|(to, slope)| *to += slope * (scale * importance) as f32);
            }
            all.remembers |= !result.state.is_empty();
            if learn {
                term.state = result.state;
            }
        }
        Ok(all)
    }
}

/// Ranges of every pair's chosen and rejected tokens in a flat buffer.
pub(super) fn spans(answers: &[[usize; 2]]) -> Vec<[Range<usize>; 2]> {
    let mut at = 0;
    let mut take = |n: usize| {
        at += n;
        at - n..at
    };
    answers.iter().map(|[c, r]| [take(*c), take(*r)]).collect()
}

/// 1, or LD-DPO's alpha for tokens beyond the length of the shorter answer.
fn token_weights(answers: &[[usize; 2]], ld_alpha: Option<f32>) -> Vec<f32> {
    let alpha = ld_alpha.unwrap_or(1.0);
    let of = |own: usize, other: usize| (0..own).map(move |i| if i < other { 1.0 } else { alpha });
    answers.iter().flat_map(|[c, r]| of(*c, *r).chain(of(*r, *c))).collect()
}

/// WPO's weight of a pair: for both answers `exp(mean(logp - ln Σ p²))`, multiplied; no gradient flows through it.
fn weighting(logps: Logps<'_>, span: &[Range<usize>; 2]) -> f64 {
    let mean = |s: &Range<usize>| {
        let tokens = logps.policy[s.clone()].iter().zip(&logps.log_sum_sq[s.clone()]);
        tokens.map(|(l, q)| f64::from(l - q)).sum::<f64>() / s.len().max(1) as f64
    };
    (mean(&span[0]) + mean(&span[1])).exp()
}
