//! The flags of a new adapter, under PEFT's names, and of what of it is trained how.

use std::path::Path;

use clap::{ArgAction, Args};
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::lora::{AdapterConfig, Init, Patterns, Targets};
use dpo_train::config::StartAdapter;
use serde::Serialize;

use super::{ABOVE_0, ALPHA, BELOW_1, refuse_out_of_range};

/// As ms-swift has them.
pub(super) const LORA_RANK: usize = 8;
pub(super) const LORA_ALPHA: f64 = 32.0;

#[derive(Args, Clone, Debug, Serialize)]
#[command(next_help_heading = "LoRA")]
pub(crate) struct LoraArgs {
    /// LoRA rank r [default: 8; with --init-adapter that adapter's]
    #[arg(long, value_name = "R")]
    lora_rank: Option<usize>,
    /// LoRA alpha: the update is scaled by alpha / rank [default: 32; with --init-adapter that adapter's]
    #[arg(long, value_name = "A")]
    lora_alpha: Option<f64>,
    /// Rank-stabilised LoRA: scale by alpha / sqrt(rank) instead
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    use_rslora: bool,
    /// Modules to adapt: all-linear, names of modules, one regular expression over whole names, or none beside --target-parameters
    /// [default: all-linear]
    #[arg(long, value_name = "M", num_args = 1..)]
    target_modules: Vec<String>,
    /// Parameters of experts and routers to adapt, by the ends of their names, as PEFT's target_parameters:
    /// mlp.experts.gate_up_proj mlp.experts.down_proj mlp.gate.weight [default: none]
    #[arg(long, value_name = "P", num_args = 1..)]
    target_parameters: Vec<String>,
    /// Of those, modules not to adapt: names, or one regular expression over whole names [default: none]
    #[arg(long, value_name = "M", num_args = 1..)]
    exclude_modules: Vec<String>,
    /// Ranks of modules that have their own, by the ends of their names, which may be regular expressions: {"down_proj": 4}
    /// [default: none]
    #[arg(long, value_name = "JSON")]
    rank_pattern: Option<String>,
    /// Alphas of modules that have their own, as for --rank-pattern [default: none]
    #[arg(long, value_name = "JSON")]
    alpha_pattern: Option<String>,

    /// How A and B begin, by PEFT's names: true (A Kaiming-uniform, B zero), gaussian, orthogonal, pissa, pissa_niter_N, olora. Those
    /// that begin with a part of the weights are saved as a plain adapter of twice the rank, and the reference is the model
    #[arg(long, value_name = "NAME", default_value = "true")]
    init_lora_weights: String,
    /// DoRA: rows of the adapted weights have lengths of their own, which are trained; on the CPU
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    use_dora: bool,
    /// Probability with which a number that A reads in training is zero: on the CPU, and where dropout is not disabled
    #[arg(long, value_name = "0..1", default_value_t = 0.0)]
    lora_dropout: f64,
    /// Whether dropout is off, as it is in the preference training of TRL, LLaMA-Factory and ms-swift
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = true, default_missing_value = "true", action = ArgAction::Set)]
    disable_dropout: bool,
    /// LoRA+: how many times the learning rate B has
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub(super) loraplus_lr_ratio: f64,
}

impl LoraArgs {
    /// Refuses numbers that nothing can be computed with.
    pub(super) fn refuse_out_of_range(&self) -> Result<()> {
        refuse_out_of_range(&[
            ("--lora-rank", self.lora_rank.map(|n| n as f64), ABOVE_0, "8 to 64 is usual"),
            ("--lora-alpha", self.lora_alpha, ALPHA, "two to four times the rank is usual"),
            ("--lora-dropout", Some(self.lora_dropout), BELOW_1, "0.05 is usual"),
            ("--loraplus-lr-ratio", Some(self.loraplus_lr_ratio), ABOVE_0, "2 to 16 is usual"),
        ])
    }

    /// Says what changes nothing.
    pub(super) fn note_ignored(&self) {
        if self.lora_dropout > 0.0 && self.disable_dropout {
            console::note(
                "--lora-dropout changes nothing: dropout is off in preference training, as in TRL, LLaMA-Factory and ms-swift; \
                 --disable-dropout false applies it",
            );
        }
    }

    /// The adapter of the start: a new one, or the one in a folder.
    pub(super) fn starting_adapter(&self, init_adapter: Option<&Path>) -> Result<StartAdapter> {
        let (rank, alpha) = (self.lora_rank, self.lora_alpha);
        if let Some(folder) = init_adapter {
            self.refuse_other_shape()?;
            return Ok(StartAdapter::From { folder: folder.to_path_buf(), rank, alpha, dropout: self.dropout() });
        }
        let modules = |flag: &str, values: &[String]| Targets::parse(values).map_err(|e| e.at(flag));
        let patterns = |flag: &str, text: &Option<String>| match text {
            Some(text) => Patterns::parse(text).map_err(|e| e.at(flag)),
            None => Ok(Patterns::default()),
        };
        Ok(StartAdapter::New(Box::new(AdapterConfig {
            rslora: self.use_rslora,
            targets: match self.target_modules.as_slice() {
                [] => Targets::AllLinear,
                [none] if none == "none" && !self.target_parameters.is_empty() => Targets::Names(Vec::new()),
                names => modules("--target-modules", names)?,
            },
            parameters: self.target_parameters.clone(),
            exclude: match self.exclude_modules.as_slice() {
                [] => None,
                names => Some(modules("--exclude-modules", names)?),
            },
            rank_pattern: patterns("--rank-pattern", &self.rank_pattern)?,
            alpha_pattern: patterns("--alpha-pattern", &self.alpha_pattern)?,
            init: Init::parse(&self.init_lora_weights).map_err(|e| e.at("--init-lora-weights"))?,
            dora: self.use_dora,
            dropout: self.dropout(),
            ..AdapterConfig::new(rank.unwrap_or(LORA_RANK), alpha.unwrap_or(LORA_ALPHA))
        })))
    }

    /// The dropout that there is.
    fn dropout(&self) -> f64 {
        if self.disable_dropout { 0.0 } else { self.lora_dropout }
    }

    /// Refuses flags of a new adapter where one is continued.
    fn refuse_other_shape(&self) -> Result<()> {
        let given = [
            ("--target-parameters", !self.target_parameters.is_empty()),
            ("--exclude-modules", !self.exclude_modules.is_empty()),
            ("--rank-pattern", self.rank_pattern.is_some()),
            ("--alpha-pattern", self.alpha_pattern.is_some()),
            ("--init-lora-weights", self.init_lora_weights != "true"),
            ("--use-dora", self.use_dora),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Error::input("is of a new adapter, and --init-adapter continues one")
                .at(flag)
                .help("leave it out: a run from an adapter keeps its shape")),
            None => Ok(()),
        }
    }
}
