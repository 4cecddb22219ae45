//! The settings of a run, typed and resolved. How flags become these is the command line's business.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dpo_core::error::Result;
use dpo_core::lora::AdapterConfig;
use dpo_core::optimizer::AdamW;
use dpo_core::plan::{MemoryOptions, Packing};
use dpo_data::{DataOptions, Wanted};
use dpo_hub::model::ModelOptions;
use dpo_plugin_api::graph::ModelGraph;
use serde_json::{Map, Value, json};

use crate::objective::ObjectiveOptions;
use crate::schedule::Schedule;

/// The key of `args.json` under which stands what the flags came to, beside them.
pub const RESOLVED: &str = "resolved";
/// Its key of the packing.
pub(crate) const PACKING: &str = "packing";

/// Everything that a run is told.
#[derive(Clone, Debug)]
pub struct TrainConfig {
    /// Checkpoint: a folder, or a name on a hub.
    pub model: String,
    /// How its folder is read.
    pub reading: ModelOptions,
    /// Adapter to start from.
    pub adapter: StartAdapter,
    /// How rows become examples.
    pub data: DataOptions,
    /// Rows to train on: `PATH` or `PATH#N`.
    pub dataset: Vec<String>,
    /// Rows to evaluate on.
    pub val_dataset: Vec<EvalRows>,
    /// Fraction of the examples held out for evaluation, where there is no `val_dataset`.
    pub split_dataset_ratio: f64,
    /// What evaluations decide.
    pub evaluation: EvaluationConfig,
    /// The reference, where it is not the model with the adapter of the start.
    pub reference: Option<ReferenceConfig>,
    /// The losses, their weights and options.
    pub objective: ObjectiveOptions,
    /// Optimizer, learning rate, batch.
    pub optimizer: OptimizerConfig,
    /// Memory and what follows from it.
    pub memory: MemoryOptions,
    /// Where the run is written, and how often.
    pub output: OutputConfig,
    /// The page to serve while the run goes on.
    pub dashboard: Dashboard,
    /// Folders of plugins that were named, for the commands that go on from the run.
    pub plugin_dirs: Vec<PathBuf>,
    /// Every flag with its resolved value, by name: what `args.json` records.
    pub flags: Map<String, Value>,
}

/// Rows to evaluate on, as one set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalRows {
    /// The set's name; empty where it is the only one.
    pub name: String,
    /// `PATH` or `PATH#N`.
    pub paths: Vec<String>,
}

impl EvalRows {
    /// Sets of `--val-dataset`'s values, `[NAME=]PATH[#N]`, in the order in which they are first named.
    pub fn parse(values: &[String]) -> Vec<EvalRows> {
        let mut sets: Vec<EvalRows> = Vec::new();
        for value in values {
            let plain =
                |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
            // A file may have such a name.
            let named = value.split_once('=').filter(|(name, _)| plain(name) && !Path::new(value).exists());
            let (name, path) = named.unwrap_or(("", value));
            match sets.iter_mut().find(|set| set.name == name) {
                Some(set) => set.paths.push(path.to_owned()),
                None => sets.push(EvalRows { name: name.to_owned(), paths: vec![path.to_owned()] }),
            }
        }
        sets
    }
}

/// What evaluations decide, as in transformers' trainer.
#[derive(Clone, Debug, Default)]
pub struct EvaluationConfig {
    /// Whether there is one before the first step.
    pub on_start: bool,
    /// Whether the run's adapter is that of the best evaluation, not that of the last step.
    pub load_best: bool,
    /// Evaluations that may pass without a better one; the run ends at the next.
    pub patience: Option<u64>,
    /// What is compared; `None` for the loss.
    pub metric: Option<String>,
    /// Whether more is better; `None` for what follows from the metric's name.
    pub greater_is_better: Option<bool>,
}

/// A reference of its own.
#[derive(Clone, Debug)]
pub struct ReferenceConfig {
    /// Checkpoint; `None` for the run's.
    pub model: Option<String>,
    /// How its folder is read.
    pub reading: ModelOptions,
    /// Its adapter; `None` for none.
    pub adapter: Option<PathBuf>,
}

/// The adapter at the start, which is also the reference unless that has a [`ReferenceConfig`].
#[derive(Clone, Debug)]
pub enum StartAdapter {
    /// A new one.
    New(Box<AdapterConfig>),
    /// A PEFT adapter. Rank and alpha are its own; where the user names them they have to agree.
    From {
        /// Its folder.
        folder: PathBuf,
        /// LoRA rank, where given.
        rank: Option<usize>,
        /// LoRA alpha, where given.
        alpha: Option<f64>,
        /// Dropout in training.
        dropout: f64,
    },
}

