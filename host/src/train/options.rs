//! Everything `dpo-host train` can be told. The field docs are the manual.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::schedule::Schedule;
use crate::data::{DataOptions, Truncation, Wanted, parse_columns};
use crate::error::Result;

/// Options of `dpo-host train`.
#[derive(Args, Clone, Debug, Serialize)]
#[command(next_help_heading = "Model and data")]
pub struct TrainOptions {
    /// Flags from a file, TOML or the args.json of a run; those of the command line win
    #[arg(long, value_name = "FILE", help_heading = "Options")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Print steps, evaluations, remarks and the end as lines of JSON, to stdout
    #[arg(long, help_heading = "Options")]
    #[serde(skip)]
    pub json: bool,
    /// Fields whose flags were given, here or in a file, which defaults for a purpose leave alone
    #[arg(skip)]
    #[serde(skip)]
    pub said: Vec<String>,
    /// Model family (see `dpo-host list`); by default the one that claims the checkpoint's architecture
    #[arg(long, value_name = "NAME")]
    pub plugin: Option<String>,
    /// Checkpoint: a folder, or a model of a hub: owner/name[@revision] of Hugging Face, ms::owner/name of ModelScope.
    /// Without it and without --dataset: the demo
    #[arg(long, value_name = "DIR|ID")]
    pub model: Option<String>,
    /// How rows become pairs
    #[command(flatten)]
    #[serde(flatten)]
    pub data: DataArgs,
    /// Rows to evaluate on, as for --dataset
    #[arg(long, value_name = "PATH[#N]", num_args = 1..)]
    pub val_dataset: Vec<String>,
    /// Part of the pairs that is kept from training and evaluated on
    #[arg(long, value_name = "0..1", default_value_t = 0.0)]
    pub split_dataset_ratio: f64,
    /// PEFT adapter to go on training; it is also the reference
    #[arg(long, visible_alias = "adapters", value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,
    /// Where the run is written; by default the next free folder output/<model>-N
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,

    /// What is trained for
    #[command(flatten)]
    #[serde(flatten)]
    pub loss: LossArgs,

