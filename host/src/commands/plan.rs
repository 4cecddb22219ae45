//! `dpo-host plan`: the memory of a run before it starts; for a GPU, also without one at hand.

use crate::args::model::ModelArgs;
use crate::args::storage::StorageArgs;
use crate::args::{DeviceArg, SizeArg};
use crate::{backends, demo};
use clap::Args;
use dpo_plugin_api::graph::ModelGraph;
use serde::Serialize;

use dpo_core::aux_loss::RouterAuxLoss;
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::lora::{Adapter, AdapterConfig};
use dpo_core::memory::size;
use dpo_core::plan::{MemoryOptions, Plan};
use dpo_core::storage::Quantization;
use dpo_cuda::{self as cuda, Gpu, GpuPlan, Room};
use dpo_hub::Need;
use dpo_hub::model::{self, Model, ModelOptions};
use dpo_plugins::Registry;
use dpo_plugins::shapes::{SHAPES, Shape};

#[derive(Args)]
pub(crate) struct PlanOptions {
    /// Checkpoint: a folder, a model of a hub: owner/name of Hugging Face, ms::owner/name of ModelScope, or a published shape such as qwen2.5-7b
    #[arg(long, value_name = "DIR|ID|SHAPE", required_unless_present = "table")]
    model: Option<String>,
    #[command(flatten)]
    reading: ModelArgs,
    /// Maximum sequence length: prompt plus one answer, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    max_length: usize,
    /// LoRA rank r
    #[arg(long, value_name = "R", default_value_t = 8)]
    lora_rank: usize,
    /// What to plan for: auto, cpu, cuda or cuda:N. With --gpu-memory a GPU, which need not be there
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceArg::Auto)]
    device: DeviceArg,
    /// Memory to plan with, such as 24GiB [default: what is free]
    #[arg(long, value_name = "SIZE")]
    gpu_memory: Option<SizeArg>,
    #[command(flatten)]
    storage: StorageArgs,
    /// Number of GPUs, over which the base weights are sharded where one cannot hold them
    #[arg(long, value_name = "N", default_value_t = 1)]
    gpus: usize,
    /// A markdown table over published shapes and sizes of GPUs
    #[arg(long)]
    table: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Sizes of GPUs in GiB: RTX 3060, 4080, 3090 and 4090, 5090, L40S, A100 and H100.
const GPUS: &[usize] = &[8, 12, 16, 24, 32, 48, 80];

/// What a plan for a GPU that need not be there does not know.
const FP8: &str = "fp8 is for cards whose tensor cores multiply it: Ada (RTX 4090, L40), Hopper (H100) and later ones";

/// Half GiB that no shape needs more of.
const MOST_HALVES: usize = 512;

pub(crate) fn plan(registry: &Registry, options: &PlanOptions) -> Result<()> {
    if options.table {
        return table(registry, options);
    }
    let name = options.model.as_deref().unwrap_or_default();
    let storage = options.storage.on(MemoryOptions::default());
    let (graph, storage) = match Shape::named(name) {
        Ok(shape) => {
            let graph = shape.graph(registry)?;
            let storage = shape.memory(storage, &graph)?;
            (graph, storage)
        }
        Err(_) => {
            // What has no slash is no name on a hub.
            let shapes: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
            let known = format!("name a folder, owner/name of Hugging Face, or one of {}", shapes.join(", "));
            let folder = model::locate(&demo::or_named(name.to_owned())?, Need::Config).map_err(|e| {
                match name.contains('/') {
                    true => e,
                    false => Error::input(format!("'{name}' is neither a folder nor a published shape"))
                        .at("--model")
                        .help(known),
                }
            })?;
            // As training has it without a word.
            let reading = ModelOptions { router_aux_loss: RouterAuxLoss::OfConfig, ..options.reading.options() };
            let model = Model::open(registry, &folder, &reading)?;
            model.warn();
            let storage = model.memory(storage)?;
            (model.graph, storage)
        }
    };
    let adapter = adapter(&graph, options)?;
    let memory = options.gpu_memory.as_ref().map(|size| size.bytes);
    let (gpu, memory) = match (&options.device, memory) {
        (DeviceArg::Cpu, memory) => (false, memory),
        (_, Some(memory)) => (true, Some(memory)),
        (device, None) => match backends::gpu(device, None)? {
            None => {
                if *device == DeviceArg::Auto {
                    console::note(
                        "no GPU here: this plans for the CPU; --gpu-memory 24GiB plans for a card of that size",
                    );
                }
                (false, None)
            }
            Some(index) => (true, Some(cuda::room(&Gpu::open(index)?, None, None)?.available)),
        },
    };
    if gpu {
        if storage.quantization == Some(Quantization::Fp8) {
            console::note(FP8);
        }
        return print(&on_gpu(&graph, &adapter, options, memory.unwrap_or(0), storage)?, options.json);
    }
    let memory_options = MemoryOptions { limit: memory, ..storage };
    let plan = |ranks| Plan::new(&graph, adapter.training_bytes(), longest(options), ranks, memory_options);
    print(&whole_or_shared(options.gpus, plan)?, options.json)
}

