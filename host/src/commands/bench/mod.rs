//! `dpo-host bench`: speed and memory of training, or of answers, with random weights of a published shape.

mod answers;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use crate::args::storage::StorageArgs;
use crate::args::{DeviceArg, KernelsArg, SizeArg};
use crate::backends;
use clap::builder::PossibleValuesParser;
use clap::{ArgAction, Args, ValueEnum};
use indicatif::ProgressBar;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use dpo_core::collective::{Alone, ProcessGroup};
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::example::{Answer, Example};
use dpo_core::files;
use dpo_core::logprobs::{AnswerLogProbs, AnswerOffsets};
use dpo_core::lora::{Adapter, AdapterConfig};
use dpo_core::memory::size;
use dpo_core::ops;
use dpo_core::optimizer::{AdamW, Moments, clip};
use dpo_core::plan::MemoryOptions;
use dpo_core::storage::Quantization;
use dpo_cuda::{self as cuda, CudaDevice, Gpu, GpuPlan, Nccl, Source};
use dpo_data::Wanted;
use dpo_plugin_api::graph::{ModelGraph, Node};
use dpo_plugin_api::loss::{Answers, MAX_ANSWERS};
use dpo_plugins::Registry;
use dpo_plugins::shapes::{SHAPES, Shape};
use dpo_ranks::{self as ranks, Place};
use dpo_train::{self as train, Objective, ObjectiveOptions};

#[derive(Args)]
pub(crate) struct BenchOptions {
    /// Shape of the model
    #[arg(long, value_name = "SHAPE", value_parser = shape_names(), default_value = "qwen2.5-7b")]
    shape: String,
    /// Lengths of prompts and answers
    #[arg(long, value_enum, default_value_t = Profile::Chat)]
    profile: Profile,
    /// Loss
    #[arg(long, value_name = "NAME", default_value = "sigmoid")]
    loss: String,
    /// Answers to a prompt, for losses over rankings
    #[arg(long, value_name = "K", default_value_t = 2)]
    answers: usize,
    /// Steps that are measured, after one of warm-up
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Examples a step, for each GPU
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Measure answers instead of training: so many sequences at once, each number by itself
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', value_parser = sequences)]
    sequences: Vec<usize>,
    /// Numbers of GPUs, each measured by itself
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', default_value = "1")]
    gpus: Vec<usize>,
    /// Shard the frozen base weights over the GPUs (FSDP-like)
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true", default_value_t = false, action = ArgAction::Set)]
    shard_base: bool,
    /// Maximum sequence length: prompt plus one answer, in tokens
    #[arg(long, default_value_t = 2048)]
    max_length: usize,
    /// LoRA rank r
    #[arg(long, default_value_t = 8)]
    lora_rank: usize,
    /// Parameters of experts and routers to adapt besides all linears, as train has them [default: none]
    #[arg(long, value_name = "P", num_args = 1..)]
    target_parameters: Vec<String>,
    /// Coefficient of the auxiliary loss of routers, which train has from the config
    #[arg(long, value_name = "C", default_value_t = 0.0)]
    router_aux_loss_coef: f64,
    /// Memory limit of a GPU [default: what is free]
    #[arg(long, value_name = "SIZE")]
    gpu_memory: Option<SizeArg>,
    #[command(flatten)]
    storage: StorageArgs,
    /// Tokens of a micro-batch [default: as many as fit into memory]
    #[arg(long, value_name = "N")]
    micro_batch_tokens: Option<usize>,
    /// The GPUs: cuda or cuda:N,M
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceArg::Cuda(Vec::new()))]
    device: DeviceArg,
    /// Run the kernels for an older generation of GPUs, such as sm_80 [default: the GPU's own]
    #[arg(long, value_name = "GENERATION")]
    kernels: Option<KernelsArg>,
    /// Print the time of every op in a further step
    #[arg(long)]
    profile_ops: bool,
    /// Write that step as a Chrome trace
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Weights of experts that a token is multiplied with.
fn of_experts(graph: &ModelGraph) -> usize {
    let of = |node: &Node| match node.op.as_str() {
        "experts" => {
            let matrices = node.weights.iter().filter(|w| w.shape.len() == 3);
            matrices.map(|w| ops::count(node, "top_k") * w.shape[1] * w.shape[2]).sum()
        }
        _ => 0,
    };
    graph.parts().flat_map(|(_, block)| &block.nodes).map(of).sum()
}

