//! A checkpoint folder: its config, the family that answers for it, its checked graph.

use std::path::{Path, PathBuf};

use dpo_plugin_api::graph::ModelGraph;
use serde_json::Value;

use crate::error::{Error, IoContext, Result};
use crate::graph;
use crate::hub::{self, Name, Need};
use crate::lora;
use crate::plugins::{Family, Registry};

/// The files of a checkpoint folder beside its weights, as far as anything here or the programs that serve models reads them.
pub const FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
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
        let config = std::fs::read_to_string(&path).reading(&path)?;
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
        let graph = graph::of_checkpoint(family, &config).map_err(|e| e.at(&place))?;
        Ok(Model { folder: folder.to_owned(), family, graph, config })
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
        return Ok(folder);
    }
    // A file could pass for a name on a hub, which would be asked in vain.
    if folder.is_file() {
        return Err(Error::input("is a file, not a folder")
            .at(format!("--model {model}"))
            .help("name the folder with config.json, tokenizer.json and safetensors; GGUF files cannot be trained"));
    }
    match Name::parse(model) {
        Some(name) if !name.is_inside() => hub::model(&name, need),
        _ => Err(Error::input(format!("'{model}' is no folder, and cannot be the name of a model on a hub"))
            .at("--model")
            .help("name a folder, owner/name[@revision] of Hugging Face, or ms::owner/name of ModelScope")),
    }
}
