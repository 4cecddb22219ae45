//! What an adapter is made of, and PEFT's `adapter_config.json`, which says it.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::init::Init;
use super::target::{Layers, Patterns, Targets, ends_in};
use super::{MOST_RANK, Site};
use crate::error::{Error, Result};

/// Largest alpha: a scale beyond it is an accident, and far beyond it not a number.
pub const MOST_ALPHA: f64 = 1e12;

/// What an adapter is made of, under PEFT's names.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    /// LoRA rank r, of modules without their own.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Ranks of modules that have their own.
    pub rank_pattern: Patterns,
    /// Alphas of modules that have their own.
    pub alpha_pattern: Patterns,
    /// Whether the scale is `alpha / sqrt(rank)` (Kalajdzievski 2023) instead of `alpha / rank`.
    pub rslora: bool,
    /// Which linears.
    pub targets: Targets,
    /// Parameters that are no linear's, by the ends of their names: those of experts and routers.
    pub parameters: Vec<String>,
    /// Which linears not.
    pub exclude: Option<Targets>,
    /// In which layers, where not in all.
    pub layers: Option<Layers>,
    /// How A and B begin.
    pub init: Init,
    /// Whether rows of the sum have a length of their own (DoRA, Liu et al. 2024).
    pub dora: bool,
    /// Probability with which a number that A reads in training is zero.
    pub dropout: f64,
}

impl AdapterConfig {
    /// Plain LoRA on every linear.
    pub fn new(rank: usize, alpha: f64) -> AdapterConfig {
        let (rank_pattern, alpha_pattern) = Default::default();
        AdapterConfig {
            rank,
            alpha,
            rank_pattern,
            alpha_pattern,
            rslora: false,
            targets: Targets::AllLinear,
            parameters: Vec::new(),
            exclude: None,
            layers: None,
            init: Init::default(),
            dora: false,
            dropout: 0.0,
        }
    }

    /// Whether a linear is adapted.
    pub fn adapts(&self, module: &str) -> bool {
        let excluded = self.exclude.as_ref().is_some_and(|exclude| exclude.name(module));
        // PEFT asks for the layer of those modules alone that are not named in full.
        let in_full = matches!(&self.targets, Targets::Names(names) if names.iter().any(|name| name == module));
        let in_layers = in_full || self.layers.as_ref().is_none_or(|layers| layers.have(module));
        !excluded && in_layers && self.targets.name(module)
    }

    /// Whether a parameter is adapted that is no linear's.
    pub fn adapts_parameter(&self, name: &str) -> bool {
        self.parameters.iter().any(|end| ends_in(name, end))
    }

    /// Refuses what PEFT has for linears alone.
    pub(super) fn refuse_for_experts(&self, site: &Site) -> Result<()> {
        let name = site.parameter.as_deref().unwrap_or(&site.module);
        let refused = |flag: &str, what: &str| {
            let help = "leave it out, or the experts";
            Err(Error::input(format!("{what} is of linears, and '{name}' has a matrix for each expert"))
                .at(flag)
                .help(help))
        };
        match (self.dora, self.dropout > 0.0, self.init) {
            (true, ..) => refused("--use-dora", "DoRA"),
            (_, true, _) => refused("--lora-dropout", "dropout"),
            (.., Init::Kaiming | Init::Gaussian) => Ok(()),
            _ => refused("--init-lora-weights", "this start"),
        }
    }

    /// The rank of a module or parameter.
    pub fn rank_of(&self, module: &str) -> usize {
        self.rank_pattern.of(module).map_or(self.rank, |rank| rank as usize)
    }

    /// The factor on `B · A` of a module or parameter.
    pub fn scale_of(&self, module: &str) -> f64 {
        self.factor(self.alpha_pattern.of(module).unwrap_or(self.alpha), self.rank_of(module))
    }

    /// The factor of an alpha and a rank.
    pub(super) fn factor(&self, alpha: f64, rank: usize) -> f64 {
        alpha / if self.rslora { (rank as f64).sqrt() } else { rank as f64 }
    }