fn sequences(text: &str) -> std::result::Result<usize, String> {
    let count = text.parse().ok().filter(|count| (1..=256).contains(count));
    count.ok_or_else(|| "a number from 1 to 256".to_owned())
}

/// What `--shape` may be.
fn shape_names() -> PossibleValuesParser {
    PossibleValuesParser::new(SHAPES.iter().map(|s| s.name))
}

/// Lengths: medians of prompt, chosen and rejected, and the spread of their logarithms.
#[derive(Clone, Copy, ValueEnum)]
enum Profile {
    /// Many turns, short answers
    Chat,
    /// One question, long answers
    Instruct,
    /// A long document, short answers
    Long,
    /// A document of some 7,000 tokens (give --max-length 8192)
    Document,
    /// A prompt as long as --max-length leaves room for
    Book,
}

impl Profile {
    fn lengths(self) -> ([f64; 3], f64) {
        match self {
            // About 20 tokens of every prompt are the chat template's.
            Profile::Chat => ([450.0, 131.0, 111.0], 0.55),
            Profile::Instruct => ([140.0, 321.0, 281.0], 0.5),
            Profile::Long => ([1520.0, 161.0, 141.0], 0.25),
            Profile::Document => ([7000.0, 161.0, 141.0], 0.25),
            Profile::Book => ([1e6, 161.0, 141.0], 0.25),
        }
    }

    /// Examples of what a loss wants, of which a ranking has `answers` answers.
    fn examples(
        self,
        count: usize,
        (wanted, answers): (&Wanted, usize),
        vocab: usize,
        max_length: usize,
    ) -> Result<Vec<Example>> {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let (medians, spread) = self.lengths();
        let answers = match wanted.answers {
            Answers::One | Answers::Labelled => 1,
            Answers::Pair => 2,
            Answers::Ranked => answers,
        };
        let example = |at: usize| {
            let mut draw = |median: f64| {
                // The sum of twelve uniform numbers is near enough to a normal one.
                let normal = (0..12).map(|_| rng.random_range(0.0..1.0_f64)).sum::<f64>() - 6.0;
                ((median * (spread * normal).exp()) as usize).max(8)
            };
            let [p, c, r] = medians.map(&mut draw);
            let (c, r) = (c.min(max_length / 2), r.min(max_length / 2));
            let p = p.min(max_length - c.max(r));
            let mut ids = |n: usize| (0..n).map(|_| rng.random_range(0..vocab as u32)).collect::<Vec<u32>>();
            let prompt = ids(p);
            let label = if wanted.answers == Answers::Labelled { (at % 2) as f64 } else { 1.0 };
            let mut answer = |at: usize| match at {
                0 => Answer::new(ids(c), label),
                worse => Answer::new(ids(r), -(worse as f64)),
            };
            let answers = (0..answers).map(&mut answer).collect();
            let example = Example::new(prompt, answers, "")?;
            let example = if wanted.prompt { example.with_prompt_scored() } else { example };
            if wanted.mismatched { example.with_detached(ids(r)) } else { Ok(example) }
        };
        (0..count).map(example).collect()
    }
}

/// TFLOP/s in bf16 with sums in f32, without sparsity, as NVIDIA's data sheets have them.
const PEAKS: &[(&str, f64)] = &[
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("RTX 4090", 165.2),
    ("RTX 5090", 209.5),
    ("RTX 3090", 71.0),
    ("L40S", 362.0),
];

pub(crate) fn bench(registry: &Registry, options: &BenchOptions) -> Result<()> {
    if let Some(place) = Place::from_environment()? {
        return ranks::work(&place, |ranks| measure(registry, options, ranks, Some(place.local_rank)));
    }
    if !options.sequences.is_empty() {
        return answers::measure(registry, options);
    }
    options.gpus.iter().try_for_each(|gpus| match gpus {
        1 => measure(registry, options, &mut Alone, None),
        // Ranks find their places in the environment and do not come here.
        gpus => ranks::launch(*gpus, &[], 0),
    })
}

