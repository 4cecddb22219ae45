//! `dpo-host selftest`: every op of the GPU, forward and backward, and ten steps of training against the CPU; with `--gpus`, what
//! several GPUs sum and gather against the same through the hosts.

use crate::args::{DeviceArg, KernelsArg};
use crate::backends;
use clap::Args;
use dpo_plugin_api::graph::{ModelGraph, Node};
use indicatif::ProgressBar;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use dpo_core::aux_loss::RouterLoad;
use dpo_core::batch::Batch;
use dpo_core::collective::{Alone, ProcessGroup};
use dpo_core::console;
use dpo_core::cpu_decoder::CpuDecoder;
use dpo_core::decoder::{Decoder, Sequences};
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::example::Example;
use dpo_core::logprobs::AnswerLogProbs;
use dpo_core::lora::Adapter;
use dpo_core::memory::size;
use dpo_core::ops::count;
use dpo_core::optimizer::{AdamW, Moments};
use dpo_core::plan::{MemoryOptions, Packing};
use dpo_core::storage::{Numbers, Quantization};
use dpo_core::testing::{
    FAMILIES, adapter, cpu, cpu_as, distance, engine_as, examples, experts_adapter, given, given_in_mxfp4, op_cases,
    patterned_adapter, router_dprobs, subtracting_adapter, wide_cases,
};
use dpo_cuda::{self as cuda, CudaDecoder, CudaDevice, Gpu, GpuPlan, Nccl, Source};
use dpo_plugins::Registry;
use dpo_ranks::{self as ranks, Place};
use dpo_train::{self as train, Objective, ObjectiveOptions};