    /// Refuses ranks and alphas that nothing can be computed with.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |what: String, flag: &str, help: &str| Err(Error::input(what).at(flag).help(help));
        if !(1..=MOST_RANK).contains(&self.rank) {
            let what = format!("should be from 1 to {MOST_RANK}, not {}", self.rank);
            return wrong(what, "--lora-rank", "8 to 64 is usual");
        }
        let whole = |n: f64| n.fract() == 0.0 && (1.0..=MOST_RANK as f64).contains(&n);
        if let Some((key, rank)) = self.rank_pattern.numbers().find(|(_, rank)| !whole(*rank)) {
            let what = format!("'{key}' should be a whole number from 1 to {MOST_RANK}, not {rank}");
            return wrong(what, "--rank-pattern", "8 to 64 is usual");
        }
        let alpha = |a: f64| a > 0.0 && a <= MOST_ALPHA;
        if let Some((key, alpha)) = self.alpha_pattern.numbers().find(|(_, a)| !alpha(*a)) {
            let what = format!("'{key}' should be above 0 and up to {MOST_ALPHA:e}, not {alpha}");
            return wrong(what, "--alpha-pattern", "two to four times the rank is usual");
        }
        if self.dora && self.init.subtracts() {
            let what = "DoRA begins with the model's own rows".to_owned();
            return wrong(what, "--init-lora-weights", "leave one of the two out");
        }
        if self.init == Init::Orthogonal && !self.ranks().all(|rank| rank.is_multiple_of(2)) {
            return wrong("orthogonal needs even ranks".into(), "--init-lora-weights", "such as --lora-rank 8");
        }
        Ok(())
    }

    /// Every rank that a module may have.
    fn ranks(&self) -> impl Iterator<Item = usize> {
        self.rank_pattern.numbers().map(|(_, rank)| rank as usize).chain([self.rank])
    }

    /// From the text of an `adapter_config.json`.
    ///
    /// # Errors
    /// A kind of adapter whose tensors mean something else than `W + scale · B · A` on the model as it is.
    pub(super) fn parse(text: &str) -> Result<AdapterConfig> {
        let keys: Map<String, Value> = serde_json::from_str(text).map_err(|e| Error::input(e.to_string()))?;
        match keys.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            None if keys.contains_key("swift_type") => {
                return Err(Error::input("is an adapter of ms-swift's own tuners, not of PEFT")
                    .help("ms-swift writes PEFT's with --tuner_backend peft"));
            }
            other => return Err(Error::input(format!("peft_type is {other:?}, only LORA is supported"))),
        }
        if let Some((key, value)) = keys.iter().find(|(key, value)| !UNDERSTOOD.contains(&key.as_str()) && !off(value))
        {
            return Err(unsupported(key, value));
        }
        match keys.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(init)) if PLAIN_INIT.contains(&init.as_str()) => {}
            Some(init) => {
                return Err(Error::input(format!(
                    "'init_lora_weights': {init} changes the base model, which is not changed here"
                ))
                .help(CONVERT));
            }
        }
        if let Some(bias) = keys.get("bias").filter(|b| !b.is_null() && b.as_str() != Some("none")) {
            return Err(unsupported("bias", bias));
        }
        let rank = keys.get("r").and_then(Value::as_u64).filter(|r| (1..=MOST_RANK as u64).contains(r));
        let alpha = keys.get("lora_alpha").and_then(Value::as_f64).filter(|a| *a > 0.0 && *a <= MOST_ALPHA);
        let (Some(rank), Some(alpha)) = (rank, alpha) else {
            let text = |key: &str| keys.get(key).map_or_else(|| "missing".to_owned(), Value::to_string);
            let what = format!("'r' is {}, 'lora_alpha' is {}", text("r"), text("lora_alpha"));
            return Err(Error::input(what).help(format!(
                "'r' is a whole number from 1 to {MOST_RANK}, 'lora_alpha' a number above 0 and up to {MOST_ALPHA:e}"
            )));
        };
        let value = |key: &str| keys.get(key).unwrap_or(&Value::Null);
        let switch = |key: &str| match value(key) {
            Value::Null => Ok(false),
            Value::Bool(on) => Ok(*on),
            other => Err(unsupported(key, other)),
        };
        let patterns = |key: &str| match value(key) {
            Value::Null => Ok(Patterns::default()),
            Value::Object(map) => {
                Patterns::from_json(map).map_err(|e| Error::input(format!("'{key}': {}", e.message())))
            }
            other => Err(unsupported(key, other)),
        };
        let config = AdapterConfig {
            rslora: switch("use_rslora")?,
            dora: switch("use_dora")?,
            targets: match value("target_modules") {
                // Of an adapter on parameters alone.
                none if off(none) && !off(value("target_parameters")) => Targets::Names(Vec::new()),
                some => Targets::from_json("target_modules", some)?,
            },
            parameters: match value("target_parameters") {
                none if off(none) => Vec::new(),
                Value::Array(list) if list.iter().all(Value::is_string) => {
                    list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
                }
                other => {
                    return Err(Error::input(format!("'target_parameters' should be a list of names, is {other}")));
                }
            },
            exclude: match value("exclude_modules") {
                none if off(none) => None,
                some => Some(Targets::from_json("exclude_modules", some)?),
            },
            layers: Layers::from_json(value("layers_to_transform"), value("layers_pattern"))?,
            rank_pattern: patterns("rank_pattern")?,
            alpha_pattern: patterns("alpha_pattern")?,
            ..AdapterConfig::new(rank as usize, alpha)
        };
        // In a file the flag's key is said, not the flag.
        let key = |e: &Error| e.place().unwrap_or_default().trim_start_matches('-').replace('-', "_");
        config.check().map_err(|e| Error::input(format!("'{}': {}", key(&e), e.message())))?;
        Ok(config)
    }

    /// As PEFT writes it, of an adapter on these linears.
    pub(super) fn to_json(&self, sites: &[Site], base_model: &str) -> Value {
        // PEFT lists plain names, so that a reader needs no notion of our kinds of target.
        let last = |s: &Site| s.module.rsplit('.').next().unwrap_or_default().to_owned();
        let modules = sites.iter().filter(|site| site.parameter.is_none());
        let all = || json!(modules.map(last).collect::<BTreeSet<_>>());
        // What is subtracted is further rows of A and columns of B, under the same scale.
        let (ranks, alphas) = match (self.init.subtracts(), self.rslora) {
            (false, _) => (1, 1.0),
            (true, false) => (2, 2.0),
            (true, true) => (2, std::f64::consts::SQRT_2),
        };
        let (layers, pattern) = self.layers.as_ref().map_or((Value::Null, Value::Null), Layers::to_json);
        json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": true,
            "r": self.rank * ranks, "lora_alpha": self.alpha * alphas, "lora_dropout": self.dropout, "bias": "none",
            "use_rslora": self.rslora, "use_dora": self.dora, "fan_in_fan_out": false, "init_lora_weights": true,
            "modules_to_save": null, "rank_pattern": self.rank_pattern.to_json(ranks as f64),
            "alpha_pattern": self.alpha_pattern.to_json(alphas),
            "target_modules": self.targets.to_json().unwrap_or_else(all),
            "target_parameters": if self.parameters.is_empty() { Value::Null } else { json!(self.parameters) },
            "exclude_modules": self.exclude.as_ref().and_then(Targets::to_json),
            "layers_to_transform": layers, "layers_pattern": pattern,
        })
    }
}

/// Keys of a PEFT config (`peft/tuners/lora/config.py`) that are read, or say nothing of what the adapter's tensors mean. Every
/// other key has to be off: null, false, or empty.
const UNDERSTOOD: &[&str] = &[
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_dora",
    "use_rslora",
];

/// Ways to begin an adapter that leave the base as it is. Others change it, so that the adapter is right on the changed base alone.
const PLAIN_INIT: &[&str] = &["gaussian", "orthogonal", "eva"];

/// How an adapter of a changed base becomes a plain one.
const CONVERT: &str = "convert it where it was trained: PEFT's model.save_pretrained(folder, \
                       path_initial_model_for_weight_conversion=the adapter as it was at the start) writes a plain adapter";

fn unsupported(key: &str, value: &Value) -> Error {
    Error::input(format!("'{key}': {value} is not supported")).help("only plain LoRA adapters are read")
}

fn off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}
