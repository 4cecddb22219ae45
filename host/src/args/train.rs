//! The flags of `dpo-host train`, what of them is refused, and the settings that they become.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use dpo_core::aux_loss::RouterAuxLoss;
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::memory::free_memory;
use dpo_core::optimizer::AdamW;
use dpo_core::plan::MemoryOptions;
use dpo_data::Wanted;
use dpo_hub::model::ModelOptions;
use dpo_ranks::{Place, Timeouts};
use dpo_train::config::{
    Dashboard, EvalRows, EvaluationConfig, OptimizerConfig, OutputConfig, ReferenceConfig, Resume, TrainConfig,
};
use dpo_train::schedule::Schedule;
use serde::Serialize;
use serde_json::json;

use super::data::DataArgs;
use super::lora::{LORA_ALPHA, LORA_RANK, LoraArgs};
use super::loss::LossArgs;
use super::model::ModelArgs;
use super::report::ReportArgs;
use super::storage::StorageArgs;
use super::{ABOVE_0, Auto, BELOW_1, DeviceArg, FROM_0, MINUTES, SHARE, SizeArg, record, refuse_out_of_range};
use crate::demo;

/// Flags of `dpo-host train`. The field docs are the manual.
#[derive(Args, Clone, Debug, Serialize)]
#[command(next_help_heading = "Model and data")]
pub(crate) struct TrainArgs {
    /// Flags from a file, TOML, YAML or the args.json of a run; those of the command line win
    #[arg(long, value_name = "FILE", help_heading = "Options")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Print steps, evaluations, remarks and the end as lines of JSON, to stdout
    #[arg(long, help_heading = "Options")]
    #[serde(skip)]
    pub(crate) json: bool,
    /// Fields whose flags were given, here or in a file
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) given: Vec<String>,
    /// What the demo is trained with, to be said
    #[arg(skip)]
    #[serde(skip)]
    demo: Option<String>,
    /// Folders of plugins, which are flags of all commands
    #[arg(skip)]
    pub(crate) plugin_dir: Vec<PathBuf>,
    #[command(flatten)]
    #[serde(flatten)]
    reading: ModelArgs,
    /// Checkpoint: a folder, or a model of a hub: owner/name[@revision] of Hugging Face, ms::owner/name of ModelScope; demo is
    /// the built-in one [default: demo, where --dataset is not given either]
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    data: DataArgs,
    /// Rows to evaluate on, as for --dataset; with names, several sets that are evaluated each by itself [default: none]
    #[arg(long, value_name = "[NAME=]PATH[#N]", num_args = 1..)]
    val_dataset: Vec<String>,
    /// Fraction of examples held out for evaluation
    #[arg(long, value_name = "0..1", default_value_t = 0.0)]
    split_dataset_ratio: f64,
    /// PEFT adapter to continue from, and the reference, if that is not named [default: a new adapter]
    #[arg(long, visible_alias = "adapters", value_name = "DIR")]
    init_adapter: Option<PathBuf>,
    /// Reference model, as for --model, with the tokenizer of that [default: the model, with the adapter of the start]
    #[arg(long, value_name = "DIR|ID")]
    ref_model: Option<String>,
    /// PEFT adapter of the reference model [default: none, with --ref-model]
    #[arg(long, value_name = "DIR")]
    ref_adapter: Option<PathBuf>,
    /// Where the run is written [default: the next free folder output/<model>-N]
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Write into a new folder inside of --output-dir, as ms-swift does: v0-TIME, v1-TIME
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    add_version: bool,

    #[command(flatten)]
    #[serde(flatten)]
    loss: LossArgs,
    /// Coefficient of the auxiliary loss that spreads tokens over the experts of a mixture; 0 leaves it out [default: what the model's
    /// config says, where its family has such a loss]
    #[arg(long, value_name = "W", help_heading = "Loss")]
    router_aux_loss_coef: Option<f64>,

    /// Where to compute; auto is the first GPU that can be used, else the CPU
    #[arg(long, value_name = "auto|cpu|cuda[:N,...]", default_value_t = DeviceArg::Auto, help_heading = "Device")]
    device: DeviceArg,
    /// Number of processes, each with a GPU of its own, or sharing the CPU; leave it out under torchrun, srun or mpirun
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Device")]
    pub(crate) gpus: usize,
    /// Type of weights and matmuls
    #[arg(long, value_enum, default_value_t = Dtype::Auto, help_heading = "Device")]
    dtype: Dtype,
    /// Memory limit, of the GPU or of the CPU's, such as 24GiB [default: what is free]
    #[arg(long, value_name = "SIZE", help_heading = "Device")]
    gpu_memory: Option<SizeArg>,
    /// Tokens of a micro-batch (gradient accumulation follows from it); auto is as many as fit into memory
    #[arg(long, value_name = "auto|N", default_value_t = Auto(None), help_heading = "Device")]
    micro_batch_tokens: Auto<usize>,
    /// Activation checkpointing: recompute a layer's activations in the backward pass instead of saving them; auto saves
    /// what fits into memory
    #[arg(
        long,
        value_name = "auto|true|false",
        num_args = 0..=1,
        default_missing_value = "true",
        visible_alias = "gradient-checkpointing",
        default_value_t = Auto(None),
        help_heading = "Device"
    )]
    recompute: Auto<bool>,
    #[command(flatten)]
    #[serde(flatten)]
    storage: StorageArgs,

    /// Shard the frozen base weights over the processes (FSDP-like): each keeps a part and gathers a layer before it
    /// computes it; auto does so where they do not fit otherwise
    #[arg(long, value_name = "auto|true|false", num_args = 0..=1, default_missing_value = "true", default_value_t = Auto(None), help_heading = "Ranks")]
    shard_base: Auto<bool>,
    /// How often to restart all processes, from the last checkpoint, when one is lost
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Ranks")]
    pub(crate) max_restarts: usize,
    /// Seconds without a heartbeat after which a process counts as lost
    #[arg(long, value_name = "SECONDS", default_value_t = 8.0, help_heading = "Ranks")]
    watchdog: f64,
    /// Seconds without progress on any process after which the run is stuck and ends
    #[arg(long, value_name = "SECONDS", default_value_t = 1800.0, help_heading = "Ranks")]
    progress_timeout: f64,
    /// Seconds that processes wait for each other at the start
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0, help_heading = "Ranks")]
    rendezvous: f64,

    /// Examples per optimizer step, over all devices
    #[arg(long, value_name = "EXAMPLES", default_value_t = 16, help_heading = "Optimizer")]
    batch_size: usize,
    /// Epochs: passes over the data
    #[arg(long, alias = "epochs", value_name = "N", default_value_t = 1.0, help_heading = "Optimizer")]
    num_epochs: f64,
    /// Optimizer steps, in place of --num-epochs [default: what --num-epochs says]
    #[arg(long, value_name = "N", help_heading = "Optimizer")]
    max_steps: Option<u64>,
    /// Peak learning rate
    #[arg(long, alias = "lr", value_name = "LR", default_value_t = 1e-4, help_heading = "Optimizer")]
    learning_rate: f64,
    /// Learning rate schedule after the warmup
    #[arg(long, value_enum, default_value_t = ScheduleArg::Cosine, help_heading = "Optimizer")]
    lr_scheduler: ScheduleArg,
    /// Learning rate at the end of a schedule that does not fall to 0: of cosine_with_min_lr [default: 0] and polynomial
    /// [default: 1e-7]
    #[arg(long, value_name = "LR", help_heading = "Optimizer")]
    min_lr: Option<f64>,
    /// Fraction of the steps over which the learning rate warms up
    #[arg(long, value_name = "0..1", default_value_t = 0.0, help_heading = "Optimizer")]
    warmup_ratio: f64,
    /// Warmup steps, in place of --warmup-ratio [default: what --warmup-ratio says]
    #[arg(long, value_name = "N", help_heading = "Optimizer")]
    warmup_steps: Option<u64>,
    /// AdamW weight decay
    #[arg(long, value_name = "W", default_value_t = 0.1, help_heading = "Optimizer")]
    weight_decay: f64,
    /// Adam beta1
    #[arg(long, value_name = "B", default_value_t = 0.9, help_heading = "Optimizer")]
    adam_beta1: f64,
    /// Adam beta2
    #[arg(long, value_name = "B", default_value_t = 0.95, help_heading = "Optimizer")]
    adam_beta2: f64,
    /// Adam epsilon
    #[arg(long, value_name = "E", default_value_t = 1e-8, help_heading = "Optimizer")]
    adam_epsilon: f64,
    /// Maximum gradient norm; 0 disables clipping
    #[arg(long, value_name = "N", default_value_t = 1.0, help_heading = "Optimizer")]
    max_grad_norm: f64,

    #[command(flatten)]
    #[serde(flatten)]
    lora: LoraArgs,

    /// Steps between lines of the log
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Output")]
    logging_steps: u64,
    /// Steps between evaluations [default: as --save-steps]
    #[arg(long, value_name = "N", help_heading = "Output")]
    eval_steps: Option<u64>,
    /// Evaluate before the first step, too
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set, help_heading = "Output")]
    eval_on_start: bool,
    /// Steps between checkpoints
    #[arg(long, value_name = "N", default_value_t = 500, help_heading = "Output")]
    save_steps: u64,
    /// Minutes between checkpoints, beside those of --save-steps [default: none]
    #[arg(long, value_name = "N", help_heading = "Output")]
    save_minutes: Option<f64>,
    /// Checkpoints to keep, the newest ones, and that of the best evaluation [default: all]
    #[arg(long, value_name = "N", help_heading = "Output")]
    save_total_limit: Option<usize>,
    /// End with the adapter of the best evaluation, which is saved as a checkpoint, not with that of the last step
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set, help_heading = "Output")]
    load_best_model_at_end: bool,
    /// End early after so many evaluations, one after the other, that were not better than the best [default: never]
    #[arg(long, value_name = "N", help_heading = "Output")]
    early_stopping_patience: Option<u64>,
    /// Metric that says which evaluation is the best: a name of logging.jsonl, such as eval_rewards/accuracies [default:
    /// eval_loss, of the first of several sets]
    #[arg(long, value_name = "NAME", help_heading = "Output")]
    metric_for_best_model: Option<String>,
    /// Whether more of that metric is better [default: unless it is a loss]
    #[arg(long, value_name = "BOOL", help_heading = "Output")]
    greater_is_better: Option<bool>,
    /// Serve a page with the run's curves while it trains; without an address on 127.0.0.1, see `dpo-host ui` [default: no
    /// page]
    #[arg(long, value_name = "ADDR:PORT", num_args = 0..=1, default_missing_value = "true", help_heading = "Output")]
    dashboard: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    report: ReportArgs,
    /// Resume from a checkpoint folder, or from the latest one in --output-dir [default: start anew]
    #[arg(long, value_name = "DIR|latest", help_heading = "Output")]
    resume_from_checkpoint: Option<String>,
}