#[derive(Args)]
pub(crate) struct SelftestOptions {
    /// The GPU to test: cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceArg::Cuda(Vec::new()))]
    device: DeviceArg,
    /// Test what so many GPUs exchange instead
    #[arg(long, value_name = "N", default_value_t = 1)]
    gpus: usize,
    /// Small batches only, for tools that make every access slow
    #[arg(long)]
    quick: bool,
    /// Run the kernels for an older generation of GPUs, such as sm_80 [default: the GPU's own]
    #[arg(long, value_name = "GENERATION")]
    kernels: Option<KernelsArg>,
    /// Only the comparisons with this text in their names
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

/// The GPU that is tested, and whose kernels it runs.
#[derive(Clone, Copy)]
struct Card {
    index: usize,
    kernels: Option<u32>,
}

impl Card {
    fn open(self) -> Result<Gpu> {
        Gpu::open(self.index)?.with_kernels(self.kernels)
    }
}

/// Most that log-probs and gradients may differ, as the norm of the difference over the norm: bf16 keeps eight bits.
const TOLERANCE: f64 = 0.03;

/// The same of the logits of an answer's next token, which are not averaged with others': the worst of some forty.
const ANSWER_TOLERANCE: f64 = 0.05;

/// The same where values and gradients are rounded to e4m3 before every product, which the CPU does not do.
const FP8_TOLERANCE: f64 = 0.08;

/// The same of gradients where experts are chosen, or clamp values: logits of a GPU are bf16, and of experts that score alike another may
/// be chosen, from which on a token goes another way; at a limit a gradient jumps.
const CHOICE_TOLERANCE: f64 = 0.15;

/// The same of the losses of a training run where experts are chosen.
const CHOICE_LOSS_TOLERANCE: f64 = 0.05;

/// Graphs whose experts are kept in fewer bits, by a part of their names: with biases, with less than a block of mxfp4, a model.
const KEPT_EXPERTS: &[&str] = &["experts as gpt-oss", "of 24 columns", "gpt_oss"];

/// Rows of a chunk, where batches are computed in chunks: an op alone is computed at once, whole models in both ways.
const AT_ONCE: &[Option<usize>] = &[None];
const BOTH: &[Option<usize>] = &[None, Some(64)];

/// Most answer tokens to a token that is laid out: five answers of one token to a prompt of one.
const MOST_ANSWERS: f64 = 5.0;

/// Most that a loss of a training run may differ, relative to itself, or to [`SMALL_LOSS`] where it is smaller: once pairs are told
/// apart, what is left of the loss is as large as a part of a logit.
const LOSS_TOLERANCE: f64 = 0.015;
const SMALL_LOSS: f64 = 0.1;

/// Numbers of values that GPUs sum and gather, the last as many as a 7B model's adapter has.
const COUNTS: &[usize] = &[1, 1_001, 20_185_088];

/// Most that parameters after a step of the optimizer may, which both compute in f32.
const UPDATE_TOLERANCE: f64 = 1e-6;
/// Most that sums of GPUs may differ from those of the hosts, which add in another order.
const SUM_TOLERANCE: f64 = 1e-6;

pub(crate) fn selftest(registry: &Registry, options: &SelftestOptions) -> Result<()> {
    if let Some(place) = Place::from_environment()? {
        return ranks::work(&place, |ranks| exchange(options, ranks, place.local_rank));
    }
    if options.gpus > 1 {
        return ranks::launch(options.gpus, &[], 0);
    }
    let Some(index) = backends::gpu(&options.device, None)? else {
        return Err(Error::input("the CPU is what GPUs are tested against").at("--device").help("say --device cuda"));
    };
    let card = Card { index, kernels: options.kernels.map(|k| k.0) };
    println!("{:<44} {:>10} {:>10} {:>8}", card.open()?.name, "log-probs", "gradient", "repeats");
    let mut failures = 0;
    let wanted = |name: &str| name.contains(&options.only);
    for (name, graph) in op_cases()?.into_iter().chain(wide_cases()?).filter(|(name, _)| wanted(name)) {
        failures += usize::from(!compare(card, &name, &graph, &adapter(&graph, false)?, (AT_ONCE, options.quick))?);
        if has_experts(&graph) {
            failures += usize::from(!adapted_experts(card, &name, &graph, AT_ONCE, options.quick)?);
        }
    }
    let (family, config) = FAMILIES[0];
    let graph = registry.family(family)?.runnable(config)?;
    for (name, adapter) in [
        ("LoRA rank and alpha patterns", patterned_adapter(&graph)?),
        ("LoRA minus its start", subtracting_adapter(&graph)?),
    ] {
        if wanted(name) {
            failures += usize::from(!compare(card, name, &graph, &adapter, (BOTH, options.quick))?);
            failures += usize::from(!updates(card, name, &graph, &adapter)?);
        }
    }
    let products_of_fp8 = cuda::room(&card.open()?, None, None)?.fp8;
    for (name, storages) in storages() {
        if wanted(name) && numbers(storages[0]) == Numbers::Fp8 && !products_of_fp8 {
            println!("{name:<44} not tested: these kernels have no products of fp8");
        } else if wanted(name) {
            let adapter = patterned_adapter(&graph)?;
            failures += usize::from(!compare_kept(card, (name, &storages), &graph, &adapter, (BOTH, options.quick))?);
            failures += usize::from(!answers(card, name, &graph, storages[1])?);
        }
    }
    failures += kept_experts(registry, card, options, products_of_fp8)?;
    let steps = if options.quick { 2 } else { 10 };
    for (family, config) in FAMILIES.iter().filter(|(family, _)| wanted(family)) {
        let graph = registry.family(family)?.runnable(config)?;
        failures += usize::from(!compare(card, family, &graph, &adapter(&graph, false)?, (BOTH, options.quick))?);
        if has_experts(&graph) {
            failures += usize::from(!adapted_experts(card, family, &graph, BOTH, options.quick)?);
        }
        failures += usize::from(!training(registry, card, family, &graph, steps)?);
        failures += usize::from(!answers(card, family, &graph, MemoryOptions::default())?);
    }
    if failures > 0 {
        return Err(Error::run(format!("{failures} of the comparisons failed")));
    }
    println!(
        "all within {TOLERANCE} (answers {ANSWER_TOLERANCE}; losses {LOSS_TOLERANCE}; fp8 {FP8_TOLERANCE}; where experts are chosen, gradients {CHOICE_TOLERANCE}, losses {CHOICE_LOSS_TOLERANCE})"
    );
    Ok(())
}

/// Sums and gathers of this rank's GPU and the others.
fn exchange(options: &SelftestOptions, group: &mut dyn ProcessGroup, local_rank: usize) -> Result<()> {
    let Some(index) = backends::gpu(&options.device, Some(local_rank))? else {
        return Err(Error::input("the CPU is what GPUs are tested against").at("--device").help("say --device cuda"));
    };
    let gpu = Gpu::open(index)?;
    let Some(nccl) = Nccl::join(&gpu, group)? else {
        return Err(Error::run("there is nothing to test without NCCL"));
    };
    console::line(format!("{:<44} {:>10} {:>8}", format!("values on {} GPUs", group.size()), "apart", "repeats"));
    let mut failures = 0;
    for count in COUNTS {
        let (apart, same) = nccl.compare(&gpu, group, *count)?;
        let good = same && apart <= SUM_TOLERANCE;
        failures += group.all_reduce_max(u64::from(!good))?;
        console::line(format!("{count:<44} {apart:>10.1e} {:>8}", if same { "equal" } else { "DIFFER" }));
    }
    match failures {
        0 => {
            console::line(format!("all within {SUM_TOLERANCE:e}; NCCL takes {}", size(nccl.memory)));
            Ok(())
        }
        _ => Err(Error::run(format!("{failures} of the comparisons failed"))),
    }
}

/// Compares logits of sequences that grow by many tokens and by one, alone and beside others, with either of two adapters and without, and
/// are taken back; a line of the table.
fn answers(card: Card, name: &str, graph: &ModelGraph, options: MemoryOptions) -> Result<bool> {
    let mut graph = graph.clone();
    choose_all(&mut graph);
    let graph = &graph;
    let gpu = card.open()?;
    let room = cuda::room(&gpu, None, None)?;
    let adapters = vec![adapter(graph, false)?, other_adapter(graph)?];
    let (source, wanted) =
        (Source::Given(values_of(numbers(options))), Sequences { count: 5, most: 1024, least: 1024 });
    let hidden = ProgressBar::hidden();
    let mut gpu = CudaDecoder::load(gpu, graph.clone(), &source, adapters.clone(), wanted, (room, options), &hidden)?;
    let engine = engine_as(graph, Adapter::idle(graph)?, numbers(options))?;
    let mut cpu = CpuDecoder::of(engine, &adapters, wanted)?;
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut draw =
        |count: usize| -> Vec<u32> { (0..count).map(|_| rng.random_range(0..graph.vocab_size as u32)).collect() };
    let (mut worst, mut text) = (0.0_f64, Vec::new());
    let mut compare = |gpu: Vec<Vec<f32>>, cpu: Vec<Vec<f32>>| {
        for off in gpu.iter().zip(&cpu).map(|(gpu, cpu)| distance(gpu, cpu)) {
            worst = if off.is_nan() { f64::NAN } else { worst.max(off) };
        }
    };
    for (kept, count) in [(0, 70), (70, 1), (71, 1), (72, 130), (202, 1), (65, 1), (66, 63), (129, 1), (1, 5)] {
        text.truncate(kept);
        text.extend(draw(count));
        for (sequence, adapter) in [None, Some(0), Some(1)].into_iter().enumerate() {
            // Where there are states, fewer may be left.
            let (of_cpu, of_gpu) = (cpu.truncate(sequence, kept), gpu.truncate(sequence, kept));
            let of_gpu = gpu.append(adapter, &[(sequence, &text[of_gpu..])])?;
            compare(of_gpu, cpu.append(adapter, &[(sequence, &text[of_cpu..])])?);
        }
    }
    // Five at once, of other lengths each.
    for (sequence, tokens) in [3, 70, 129, 4, 200].into_iter().enumerate() {
        let ids = draw(tokens);
        cpu.truncate(sequence, 0);
        gpu.truncate(sequence, 0);
        compare(gpu.append(Some(1), &[(sequence, &ids)])?, cpu.append(Some(1), &[(sequence, &ids)])?);
    }
    for _ in 0..3 {
        let ids = draw(5);
        let new: Vec<(usize, &[u32])> = (0..5).map(|at| (at, &ids[at..at + 1])).collect();
        compare(gpu.append(Some(1), &new)?, cpu.append(Some(1), &new)?);
    }
    let good = worst < tolerance(options).max(ANSWER_TOLERANCE);
    println!("{:<44} {worst:>10.5} {}", format!("{name}, answers"), if good { "" } else { "FAILED" });
    Ok(good)
}

/// An adapter on fewer modules, with other numbers.
fn other_adapter(graph: &ModelGraph) -> Result<Adapter> {
    let mut other = adapter(graph, false)?;
    let keep = other.sites.len().div_ceil(2);
    other.params.truncate(other.sites.get(keep).map_or(other.params.len(), |site| site.offset));
    other.sites.truncate(keep);
    other.params.iter_mut().for_each(|value| *value = -*value);
    Ok(other)
}

/// Ways to keep the frozen base that compute the same bits, by name.
fn storages() -> Vec<(&'static str, Vec<MemoryOptions>)> {
    vec![
        ("layers on the GPU and in host memory", storages_of(None)),
        ("layers in nf4, on the GPU and in host memory", storages_of(Some(Quantization::Nf4))),
        ("layers in fp8, on the GPU and in host memory", storages_of(Some(Quantization::Fp8))),
    ]
}

/// The same of a quantisation. What mxfp4 has, bf16 has as well.
fn storages_of(quantization: Option<Quantization>) -> Vec<MemoryOptions> {
    let with = |quantization, offload_base| MemoryOptions { quantization, offload_base, ..MemoryOptions::default() };
    let both = [false, true].map(|offload| with(quantization, Some(offload)));
    let as_bf16 = (quantization == Some(Quantization::Mxfp4)).then(|| with(None, Some(false)));
    both.into_iter().chain(as_bf16).collect()
}

/// Compares experts that are kept in fewer bits, of ops and of a model, with LoRA on them; how many failed.
fn kept_experts(registry: &Registry, card: Card, options: &SelftestOptions, products_of_fp8: bool) -> Result<usize> {
    let mut failures = 0;
    let is_kept = |name: &str| KEPT_EXPERTS.iter().any(|part| name.contains(part));
    let mut graphs: Vec<(String, ModelGraph)> = op_cases()?.into_iter().filter(|(name, _)| is_kept(name)).collect();
    for (family, config) in FAMILIES.iter().filter(|(family, _)| is_kept(family)) {
        graphs.push(((*family).to_owned(), registry.family(family)?.runnable(config)?));
    }
    graphs.iter_mut().for_each(|(_, graph)| choose_all(graph));
    for (name, graph) in &graphs {
        for kind in [Quantization::Nf4, Quantization::Fp8, Quantization::Mxfp4] {
            let (title, storages) = (format!("{name}, experts in {}", kind.name()), storages_of(Some(kind)));
            if title.contains(&options.only) && (kind != Quantization::Fp8 || products_of_fp8) {
                let (adapter, how) = (experts_adapter(graph)?, (BOTH, options.quick));
                failures += usize::from(!compare_kept(card, (&title, &storages), graph, &adapter, how)?);
                failures += usize::from(!answers(card, &title, graph, storages[0])?);
            }
        }
    }
    Ok(failures)
}

/// Sends every token to all experts. From the values of few bits others may be chosen than from exact ones, which says nothing of the
/// arithmetic.
fn choose_all(graph: &mut ModelGraph) {
    for node in graph.blocks.iter_mut().flat_map(|block| &mut block.nodes) {
        let experts = match node.op.as_str() {
            "route" => node.width,
            "experts" => node.weights[0].shape[0],
            _ => continue,
        };
        node.attrs.insert("top_k".into(), json!(experts));
        if let Some(groups) = node.attrs.get("groups").cloned() {
            node.attrs.insert("top_groups".into(), groups);
        }
    }
}

/// Values of weights whose numbers are all that these keep.
fn values_of(numbers: Numbers) -> cuda::Given<'static> {
    if numbers == Numbers::Mxfp4 { &given_in_mxfp4 } else { &given }
}

