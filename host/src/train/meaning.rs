//! What options mean: for the objective, for the device, for memory; the demo's; and those that mean nothing.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, json};

use super::ObjectiveOptions;
use super::options::{Dtype, LossArgs, Quantization, TrainOptions};
use crate::error::{Error, Result};
use crate::plan::{Wishes, free_memory, parse_size};
use crate::ranks::{Patience, Place};
use crate::{console, demo, device};

/// The model that was named; without model and data, the demo with settings that suit it.
pub(super) fn demo_or_given(options: &mut TrainOptions) -> Result<String> {
    match (&options.model, options.data.dataset.is_empty()) {
        (Some(model), false) => Ok(model.clone()),
        (Some(_), true) => {
            Err(Error::input("no data").at("--dataset").help("name rows: --dataset FILE, or --dataset hf::owner/name"))
        }
        (None, false) => Err(Error::input("no model")
            .at("--model")
            .help("name a checkpoint folder, or a model of a hub: --model owner/name")),
        (None, true) => {
            let demo = demo::write()?;
            let text = |p: &Path| p.display().to_string();
            let model = text(&demo.model);
            options.model = Some(model.clone());
            options.data.dataset = vec![text(&demo.dataset)];
            options.val_dataset = vec![text(&demo.val_dataset)];
            options.suit_demo();
            Ok(model)
        }
    }
}

pub(super) fn refuse_unsupported(options: &TrainOptions) -> Result<()> {
    if options.gpus == 0 {
        return Err(Error::input("should be above 0").at("--gpus").help("say --device cpu to compute without one"));
    }
    if options.quantization != Quantization::None {
        return Err(Error::input("quantised weights: this version computes in bf16 or f32")
            .at("--quantization")
            .help("leave it out; `dpo-host plan` says what fits, and what --recompute and --shard-base save"));
    }
    if options.batch_size == 0 {
        return Err(Error::input("a step needs pairs").at("--batch-size").help("16 is usual"));
    }
    options.refuse_out_of_range()
}

pub(super) fn note_ignored(options: &TrainOptions) {
    if options.lora_dropout != 0.0 {
        console::note(
            "--lora-dropout is ignored: dropout is off while aligning, as in TRL, LLaMA-Factory and ms-swift",
        );
    }
    if options.dtype == Dtype::Bfloat16 && options.device == "cpu" {
        console::note("--dtype bfloat16 is for GPUs; the CPU computes in float32");
    }
}

/// The GPU of `--device`, or `None` for the CPU. GPUs compute in bf16, the CPU in f32.
pub(super) fn choose_device(options: &TrainOptions, local_rank: Option<usize>) -> Result<Option<usize>> {
    let exact = options.dtype == Dtype::Float32;
    if exact && options.device == "auto" {
        return Ok(None);
    }
    let chosen = device::choose(&options.device, local_rank);
    match chosen.map_err(|e| e.help("leave it out to compute on what there is"))? {
        Some(_) if exact => Err(Error::input("GPUs compute in bfloat16")
            .at("--dtype")
            .help("leave it out, or add --device cpu for float32")),
        gpu => Ok(gpu),
    }
}

/// Numbers that make sense, and how to say so.
type Range = (fn(f64) -> bool, &'static str);
const FROM_0: Range = (|x| x >= 0.0, "0 or more");
const ABOVE_0: Range = (|x| x > 0.0, "above 0");
const SHARE: Range = (|x| (0.0..=1.0).contains(&x), "from 0 to 1");
const BELOW_1: Range = (|x| (0.0..1.0).contains(&x), "from 0 to below 1");

/// Flags with their numbers, the range in which these make sense, and what is usual.
fn refuse_out_of_range(numbers: &[(&str, Option<f64>, Range, &str)]) -> Result<()> {
    for (flag, number, (within, range), help) in numbers {
        if let Some(x) = number.filter(|x| !x.is_finite() || !within(*x)) {
            return Err(Error::input(format!("should be {range}, not {x}")).at(flag).help(*help));
        }
    }
    Ok(())
}

impl LossArgs {
    /// The objective that they describe.
    ///
    /// # Errors
    /// Numbers of which no loss could make sense, and options that are no NAME=VALUE.
    pub fn objective(&self) -> Result<ObjectiveOptions> {
        refuse_out_of_range(&[
            ("--beta", self.beta, ABOVE_0, "0.01 to 0.5 is usual; the lower, the further from the reference"),
            ("--label-smoothing", self.label_smoothing, BELOW_1, "the part of preferences that are wrong, such as 0.1"),
            ("--rpo-alpha", self.rpo_alpha, FROM_0, "0.1 to 1 is usual"),
            ("--ld-alpha", self.ld_alpha, SHARE, "1 is plain DPO"),
        ])?;
        let mut options = Map::new();
        let numbers = [("beta", self.beta), ("label_smoothing", self.label_smoothing)];
        options.extend(numbers.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?)))));
        options.extend(self.f_divergence.iter().map(|f| ("f_divergence".to_owned(), json!(f))));
        for option in &self.loss_option {
            let Some((name, value)) = option.split_once('=') else {
                return Err(Error::input(format!("'{option}' should be NAME=VALUE"))
                    .at("--loss-option")
                    .help("`dpo-host describe LOSS` names a loss's options"));
            };
            options.insert(name.into(), value.parse::<f64>().map_or_else(|_| json!(value), |n| json!(n)));
        }
        Ok(ObjectiveOptions {
            losses: self.names.clone(),
            weights: self.loss_weights.clone(),
            options,
            rpo_alpha: self.rpo_alpha,
            ld_alpha: self.ld_alpha,
            weighting: self.use_weighting,
        })
    }
}

