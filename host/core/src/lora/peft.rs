//! PEFT's files: `adapter_config.json` and `adapter_model.safetensors` with the names PEFT gives.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use super::{Adapter, MOST_RANK, Targets};
use crate::error::{Error, Result};
use crate::files;
use crate::weights::read_f32;

const CONFIG: &str = "adapter_config.json";
const PARAMS: &str = "adapter_model.safetensors";

/// Largest alpha: a scale beyond it is an accident, and far beyond it not a number.
pub const MOST_ALPHA: f64 = 1e12;

/// What an adapter is made of.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    /// Rows of A.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(rank)` (Kalajdzievski 2023) instead of `alpha / rank`.
    pub rslora: bool,
    /// Which linears.
    pub targets: Targets,
}

impl AdapterConfig {
    /// The factor on `B · A`.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

/// Keys of a PEFT config (`peft/tuners/lora/config.py`) that are read, or say nothing of what the adapter's tensors mean. Every
/// other key has to be off: null, false, or empty.
const UNDERSTOOD: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// Ways to begin an adapter that leave the base as it is. Others change it, so that the adapter is right on the changed base alone.
const PLAIN_INIT: &[&str] = &["gaussian", "orthogonal", "eva"];

/// Reads the config in an adapter folder, refusing kinds of adapter that are not plain LoRA.
pub fn read_config(folder: &Path) -> Result<AdapterConfig> {
    let path = folder.join(CONFIG);
    parse_config(&read(&path)?).map_err(|e| e.at(path.display()))
}

/// The model that an adapter says it was trained on: a folder, or a name on a hub.
pub fn base_model(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(CONFIG);
    let config: Value =
        serde_json::from_str(&read(&path)?).map_err(|e| Error::input(e.to_string()).at(path.display()))?;
    let name = config.get("base_model_name_or_path").and_then(Value::as_str);
    Ok(name.filter(|n| !n.is_empty()).map(str::to_owned))
}

fn read(config: &Path) -> Result<String> {
    files::read_text(config).map_err(|e| {
        let folder = config.parent().unwrap_or(config);
        if config.exists() {
            return e;
        }
        if folder.join("config.json").is_file() {
            return Error::input("is the folder of a model, not of an adapter").at(folder.display()).help(
                "an adapter has adapter_config.json: name the folder of a run, or a checkpoint in it; a model goes to --model",
            );
        }
        let error = Error::input(e.message()).at(config.display());
        match runs_in(folder) {
            Some(runs) => error.help(format!("this folder has several adapters: name one of {runs}")),
            None => error.help(
                "an adapter is a folder with adapter_config.json and adapter_model.safetensors: that of a run, or a checkpoint in it",
            ),
        }
    })
}

/// The folders in a folder that are adapters, such as the runs of `output`.
fn runs_in(folder: &Path) -> Option<String> {
    let entries = std::fs::read_dir(folder).ok()?.filter_map(|e| Some(e.ok()?.path()));
    let mut runs: Vec<String> =
        entries.filter(|path| path.join(CONFIG).is_file()).map(|path| path.display().to_string()).collect();
    runs.sort();
    (!runs.is_empty()).then(|| runs.join(", "))
}

fn parse_config(text: &str) -> Result<AdapterConfig> {
    let keys: Map<String, Value> = serde_json::from_str(text).map_err(|e| Error::input(e.to_string()))?;
    let refuse = |key: &str, value: &Value| {
        Err(Error::input(format!("'{key}': {value} is not supported")).help("only plain LoRA adapters are read"))
    };
    match keys.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => return Err(Error::input(format!("peft_type is {other:?}, only LORA is supported"))),
    }
    let off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    if let Some((key, value)) = keys.iter().find(|(key, value)| !UNDERSTOOD.contains(&key.as_str()) && !off(value)) {
        return refuse(key, value);
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
    if let Some(bias) = keys.get("bias").filter(|b| b.as_str() != Some("none")) {
        return refuse("bias", bias);
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
    let rslora = match keys.get("use_rslora") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(rslora)) => *rslora,
        Some(other) => return refuse("use_rslora", other),
    };
    let targets = Targets::from_json(keys.get("target_modules").unwrap_or(&Value::Null))?;
    Ok(AdapterConfig { rank: rank as usize, alpha, rslora, targets })
}

/// How an adapter of a changed base becomes a plain one.
const CONVERT: &str = "convert it where it was trained: PEFT's model.save_pretrained(folder, \
                       path_initial_model_for_weight_conversion=the adapter as it was at the start) writes a plain adapter";

fn names(module: &str) -> [String; 2] {
    ["lora_A", "lora_B"].map(|part| format!("base_model.model.{module}.{part}.weight"))
}

const OTHER_MODEL: &str = "the adapter is of another model, whose name is in its adapter_config.json";

pub(super) fn read_params(adapter: &mut Adapter, folder: &Path) -> Result<()> {
    let path = folder.join(PARAMS);
    let mut tensors = read_f32(&path)?;
    let rank = adapter.config.rank;
    for site in adapter.sites.clone() {
        let shapes = [[rank, site.inputs], [site.outputs, rank]];
        for (name, shape) in names(&site.module).into_iter().zip(shapes) {
            let Some((is, values)) = tensors.remove(&name) else {
                return Err(Error::input(format!("tensor '{name}' of shape {shape:?} is missing"))
                    .at(path.display())
                    .help(OTHER_MODEL));
            };
            if is != shape {
                let what = format!("tensor '{name}' has shape {is:?}, the model needs {shape:?}");
                return Err(Error::input(what).at(path.display()).help(OTHER_MODEL));
            }
            adapter.params.extend(values);
        }
    }
    match tensors.keys().next() {
        Some(name) => Err(Error::input(format!("tensor '{name}' belongs to no linear of this model"))
            .at(path.display())
            .help(OTHER_MODEL)),
        None => Ok(()),
    }
}

pub(super) fn write(adapter: &Adapter, folder: &Path, base_model: &str) -> Result<()> {
    // PEFT lists plain names, so that a reader needs no notion of our kinds of target.
    let last = |s: &super::Site| s.module.rsplit('.').next().unwrap_or_default().to_owned();
    let targets = match &adapter.config.targets {
        Targets::Pattern(p) => json!(p.as_str().trim_start_matches("^(?:").trim_end_matches(")$")),
        Targets::Names(names) => json!(names),
        Targets::AllLinear => json!(adapter.sites.iter().map(last).collect::<BTreeSet<_>>()),
    };
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": true,
        "r": adapter.config.rank, "lora_alpha": adapter.config.alpha, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": adapter.config.rslora, "use_dora": false, "fan_in_fan_out": false, "init_lora_weights": true,
        "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": targets,
    });
    let text = format!("{:#}\n", config);
    let bytes = |range: std::ops::Range<usize>| adapter.params[range].iter().flat_map(|p| p.to_le_bytes()).collect();
    let mut data: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for site in &adapter.sites {
        let [a, b] = adapter.ranges(site);
        let [name_a, name_b] = names(&site.module);
        data.push((name_a, vec![adapter.config.rank, site.inputs], bytes(a)));
        data.push((name_b, vec![site.outputs, adapter.config.rank], bytes(b)));
    }
    let failed = |e: safetensors::SafeTensorError| Error::run(format!("adapter: {e}"));
    let views =
        data.iter().map(|(n, shape, bytes)| Ok((n.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(failed)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let params = safetensors::serialize(views, Some(metadata)).map_err(failed)?;
    files::write_into(&folder.join(PARAMS), &params)?;
    files::write_into(&folder.join(CONFIG), text.as_bytes())
}
