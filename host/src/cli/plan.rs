//! `dpo-host plan`: the memory of a run before it starts.

use clap::Args;

use crate::error::{Error, Result};
use crate::lora::{Adapter, AdapterConfig, Targets};
use crate::model::{self, Model};
use crate::plan::{Plan, Wishes, parse_size};
use crate::plugins::Registry;

#[derive(Args)]
pub(super) struct PlanOptions {
    /// Checkpoint: a folder, or an id in the local Hugging Face cache
    #[arg(long, value_name = "DIR|ID")]
    model: String,
    /// Model family; by default the one that claims the architecture
    #[arg(long, value_name = "NAME")]
    plugin: Option<String>,
    /// Most tokens of prompt and one answer
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    max_length: usize,
    /// Rows of A
    #[arg(long, value_name = "R", default_value_t = 8)]
    lora_rank: usize,
    /// Memory to plan with; by default what is free
    #[arg(long, value_name = "SIZE")]
    gpu_memory: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn plan(registry: &Registry, options: &PlanOptions) -> Result<()> {
    let model = Model::open(registry, &model::locate(&options.model)?, options.plugin.as_deref())?;
    let config = AdapterConfig { rank: options.lora_rank, alpha: 1.0, rslora: false, targets: Targets::AllLinear };
    let parameters = Adapter::new(&model.graph, config, 0)?.params.len();
    let memory = options.gpu_memory.as_deref().map(parse_size).transpose()?;
    // A pair of two answers that share nothing takes at most twice the length of one.
    let longest = 2 * options.max_length;
    let plan = Plan::new(&model.graph, parameters, longest, Wishes { memory, ..Wishes::default() })?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&plan).map_err(|e| Error::run(e.to_string()))?);
    } else {
        println!("{plan}");
    }
    Ok(())
}