/// Type of weights and matmuls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    /// bfloat16 on a GPU, float32 on the CPU
    Auto,
    /// float32: the CPU
    Float32,
    /// bfloat16: a GPU
    Bfloat16,
}

/// Learning rate schedule after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum ScheduleArg {
    /// Linear decay to 0
    Linear,
    /// Cosine decay to 0
    Cosine,
    /// No decay
    Constant,
    /// Linear decay to --min-lr
    Polynomial,
    /// Decay with the square root of the steps
    #[value(name = "inverse_sqrt")]
    #[serde(rename = "inverse_sqrt")]
    InverseSqrt,
    /// Cosine decay to --min-lr
    #[value(name = "cosine_with_min_lr")]
    #[serde(rename = "cosine_with_min_lr")]
    CosineWithMinLr,
}

/// Most processes that are started on one host.
const MOST_PROCESSES: usize = 256;
/// The name of the built-in model.
const DEMO: &str = "demo";
/// Most seconds that processes wait for each other: thirty years.
const LONGEST_WAIT: f64 = 1e9;

impl TrainArgs {
    /// Without model and data, the demo with settings that suit it.
    pub(crate) fn demo_or_given(&mut self) -> Result<()> {
        let demo = || demo::write().map(|demo| (demo, |path: PathBuf| path.display().to_string()));
        match (self.model.as_deref(), self.data.dataset.is_empty()) {
            (Some(DEMO), false) => {
                let (demo, text) = demo()?;
                self.model = Some(text(demo.model));
                Ok(())
            }
            (Some(DEMO) | None, true) => {
                let (demo, text) = demo()?;
                self.model = Some(text(demo.model));
                self.data.dataset = vec![text(demo.dataset)];
                self.val_dataset = vec![text(demo.val_dataset)];
                self.apply_demo_defaults();
                Ok(())
            }
            (Some(_), false) => Ok(()),
            (Some(_), true) => Err(Error::input("no data")
                .at("--dataset")
                .help("name rows: --dataset FILE, or --dataset hf::owner/name")),
            (None, false) => Err(Error::input("no model").at("--model").help(
                "name a checkpoint folder, a model of a hub, --model owner/name, or the built-in one, --model demo",
            )),
        }
    }