fn numbers(options: MemoryOptions) -> Numbers {
    options.quantization.map_or(Numbers::Bf16, Quantization::numbers)
}

/// Compares what LoRA on experts gives, and a step of the optimizer; lines of the table.
fn adapted_experts(card: Card, name: &str, graph: &ModelGraph, chunks: &[Option<usize>], quick: bool) -> Result<bool> {
    let (name, adapter) = (format!("{name}, LoRA on experts"), experts_adapter(graph)?);
    let values = compare(card, &name, graph, &adapter, (chunks, quick))?;
    Ok(updates(card, &name, graph, &adapter)? && values)
}

fn has_experts(graph: &ModelGraph) -> bool {
    graph.parts().any(|(_, block)| block.nodes.iter().any(|node| node.op == "experts"))
}

/// Whether tokens go to some experts of more.
fn chooses(graph: &ModelGraph) -> bool {
    let some_of = |n: &Node| n.op == "route" && count(n, "top_k") < n.width;
    graph.parts().any(|(_, block)| block.nodes.iter().any(some_of))
}

/// Whether experts clamp values at a limit, at which a gradient jumps.
fn clamps(graph: &ModelGraph) -> bool {
    let clamps = |n: &Node| n.op == "experts" && n.attrs.contains_key("limit");
    graph.parts().any(|(_, block)| block.nodes.iter().any(clamps))
}