impl TrainOptions {
    /// Numbers of which no run could make sense.
    fn refuse_out_of_range(&self) -> Result<()> {
        refuse_out_of_range(&[
            ("--learning-rate", Some(self.learning_rate), FROM_0, "LoRA wants 1e-5 to 2e-4"),
            ("--num-epochs", Some(self.num_epochs), ABOVE_0, "part of an epoch is a number such as 0.5"),
            ("--max-steps", self.max_steps.map(|n| n as f64), ABOVE_0, "leave it out to take --num-epochs"),
            ("--warmup-ratio", Some(self.warmup_ratio), SHARE, "0.05 is usual"),
            ("--weight-decay", Some(self.weight_decay), FROM_0, "0 is none"),
            ("--adam-beta1", Some(self.adam_beta1), BELOW_1, "0.9 is usual"),
            ("--adam-beta2", Some(self.adam_beta2), BELOW_1, "0.95 or 0.999 is usual"),
            ("--adam-epsilon", Some(self.adam_epsilon), ABOVE_0, "1e-8 is usual"),
            ("--max-grad-norm", Some(self.max_grad_norm), FROM_0, "0 is no clipping"),
            ("--lora-alpha", self.lora_alpha, ABOVE_0, "two to four times the rank is usual"),
            ("--lora-dropout", Some(self.lora_dropout), SHARE, "it has no effect here"),
            ("--split-dataset-ratio", Some(self.split_dataset_ratio), BELOW_1, "0.01 keeps every hundredth pair"),
        ])
    }

    /// How ranks wait for each other.
    pub(super) fn patience(&self) -> Result<Patience> {
        let seconds = |flag: &str, value: f64| match Duration::try_from_secs_f64(value) {
            Ok(time) if !time.is_zero() => Ok(time),
            _ => Err(Error::input(format!("{value} should be a number of seconds above 0"))
                .at(flag)
                .help("10 is ten seconds")),
        };
        Ok(Patience {
            rendezvous: seconds("--rendezvous", self.rendezvous)?,
            watchdog: seconds("--watchdog", self.watchdog)?,
        })
    }

    /// Bytes that may be used, where the user says so.
    pub(super) fn memory(&self) -> Result<Option<usize>> {
        self.gpu_memory.as_deref().map(parse_size).transpose().map_err(|e| e.at("--gpu-memory"))
    }

    pub(super) fn wishes(&self, gpu: Option<usize>, place: Option<&Place>) -> Result<Wishes> {
        let auto = |value: &str| value == "auto";
        let tokens = match self.micro_batch_tokens.as_str() {
            value if auto(value) => None,
            value => Some(value.parse().ok().filter(|n| *n > 0).ok_or_else(|| {
                Error::input(format!("'{value}' should be auto or a number of tokens")).at("--micro-batch-tokens")
            })?),
        };
        let choice = |flag: &str, value: &str| match value {
            value if auto(value) => Ok(None),
            "true" => Ok(Some(true)),
            "false" => Ok(Some(false)),
            _ => Err(Error::input(format!("'{value}' should be auto, true or false")).at(flag)),
        };
        let recompute = choice("--recompute", &self.recompute)?;
        let shard_base = choice("--shard-base", &self.shard_base)?;
        let memory = self.memory()?;
        // Ranks that compute on the same host's CPU share its memory.
        let sharing = if gpu.is_none() { place.and_then(|p| p.local_size) } else { None };
        let memory = memory.or_else(|| free_memory().zip(sharing).map(|(free, ranks)| free / ranks.max(1)));
        Ok(Wishes { memory, micro_batch_tokens: tokens, recompute, shard_base })
    }

    /// Settings under which the demo's model changes its tone within a minute and keeps what it knows. A strong reference and
    /// the likelihood of the chosen answers are what keeps a model of this size from stammering.
    fn suit_demo(&mut self) {
        let said = |name: &str| self.said.iter().any(|said| said == name);
        let (rate, epochs) = (said("learning_rate"), said("num_epochs"));
        if !rate {
            self.learning_rate = 2e-3;
        }
        if !epochs {
            self.num_epochs = 2.0;
        }
        if self.loss.names == ["sigmoid"] {
            self.loss.beta.get_or_insert(0.5);
            self.loss.rpo_alpha.get_or_insert(1.0);
        }
    }
}