    /// Settings under which the demo's model changes its tone within a minute and keeps what it knows. A strong reference and
    /// the likelihood of the chosen answers are what keeps a model of this size from stammering.
    fn apply_demo_defaults(&mut self) {
        let given = |name: &str| self.given.iter().any(|given| given == name);
        let (rate, epochs) = (given("learning_rate"), given("num_epochs"));
        if !rate {
            self.learning_rate = 2e-3;
        }
        if !epochs {
            self.num_epochs = 2.0;
        }
        let mut said = format!("--learning-rate {} --num-epochs {}", self.learning_rate, self.num_epochs);
        if self.loss.names == ["sigmoid"] {
            let (beta, alpha) = (self.loss.beta.get_or_insert(0.5), self.loss.rpo_alpha.get_or_insert(1.0));
            said += &format!(" --beta {beta} --rpo-alpha {alpha}");
        }
        self.demo = Some(said);
    }

    pub(crate) fn refuse_unsupported(&self) -> Result<()> {
        if self.gpus > MOST_PROCESSES {
            return Err(Error::input(format!(
                "{} processes on one host; up to {MOST_PROCESSES} are started",
                self.gpus
            ))
            .at("--gpus")
            .help("the number of GPUs that this host has, or leave it out under torchrun, srun or mpirun"));
        }
        if self.gpus == 0 {
            return Err(Error::input("should be above 0").at("--gpus").help("say --device cpu to compute without one"));
        }
        if self.batch_size == 0 {
            return Err(Error::input("a step needs examples").at("--batch-size").help("16 is usual"));
        }
        let falls_to_min = matches!(self.lr_scheduler, ScheduleArg::Polynomial | ScheduleArg::CosineWithMinLr);
        if self.min_lr.is_some() && !falls_to_min {
            return Err(Error::input("is of the schedules cosine_with_min_lr and polynomial")
                .at("--min-lr")
                .help("add --lr-scheduler cosine_with_min_lr, or leave it out"));
        }
        if let Some(min) = self.min_lr.filter(|min| *min > self.learning_rate) {
            return Err(Error::input(format!("{min} is above the learning rate, {}", self.learning_rate))
                .at("--min-lr")
                .help("a tenth of --learning-rate is usual"));
        }
        if self.micro_batch_tokens.0 == Some(0) {
            return Err(Error::input("should be auto or above 0")
                .at("--micro-batch-tokens")
                .help("4096 to 8192 is usual"));
        }
        self.lora.refuse_out_of_range()?;
        refuse_out_of_range(&[
            ("--learning-rate", Some(self.learning_rate), FROM_0, "LoRA wants 1e-5 to 2e-4"),
            ("--num-epochs", Some(self.num_epochs), ABOVE_0, "part of an epoch is a number such as 0.5"),
            ("--max-steps", self.max_steps.map(|n| n as f64), ABOVE_0, "leave it out to take --num-epochs"),
            ("--min-lr", self.min_lr, FROM_0, "a tenth of --learning-rate is usual"),
            ("--save-minutes", self.save_minutes, MINUTES, "30 is half an hour"),
            (
                "--early-stopping-patience",
                self.early_stopping_patience.map(|n| n as f64),
                ABOVE_0,
                "3 ends a run at the third evaluation that is no better",
            ),
            ("--warmup-ratio", Some(self.warmup_ratio), SHARE, "0.05 is usual"),
            ("--weight-decay", Some(self.weight_decay), FROM_0, "0 is none"),
            ("--adam-beta1", Some(self.adam_beta1), BELOW_1, "0.9 is usual"),
            ("--adam-beta2", Some(self.adam_beta2), BELOW_1, "0.95 or 0.999 is usual"),
            ("--adam-epsilon", Some(self.adam_epsilon), ABOVE_0, "1e-8 is usual"),
            ("--router-aux-loss-coef", self.router_aux_loss_coef, FROM_0, "0 leaves it out, 0.001 is usual"),
            ("--max-grad-norm", Some(self.max_grad_norm), FROM_0, "0 is no clipping"),
            (
                "--split-dataset-ratio",
                Some(self.split_dataset_ratio),
                BELOW_1,
                "0.01 holds out every hundredth example",
            ),
        ])
    }

