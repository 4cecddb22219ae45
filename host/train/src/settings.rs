//! What decides the steps of a run, by name. It is saved with a checkpoint, and a run that resumes must have the same.

use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::manifest::hex;
use super::objective::Objective;
use dpo_core::error::{Error, Result};
use dpo_core::example::Example;
use dpo_core::lora::Adapter;
use dpo_plugin_api::graph::ModelGraph;

/// Flags that decide no step: where things are and how often they are written, and what is said in `model`, `data` and
/// `adapter` by content.
const FREE: &[&str] = &[
    "columns",
    "dashboard",
    "dataset",
    "dataset_format",
    "device",
    "dtype",
    "eval_steps",
    "gpu_memory",
    "gpus",
    "init_adapter",
    "logging_steps",
    "lora_alpha",
    "lora_rank",
    "max_restarts",
    "micro_batch_tokens",
    "model",
    "output_dir",
    "plugin",
    "progress_timeout",
    "recompute",
    "rendezvous",
    "resume_from_checkpoint",
    "save_steps",
    "save_total_limit",
    "shard_base",
    "strict",
    "target_modules",
    "use_rslora",
    "val_dataset",
    "watchdog",
];

/// The version of this program.
const HOST: &str = "dpo-host";
/// How the device computes, which is known last.
pub(super) const ARITHMETIC: &str = "the arithmetic";

/// The decisive settings of a run, but for the [`ARITHMETIC`], under the names that a message gives them. `model` identifies the
/// weights by content.
pub(super) fn decisive(
    flags: &Map<String, Value>,
    (model, graph): (&str, &ModelGraph),
    objective: &Objective<'_>,
    adapter: &Adapter,
    examples: &[Example],
) -> Map<String, Value> {
    let mut flags = flags.clone();
    FREE.iter().for_each(|flag| drop(flags.remove(*flag)));
    flags.insert("lora_rank".into(), json!(adapter.config.rank));
    flags.insert("lora_alpha".into(), json!(adapter.config.alpha));
    flags.insert("use_rslora".into(), json!(adapter.config.rslora));
    let modules: Vec<&str> = adapter.sites.iter().map(|s| s.module.as_str()).collect();
    let params: Vec<u8> = adapter.params.iter().flat_map(|p| p.to_le_bytes()).collect();
    let content: Vec<u8> = examples.iter().flat_map(Example::content).collect();
    // Text keys in the order of their fields: the same graph has the same text.
    let graph = serde_json::to_vec(graph).unwrap_or_default();
    let contents = [
        (HOST, env!("CARGO_PKG_VERSION").to_owned()),
        ("the plugin's graph of the model", short(&graph)),
        ("the model", short(model.as_bytes())),
        ("the data", format!("{} examples, {}", examples.len(), short(&content))),
        ("--target-modules", format!("{} modules, {}", modules.len(), short(modules.join(" ").as_bytes()))),
        ("the adapter at the start", short(&params)),
    ];
    let flags = flags.into_iter().map(|(name, value)| (format!("--{}", name.replace('_', "-")), value));
    let contents = contents.map(|(name, value)| (name.to_owned(), value)).into_iter();
    let losses =
        objective.packages().into_iter().map(|(loss, package)| (format!("the plugin of loss '{loss}'"), package));
    flags.chain(contents.chain(losses).map(|(name, value)| (name, json!(value)))).collect()
}

/// Enough of a hash to tell things apart.
fn short(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes)[..6])
}

/// Refuses settings that differ from those of a checkpoint, naming every one of them; the arithmetic as soon as it is known.
pub(super) fn refuse_other(was: &Map<String, Value>, is: &Map<String, Value>, folder: &Path) -> Result<()> {
    let names = was.keys().chain(is.keys().filter(|k| !was.contains_key(*k)));
    let known = |k: &&String| *k != ARITHMETIC || is.contains_key(ARITHMETIC);
    let differing = names.filter(known).filter(|k| was.get(*k) != is.get(*k));
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

fn text(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "not given".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    }
}
