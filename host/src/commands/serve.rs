//! `dpo-host serve`: a model and adapters over HTTP, for clients of OpenAI's API.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::args::DeviceArg;
use crate::args::model::ModelArgs;
use crate::args::sampling::SamplingArgs;
use crate::args::storage::StorageArgs;
use crate::{backends, demo};
use dpo_core::console;
use dpo_core::decoder::Sequences;
use dpo_core::error::{Error, Result};
use dpo_core::lora::{self, Adapter};
use dpo_core::plan::MemoryOptions;
use dpo_data::ChatTokenizer;
use dpo_generate::{Generator, Sampling};
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_plugins::Registry;
use dpo_serve::{Config, Listener};

/// The variable that a key is taken from, so that it is in no list of processes.
const API_KEY: &str = "DPO_HOST_API_KEY";

#[derive(Args)]
pub(crate) struct ServeOptions {
    /// Checkpoint: a folder, or a model of a hub: owner/name of Hugging Face, ms::owner/name of ModelScope. By default the one
    /// that the adapter names; without an adapter the demo's
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,
    /// PEFT adapters, each under its own model name; by default that of its folder
    #[arg(long, visible_aliases = ["adapters", "lora-modules"], value_name = "[NAME=]DIR", num_args = 1..)]
    adapter: Vec<Named>,
    #[command(flatten)]
    reading: ModelArgs,
    /// Model name under which the model without an adapter answers; by default its id or its folder's name
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Where to listen; a port alone is one of 127.0.0.1 [default: 127.0.0.1:8000]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Key that clients have to show; better in $DPO_HOST_API_KEY, which no list of processes shows
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Sequences at once: answers that go on in one pass. Each has its own part of the KV cache
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    max_num_seqs: u16,
    /// Tokens of a sequence, prompt and answer [default: what the model was made for, or what memory has room for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    max_model_len: Option<u32>,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
    #[command(flatten)]
    storage: StorageArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// An adapter with the name that it is served under, if it was given one.
#[derive(Clone, Debug)]
struct Named {
    name: Option<String>,
    folder: PathBuf,
}

impl FromStr for Named {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> std::result::Result<Named, Self::Err> {
        Ok(match text.split_once('=') {
            // A folder may have that letter in its name.
            Some((name, folder)) if !Path::new(text).exists() && !name.is_empty() => {
                Named { name: Some(name.into()), folder: folder.into() }
            }
            _ => Named { name: None, folder: text.into() },
        })
    }
}

pub(crate) fn serve(registry: &Registry, options: &ServeOptions) -> Result<()> {
    let first = options.adapter.first().map(|adapter| adapter.folder.as_path());
    let name = match (&options.model, first) {
        (None, None) => demo::write()?.model.display().to_string(),
        (model, adapter) => demo::or_named(model::named(model.as_deref(), adapter)?)?,
    };
    // What can be told without weights is told before they are fetched.
    let folder = model::locate(&name, Need::WeightsToCome)?;
    let model = Model::open(registry, &folder, &options.reading.options())?;
    model.warn();
    let adapters = options.adapter.iter().map(|a| Adapter::load(&model.graph, &a.folder));
    let adapters = adapters.collect::<Result<Vec<Adapter>>>()?;
    let config = config(options, &name, &folder)?;
    let tokenizer = ChatTokenizer::open(&folder, model.family.chat_template.as_deref())?;
    let listener = Listener::bind(options.listen.as_deref())?;
    if listener.is_open() && config.api_key.is_none() {
        let what = "whoever reaches this address can use the model: there is no key";
        console::warning(&Error::input(what).at("--listen").help(format!("put one into ${API_KEY}")));
    }
    model::locate(&name, Need::Weights)?;
    let usual = Sequences::of(options.max_num_seqs.into());
    let asked = options.max_model_len.map(|tokens| tokens as usize);
    let made_for = model.positions().unwrap_or(usize::MAX);
    if let Some(tokens) = asked.filter(|tokens| *tokens > made_for) {
        return Err(Error::input(format!("{tokens} tokens, the model is made for {made_for}")).at("--max-model-len"));
    }
    let sequences = Sequences {
        most: asked.unwrap_or(usual.most.min(made_for)),
        least: asked.unwrap_or(usual.least.min(made_for)),
        ..usual
    };
    let memory = options.storage.on(MemoryOptions::default());
    let backend = backends::open(&options.device, None)?;
    let generator = Generator::open(&model, adapters, backend.as_ref(), sequences, memory)?;
    console::line(format!("model       {} ({})", folder.display(), model.family.name));
    let names = [vec![config.model.clone()], config.adapters.clone()].concat();
    console::line(format!("names       {}", names.join(", ")));
    let length = generator.bounds().length;
    console::line(format!("device      {}; {} sequences of {length} tokens", generator.device(), sequences.count));
    console::result(format!("serving     {}", listener.url()));
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // A second one ends at once.
        let registered = flag::register_conditional_shutdown(signal, 130, stop.clone())
            .and_then(|_| flag::register(signal, stop.clone()));
        registered.map_err(|e| Error::run(format!("signals cannot be heard: {e}")))?;
    }
    dpo_serve::serve(generator, tokenizer, config, listener, || stop.load(Ordering::Relaxed))
}

fn config(options: &ServeOptions, name: &str, folder: &Path) -> Result<Config> {
    let last =
        |path: &Path| path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into());
    let is_folder = Path::new(name).is_dir();
    let model = options.served_model_name.clone();
    let model = model.unwrap_or_else(|| if is_folder { last(Path::new(name)) } else { name.to_owned() });
    let mut adapters: Vec<String> = Vec::new();
    for adapter in &options.adapter {
        let own = adapter.name.clone().unwrap_or_else(|| last(&adapter.folder));
        if own == model || adapters.contains(&own) {
            return Err(Error::input(format!("two models would be named '{own}'"))
                .at("--adapter")
                .help("name each: --adapter first=DIR second=DIR"));
        }
        adapters.push(own);
        if let Some(of) = lora::base_model(&adapter.folder)?.filter(|of| !is_same_model(of, name)) {
            console::note(format!("{}: was trained on {of}", adapter.folder.display()));
        }
    }
    let mut asked = options.sampling.options();
    // As OpenAI's API has it, and vLLM: what neither the user nor the model says is 1.
    let given = dpo_data::read_json(&folder.join("generation_config.json"))?;
    let temperature = given.get("temperature").and_then(serde_json::Value::as_f64);
    asked.temperature = asked.temperature.or(temperature).or(Some(1.0));
    let max_new_tokens = asked
        .max_new_tokens
        .or_else(|| given.get("max_new_tokens").and_then(serde_json::Value::as_u64).map(|n| n as usize));
    let key = std::env::var(API_KEY).ok().filter(|key| !key.is_empty());
    Ok(Config {
        model,
        adapters,
        sampling: Sampling::of(&asked, folder)?,
        max_new_tokens,
        api_key: options.api_key.clone().or(key),
    })
}

/// Whether two names of a model mean the same, as far as can be told.
fn is_same_model(a: &str, b: &str) -> bool {
    let place = |name: &str| std::fs::canonicalize(name).ok();
    a == b || place(a).is_some_and(|a| place(b) == Some(a))
}
