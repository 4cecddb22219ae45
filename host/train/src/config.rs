//! The settings of a run, typed and resolved. How flags become these is the command line's business.

use std::path::PathBuf;

use dpo_core::error::Result;
use dpo_core::lora::Targets;
use dpo_core::optimizer::AdamW;
use dpo_core::plan::{MemoryOptions, Packing};
use dpo_data::{DataOptions, Wanted};
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
    /// Model family; `None` for the one that claims the checkpoint's architecture.
    pub plugin: Option<String>,
    /// Adapter to start from.
    pub adapter: StartAdapter,
    /// How rows become examples.
    pub data: DataOptions,
    /// Rows to train on: `PATH` or `PATH#N`.
    pub dataset: Vec<String>,
    /// Rows to evaluate on.
    pub val_dataset: Vec<String>,
    /// Fraction of the examples held out for evaluation, where there is no `val_dataset`.
    pub split_dataset_ratio: f64,
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
    /// Every flag with its resolved value, by name: what `args.json` records.
    pub flags: Map<String, Value>,
}

/// The adapter at the start, which is also the reference.
#[derive(Clone, Debug)]
pub enum StartAdapter {
    /// A new one: A Kaiming-uniform, B zero.
    New {
        /// LoRA rank r.
        rank: usize,
        /// LoRA alpha.
        alpha: f64,
        /// Whether the update is scaled by `alpha / sqrt(rank)` instead of `alpha / rank`.
        rslora: bool,
        /// Which linears.
        targets: Targets,
    },
    /// A PEFT adapter. Rank and alpha are its own; where the user names them they have to agree.
    From {
        /// Its folder.
        folder: PathBuf,
        /// LoRA rank, where given.
        rank: Option<usize>,
        /// LoRA alpha, where given.
        alpha: Option<f64>,
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
    /// Checkpoints to keep, the newest ones; `None` for all.
    pub save_total_limit: Option<usize>,
    /// The checkpoint to resume from.
    pub resume: Option<Resume>,
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
    pub(crate) fn rows(&self, paths: &[String], graph: &ModelGraph, wanted: &Wanted) -> DataOptions {
        DataOptions { paths: paths.to_vec(), wanted: wanted.clone(), ..self.data.clone() }.of_model(graph)
    }

    /// The record of the run's flags, and of what they came to: the packing, the family's package, and everything that decides
    /// the steps, as `args.json` has it.
    pub(crate) fn args_json(
        &self,
        packing: Packing,
        package: &Value,
        settings: &Map<String, Value>,
    ) -> Result<Vec<u8>> {
        let mut all = self.flags.clone();
        all.insert(RESOLVED.to_owned(), json!({PACKING: packing, "package": package, "settings": settings}));
        let text = serde_json::to_string_pretty(&all);
        Ok(text.map_err(|e| dpo_core::error::Error::run(e.to_string()))?.into_bytes())
    }
}
