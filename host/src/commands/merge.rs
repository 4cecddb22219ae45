//! `dpo-host merge`: an adapter folded into its model, as a checkpoint of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clap::Args;

use crate::args::model::ModelArgs;
use crate::demo;
use dpo_core::error::{IoContext, Result};
use dpo_core::lora::{self, Adapter};
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
        Ok(())
    })?;
    bar.finish_and_clear();
    console::result(format!("merged      {} linears, in {}", adapter.sites.len(), options.output_dir.display()));
    Ok(())
}

/// Copies a file that may be missing.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_file() {
        fs::copy(from, to).and_then(|_| File::open(to)?.sync_all()).writing(to)?;
    }
    Ok(())
}
