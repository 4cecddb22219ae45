//! `dpo-host eval`: log-probs of pairs under a model and an adapter.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::data::{self, ChatTokenizer, TokenPair};
use crate::error::Result;
use crate::hub::Need;
use crate::lora::Adapter;
use crate::model::{self, Model};
use crate::plan::Wishes;
use crate::plugins::Registry;
use crate::ranks::Ranks;
use crate::train::{DataArgs, score};
use crate::weights::Checkpoint;
use crate::{cuda, device, files};

#[derive(Args)]
pub(super) struct EvalOptions {
    /// Checkpoint: a folder, or a model of a hub: owner/name of Hugging Face, ms::owner/name of ModelScope
    #[arg(long, value_name = "DIR|ID")]
    model: String,
    /// Model family; by default the one that claims the architecture
    #[arg(long, value_name = "NAME")]
    plugin: Option<String>,
    /// PEFT adapter; without it the base model is scored
    #[arg(long, visible_alias = "adapters", value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Write a line of JSON for every pair
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
}

pub(super) fn eval(registry: &Registry, options: &EvalOptions) -> Result<()> {
    let folder = model::locate(&options.model, Need::Weights)?;
    let model = Model::open(registry, &folder, options.plugin.as_deref())?;
    let tokenizer = ChatTokenizer::open(&folder, model.family.chat_template.as_deref())?;
    let rows = options.data.options(&options.data.dataset, model.graph.max_positions)?;
    let pairs = data::load(&rows, registry, &tokenizer)?.pairs;
    let adapter = match &options.adapter {
        Some(folder) => Adapter::load(&model.graph, folder)?,
        None => Adapter::idle(&model.graph)?,
    };
    let gpu = cuda::choose(&options.device)?;
    let checkpoint = Checkpoint::open(&folder)?;
    checkpoint.refuse_extra(&model.graph)?;
    let mut device =
        device::open(&mut Ranks::alone(), gpu, model.graph, &checkpoint, adapter, pairs.iter(), Wishes::default())?;
    let all: Vec<&TokenPair> = pairs.iter().collect();
    let scores = score(&mut Ranks::alone(), device.as_mut(), &all, |_| {})?;
    let mut rest = scores.logps.as_slice();
    let mut sum = |tokens: usize| {
        let (own, after) = rest.split_at(tokens);
        rest = after;
        own.iter().map(|l| f64::from(*l)).sum::<f64>()
    };
    let sums: Vec<[f64; 2]> = scores.answers.iter().map(|[c, r]| [sum(*c), sum(*r)]).collect();
    let mean = |side: usize| sums.iter().map(|s| s[side]).sum::<f64>() / sums.len().max(1) as f64;
    let preferred = sums.iter().filter(|s| s[0] > s[1]).count();
    let share = preferred as f64 / sums.len().max(1) as f64;
    println!(
        "{:#}",
        json!({"pairs": sums.len(), "logps/chosen": mean(0), "logps/rejected": mean(1), "chosen_more_likely": share})
    );
    if let Some(path) = &options.output {
        let line = |s: &[f64; 2]| format!("{}\n", json!({"chosen": s[0], "rejected": s[1]}));
        files::write(path, sums.iter().map(line).collect::<String>().as_bytes())?;
    }
    Ok(())
}