    /// A flag that reads what the command line does not show, loads code, or does what a page does otherwise.
    pub(super) fn beyond_a_run(&self) -> Option<&'static str> {
        let serves = self.dashboard.as_deref().is_some_and(|address| address != "false");
        let given = [
            ("--plugin-dir", !self.plugin_dir.is_empty()),
            ("--config", self.config.is_some()),
            ("--dashboard", serves),
            ("--add-version", self.add_version),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }

    /// Where the run is written, if that was said.
    pub(super) fn output_dir(&self) -> Option<&Path> {
        self.output_dir.as_deref()
    }

    /// Whether it goes on from a checkpoint.
    pub(super) fn resumes(&self) -> bool {
        self.resume_from_checkpoint.is_some()
    }

    pub(crate) fn note_ignored(&self) {
        if let Some(settings) = &self.demo {
            console::note(format!("the demo has settings of its own, unless you say otherwise: {settings}"));
        }
        self.lora.note_ignored();
    }

    /// Says where the type that was asked for is not that of the device.
    pub(crate) fn note_dtype(&self, on_gpu: bool) {
        if self.dtype == Dtype::Bfloat16 && !on_gpu {
            console::note("--dtype bfloat16 is for GPUs; the CPU computes in float32");
        }
    }

    /// The device, as `--dtype` allows it: GPUs compute in bfloat16, the CPU in float32.
    pub(crate) fn device(&self) -> Result<DeviceArg> {
        match (self.dtype, &self.device) {
            (Dtype::Float32, DeviceArg::Auto) => Ok(DeviceArg::Cpu),
            (Dtype::Float32, DeviceArg::Cuda(_)) => Err(Error::input("GPUs compute in bfloat16")
                .at("--dtype")
                .help("leave it out, or add --device cpu for float32")),
            (_, device) => Ok(device.clone()),
        }
    }

