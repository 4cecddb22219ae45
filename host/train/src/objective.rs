//! What is minimised: a weighted sum of losses, each called through its plugin.

use std::collections::BTreeSet;
use std::ops::Range;

use dpo_plugin_api::abi::{RawAnswer, RawExample, RawTotals};
use dpo_plugin_api::loss::{Answers, MAX_STATISTICS};
use serde_json::{Map, Value, json};

use super::metrics::ExampleMetrics;
use dpo_core::error::{Error, Result};
use dpo_core::example::Example;
use dpo_core::logprobs::AnswerLogProbs;
use dpo_data::Wanted;
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
    /// Whether examples are weighted by how likely the policy finds them (WPO, Zhou et al. 2024, eq. 2).
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

/// Sizes of a whole step, known before its micro-batches run; detached answers are not counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Examples.
    pub examples: usize,
    /// Answers.
    pub answers: usize,
    /// Tokens of every example's best answer.
    pub best_tokens: usize,
    /// Tokens of all answers.
    pub tokens: usize,
    /// Tokens of all prompts that are scored.
    pub prompt_tokens: usize,
}

/// What an objective makes of some examples.
pub struct Evaluated {
    /// Their part of the step's loss.
    pub loss: f64,
    /// `d step loss / d logp` of every answer token.
    pub dlogps: Vec<f32>,
    /// For the log.
    pub examples: Vec<ExampleMetrics>,
    /// Whether a loss leaves a state to its next call.
    pub remembers: bool,
}

impl Totals {
    /// Of some examples that are a whole step.
    pub fn of(examples: &[&Example]) -> Totals {
        let learned = || examples.iter().map(|e| e.learned());
        Totals {
            examples: examples.len(),
            answers: learned().map(<[_]>::len).sum(),
            best_tokens: learned().filter_map(|answers| Some(answers.first()?.ids.len())).sum(),
            tokens: learned().flatten().map(|a| a.ids.len()).sum(),
            prompt_tokens: examples.iter().map(|e| e.scored_prompt().len()).sum(),
        }
    }