fn tolerance(options: MemoryOptions) -> f64 {
    if options.quantization == Some(Quantization::Fp8) { FP8_TOLERANCE } else { TOLERANCE }
}

fn gpu(
    card: Card,
    graph: &ModelGraph,
    tokens: usize,
    adapter: Adapter,
    (options, chunk_rows, values): (MemoryOptions, Option<usize>, cuda::Given<'_>),
) -> Result<CudaDevice> {
    let gpu = card.open()?;
    let packing = Packing { micro_batch_tokens: tokens, scoring_tokens: tokens, logits_rows: None, chunk_rows };
    let options = MemoryOptions { packing: Some(packing), ..options };
    let plan = GpuPlan::new(graph, &adapter, tokens, MOST_ANSWERS, cuda::room(&gpu, None, None)?, 1, options)?;
    CudaDevice::load(gpu, graph.clone(), &Source::Given(values), adapter, (plan, 0), &ProgressBar::hidden())
}

/// Whether passes give the same bits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeats {
    Equal,
    /// One after the other.
    Differ,
    /// With saved activations and with recomputed ones.
    RecomputedDiffer,
    /// With the frozen base kept in two ways.
    StoragesDiffer,
}

/// Compares log-probs and gradients; a line of the table.
fn compare(
    card: Card,
    name: &str,
    graph: &ModelGraph,
    adapter: &Adapter,
    how: (&[Option<usize>], bool),
) -> Result<bool> {
    compare_kept(card, (name, &[MemoryOptions::default()]), graph, adapter, how)
}