    /// How ranks wait for each other.
    pub(crate) fn timeouts(&self) -> Result<Timeouts> {
        let seconds = |flag: &str, value: f64| match Duration::try_from_secs_f64(value) {
            Ok(time) if !time.is_zero() && value <= LONGEST_WAIT => Ok(time),
            _ => {
                Err(Error::input(format!("{value:e} should be a number of seconds above 0 and up to {LONGEST_WAIT:e}"))
                    .at(flag)
                    .help("10 is ten seconds"))
            }
        };
        Ok(Timeouts {
            rendezvous: seconds("--rendezvous", self.rendezvous)?,
            watchdog: seconds("--watchdog", self.watchdog)?,
            progress: seconds("--progress-timeout", self.progress_timeout)?,
        })
    }

    /// What the flags say, typed, for a rank of some or the only process.
    pub(crate) fn resolve(&self, place: Option<&Place>, on_gpu: bool) -> Result<TrainConfig> {
        Ok(TrainConfig {
            model: self.model.clone().unwrap_or_default(),
            reading: ModelOptions {
                router_aux_loss: self.router_aux_loss_coef.map_or(RouterAuxLoss::OfConfig, RouterAuxLoss::Coefficient),
                ..self.reading.options()
            },
            adapter: self.lora.starting_adapter(self.init_adapter.as_deref())?,
            data: self.data.options(&[], &Wanted::default())?,
            dataset: self.data.dataset.clone(),
            val_dataset: EvalRows::parse(&self.val_dataset),
            split_dataset_ratio: self.split_dataset_ratio,
            evaluation: EvaluationConfig {
                on_start: self.eval_on_start,
                load_best: self.load_best_model_at_end,
                patience: self.early_stopping_patience,
                metric: self.metric_for_best_model.clone(),
                greater_is_better: self.greater_is_better,
            },
            reference: (self.ref_model.is_some() || self.ref_adapter.is_some()).then(|| ReferenceConfig {
                model: self.ref_model.clone(),
                // Its family is that of its own architecture.
                reading: ModelOptions { plugin: None, ..self.reading.options() },
                adapter: self.ref_adapter.clone(),
            }),
            objective: self.loss.objective()?,
            optimizer: self.optimizer(),
            memory: self.memory(place, on_gpu),
            output: self.output(),
            dashboard: match self.dashboard.as_deref() {
                None | Some("false") => Dashboard::Off,
                Some("true") => Dashboard::Usual,
                Some(address) => Dashboard::At(address.to_owned()),
            },
            plugin_dirs: self.plugin_dir.clone(),
            flags: self.resolved_flags(),
        })
    }

