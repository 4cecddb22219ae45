//! A checkpoint folder: its config, the family that answers for it, its checked graph.

use std::path::{Path, PathBuf};

use dpo_plugin_api::graph::ModelGraph;
use serde_json::{Map, Value};

use crate::{Name, Need};
use dpo_core::error::{Error, Result};
use dpo_core::graph;
use dpo_core::lora;
use dpo_plugins::{Family, Registry};

/// Keys of `config.json` that do not change what a forward pass computes. Anything else that a family did not read is
/// refused, since it might.
const HARMLESS_CONFIG: &[&str] = &[
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "attention_dropout", // off while aligning, as TRL, LLaMA-Factory and ms-swift have it
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "finetuning_task",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_position_embeddings",
    "max_sequence_length",
    "max_window_layers",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "resid_pdrop",
    "return_dict",
    "sliding_window", // families with a window read it
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// A model before its weights are read.
pub struct Model<'r> {
    /// Its folder.
    pub folder: PathBuf,
    /// The family that answers for it.
    pub family: &'r Family,
    /// Its graph, checked.
    pub graph: ModelGraph,
    /// The text of its `config.json`.
    pub config: String,
}

impl<'r> Model<'r> {
    /// Reads `config.json` and asks the family: the one named, or the one that claims the architecture.
    pub fn open(registry: &'r Registry, folder: &Path, plugin: Option<&str>) -> Result<Model<'r>> {
        let path = folder.join("config.json");
        if !path.is_file() {
            return Err(Error::input("no such file").at(path.display()).help(
                "a model folder holds config.json, tokenizer.json and safetensors files, as published checkpoints do",
            ));
        }
        let config = dpo_core::files::read_text(&path)?;
        let place = path.display();
        let value: Value = serde_json::from_str(&config).map_err(|e| Error::input(e.to_string()).at(&place))?;
        let architecture = value.pointer("/architectures/0").and_then(Value::as_str);
        let family = match (plugin, architecture) {
            (Some(name), _) => registry.family(name).map_err(|e| e.at("--plugin"))?,
            (None, Some(architecture)) => registry.family_for(architecture).map_err(|e| e.at(&place))?,
            (None, None) => {
                return Err(Error::input("names no architecture").at(&place).help("name the family with --plugin"));
            }
        };
        if let Some(other) = architecture.filter(|a| !family.claims.iter().any(|c| c == a)) {
            let claims = family.claims.join(", ");
            return Err(Error::input(format!("is of {other}, but the plugin '{}' answers for {claims}", family.name))
                .at(&place)
                .help("leave --plugin out to have it chosen by architecture"));
        }
        let graph = graph_of(family, &config).map_err(|e| e.at(&place))?;
        Ok(Model { folder: folder.to_owned(), family, graph, config })
    }
}

impl Model<'_> {
    /// Positions that it is made for, where its config says so: `max_position_embeddings`, or what rope scaling makes of those that
    /// it was trained with.
    pub fn positions(&self) -> Option<usize> {
        let config: Value = serde_json::from_str(&self.config).ok()?;
        let most = config.get("max_position_embeddings").and_then(Value::as_f64);
        let rope =
            ["rope_scaling", "rope_parameters"].iter().find_map(|key| config.get(*key).filter(|v| v.is_object()));
        let of_rope = |name: &str| rope.and_then(|rope| rope.get(name)).and_then(Value::as_f64);
        let trained = of_rope("original_max_position_embeddings").or(most);
        let scaled = trained.zip(of_rope("factor")).map(|(trained, factor)| trained * factor);
        let made_for = [most, scaled].into_iter().flatten().reduce(f64::max).map(|n| n as usize);
        [self.graph.max_positions, made_for].into_iter().flatten().min()
    }
}

/// What `--model` means: what it says, or the model that the adapter names as its own.
pub fn named(model: Option<&str>, adapter: Option<&Path>) -> Result<String> {
    match (model, adapter) {
        (Some(model), _) => Ok(model.to_owned()),
        (None, Some(adapter)) => lora::base_model(adapter)?.ok_or_else(|| {
            Error::input("the adapter does not name the model it was trained on")
                .at(adapter.display())
                .help("name it with --model")
        }),
        (None, None) => Err(Error::input("no model").help("name it with --model, or an adapter with --adapter")),
    }
}

/// The folder that `--model` means, with what is needed of it: a folder, or a model of a hub, which is fetched.
pub fn locate(model: &str, need: Need) -> Result<PathBuf> {
    let folder = PathBuf::from(model);
    if folder.is_dir() {
        let is_adapter = folder.join("adapter_config.json").is_file() && !folder.join("config.json").is_file();
        return match is_adapter {
            false => Ok(folder),
            true => Err(Error::input("is the folder of an adapter, not of a model").at(format!("--model {model}")).help(
                "name the model that it was trained on, and the adapter with --adapter, or in `train` --init-adapter",
            )),
        };
    }
    if let Some(id) = model.strip_prefix("https://").or_else(|| model.strip_prefix("http://")) {
        let id: Vec<&str> = id.split('/').skip(1).filter(|part| !part.is_empty()).take(2).collect();
        return Err(Error::input("is an address, not a name").at(format!("--model {model}")).help(format!(
            "a model of Hugging Face is named owner/name, one of ModelScope ms::owner/name: --model {}",
            id.join("/")
        )));
    }
    // A file could pass for a name on a hub, which would be asked in vain.
    if folder.is_file() {
        return Err(Error::input("is a file, not a folder")
            .at(format!("--model {model}"))
            .help("name the folder with config.json, tokenizer.json and safetensors; GGUF files cannot be trained"));
    }
    let name = Name::parse(model).filter(|name| !name.is_inside()).ok_or_else(|| {
        Error::input(format!("'{model}' is not a folder, and cannot be the name of a model on a hub"))
            .at("--model")
            .help("name a folder, owner/name[@revision] of Hugging Face, or ms::owner/name of ModelScope")
    })?;
    // Whoever has a folder of the owner's name means what is in it.
    if let Some((owner, _)) = model.split_once('/').filter(|(owner, _)| Path::new(owner).is_dir()) {
        return Err(Error::input(format!("'{owner}' is a folder, '{model}' is not"))
            .at("--model")
            .help(format!("is the path right? hf::{model} is a model of Hugging Face")));
    }
    crate::model(&name, need)
}

/// The checked graph of a checkpoint: every key of its config understood, every op known. `config` is the text of its
/// `config.json`, whose values `null` and `false` count as off.
pub fn graph_of(family: &Family, config: &str) -> Result<ModelGraph> {
    let graph = family.graph(config)?;
    graph::check(&graph)?;
    let values: Map<String, Value> =
        serde_json::from_str(config).map_err(|e| Error::input(format!("config.json: {e}")))?;
    let is_off = |value: &Value| match value {
        Value::Bool(on) => !on,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    let off = |key: &str| values.get(key).is_some_and(is_off);
    let harmless = |key: &str| HARMLESS_CONFIG.contains(&key) || key.starts_with('_') || off(key);
    match graph.unread_config.iter().find(|k| !harmless(k)) {
        Some(key) => Err(Error::input(format!("key '{key}' is not understood by the plugin '{}'", family.name))
            .help("it may change the arithmetic; if it does not, remove it from config.json")),
        None => Ok(graph),
    }
}