/// The same, with the frozen base kept in several ways, which are of the same numbers and compute the same bits.
fn compare_kept(
    card: Card,
    (name, storages): (&str, &[MemoryOptions]),
    graph: &ModelGraph,
    adapter: &Adapter,
    (chunks, quick): (&[Option<usize>], bool),
) -> Result<bool> {
    // Lengths that are multiples of nothing: one token, answers of one token, from one answer to five.
    let all: &[&[&[usize]]] = &[
        &[&[1, 1, 1]],
        &[&[3, 1, 9], &[1, 2, 1], &[17, 5, 6]],
        &[&[70, 33, 65], &[129, 64, 1], &[5, 200, 131], &[64, 64, 64]],
        &[&[301, 97, 210], &[11, 401, 77], &[1, 1, 600]],
        &[&[1, 1, 1, 1, 1, 1], &[90, 150], &[40, 1], &[7, 3, 1, 170], &[65, 64, 64, 64]],
        &[&[130, 70, 1, 64, 33, 210], &[3, 9, 200, 2, 140, 5], &[66, 65, 129, 67]],
    ];
    // Several tiles of queries and keys, and rows beside them, in as few tokens as that takes.
    let few: &[&[&[usize]]] = &[&[&[3, 1, 9], &[1, 2, 1], &[70, 33, 65], &[40, 1, 2, 30, 3]]];
    let batches = if quick { few } else { all };
    // Of every second example the prompt is scored as well.
    let scored = |(i, example): (usize, Example)| if i % 2 == 1 { example.with_prompt_scored() } else { example };
    let make = |lengths: &&[&[usize]]| {
        let examples = examples(graph.vocab_size, lengths, 5)?.into_iter().enumerate().map(scored);
        Ok(Batch::of(&examples.collect::<Vec<_>>()))
    };
    let batches = batches.iter().map(make).collect::<Result<Vec<Batch>>>()?;
    let tokens = batches.iter().map(Batch::tokens).max().unwrap_or(1);
    let mut cpu = cpu_as(graph, tokens, adapter.clone(), numbers(storages[0]))?;
    let mut worst = [0.0_f64; 2];
    let mut repeats = Repeats::Equal;
    let recompute = if quick { &[true][..] } else { &[false, true] };
    let kept = recompute
        .iter()
        .flat_map(|recompute| storages.iter().map(|storage| MemoryOptions { recompute: Some(*recompute), ..*storage }));
    // What is recomputed changes nothing; what is computed in chunks adds up in another order.
    let load = |chunk_rows| {
        let values = values_of(numbers(storages[0]));
        let load = |options| gpu(card, graph, tokens, adapter.clone(), (options, chunk_rows, values));
        kept.clone().map(load).collect::<Result<Vec<_>>>()
    };
    let mut devices = chunks.iter().map(|rows| load(*rows)).collect::<Result<Vec<_>>>()?;
    let worse = |worst: &mut f64, is: f64| *worst = if is.is_nan() { f64::NAN } else { worst.max(is) };
    for batch in &batches {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let grads: Vec<f32> = batch.targets.iter().map(|_| rng.random_range(-1.0..1.0_f32)).collect();
        cpu.clear_gradient()?;
        let exact = cpu.forward(batch, true)?;
        let load = cpu.router_load()?;
        cpu.set_router_dprobs(router_dprobs(graph));
        cpu.backward(batch, &grads)?;
        for devices in &mut devices {
            let mut before: Option<(AnswerLogProbs, Vec<f32>, RouterLoad)> = None;
            for turn in 0..2 * devices.len() {
                let device = &mut devices[turn / 2];
                let differ = match (turn % 2, turn / 2 % storages.len()) {
                    (1, _) => Repeats::Differ,
                    (_, 0) => Repeats::RecomputedDiffer,
                    _ => Repeats::StoragesDiffer,
                };
                device.clear_gradient()?;
                let own = device.forward(batch, true)?;
                let counted = device.router_load()?;
                device.set_router_dprobs(router_dprobs(graph));
                device.backward(batch, &grads)?;
                let gradient = device.gradient()?;
                worse(&mut worst[0], apart(&counted.probs, &load.probs));
                worse(&mut worst[1], apart(&counted.counts, &load.counts));
                worse(&mut worst[0], distance(&own.logps, &exact.logps));
                worse(&mut worst[0], distance(&own.values(), &exact.values()));
                worse(&mut worst[1], distance(&gradient, cpu.gradient()));
                let now = (own, gradient, counted);
                if before.as_ref().is_some_and(|b| *b != now) {
                    repeats = differ;
                }
                before = Some(now);
            }
        }
    }
    let of_gradients = if chooses(graph) || clamps(graph) { CHOICE_TOLERANCE } else { tolerance(storages[0]) };
    let good = worst[0] < tolerance(storages[0]) && worst[1] < of_gradients && repeats == Repeats::Equal;
    let verdict = if good { "" } else { "  FAILED" };
    println!(
        "{name:<44} {:>10.5} {:>10.5} {:>8}{verdict}",
        worst[0],
        worst[1],
        match repeats {
            Repeats::Equal => "equal",
            Repeats::Differ => "differ",
            Repeats::RecomputedDiffer => "differ from recomputed",
            Repeats::StoragesDiffer => "differ by storage",
        }
    );
    Ok(good)
}

