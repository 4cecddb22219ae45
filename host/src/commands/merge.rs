//! `dpo-host merge`: an adapter folded into its model, as a checkpoint of its own.

use std::fs::{self, File};
use std::io::{BufWriter, IntoInnerError};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::args::model::ModelArgs;
use serde_json::{Map, Value, json};

use crate::demo;
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::lora::{self, Adapter};
use dpo_core::quantized::KEYS;
use dpo_core::weights::{Checkpoint, FILES, INDEX};
use dpo_core::{console, files, memory};
use dpo_gguf::{Export, Mixture, Source};
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
    /// What is written: a checkpoint like the model's own; a GGUF file for llama.cpp with a Modelfile for ollama; or the adapter alone, with a
    /// module for each expert, as vLLM reads it
    #[arg(long, value_name = "FORMAT", default_value = "safetensors", value_enum)]
    format: Format,
    /// Numbers of a GGUF file's matrices: f16, bf16, q8_0 (8 bits), q4_k_m (4 and 6 bits) [default: f16]
    #[arg(long, value_name = "TYPE", value_parser = mixture)]
    quantize: Option<Mixture>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Safetensors,
    Gguf,
    Adapter,
}

fn mixture(name: &str) -> std::result::Result<Mixture, String> {
    let known: Vec<&str> = Mixture::all().map(Mixture::name).collect();
    Mixture::all().find(|m| m.name() == name.to_lowercase()).ok_or_else(|| format!("is none of {}", known.join(", ")))
}

pub(crate) fn merge(registry: &Registry, options: &MergeOptions) -> Result<()> {
    if let Some(mixture) = options.quantize.filter(|_| options.format != Format::Gguf) {
        let what = format!("a checkpoint is not quantised to {}, a GGUF file is", mixture.name());
        return Err(Error::input(what).at("--quantize").help("say --format gguf as well, or leave --quantize out"));
    }
    let name = demo::or_named(model::named(options.model.as_deref(), Some(&options.adapter))?)?;
    // What can be told without weights is told before they are fetched.
    let folder = model::locate(&name, Need::WeightsToCome)?;
    let model = Model::open(registry, &folder, &options.reading.options())?;
    model.warn();
    let adapter = Adapter::load(&model.graph, &options.adapter)?;
    match options.format {
        Format::Safetensors => {}
        Format::Gguf => return gguf(&name, &model, &adapter, options),
        Format::Adapter => {
            let base = lora::base_model(&options.adapter)?.unwrap_or(name);
            files::write_folder(&options.output_dir, |folder| adapter.save_of_each(&model.graph, folder, &base))?;
            console::result(format!("adapter     {}, in {}", adapter.places(), options.output_dir.display()));
            return Ok(());
        }
    }
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

/// The same as a GGUF file.
fn gguf(name: &str, model: &Model<'_>, adapter: &Adapter, options: &MergeOptions) -> Result<()> {
    let mixture = options.quantize.unwrap_or(Mixture::F16);
    let called = options.output_dir.file_name().unwrap_or_default().to_string_lossy();
    let export = Export::plan(
        &Source {
            family: &model.family.name,
            graph: &model.graph,
            config: &model.config,
            folder: &model.folder,
            template: model.family.chat_template.as_deref(),
            name: &called,
        },
        mixture,
    )?;
    let room = files::free_space(&options.output_dir).filter(|free| export.bytes() as u64 > *free);
    if let Some(free) = room {
        let (needs, free) = (memory::size(export.bytes()), memory::size(free as usize));
        return Err(Error::input(format!("the file takes {needs}, the disk has {free}"))
            .at(options.output_dir.display())
            .help("free some, or name a folder of another disk"));
    }
    export.remarks.iter().cloned().for_each(console::warning);
    let folder = model::locate(name, Need::Weights)?;
    let checkpoint = Checkpoint::of(&folder, &model.graph)?;
    let merged = lora::Merged::new(&model.graph, &checkpoint, adapter)?;
    let bar = console::bar(export.bytes() as u64, "merging     {bar:30} {bytes}/{total_bytes} {eta} left");
    let file = format!("model-{}.gguf", mixture.name());
    files::write_folder(&options.output_dir, |output| {
        let path = output.join(&file);
        let mut to = BufWriter::new(File::create(&path).writing(&path)?);
        export.write(&merged, &mut to, &path, |bytes| bar.inc(bytes as u64))?;
        to.into_inner().map_err(IntoInnerError::into_error).and_then(|f| f.sync_all()).writing(&path)?;
        files::write(&output.join("Modelfile"), export.modelfile(&file).as_bytes())
    })?;
    bar.finish_and_clear();
    let (places, size) = (adapter.places(), memory::size(export.bytes()));
    console::result(format!("merged      {places}, {size} in {}", options.output_dir.join(file).display()));
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