/// As a run does without `--shard-base`: frozen weights are shared if they do not fit otherwise.
fn whole_or_shared<P>(ranks: usize, plan: impl Fn(usize) -> Result<P>) -> Result<P> {
    plan(1).or_else(|e| if ranks > 1 { plan(ranks) } else { Err(e) })
}

fn print(plan: &(impl Serialize + std::fmt::Display), json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(plan).map_err(|e| Error::run(e.to_string()))?);
    } else {
        println!("{plan}");
    }
    Ok(())
}

/// A pair of two answers that share nothing takes at most twice the length of one.
fn longest(options: &PlanOptions) -> usize {
    2 * options.max_length
}

fn adapter(graph: &ModelGraph, options: &PlanOptions) -> Result<Adapter> {
    let config = AdapterConfig::new(options.lora_rank, 1.0);
    Adapter::planned(graph, config)
}

/// A plan for the longest pairs there can be, all of whose tokens may be an answer's.
fn on_gpu(
    graph: &ModelGraph,
    adapter: &Adapter,
    options: &PlanOptions,
    memory: usize,
    storage: MemoryOptions,
) -> Result<GpuPlan> {
    let room = Room::of(memory, options.gpus);
    // Ranks shard the layers before they keep them in host memory; a table says what fits without that.
    let offload_base = storage.offload_base.or((options.gpus > 1 || options.table).then_some(false));
    let storage = MemoryOptions { offload_base, ..storage };
    let plan = |ranks| GpuPlan::new(graph, adapter, longest(options), 1.0, room, ranks, storage);
    whole_or_shared(options.gpus, plan)
}

/// Of every shape a row for each way to keep the base, or for the one that is asked for.
fn table(registry: &Registry, options: &PlanOptions) -> Result<()> {
    let asked = options.storage.on(MemoryOptions::default());
    let kinds = match (asked.quantization, asked.published) {
        (None, Some(published)) => {
            vec![None, Some(Quantization::Fp8), Some(Quantization::Nf4), Some(published)]
        }
        (kind, _) => vec![kind],
    };
    let header: Vec<String> = GPUS.iter().map(|g| format!("{g} GiB")).collect();
    let (rank, length) = (options.lora_rank, options.max_length);
    println!("| LoRA rank {rank}, --max-length {length} | base | needs | {} |", header.join(" | "));
    println!("|---|---|---|{}", "---|".repeat(GPUS.len()));
    for shape in SHAPES {
        let graph = shape.graph(registry)?;
        let own = shape.memory(asked, &graph).ok().and_then(|own| own.published);
        // Of what may stay as it is published, the shapes that are.
        for kind in kinds.iter().filter(|kind| asked.published.is_none() || **kind != asked.published || **kind == own)
        {
            let storage = MemoryOptions { quantization: *kind, published: None, ..asked };
            println!("| {} |", row(options, (*shape, &graph), storage)?.join(" | "));
        }
    }
    if kinds.contains(&Some(Quantization::Fp8)) {
        println!("\n{FP8}");
    }
    Ok(())
}

/// The least that a shape needs, in steps of half a GiB; of every size of GPU the tokens at once, and what computing again
/// costs.
fn row(options: &PlanOptions, (shape, graph): (Shape, &ModelGraph), storage: MemoryOptions) -> Result<Vec<String>> {
    let adapter = adapter(graph, options)?;
    let plan = |memory| on_gpu(graph, &adapter, options, memory, storage);
    let least = (1..=MOST_HALVES).map(|half| half << 29).find(|memory| plan(*memory).is_ok());
    let base = storage.quantization.map_or("bf16", Quantization::name).to_owned();
    let mut cells = vec![shape.name.to_owned(), base, least.map_or_else(|| "—".into(), size)];
    for gib in GPUS {
        // The desktop, other processes and the driver take some of a card.
        let memory = (gib << 30) - (gib << 30) / 32;
        cells.push(match plan(memory) {
            Ok(plan) if plan.again > 0.005 => {
                format!("{} tokens, +{:.0}%", plan.micro_batch_tokens, plan.again * 100.0)
            }
            Ok(plan) => format!("{} tokens", plan.micro_batch_tokens),
            Err(_) => "—".into(),
        });
    }
    Ok(cells)
}
