//! Evaluations: the sets of rows that are evaluated on, and which evaluation was the best.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config::EvaluationConfig;
use super::metrics::NAMES;
use super::reference::Reference;
use dpo_core::error::{Error, Result};
use dpo_data::Examples;

/// Examples that are evaluated on.
pub(super) struct EvalSet {
    /// What stands before the names of its metrics: `eval_`, or `eval_NAME_` for a named one.
    pub(super) prefix: String,
    pub(super) examples: Examples,
    pub(super) reference: Reference,
}

impl EvalSet {
    /// A set of a name, or the only one.
    pub(super) fn new(name: &str, examples: Examples) -> EvalSet {
        let prefix = if name.is_empty() { "eval_".to_owned() } else { format!("eval_{name}_") };
        EvalSet { prefix, examples, reference: Reference::none() }
    }
}

/// The metric by which evaluations are compared, as transformers' `metric_for_best_model` has it.
#[derive(Clone, Debug)]
pub(super) struct Metric {
    /// Its name in the log, such as `eval_loss`.
    pub(super) name: String,
    greater_is_better: bool,
}

impl Metric {
    /// The metric that is asked for, else the loss of the first set; `None` where nothing depends on it.
    ///
    /// # Errors
    /// No set to evaluate on, or a name that no evaluation logs.
    pub(super) fn of(config: &EvaluationConfig, sets: &[EvalSet]) -> Result<Option<Metric>> {
        let asking =
            [("--load-best-model-at-end", config.load_best), ("--early-stopping-patience", config.patience.is_some())];
        let Some((flag, _)) = asking.into_iter().find(|(_, asks)| *asks) else { return Ok(None) };
        let Some(first) = sets.first() else {
            return Err(Error::input("needs rows to evaluate on")
                .at(flag)
                .help("name them with --val-dataset, or hold some out with --split-dataset-ratio 0.1"));
        };
        let known: Vec<String> =
            sets.iter().flat_map(|set| NAMES.map(|name| format!("{}{name}", set.prefix))).collect();
        let wished = config.metric.as_deref().unwrap_or("loss");
        let candidates = [wished.to_owned(), format!("eval_{wished}"), format!("{}{wished}", first.prefix)];
        let Some(name) = candidates.into_iter().find(|name| known.contains(name)) else {
            return Err(
                Error::unknown("metric", wished, known.iter().map(String::as_str)).at("--metric-for-best-model")
            );
        };
        // As in transformers: what is called a loss is better where it is lower.
        let greater_is_better = config.greater_is_better.unwrap_or(!name.ends_with("loss"));
        Ok(Some(Metric { name, greater_is_better }))
    }
}

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Best {
    /// The step behind which it took place, and its metric.
    pub(super) found: Option<(u64, f64)>,
    /// Evaluations since that were not better.
    pub(super) waited: u64,
}

impl Best {
    /// Looks at an evaluation behind a step; whether it is the best so far. One whose metric is not finite is not.
    pub(super) fn look(&mut self, step: u64, metric: &Metric, line: &Map<String, Value>) -> bool {
        let value = line.get(&metric.name).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let better = |than: f64| if metric.greater_is_better { value > than } else { value < than };
        let is_best = value.is_finite() && self.found.is_none_or(|(_, best)| better(best));
        if is_best {
            *self = Best { found: Some((step, value)), waited: 0 };
        } else {
            self.waited += 1;
        }
        is_best
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use serde_json::json;

    use super::*;

    fn metric(name: Option<&str>, greater: Option<bool>, sets: &[&str]) -> Result<Option<Metric>> {
        let sets: Vec<EvalSet> = sets.iter().map(|name| EvalSet::new(name, Examples::default())).collect();
        let config = EvaluationConfig {
            metric: name.map(str::to_owned),
            greater_is_better: greater,
            load_best: true,
            ..EvaluationConfig::default()
        };
        Metric::of(&config, &sets)
    }

    #[test]
    fn the_metric_is_found_by_any_of_its_names() {
        let name = |wished, sets: &[&str]| metric(wished, None, sets).unwrap().unwrap().name;
        assert_eq!(name(None, &[""]), "eval_loss");
        assert_eq!(name(None, &["hard", "easy"]), "eval_hard_loss");
        assert_eq!(name(Some("easy_loss"), &["hard", "easy"]), "eval_easy_loss");
        assert_eq!(name(Some("eval_rewards/accuracies"), &[""]), "eval_rewards/accuracies");
        let error = metric(Some("accuracy"), None, &[""]).unwrap_err().to_string();
        assert!(error.contains("--metric-for-best-model") && error.contains("eval_rewards/accuracies"), "{error}");
        assert!(metric(None, None, &[]).unwrap_err().to_string().contains("--val-dataset"));
    }

    #[test]
    fn the_best_is_kept_and_waiting_is_counted() {
        let losses = [0.7, 0.5, 0.6, f64::NAN, 0.5, 0.4];
        let metric = metric(None, None, &[""]).unwrap().unwrap();
        let mut best = Best::default();
        let mut look = |(step, loss): (usize, &f64)| {
            let is_best = best.look(step as u64, &metric, json!({"eval_loss": loss}).as_object().unwrap());
            (is_best, best.waited)
        };
        let seen: Vec<_> = losses.iter().enumerate().map(&mut look).collect();
        assert_eq!(seen, [(true, 0), (true, 0), (false, 1), (false, 2), (false, 3), (true, 0)]);
        assert_eq!(best.found, Some((5, 0.4)));
    }
}