/// Optimizer, learning rate and how many steps.
#[derive(Clone, Debug)]
pub struct OptimizerConfig {
    /// Betas, epsilon, weight decay.
    pub adamw: AdamW,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How the learning rate falls.
    pub schedule: Schedule,
    /// Fraction of the steps over which the learning rate rises.
    pub warmup_ratio: f64,
    /// Steps over which it rises, in place of `warmup_ratio`.
    pub warmup_steps: Option<u64>,
    /// Maximum gradient norm; 0 disables clipping.
    pub max_grad_norm: f64,
    /// Examples per optimizer step, over all devices.
    pub batch_size: usize,
    /// Passes over the data.
    pub num_epochs: f64,
    /// Steps to take, in place of `num_epochs`.
    pub max_steps: Option<u64>,
}

impl OptimizerConfig {
    /// Steps of an epoch, of the run and of its warm-up.
    pub(crate) fn steps(&self, examples: usize) -> Steps {
        let per_epoch = examples.div_ceil(self.batch_size) as u64;
        let total = self.max_steps.unwrap_or((self.num_epochs * per_epoch as f64).ceil() as u64);
        let warmup = self.warmup_steps.unwrap_or((self.warmup_ratio * total as f64).ceil() as u64);
        Steps { per_epoch, total, warmup }
    }
}

/// How many steps a run takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Steps {
    pub(crate) per_epoch: u64,
    pub(crate) total: u64,
    pub(crate) warmup: u64,
}

/// Where a run is written, and how often.
#[derive(Clone, Debug)]
pub struct OutputConfig {
    /// The folder; `None` for the next free `output/<model>-N`.
    pub dir: Option<PathBuf>,
    /// Whether a new run gets a folder of its own inside of `dir`, as ms-swift makes them: `vN-TIME`.
    pub version: bool,
    /// Steps between lines of the log.
    pub logging_steps: u64,
    /// Steps between evaluations.
    pub eval_steps: u64,
    /// Steps between checkpoints.
    pub save_steps: u64,
    /// Time between checkpoints, beside those of `save_steps`.
    pub save_every: Option<Duration>,
    /// Checkpoints to keep, the newest ones; `None` for all.
    pub save_total_limit: Option<usize>,
    /// The checkpoint to resume from.
    pub resume: Option<Resume>,
    /// Where its numbers go beside its folder.
    pub report: ReportConfig,
}

/// Where the numbers of a run go beside its folder.
#[derive(Clone, Debug, Default)]
pub struct ReportConfig {
    /// The trackers, each once.
    pub to: Vec<Service>,
    /// The run's name there; `None` for its folder's.
    pub run_name: Option<String>,
    /// The project or experiment there; `None` for what the tracker's own variable says.
    pub project: Option<String>,
}

/// A program that shows numbers of runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Weights & Biases, offline.
    Wandb,
    /// SwanLab, offline.
    Swanlab,
    /// An MLflow server.
    Mlflow,
}

/// What a run resumes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The latest whole checkpoint of the output folder, or the beginning where there is none.
    Latest,
    /// A checkpoint folder.
    From(PathBuf),
}

/// The page of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Dashboard {
    /// None.
    #[default]
    Off,
    /// At the usual address.
    Usual,
    /// At an address of the user's.
    At(String),
}

impl TrainConfig {
    /// What the data side is asked for, with rows from `paths` for a model and what the losses want.
    pub(crate) fn rows(
        &self,
        paths: &[String],
        (graph, positions): (&ModelGraph, Option<usize>),
        wanted: &Wanted,
    ) -> DataOptions {
        let batch_size = self.optimizer.batch_size;
        DataOptions { paths: paths.to_vec(), wanted: wanted.clone(), batch_size, ..self.data.clone() }
            .of_model(graph, positions)
    }

    /// The record of the run's flags, and of what they came to: the packing, the `losses` with all of their options, what is
    /// known of the run before its first step, and everything that decides the steps, as `args.json` has it.
    pub(crate) fn args_json(
        &self,
        packing: Packing,
        losses: &Value,
        facts: &Value,
        settings: &Map<String, Value>,
    ) -> Result<Vec<u8>> {
        let mut all = self.flags.clone();
        let mut resolved = json!({PACKING: packing, "losses": losses, "settings": settings});
        for name in ["package", "device", "ranks", "parameters", "total_steps", "warmup_steps"] {
            resolved[name] = facts[name].clone();
        }
        all.insert(RESOLVED.to_owned(), resolved);
        let text = serde_json::to_string_pretty(&all);
        Ok(text.map_err(|e| dpo_core::error::Error::run(e.to_string()))?.into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_to_evaluate_on_may_have_names() {
        let values = ["easy=a.jsonl#5", "b.jsonl", "easy=c.jsonl", "hf::owner/name", "./x=y.jsonl"].map(str::to_owned);
        let sets: Vec<(String, Vec<String>)> =
            EvalRows::parse(&values).into_iter().map(|s| (s.name, s.paths)).collect();
        let paths = |paths: &[&str]| paths.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            sets,
            [
                ("easy".to_owned(), paths(&["a.jsonl#5", "c.jsonl"])),
                (String::new(), paths(&["b.jsonl", "hf::owner/name", "./x=y.jsonl"]))
            ]
        );
    }
}