/// Measures as one of some ranks.
fn measure(
    registry: &Registry,
    options: &BenchOptions,
    group: &mut dyn ProcessGroup,
    local_rank: Option<usize>,
) -> Result<()> {
    let Some(index) = backends::gpu(&options.device, local_rank)? else {
        return Err(Error::input("bench measures GPUs").at("--device").help("say --device cuda"));
    };
    let batch_size = options.batch_size * group.size();
    let shape = Shape::named(&options.shape)?;
    let graph = shape.graph_with(registry, options.router_aux_loss_coef)?;
    let parameters = options.target_parameters.clone();
    let lora = AdapterConfig { parameters, ..AdapterConfig::new(options.lora_rank, 32.0) };
    let adapter = Adapter::new(&graph, lora, 0)?;
    let objective = ObjectiveOptions { losses: vec![options.loss.clone()], ..ObjectiveOptions::default() };
    let mut objective = Objective::new(registry, &objective)?;
    let wanted = objective.wanted()?;
    if !(2..=MAX_ANSWERS).contains(&options.answers) {
        let what = format!("should be from 2 to {MAX_ANSWERS}, not {}", options.answers);
        return Err(Error::input(what).at("--answers"));
    }
    let count = batch_size * (options.steps + 1);
    let pairs = options.profile.examples(count, (&wanted, options.answers), graph.vocab_size, options.max_length)?;
    let longest = pairs.iter().map(Example::packed_tokens).max().unwrap_or(1);
    let answers = pairs.iter().map(Example::scored_share).fold(0.0, f64::max);
    let gpu = Gpu::open(index)?.with_kernels(options.kernels.map(|k| k.0))?;
    let nccl = Nccl::join(&gpu, group)?;
    let memory = options.gpu_memory.as_ref().map(|size| size.bytes);
    let memory_options =
        MemoryOptions { limit: memory, micro_batch_tokens: options.micro_batch_tokens, ..MemoryOptions::default() };
    let memory_options = shape.memory(options.storage.on(memory_options), &graph)?;
    let (free, all) = gpu.memory()?;
    let before = all - free;
    let room = cuda::room(&gpu, memory, nccl.as_ref())?;
    let parts = if options.shard_base { group.size() } else { 1 };
    if parts > 1 && nccl.is_none() {
        return Err(Error::input("GPUs share frozen weights through NCCL, which these ranks do not have")
            .at("--shard-base")
            .help("leave it out, or give each rank a GPU of its own; `dpo-host doctor` looks for NCCL"));
    }
    let plan = GpuPlan::new(&graph, &adapter, longest, answers, room, parts, memory_options)?;
    let many = if group.size() > 1 { format!("{} times ", group.size()) } else { String::new() };
    if !options.json {
        println!("device      {many}{}\n{plan}", gpu.name);
    }
    let of_linears = adapter.sites.iter().filter(|s| s.experts == 1).map(|s| s.inputs * s.outputs);
    let linear = of_linears.sum::<usize>() + of_experts(&graph);
    let start = Instant::now();
    let (planned, budget) = (plan.total(), plan.micro_batch_tokens);
    let plan = (plan, group.rank());
    let mut device = CudaDevice::load(gpu, graph, &Source::Random, adapter, plan, &ProgressBar::hidden())?.join(nccl);
    let loading = start.elapsed().as_secs_f64();
    let start = Instant::now();
    device.warm_up()?;
    let warming = start.elapsed().as_secs_f64();
    let optimizer = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, loraplus_lr_ratio: 1.0 };
    // As in training: the reference is computed over all pairs before the first step.
    let scored: Vec<&Example> = pairs.iter().collect();
    train::score(group, &mut device, &scored[..batch_size], |_| {})?;
    let start = Instant::now();
    let reference = match objective.needs_reference() {
        true => train::score(group, &mut device, &scored, |_| {})?,
        false => AnswerLogProbs::zeros(AnswerOffsets::of(scored.iter().copied())),
    };
    let reference_seconds = start.elapsed().as_secs_f64();
    let places: Vec<usize> = (0..scored.len()).collect();
    let steps = scored.chunks(batch_size).zip(places.chunks(batch_size));
    let steps: Vec<(&[&Example], AnswerLogProbs)> =
        steps.map(|(pairs, places)| (pairs, reference.gather(places))).collect();
    let mut step =
        |group: &mut dyn ProcessGroup, device: &mut CudaDevice, own: &(&[&Example], AnswerLogProbs)| -> Result<()> {
            train::gradient(group, device, &mut objective, own.0, Some(&own.1))?;
            let norm = device.gradient_norm()?;
            device.update(&optimizer, clip(norm, 1.0), 1e-4)?;
            device.gpu().finish()
        };
    step(group, &mut device, &steps[0])?;
    group.barrier()?;
    let start = Instant::now();
    steps[1..].iter().try_for_each(|own| step(group, &mut device, own))?;
    let training = start.elapsed().as_secs_f64();
    let measured = &scored[batch_size..];
    let count = |of: &[&Example], one: fn(&Example) -> usize| of.iter().map(|e| one(e)).sum::<usize>();
    let unique = Example::unique_tokens;
    let (tokens, answer_tokens) = (count(measured, unique), count(measured, Example::answer_tokens));
    let scoring = reference_seconds * tokens as f64 / count(&scored, unique) as f64;
    let seconds = scoring + training;
    let (free, _) = device.gpu().memory()?;
    // Forward under the reference, forward and backward by inputs under the policy; the same for the head.
    let head = device.graph().hidden_size * device.graph().vocab_size;
    let flops = 6.0 * (linear as f64 * tokens as f64 + head as f64 * answer_tokens as f64);
    let speed = tokens as f64 / seconds;
    // As tools compute them that have the prompt before every answer.
    let rows = count(measured, |e| e.answers().len() * e.prompt().len() + e.answer_tokens());
    let used = all - free;
    if options.json {
        println!(
            "{}",
            json!({"shape": options.shape, "quantization": memory_options.quantization.map_or("none", Quantization::name), "gpus": group.size(), "gpu": device.gpu().name, "tokens_per_second": speed,
                "loss": options.loss, "answers_of_example": measured.first().map_or(0, |e| e.answers().len()), "row_tokens_per_second": rows as f64 / seconds,
                "examples_per_second": (options.steps * batch_size) as f64 / seconds, "tflops": flops / seconds / 1e12,
                "reference_share": scoring / seconds, "memory_gib": used as f64 / (1_u64 << 30) as f64,
                "planned_gib": planned as f64 / (1_u64 << 30) as f64, "micro_batch_tokens": budget, "steps": options.steps,
                "answers": answer_tokens as f64 / tokens as f64})
        );
    } else {
        println!("loading     {loading:.1} s, warming up {warming:.1} s");
        println!(
            "speed       {speed:.0} unique tokens/s, reference included; {:.2} examples/s",
            (options.steps * batch_size) as f64 / seconds
        );
        println!("            {:.0} tokens/s of rows that have the prompt before every answer", rows as f64 / seconds);
        let peak = PEAKS.iter().find(|(name, _)| device.gpu().name.contains(name));
        let share = |peak: f64| flops / seconds / peak / 1e10 / group.size() as f64;
        let share = peak.map(|(_, peak)| format!(", {:.1}% of the card's {peak:.0}", share(*peak)));
        println!("            {:.0} TFLOP/s of the model{}", flops / seconds / 1e12, share.unwrap_or_default());
        println!(
            "            {:.0} unique tokens/s with the reference cached; answers are {:.0}% of the tokens",
            tokens as f64 / training,
            100.0 * answer_tokens as f64 / tokens as f64
        );
        println!("memory      {} in use, {} of them before the start", size(used), size(before));
    }
    if options.profile_ops || options.trace.is_some() {
        // The reference pass is that of the adapter as it was at the start.
        let start = device.adapter().params.clone();
        device.restore(&start, Moments::new(start.len()))?;
        device.gpu().start_trace()?;
        train::score(group, &mut device, steps[1].0, |_| {})?;
        step(group, &mut device, &steps[1])?;
        report(&device.gpu().end_trace()?, options)?;
    }
    Ok(())
}

