//! A checkpoint folder: its config, the family that answers for it, its checked graph.

use std::path::{Path, PathBuf};

use dpo_plugin_api::check::check_graph;
use dpo_plugin_api::graph::ModelGraph;
use serde_json::{Map, Value};

use crate::config::{self, Remarks};
use crate::{Name, Need};
use dpo_core::aux_loss::RouterAuxLoss;
use dpo_core::error::{Error, Result};
use dpo_core::lora;
use dpo_core::plan::MemoryOptions;
use dpo_core::predictors::gather_predictors;
use dpo_core::quantized::Method;
use dpo_plugins::{Family, Registry};

/// How a model's folder is read.
#[derive(Clone, Debug, Default)]
pub struct ModelOptions {
    /// The family; `None` for the one that claims the architecture.
    pub plugin: Option<String>,
    /// Keys of `config.json` that the user says change nothing.
    pub ignored_keys: Vec<String>,
    /// Whether the auxiliary loss of its routers is computed, as only training does.
    pub router_aux_loss: RouterAuxLoss,
}

/// A model before its weights are read.
pub struct Model<'r> {
    /// Its folder.
    pub folder: PathBuf,
    /// The family that answers for it.
    pub family: &'r Family,
    /// Its graph, checked, as devices run it.
    pub graph: ModelGraph,
    /// The text of its `config.json`.
    pub config: String,
    /// How its weights are quantised.
    method: Option<Method>,
    remarks: Remarks,
}

impl<'r> Model<'r> {
    /// Reads `config.json` and asks the family: the one named, or the one that claims the architecture.
    ///
    /// # Errors
    /// A folder or an architecture that is not known, a quantised checkpoint, keys that may change what the model computes.
    pub fn open(registry: &'r Registry, folder: &Path, options: &ModelOptions) -> Result<Model<'r>> {
        let path = folder.join("config.json");
        if !path.is_file() {
            return Err(Error::input("no such file").at(path.display()).help(
                "a model folder holds config.json, tokenizer.json and safetensors files, as published checkpoints do",
            ));
        }
        let config = dpo_core::files::read_text(&path)?;
        let place = path.display();
        let keys: Map<String, Value> =
            serde_json::from_str(&config).map_err(|e| Error::input(e.to_string()).at(&place))?;
        let method = config::method_of(&keys, Some(folder), &options.ignored_keys).map_err(|e| e.at(&place))?;
        let architecture = keys.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let family = match (options.plugin.as_deref(), architecture) {
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
        let (mut graph, remarks) = understood(family, &config, &options.ignored_keys).map_err(|e| e.at(&place))?;
        options.router_aux_loss.apply(&mut graph)?;
        let graph = gather_predictors(graph)?;
        Ok(Model { folder: folder.to_owned(), family, graph, config, method, remarks })
    }
}

impl Model<'_> {
    /// Tells what of its config is taken for harmless: once a command, which may open it several times.
    pub fn warn(&self) {
        self.remarks.tell();
    }

    /// Options on its memory, as far as they are for it.
    ///
    /// # Errors
    /// A quantisation that is for none of its weights.
    pub fn memory(&self, options: MemoryOptions) -> Result<MemoryOptions> {
        options.of_model(&self.graph, self.method.and_then(Method::kept))
    }

    /// Positions that it is made for, where its config says so: `max_position_embeddings`, or what rope scaling makes of those that
    /// it was trained with.
    pub fn positions(&self) -> Option<usize> {
        let config: Value = serde_json::from_str(&self.config).ok()?;
        let config = config.get("text_config").unwrap_or(&config);
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

/// The checked graph of a checkpoint as devices run it. `config` is the text of its `config.json`.
pub fn graph_of(family: &Family, config: &str) -> Result<ModelGraph> {
    gather_predictors(understood(family, config, &[])?.0)
}

/// The checked graph of a family: every op known, every key of its config understood or harmless, among them those of which the user
/// says that they change nothing; and what should be told of the others.
pub fn understood(family: &Family, config: &str, ignored: &[String]) -> Result<(ModelGraph, Remarks)> {
    let keys: Map<String, Value> =
        serde_json::from_str(config).map_err(|e| Error::input(format!("config.json: {e}")))?;
    config::method_of(&keys, None, ignored)?;
    let graph = family.graph(config)?;
    check_graph(&graph)?;
    let remarks = config::judge((&keys, &graph.unread_config), (&family.name, &family.claims), ignored)?;
    Ok((graph, remarks))
}
