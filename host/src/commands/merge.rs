//! `dpo-host merge`: an adapter folded into its model, as a checkpoint of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clap::Args;

use crate::args::model::ModelArgs;
use serde_json::{Map, Value, json};

use crate::demo;
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::lora::{self, Adapter};
use dpo_core::quantized::KEYS;
use dpo_core::weights::{Checkpoint, FILES, INDEX};
use dpo_core::{console, files};
use dpo_hub::Need;
use dpo_hub::model::{self, Model};
use dpo_plugins::Registry;

#[derive(Args)]
pub(crate) struct MergeOptions {
    /// Checkpoint that the adapter was trained on: a folder, or a model of a hub: owner/name of Hugging Face, ms::owner/name of
    /// ModelScope; by default the one that the adapter names
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,
    #[command(flatten)]
    reading: ModelArgs,
    /// PEFT adapter: the output folder of a run, or one of its checkpoints
    #[arg(long, visible_alias = "adapters", value_name = "DIR")]
    adapter: PathBuf,
    /// Where the merged model is written: a new or an empty folder
    #[arg(long, value_name = "DIR")]
    output_dir: PathBuf,
}

pub(crate) fn merge(registry: &Registry, options: &MergeOptions) -> Result<()> {
    let name = demo::or_named(model::named(options.model.as_deref(), Some(&options.adapter))?)?;
    // What can be told without weights is told before they are fetched.
    let folder = model::locate(&name, Need::WeightsToCome)?;
    let model = Model::open(registry, &folder, &options.reading.options())?;
    model.warn();
    let adapter = Adapter::load(&model.graph, &options.adapter)?;
    let folder = model::locate(&name, Need::Weights)?;
    let checkpoint = Checkpoint::of(&folder, &model.graph)?;
    let bar = console::bar(checkpoint.bytes() as u64, "merging     {bar:30} {bytes}/{total_bytes} {eta} left");
    files::write_folder(&options.output_dir, |output| {
        lora::merge(&model.graph, &checkpoint, &adapter, output, |bytes| bar.inc(bytes as u64))?;
        for name in FILES.iter().chain([&INDEX]) {
            copy(&folder.join(name), &output.join(name))?;
        }
        if checkpoint.is_quantized() { plain(&checkpoint, output) } else { Ok(()) }
    })?;
    bar.finish_and_clear();
    console::result(format!("merged      {}, in {}", adapter.places(), options.output_dir.display()));
    Ok(())
}

/// Lets the files beside weights that were quantised say that they no longer are.
fn plain(checkpoint: &Checkpoint, folder: &Path) -> Result<()> {
    let edit = |name: &str, change: &dyn Fn(&mut Map<String, Value>)| {
        let path = folder.join(name);
        if !path.is_file() {
            return Ok(());
        }
        let wrong = |e: serde_json::Error| Error::input(e.to_string()).at(path.display());
        let mut keys: Map<String, Value> = serde_json::from_str(&files::read_text(&path)?).map_err(wrong)?;
        change(&mut keys);
        files::write(&path, serde_json::to_string_pretty(&keys).map_err(wrong)?.as_bytes())
    };
    edit("config.json", &|keys| {
        for path in KEYS {
            match path.split_once('.') {
                None => drop(keys.shift_remove(*path)),
                Some((outer, key)) => {
                    keys.get_mut(outer).and_then(Value::as_object_mut).map(|inner| inner.shift_remove(key));
                }
            }
        }
    })?;
    let (mut names, mut bytes) = (Map::new(), 0);
    for part in checkpoint.parts() {
        let part = part?;
        let file = part.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        bytes += part.bytes;
        names.extend(part.tensors.into_iter().map(|name| (name, json!(file))));
    }
    edit(INDEX, &|keys| {
        *keys = Map::from_iter([
            ("metadata".to_owned(), json!({"total_size": bytes})),
            ("weight_map".to_owned(), Value::Object(names.clone())),
        ])
    })
}

/// Copies a file that may be missing.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_file() {
        fs::copy(from, to).and_then(|_| File::open(to)?.sync_all()).writing(to)?;
    }
    Ok(())
}