    /// Where to compute
    #[arg(long, value_name = "auto|cpu|cuda[:N,...]", default_value = "auto", help_heading = "Device")]
    pub device: String,
    /// Number of GPUs, each with a process of its own; leave it out under torchrun, srun or mpirun
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Device")]
    pub gpus: usize,
    /// Type of weights and products
    #[arg(long, value_enum, default_value_t = Dtype::Auto, help_heading = "Device")]
    pub dtype: Dtype,
    /// Form in which frozen weights are kept
    #[arg(long, value_enum, default_value_t = Quantization::None, help_heading = "Device")]
    pub quantization: Quantization,
    /// Most memory to use, such as 24GiB; by default what is free
    #[arg(long, value_name = "SIZE", help_heading = "Device")]
    pub gpu_memory: Option<String>,
    /// Tokens computed at once; by default as many as fit into memory
    #[arg(long, value_name = "auto|N", default_value = "auto", help_heading = "Device")]
    pub micro_batch_tokens: String,
    /// Compute a layer's values again in the backward pass instead of keeping them
    #[arg(
        long,
        value_name = "auto|true|false",
        visible_alias = "gradient-checkpointing",
        default_value = "auto",
        help_heading = "Device"
    )]
    pub recompute: String,

    /// Share the frozen weights: each process keeps a part and gathers the rest as it computes (CPU); auto where they do
    /// not fit otherwise
    #[arg(long, value_name = "auto|true|false", default_value = "auto", help_heading = "Ranks")]
    pub shard_base: String,
    /// Times to start all processes again, from the last checkpoint, when one is lost
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Ranks")]
    pub max_restarts: usize,
    /// Seconds without a sign of life after which a process counts as lost
    #[arg(long, value_name = "SECONDS", default_value_t = 8.0, help_heading = "Ranks")]
    pub watchdog: f64,
    /// Seconds that processes wait for each other at the start
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0, help_heading = "Ranks")]
    pub rendezvous: f64,

    /// Pairs per optimizer step, over all devices
    #[arg(long, value_name = "PAIRS", default_value_t = 16, help_heading = "Optimizer")]
    pub batch_size: usize,
    /// Passes over the data
    #[arg(long, value_name = "N", default_value_t = 1.0, help_heading = "Optimizer")]
    pub num_epochs: f64,
    /// Steps to take, whatever --num-epochs says
    #[arg(long, value_name = "N", help_heading = "Optimizer")]
    pub max_steps: Option<u64>,
    /// Peak learning rate
    #[arg(long, value_name = "LR", default_value_t = 1e-4, help_heading = "Optimizer")]
    pub learning_rate: f64,
    /// How the learning rate falls
    #[arg(long, value_enum, default_value_t = Schedule::Cosine, help_heading = "Optimizer")]
    pub lr_scheduler: Schedule,
    /// Part of the steps over which the learning rate rises
    #[arg(long, value_name = "0..1", default_value_t = 0.0, help_heading = "Optimizer")]
    pub warmup_ratio: f64,
    /// Steps over which the learning rate rises, whatever --warmup-ratio says
    #[arg(long, value_name = "N", help_heading = "Optimizer")]
    pub warmup_steps: Option<u64>,
    /// AdamW's decay of parameters
    #[arg(long, value_name = "W", default_value_t = 0.1, help_heading = "Optimizer")]
    pub weight_decay: f64,
    /// AdamW's decay of the first moment
    #[arg(long, value_name = "B", default_value_t = 0.9, help_heading = "Optimizer")]
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment
    #[arg(long, value_name = "B", default_value_t = 0.95, help_heading = "Optimizer")]
    pub adam_beta2: f64,
    /// AdamW's term against division by zero
    #[arg(long, value_name = "E", default_value_t = 1e-8, help_heading = "Optimizer")]
    pub adam_epsilon: f64,
    /// Length to which the gradient is clipped; 0 for no clipping
    #[arg(long, value_name = "N", default_value_t = 1.0, help_heading = "Optimizer")]
    pub max_grad_norm: f64,

    /// Rows of A
    #[arg(long, value_name = "R", help_heading = "LoRA")]
    pub lora_rank: Option<usize>,
    /// Numerator of the update's scale
    #[arg(long, value_name = "A", help_heading = "LoRA")]
    pub lora_alpha: Option<f64>,
    /// Scale by alpha / sqrt(rank) instead of alpha / rank
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set, help_heading = "LoRA")]
    pub use_rslora: bool,
    /// Accepted for other tools' scripts; dropout is off while aligning, as in TRL, LLaMA-Factory and ms-swift
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "LoRA")]
    pub lora_dropout: f64,
    /// all-linear, names of modules, or one regular expression over whole module names
    #[arg(long, value_name = "M", num_args = 1.., help_heading = "LoRA")]
    pub target_modules: Vec<String>,

    /// Steps between lines of the log
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Output")]
    pub logging_steps: u64,
    /// Steps between evaluations; by default as --save-steps
    #[arg(long, value_name = "N", help_heading = "Output")]
    pub eval_steps: Option<u64>,
    /// Steps between checkpoints
    #[arg(long, value_name = "N", default_value_t = 500, help_heading = "Output")]
    pub save_steps: u64,
    /// Checkpoints to keep, the newest ones
    #[arg(long, value_name = "N", help_heading = "Output")]
    pub save_total_limit: Option<usize>,
    /// Serve a page with the run's curves while it goes on; by default on 127.0.0.1, see `dpo-host ui`
    #[arg(long, value_name = "ADDR:PORT", num_args = 0..=1, default_missing_value = "true", help_heading = "Output")]
    pub dashboard: Option<String>,
    /// Go on from a checkpoint folder, or from the latest one in --output-dir
    #[arg(long, value_name = "DIR|latest", help_heading = "Output")]
    pub resume_from_checkpoint: Option<String>,
}