/// The distance of loads of routers; 0 where there are none.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    let single = |values: &[f64]| values.iter().map(|v| *v as f32).collect::<Vec<f32>>();
    if a.is_empty() && b.is_empty() { 0.0 } else { distance(&single(a), &single(b)) }
}

/// Compares steps of the optimizer, with LoRA+, from the same gradient; a line of the table.
fn updates(card: Card, name: &str, graph: &ModelGraph, adapter: &Adapter) -> Result<bool> {
    let batch = Batch::of(&examples(graph.vocab_size, &[&[20, 9, 14], &[7, 30, 22]], 11)?);
    let optimizer = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, loraplus_lr_ratio: 8.0 };
    let (clip, learning_rate) = (0.5, 1e-3);
    let mut device = gpu(card, graph, batch.tokens(), adapter.clone(), (MemoryOptions::default(), None, &given))?;
    let (mut params, mut moments) = (adapter.params.clone(), Moments::new(adapter.params.len()));
    let mut worst = 0.0_f64;
    for _ in 0..3 {
        device.clear_gradient()?;
        let logps = device.forward(&batch, true)?;
        device.backward(&batch, &vec![0.1; logps.logps.len()])?;
        let mut gradient = device.gradient()?;
        gradient.iter_mut().for_each(|g| *g *= clip as f32);
        let groups = adapter.groups(optimizer.loraplus_lr_ratio);
        optimizer.step(&groups, &mut params, &gradient, &mut moments, learning_rate);
        device.update(&optimizer, clip, learning_rate)?;
        device.fetch()?;
        let off = distance(&device.adapter().params, &params);
        worst = if off.is_nan() { f64::NAN } else { worst.max(off) };
    }
    let good = worst < UPDATE_TOLERANCE;
    println!("{:<44} {worst:>10.1e} {}", format!("{name}, LoRA+"), if good { "" } else { "FAILED" });
    Ok(good)
}

