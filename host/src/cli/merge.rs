//! `dpo-host merge`: an adapter folded into its model, as a checkpoint of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clap::Args;

use crate::error::{IoContext, Result};
use crate::hub::Need;
use crate::lora::{self, Adapter};
use crate::model::{self, Model};
use crate::plugins::Registry;
use crate::weights::{Checkpoint, INDEX};
use crate::{console, files};

#[derive(Args)]
pub(super) struct MergeOptions {
    /// Checkpoint that the adapter was trained on: a folder, or a model of a hub: owner/name of Hugging Face, ms::owner/name of
    /// ModelScope; by default the one that the adapter names
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,
    /// Model family; by default the one that claims the architecture
    #[arg(long, value_name = "NAME")]
    plugin: Option<String>,
    /// PEFT adapter: the output folder of a run, or one of its checkpoints
    #[arg(long, visible_alias = "adapters", value_name = "DIR")]
    adapter: PathBuf,
    /// Where the merged model is written: a new or an empty folder
    #[arg(long, value_name = "DIR")]
    output_dir: PathBuf,
}

pub(super) fn merge(registry: &Registry, options: &MergeOptions) -> Result<()> {
    let folder = model::locate(&model::named(options.model.as_deref(), Some(&options.adapter))?, Need::Weights)?;
    let model = Model::open(registry, &folder, options.plugin.as_deref())?;
    let adapter = Adapter::load(&model.graph, &options.adapter)?;
    let checkpoint = Checkpoint::open(&folder)?;
    checkpoint.refuse_extra(&model.graph)?;
    let bar = console::bar(checkpoint.bytes() as u64, "merging     {bar:30} {bytes}/{total_bytes} {eta} left");
    files::write_folder(&options.output_dir, |output| {
        lora::merge(&model.graph, &checkpoint, &adapter, output, |bytes| bar.inc(bytes as u64))?;
        for name in model::FILES.iter().chain([&INDEX]) {
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