    /// The flags with the defaults that help states in words.
    fn resolved_flags(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut flags = record(self);
        let mut default = |name: &str, value: serde_json::Value| {
            let unsaid = flags.get(name).is_none_or(|v| v.is_null() || v.as_array().is_some_and(Vec::is_empty));
            if unsaid {
                flags.insert(name.to_owned(), value);
            }
        };
        default("eval_steps", json!(self.save_steps));
        if self.init_adapter.is_none() {
            default("lora_rank", json!(LORA_RANK));
            default("lora_alpha", json!(LORA_ALPHA));
            default("target_modules", json!(["all-linear"]));
        }
        flags
    }

    fn optimizer(&self) -> OptimizerConfig {
        // A part of the learning rate; of none it does not matter.
        let end = |default: f64| self.min_lr.unwrap_or(default) / self.learning_rate.max(f64::MIN_POSITIVE);
        OptimizerConfig {
            adamw: AdamW {
                beta1: self.adam_beta1,
                beta2: self.adam_beta2,
                eps: self.adam_epsilon,
                weight_decay: self.weight_decay,
                loraplus_lr_ratio: self.lora.loraplus_lr_ratio,
            },
            learning_rate: self.learning_rate,
            schedule: match self.lr_scheduler {
                ScheduleArg::Linear => Schedule::Linear,
                ScheduleArg::Cosine => Schedule::Cosine,
                ScheduleArg::Constant => Schedule::Constant,
                ScheduleArg::InverseSqrt => Schedule::InverseSqrt,
                ScheduleArg::Polynomial => Schedule::Polynomial(end(1e-7)),
                ScheduleArg::CosineWithMinLr => Schedule::CosineWithMinLr(end(0.0)),
            },
            warmup_ratio: self.warmup_ratio,
            warmup_steps: self.warmup_steps,
            max_grad_norm: self.max_grad_norm,
            batch_size: self.batch_size,
            num_epochs: self.num_epochs,
            max_steps: self.max_steps,
        }
    }

    fn memory(&self, place: Option<&Place>, on_gpu: bool) -> MemoryOptions {
        let limit = self.gpu_memory.as_ref().map(|size| size.bytes);
        // Ranks that compute on the same host's CPU share its memory.
        let sharing = if on_gpu { None } else { place.and_then(|p| p.local_size) };
        let part = || free_memory().zip(sharing).map(|(free, ranks)| free / ranks.max(1));
        self.storage.on(MemoryOptions {
            limit: limit.or_else(part),
            micro_batch_tokens: self.micro_batch_tokens.0,
            recompute: self.recompute.0,
            shard_base: self.shard_base.0,
            ..MemoryOptions::default()
        })
    }

    fn output(&self) -> OutputConfig {
        OutputConfig {
            dir: self.output_dir.clone(),
            version: self.add_version,
            logging_steps: self.logging_steps,
            eval_steps: self.eval_steps.unwrap_or(self.save_steps),
            save_steps: self.save_steps,
            save_every: self.save_minutes.map(|minutes| Duration::from_secs_f64(minutes * 60.0)),
            save_total_limit: self.save_total_limit,
            resume: self.resume_from_checkpoint.as_deref().map(|value| match value {
                "latest" => Resume::Latest,
                folder => Resume::From(folder.into()),
            }),
            report: self.report.config(),
        }
    }
}