/// Trains on both devices from the same start; a line of the table.
fn training(registry: &Registry, card: Card, name: &str, graph: &ModelGraph, steps: usize) -> Result<bool> {
    let lengths: [&[usize]; 4] = [&[20, 9, 14], &[7, 30, 22], &[41, 5, 3], &[2, 17, 40]];
    let pairs = examples(graph.vocab_size, &lengths, 11)?;
    let all: Vec<&Example> = pairs.iter().collect();
    let tokens: usize = pairs.iter().map(Example::packed_tokens).sum();
    let (tokens, start) = (tokens / 2 + 60, adapter(graph, true)?);
    let own = gpu(card, graph, tokens, start.clone(), (MemoryOptions::default(), None, &given))?;
    let mut devices: [Box<dyn Device>; 2] = [Box::new(cpu(graph, tokens, start)?), Box::new(own)];
    let options = ObjectiveOptions { losses: vec!["sigmoid".into()], ..ObjectiveOptions::default() };
    let optimizer = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, loraplus_lr_ratio: 1.0 };
    let mut losses = [Vec::new(), Vec::new()];
    for (device, losses) in devices.iter_mut().zip(&mut losses) {
        let mut objective = Objective::new(registry, &options)?;
        let reference = train::score(&mut Alone, device.as_mut(), &all, |_| {})?;
        for _ in 0..steps {
            let step = train::gradient(&mut Alone, device.as_mut(), &mut objective, &all, Some(&reference))?;
            device.update(&optimizer, 1.0, 1e-3)?;
            losses.push(step.loss);
        }
    }
    let differences = losses[0].iter().zip(&losses[1]).map(|(a, b)| (a - b).abs() / a.abs().max(SMALL_LOSS));
    let worst = differences.fold(0.0, |w: f64, d| if d.is_nan() { f64::NAN } else { w.max(d) });
    let good = worst < if chooses(graph) { CHOICE_LOSS_TOLERANCE } else { LOSS_TOLERANCE };
    let last = |device: usize| losses[device].last().copied().unwrap_or(f64::NAN);
    let verdict = if good { "" } else { "  FAILED" };
    let title = format!("{name}, {steps} steps of training");
    println!("{title:<44} {worst:>10.5} loss {:.4} on the CPU, {:.4} here{verdict}", last(0), last(1));
    Ok(good)
}