    fn raw(self) -> RawTotals {
        RawTotals {
            examples: self.examples as f64,
            answers: self.answers as f64,
            best_tokens: self.best_tokens as f64,
            tokens: self.tokens as f64,
            prompt_tokens: self.prompt_tokens as f64,
        }
    }
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
        // Rewards in the log are scaled by beta, whatever the loss makes of it.
        let names = terms.iter().flat_map(|t| t.loss.options.iter().map(|o| o.name.as_str())).chain(["beta"]);
        let names: BTreeSet<&str> = names.collect();
        let known = || names.iter().copied();
        if let Some(unknown) = options.options.keys().find(|k| !known().any(|n| n == k.as_str())) {
            let losses = options.losses.join(", ");
            return Err(Error::unknown(&format!("option of {losses}:"), unknown, known()));
        }
        if options.weighting && terms.iter().any(|t| t.loss.needs.whole_batch) {
            return Err(Error::input("weights of examples have no meaning for a loss over the whole batch")
                .at("--use-weighting")
                .help("leave it out, or choose a loss over single examples such as sigmoid"));
        }
        let default_beta = || terms[0].loss.options.iter().find(|o| o.name == "beta")?.default.as_f64();
        let stated = options.options.get("beta").and_then(Value::as_f64);
        let beta = stated.or_else(|| terms.first().and_then(|_| default_beta())).unwrap_or(0.1);
        let ld_alpha = options.ld_alpha.map(|a| a as f32);
        let objective = Objective { ld_alpha, weighting: options.weighting, beta, terms };
        objective.wanted()?;
        Ok(objective)
    }

    /// The examples that all of its losses take.
    ///
    /// # Errors
    /// Losses that take different numbers of answers.
    pub fn wanted(&self) -> Result<Wanted> {
        let of = |t: &Term<'_>| Wanted {
            answers: t.loss.needs.answers,
            loss: t.loss.name.clone(),
            mismatched: self.terms.iter().any(|t| t.loss.needs.mismatched),
            prompt: self.terms.iter().any(|t| t.loss.needs.prompt),
        };
        let mut all = self.terms.iter().map(of);
        let first = all.next().unwrap_or_default();
        all.try_fold(first, |wanted, own| match (wanted.answers, own.answers) {
            (before, own) if before == own => Ok(wanted),
            // A ranking of two is a pair, and a likelihood is of the best of several.
            (Answers::Pair, Answers::Ranked) | (Answers::Pair | Answers::Ranked, Answers::One) => Ok(wanted),
            (Answers::Ranked, Answers::Pair) | (Answers::One, Answers::Pair | Answers::Ranked) => Ok(own),
            (before, after) => {
                let (before, after) = (before.describe(), after.describe());
                Err(Error::input(format!("'{}' takes {before}, '{}' takes {after}", wanted.loss, own.loss))
                    .at("--loss")
                    .help("a sum is of losses over the same examples; `dpo-host describe NAME` says what each takes"))
            }
        })
    }

    /// Of every loss its name, weight and options, as they were resolved.
    pub fn resolved(&self) -> Value {
        let options = |t: &Term<'_>| serde_json::from_str::<Value>(&t.options).unwrap_or_default();
        self.terms.iter().map(|t| json!({"loss": t.loss.name, "weight": t.weight, "options": options(t)})).collect()
    }

    /// Of every loss its name and the package that computes it.
    pub fn packages(&self) -> Vec<(String, String)> {
        self.terms.iter().map(|t| (t.loss.name.clone(), t.loss.package())).collect()
    }

    /// Whether an example's loss depends on the other examples of its step.
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

    /// Loss, derivatives and metrics of some examples of a step. A loss that is not finite has no derivatives: the step is the
    /// caller's to skip. `learn` keeps the states that losses leave.
    ///
    /// # Errors
    /// What a plugin refuses.
    pub fn eval(
        &mut self,
        examples: &[&Example],
        policy: &AnswerLogProbs,
        reference: Option<&AnswerLogProbs>,
        totals: Totals,
        learn: bool,
    ) -> Result<Evaluated> {
        let zeros = AnswerLogProbs::zeros(policy.offsets.clone());
        let reference = reference.unwrap_or(&zeros);
        let weights = token_weights(examples, self.ld_alpha);
        let offsets = &policy.offsets;
        let importance: Vec<f64> =
            (0..examples.len()).map(|e| if self.weighting { weighting(examples, policy, e) } else { 1.0 }).collect();
        let of = |e: usize| ExampleMetrics::of(examples[e], offsets.answers(e), policy, reference, &weights, self.beta);
        let mut all = Evaluated {
            loss: 0.0,
            dlogps: vec![0.0; policy.logps.len()],
            examples: (0..examples.len()).map(of).collect(),
            remembers: false,
        };
        if policy.logps.iter().chain(&reference.logps).any(|l| !l.is_finite()) {
            // No loss is asked about what is not finite.
            return Ok(Evaluated { loss: f64::NAN, ..all });
        }
        if examples.is_empty() {
            return Ok(all);
        }
        let prompt = |e: usize| match examples[e].scored_prompt() {
            [] => &[][..],
            _ => offsets.answers(e).last().map_or(&[][..], |at| &policy.logps[at]),
        };
        for term in &mut self.terms {
            let answers = raw_answers(&term.loss.needs.statistics, examples, policy, reference, &weights)?;
            let raw: Vec<RawExample<'_>> = answers
                .iter()
                .enumerate()
                .map(|(e, answers)| RawExample { answers: answers.as_slice().into(), prompt: prompt(e).into() })
                .collect();
            let call = LossCall { options: &term.options, examples: &raw, totals: totals.raw(), state: &term.state };
            let result = term.loss.eval(&call)?;
            let scale = term.weight / totals.examples as f64;
            all.loss += result.losses.iter().zip(&importance).map(|(l, w)| l * w * scale).sum::<f64>();
            for (e, importance) in importance.iter().enumerate() {
                let whole = offsets.example(e);
                let own = all.dlogps[whole.clone()].iter_mut().zip(&result.grad[whole.clone()]);
                own.for_each(|(to, grad)| *to += grad * (scale * importance) as f32);
                let finite = result.losses[e].is_finite() && all.dlogps[whole].iter().all(|d| d.is_finite());
                all.examples[e].finite &= finite;
            }
            all.remembers |= !result.state.is_empty();
            if result.state.iter().any(|value| !value.is_finite()) {
                // It would be read by every step to come.
                return Ok(Evaluated { loss: f64::NAN, dlogps: vec![0.0; policy.logps.len()], ..all });
            }
            if learn {
                term.state = result.state;
            }
        }
        for (e, example) in examples.iter().enumerate() {
            let detached = example.answers().iter().zip(offsets.answers(e)).filter(|(answer, _)| answer.detached);
            detached.for_each(|(_, at)| all.dlogps[at].fill(0.0));
        }
        if all.examples.iter().any(|e| !e.finite) {
            all.dlogps.fill(0.0);
            return Ok(Evaluated { loss: f64::NAN, ..all });
        }
        Ok(all)
    }
}

