//! What decides the steps of a run, by name. It is saved with a checkpoint, and a run that resumes must have the same.

use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::checkpoint::State;
use super::config::Steps;
use super::manifest::hex;
use super::objective::Objective;
use dpo_core::error::{Error, Result};
use dpo_core::lora::Adapter;
use dpo_data::Examples;
use dpo_plugin_api::graph::ModelGraph;

/// Flags that decide no step: where things are and how often they are written, and what is said in `model`, `data` and
/// `adapter` by content.
const FREE: &[&str] = &[
    "add_version",
    "alpha_pattern",
    "columns",
    "dashboard",
    "dataset",
    "dataset_format",
    "device",
    "disable_dropout",
    "dtype",
    "early_stopping_patience",
    "eval_on_start",
    "eval_steps",
    "exclude_modules",
    "gpu_memory",
    "gpus",
    "greater_is_better",
    "init_adapter",
    "load_best_model_at_end",
    "logging_steps",
    "lora_alpha",
    "lora_rank",
    "max_restarts",
    "metric_for_best_model",
    "micro_batch_tokens",
    "model",
    "offload_base",
    "output_dir",
    "plugin",
    "plugin_dir",
    "progress_timeout",
    "project",
    "rank_pattern",
    "recompute",
    "ref_adapter",
    "ref_model",
    "rendezvous",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_minutes",
    "save_steps",
    "save_total_limit",
    "shard_base",
    "strict",
    "system",
    "target_modules",
    "use_rslora",
    "val_dataset",
    "watchdog",
];

/// The version of this program.
const HOST: &str = "dpo-host";
/// The weights and the config of the model.
const MODEL: &str = "the model";
/// Those of a reference of its own, and its adapter.
const REFERENCE: &str = "the reference";
/// How the device computes.
pub(super) const ARITHMETIC: &str = "the arithmetic";
/// What is known when weights are there, or on a device: late.
const LATE: [&str; 3] = [MODEL, REFERENCE, ARITHMETIC];
/// How many steps there are, which a run that came to its end may have more of.
const LENGTH: [&str; 2] = ["--max-steps", "--num-epochs"];

/// Adds what identifies the model and the reference, where it has one of its own.
pub(super) fn add_models(settings: &mut Map<String, Value>, model: &str, reference: Option<&str>) {
    settings.insert(MODEL.to_owned(), json!(short(model.as_bytes())));
    let reference = reference.map_or_else(|| "the adapter at the start".to_owned(), |text| short(text.as_bytes()));
    settings.insert(REFERENCE.to_owned(), json!(reference));
}

/// The decisive settings of a run that are known before its weights, under the names that a message gives them.
pub(super) fn decisive(
    flags: &Map<String, Value>,
    graph: &ModelGraph,
    objective: &Objective<'_>,
    adapter: &Adapter,
    examples: &Examples,
) -> Result<Map<String, Value>> {
    let mut flags = flags.clone();
    FREE.iter().for_each(|flag| drop(flags.remove(*flag)));
    // What stays as it is published has the same numbers.
    if flags.get("quantization").is_some_and(|kind| kind == "auto") {
        flags.insert("quantization".into(), json!("none"));
    }
    flags.insert("lora_rank".into(), json!(adapter.config.rank));
    flags.insert("lora_alpha".into(), json!(adapter.config.alpha));
    flags.insert("lora_dropout".into(), json!(adapter.config.dropout));
    flags.insert("use_rslora".into(), json!(adapter.config.rslora));
    flags.insert("rank_pattern".into(), adapter.config.rank_pattern.to_json(1.0));
    flags.insert("alpha_pattern".into(), adapter.config.alpha_pattern.to_json(1.0));
    let params: Vec<u8> = adapter.params.iter().flat_map(|p| p.to_le_bytes()).collect();
    let content = examples.digest()?;
    // Text keys in the order of their fields: the same graph has the same text.
    let graph = serde_json::to_vec(graph).unwrap_or_default();
    let contents = [
        (HOST, env!("CARGO_PKG_VERSION").to_owned()),
        ("the plugin's graph of the model", short(&graph)),
        ("the data", format!("{} examples, {}", examples.len(), hex(&content[..6]))),
        ("--target-modules", format!("{} modules, {}", adapter.sites.len(), short(adapter.shape().as_bytes()))),
        ("the adapter at the start", short(&params)),
    ];
    let flags = flags.into_iter().map(|(name, value)| (format!("--{}", name.replace('_', "-")), value));
    let contents = contents.map(|(name, value)| (name.to_owned(), value)).into_iter();
    let losses =
        objective.packages().into_iter().map(|(loss, package)| (format!("the plugin of loss '{loss}'"), package));
    Ok(flags.chain(contents.chain(losses).map(|(name, value)| (name, json!(value)))).collect())
}

/// Enough of a hash to tell things apart.
fn short(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes)[..6])
}

/// Refuses settings that differ from those of a checkpoint, naming every one of them, as far as they are known. A run that was
/// at its end is prolonged where it is to have more steps; other settings than their number are the same.
pub(super) fn refuse_other(state: &State, is: &Map<String, Value>, steps: Steps, folder: &Path) -> Result<()> {
    let was = &state.settings;
    let longer = prolongs(state, steps);
    let names = was.keys().chain(is.keys().filter(|k| !was.contains_key(*k)));
    let known = |k: &&String| !LATE.contains(&k.as_str()) || is.contains_key(*k);
    let same = |k: &str| was.get(k) == is.get(k) || longer && LENGTH.contains(&k);
    let differing = names.filter(known).filter(|k| !same(k));
    let differences: Vec<String> =
        differing.map(|k| format!("{k} was {}, is {}", text(was.get(k)), text(is.get(k)))).collect();
    if differences.is_empty() {
        return Ok(());
    }
    let flags = folder.with_file_name("args.json");
    Err(Error::input(format!("is of another run: {}", differences.join("; "))).at(folder.display()).help(format!(
        "resume with the run's own flags, --config {}, or start a new run from it with --init-adapter",
        flags.display()
    )))
}

/// Whether a checkpoint is the end of a run that had fewer steps.
pub(super) fn prolongs(state: &State, steps: Steps) -> bool {
    state.global_step == state.total_steps && steps.total > state.total_steps
}

fn text(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "not given".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    }
}