/// Times by op, and the trace.
fn report(times: &[(&'static str, f32)], options: &BenchOptions) -> Result<()> {
    let mut sums: BTreeMap<&str, (f32, usize)> = BTreeMap::new();
    for (label, time) in times {
        let sum = sums.entry(label).or_default();
        *sum = (sum.0 + time, sum.1 + 1);
    }
    let total: f32 = times.iter().map(|(_, t)| t).sum();
    let mut sorted: Vec<_> = sums.into_iter().collect();
    sorted.sort_by(|a, b| b.1.0.total_cmp(&a.1.0));
    println!("{:<16} {:>10} {:>7} {:>7}", "op", "ms", "%", "calls");
    for (label, (time, count)) in sorted {
        println!("{label:<16} {time:>10.2} {:>7.1} {count:>7}", 100.0 * time / total);
    }
    println!("{:<16} {total:>10.2}", "all");
    let Some(path) = &options.trace else { return Ok(()) };
    let mut at = 0.0_f64;
    let mut events = Vec::new();
    for (label, time) in times {
        let length = f64::from(*time) * 1000.0;
        events.push(json!({"name": label, "ph": "X", "ts": at, "dur": length, "pid": 0, "tid": 0}));
        at += length;
    }
    files::write(path, json!({"traceEvents": events}).to_string().as_bytes())
}