/// Of every example its answers as a plugin takes them, with the statistics that it asks for.
fn raw_answers<'a>(
    statistics: &[String],
    examples: &[&Example],
    policy: &'a AnswerLogProbs,
    reference: &'a AnswerLogProbs,
    weights: &'a [f32],
) -> Result<Vec<Vec<RawAnswer<'a>>>> {
    let mut flat: [[&[f32]; MAX_STATISTICS]; 2] = [[&[]; MAX_STATISTICS]; 2];
    for (flat, of) in flat.iter_mut().zip([policy, reference]) {
        for (to, name) in flat.iter_mut().zip(statistics) {
            let found = of.statistics.get(name.as_str()).map(Vec::as_slice);
            *to = found.ok_or_else(|| Error::run(format!("the statistic '{name}' was not computed")))?;
        }
    }
    let of = |(e, example): (usize, &&Example)| {
        let answers = example.answers().iter().zip(policy.offsets.answers(e));
        let raw = answers.map(|(answer, at)| RawAnswer {
            policy: policy.logps[at.clone()].into(),
            reference: reference.logps[at.clone()].into(),
            weights: weights[at.clone()].into(),
            statistics: flat[0].map(|flat| part(flat, &at).into()),
            reference_statistics: flat[1].map(|flat| part(flat, &at).into()),
            label: answer.label,
            detached: answer.detached,
        });
        raw.collect()
    };
    Ok(examples.iter().enumerate().map(of).collect())
}

/// An answer's part of a statistic; nothing of one that was not asked for.
fn part<'a>(flat: &'a [f32], at: &Range<usize>) -> &'a [f32] {
    flat.get(at.clone()).unwrap_or_default()
}

/// 1, or LD-DPO's alpha for tokens beyond the length of the shortest answer.
fn token_weights(examples: &[&Example], ld_alpha: Option<f32>) -> Vec<f32> {
    let alpha = ld_alpha.unwrap_or(1.0);
    let of = |example: &&Example| {
        let shortest = example.learned().iter().map(|a| a.ids.len()).min().unwrap_or(0);
        let weight = move |i: usize| if i < shortest { 1.0 } else { alpha };
        let answers = example.answers().iter().flat_map(|a| (0..a.ids.len()).map(weight));
        answers.chain(example.scored_prompt().iter().map(|_| 1.0)).collect::<Vec<f32>>()
    };
    examples.iter().flat_map(of).collect()
}

/// WPO's weight of an example: for each of its answers `exp(mean(logp - ln Σ p²))`, multiplied; no gradient flows through it.
fn weighting(examples: &[&Example], policy: &AnswerLogProbs, example: usize) -> f64 {
    let squares = policy.statistics.get("log_sum_sq_probs").map_or(&[][..], Vec::as_slice);
    let mean = |at: Range<usize>| {
        let count = at.len().max(1) as f64;
        let tokens = policy.logps[at.clone()].iter().zip(&squares[at]);
        tokens.map(|(l, q)| f64::from(l - q)).sum::<f64>() / count
    };
    let answers = policy.offsets.answers(example).take(examples[example].learned().len());
    answers.map(mean).sum::<f64>().exp()
}