/// What is trained for; shared by `train` and `eval`.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub struct LossArgs {
    /// Losses (see `dpo-host list losses`); several are summed by --loss-weights
    #[arg(id = "loss", long, value_name = "NAME", num_args = 1.., default_values_t = ["sigmoid".to_owned()], help_heading = "Loss")]
    #[serde(rename = "loss")]
    pub names: Vec<String>,
    /// Weight of each loss; 1 by default
    #[arg(long, value_name = "W", num_args = 1.., help_heading = "Loss")]
    pub loss_weights: Vec<f64>,
    /// Strength of the reference; a loss's own default if not given (0.1 for DPO)
    #[arg(long, help_heading = "Loss")]
    pub beta: Option<f64>,
    /// Probability that a preference is wrong (cDPO with sigmoid)
    #[arg(long, value_name = "P", help_heading = "Loss")]
    pub label_smoothing: Option<f64>,
    /// Weight of an added likelihood term on the chosen answers (RPO)
    #[arg(long, value_name = "W", help_heading = "Loss")]
    pub rpo_alpha: Option<f64>,
    /// LD-DPO: weight of tokens beyond the length of the shorter answer
    #[arg(long, value_name = "0..1", help_heading = "Loss")]
    pub ld_alpha: Option<f64>,
    /// Divergence from the reference: reverse_kl, forward_kl, js_divergence or alpha_divergence
    #[arg(long, value_name = "NAME", help_heading = "Loss")]
    pub f_divergence: Option<String>,
    /// Weight pairs by how likely the policy finds them (WPO)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set, help_heading = "Loss")]
    pub use_weighting: bool,
    /// Any option of a loss plugin (see `dpo-host describe NAME`)
    #[arg(long, value_name = "NAME=VALUE", num_args = 1.., help_heading = "Loss")]
    pub loss_option: Vec<String>,
}

/// How rows become examples; shared by `train`, `data` and `eval`.
#[derive(Args, Clone, Debug, Serialize)]
#[command(next_help_heading = "Model and data")]
pub struct DataArgs {
    /// Rows: files or folders of jsonl, json, csv, parquet, or hf::owner/name of Hugging Face; #N takes N of them
    #[arg(long, value_name = "PATH[#N]", num_args = 1..)]
    pub dataset: Vec<String>,
    /// Format of the rows (see `dpo-host list datasets`); by default it is found out
    #[arg(long, value_name = "NAME")]
    pub dataset_format: Option<String>,
    /// Columns to rename before a format reads them, as JSON: '{"old": "new"}'
    #[arg(long, value_name = "JSON")]
    pub columns: Option<String>,
    /// Most tokens of prompt and one answer
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub max_length: usize,
    /// What to do with longer rows: drop them, cut the prompt's head, or cut the answers' tails
    #[arg(long, value_enum, default_value_t = Truncation::Delete)]
    pub truncation_strategy: Truncation,
    /// Take examples in a new random order in every epoch
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub shuffle: bool,
    /// Seed of the order, of the split and of A
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// End at the first row that cannot be used, instead of skipping it
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    pub strict: bool,
}

impl DataArgs {
    /// What the data side is asked for, with rows from `paths`, a family's limit on their length, and the examples
    /// that a loss wants.
    ///
    /// # Errors
    /// `--columns` that is no JSON object of names.
    pub fn options(&self, paths: &[String], limit: Option<usize>, wanted: &Wanted) -> Result<DataOptions> {
        let columns = self.columns.as_deref().map(parse_columns).transpose()?.unwrap_or_default();
        Ok(DataOptions {
            paths: paths.to_vec(),
            wanted: wanted.clone(),
            format: self.dataset_format.clone(),
            columns,
            max_length: self.max_length.min(limit.unwrap_or(usize::MAX)),
            truncation: self.truncation_strategy,
            strict: self.strict,
            shuffle: self.shuffle,
            seed: self.seed,
        })
    }
}

/// Type of weights and products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// float32 on the CPU.
    Auto,
    /// 32 bits.
    Float32,
    /// 16 bits with the exponent of 32.
    Bfloat16,
}

/// Form in which frozen weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// As they are.
    None,
    /// 4 bits (Dettmers et al. 2023).
    Nf4,
    /// 8-bit floats.
    Fp8,
}
