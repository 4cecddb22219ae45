//! `dpo-host selftest`: every op of the GPU, forward and backward, and ten steps of training against the CPU; with `--gpus`, what
//! several GPUs sum and gather against the same through the hosts.

use candle_core::{DType, Tensor};
use clap::Args;
use dpo_plugin_api::builder::{Attention, BlockBuilder, GraphBuilder, Var};
use dpo_plugin_api::graph::{ModelGraph, Weight};
use dpo_plugin_api::model::Config;
use dpo_plugin_api::rope::Rope;
use half::bf16;
use indicatif::ProgressBar;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::batch::{Batch, laid_out};
use crate::console;
use crate::cuda::{self, CudaDecoder, CudaDevice, Gpu, GpuPlan, Nccl, Source};
use crate::data::TokenPair;
use crate::device::{self, CpuDevice, Device};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::generate::{CpuDecoder, Decoder, Voice};
use crate::lora::{Adapter, AdapterConfig, Targets};
use crate::plan::{Wishes, size};
use crate::plugins::Registry;
use crate::ranks::{self, Place, Ranks};
use crate::train::{self, AdamW, Objective, ObjectiveOptions};
use crate::weights::blocks;

#[derive(Args)]
pub(super) struct SelftestOptions {
    /// The GPU to test: cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cuda")]
    device: String,
    /// Test what so many GPUs exchange instead
    #[arg(long, value_name = "N", default_value_t = 1)]
    gpus: usize,
    /// Small batches only, for tools that make every access slow
    #[arg(long)]
    quick: bool,
    /// Only the comparisons with this text in their names
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

/// Most that log-probs and gradients may differ, as the norm of the difference over the norm: bf16 keeps eight bits.
const TOLERANCE: f64 = 0.03;

/// Most that a loss of a training run may differ.
const LOSS_TOLERANCE: f64 = 0.01;

/// Numbers of values that GPUs sum and gather, the last as many as a 7B model's adapter has.
const COUNTS: &[usize] = &[1, 1_001, 20_185_088];

/// Most that sums of GPUs may differ from those of the hosts, which add in another order.
const SUM_TOLERANCE: f64 = 1e-6;

pub(super) fn selftest(registry: &Registry, options: &SelftestOptions) -> Result<()> {
    if let Some(place) = Place::from_environment()? {
        return ranks::work(&place, |ranks| exchange(options, ranks, place.local_rank));
    }
    if options.gpus > 1 {
        return ranks::launch(options.gpus, &[], 0);
    }
    let Some(index) = cuda::choose(&options.device)? else {
        return Err(Error::input("the CPU is what GPUs are tested against").at("--device").help("say --device cuda"));
    };
    println!("{:<44} {:>10} {:>10} {:>8}", Gpu::open(index)?.name, "log-probs", "gradient", "repeats");
    let mut failures = 0;
    let wanted = |name: &str| name.contains(&options.only);
    for (name, graph) in op_cases()?.into_iter().filter(|(name, _)| wanted(name)) {
        failures += usize::from(!compare(index, &name, &graph, options.quick)?);
    }
    let steps = if options.quick { 2 } else { 10 };
    for (family, config) in FAMILIES.iter().filter(|(family, _)| wanted(family)) {
        let graph = registry.family(family)?.graph(config)?;
        failures += usize::from(!compare(index, family, &graph, options.quick)?);
        failures += usize::from(!training(registry, index, family, &graph, steps)?);
        failures += usize::from(!answers(index, family, &graph)?);
    }
    if failures > 0 {
        return Err(Error::run(format!("{failures} of the comparisons failed")));
    }
    println!("all within {TOLERANCE} (losses {LOSS_TOLERANCE})");
    Ok(())
}

/// Sums and gathers of this rank's GPU and the others.
fn exchange(options: &SelftestOptions, ranks: &mut Ranks, local_rank: usize) -> Result<()> {
    let Some(index) = device::choose(&options.device, Some(local_rank))? else {
        return Err(Error::input("the CPU is what GPUs are tested against").at("--device").help("say --device cuda"));
    };
    let gpu = Gpu::open(index)?;
    let Some(nccl) = Nccl::join(&gpu, ranks)? else {
        return Err(Error::run("there is nothing to test without NCCL"));
    };
    console::line(format!("{:<44} {:>10} {:>8}", format!("values on {} GPUs", ranks.size()), "apart", "repeats"));
    let mut failures = 0;
    for count in COUNTS {
        let (apart, same) = nccl.compare(&gpu, ranks, *count)?;
        let good = same && apart <= SUM_TOLERANCE;
        failures += ranks.most(u64::from(!good))?;
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

/// A graph around every op: a linear before it and one after it, so that the gradient of the adapter passes through it.
pub(crate) fn op_cases() -> Result<Vec<(String, ModelGraph)>> {
    type Body<'a> = &'a dyn Fn(&mut BlockBuilder, Var) -> Var;
    let mut cases: Vec<(String, ModelGraph)> = Vec::new();
    let config = Config::parse("{}")?;
    let mut case = |name: String, body: Body<'_>| -> Result<()> {
        let (hidden, vocab) = (104, 248);
        let mut graph = GraphBuilder::decoder(hidden, vocab);
        graph.embed(|b, tokens| b.embedding("embed.weight", tokens, vocab, hidden));
        let block = graph.block("case", |b, x| {
            let inner = body(b, x);
            let out = b.linear("out", inner, hidden);
            b.add(x, out)
        });
        graph.layer(block, "layers.0.");
        graph.layer(block, "layers.1.");
        graph.head(|b, x| {
            let h = b.rms_norm("norm", x, 1e-6);
            b.lm_head("head.weight", h, vocab)
        });
        cases.push((name, graph.finish(&config)?));
        Ok(())
    };
    case("linear".into(), &|b, x| b.linear("a", x, 72))?;
    case("linear, biases, one input".into(), &|b, x| {
        let (p, q) = (b.linear_bias("a", x, 72), b.linear_bias("b", x, 72));
        b.add(p, q)
    })?;
    case("add of values that are read again".into(), &|b, x| {
        let p = b.linear("a", x, 104);
        let q = b.add(p, x);
        let r = b.rms_norm("n", q, 1e-6);
        let s = b.add(r, q);
        b.add(s, p)
    })?;
    case("rms_norm".into(), &|b, x| {
        let h = b.linear("a", x, 264);
        b.rms_norm("n", h, 1e-5)
    })?;
    case("rms_norm of heads, rope".into(), &|b, x| {
        let h = b.linear("a", x, 160);
        let h = b.head_norm("n", h, 32, 1e-6);
        b.rope(
            h,
            32,
            &Rope { inv_freq: (0..16).map(|j| 0.5_f64.powi(j)).collect(), attention_scale: 1.1, max_positions: None },
        )
    })?;
    let rope = |attention_scale| Rope {
        inv_freq: (0..16).map(|j| 0.5_f64.powi(j)).collect(),
        attention_scale,
        max_positions: None,
    };
    for bias in [true, false] {
        case(format!("layer_norm{}", if bias { ", bias" } else { "" }), &|b, x| {
            let n = b.layer_norm_if(bias, "n", x, 1e-5);
            let h = b.linear("a", n, 264);
            let m = b.layer_norm_if(bias, "m", h, 1e-5);
            b.add(m, h)
        })?;
    }
    case("scale".into(), &|b, x| {
        let (p, q) = (b.linear("a", x, 104), b.scale(x, 0.3));
        let (p, again) = (b.scale(p, -1.5), b.scale(q, 2.0));
        let r = b.add(p, q);
        let s = b.scale(r, 0.7);
        let t = b.add(s, r);
        b.add(t, again)
    })?;
    // A gradient that two values share must not be turned for one of them.
    case("rope of a value, added to another".into(), &|b, x| {
        let (p, q) = (b.linear("a", x, 160), b.linear("b", x, 160));
        let turned = b.rope(p, 32, &rope(1.1));
        b.add(turned, q)
    })?;
    case("rope of a value, added to itself".into(), &|b, x| {
        let p = b.linear("a", x, 160);
        let turned = b.rope(p, 32, &rope(1.0));
        let twice = b.rope(turned, 32, &rope(0.9));
        let sum = b.add(twice, p);
        b.add(sum, turned)
    })?;
    case("two attentions with one query".into(), &|b, x| {
        let h = b.rms_norm("n", x, 1e-6);
        let (q, k, v) = (b.linear("q", h, 64), b.linear("k", h, 32), b.linear("v", h, 32));
        let (k, other) = (b.rope(k, 32, &rope(1.0)), b.rms_norm("m", k, 1e-6));
        let first = b.attention(q, k, v, Attention::new(2, 1, 32));
        let second = b.attention(q, other, k, Attention::new(2, 1, 32).window(Some(9)));
        b.add(first, second)
    })?;
    case("linear whose bias is listed first".into(), &|b, x| {
        let weight = |role: &str, shape: &[usize]| Weight {
            role: role.into(),
            tensor: format!("a.{role}"),
            shape: shape.to_vec(),
        };
        b.op("linear", &[x], vec![weight("bias", &[72]), weight("weight", &[72, 104])], &[], 72)
    })?;
    for activation in ["silu", "gelu", "gelu_tanh"] {
        case(format!("glu {activation}"), &|b, x| {
            let h = b.rms_norm("n", x, 1e-6);
            let (gate, up) = (b.linear("gate", h, 336), b.linear("up", h, 336));
            b.glu(activation, gate, up)
        })?;
    }
    let shapes = [
        (16, 1, 3, None, None),
        (32, 2, 4, None, None),
        (64, 2, 2, Some(40), None),
        (80, 1, 2, None, None),
        (96, 1, 4, Some(9), None),
        (112, 1, 1, None, None),
        (128, 1, 7, None, None),
        (128, 2, 4, Some(100), Some(2.0)),
        (256, 1, 2, None, Some(0.5)),
        (256, 2, 2, Some(33), None),
    ];
    for (dim, kv_heads, share, window, softcap) in shapes {
        let heads = kv_heads * share;
        let mut name = format!("attention {heads} of {dim} on {kv_heads}");
        name.extend(window.map(|w| format!(", window {w}")));
        name.extend(softcap.map(|c| format!(", cap {c}")));
        case(name, &|b, x| {
            let h = b.rms_norm("n", x, 1e-6);
            let (q, k) = (b.linear("q", h, heads * dim), b.linear("k", h, kv_heads * dim));
            let v = b.linear("v", h, kv_heads * dim);
            b.attention(q, k, v, Attention::new(heads, kv_heads, dim).window(window).softcap(softcap))
        })?;
    }
    let (hidden, vocab) = (72, 88);
    let mut graph = GraphBuilder::decoder(hidden, vocab);
    graph.embed(|b, tokens| {
        let x = b.embedding("embed.weight", tokens, vocab, hidden);
        let x = b.scale(x, 3.0);
        b.layer_norm("embed.norm", x, 1e-5)
    });
    let block = graph.block("case", |b, x| {
        let h = b.layer_norm("n", x, 1e-5);
        let h = b.linear("a", h, hidden);
        b.add(x, h)
    });
    graph.layer(block, "layers.0.");
    graph.head(|b, x| {
        let h = b.layer_norm("norm", x, 1e-5);
        let h = b.scale(h, 0.5);
        b.lm_head("embed.weight", h, vocab)
    });
    cases.push(("embedding and head of several ops".into(), graph.finish(&config)?));
    Ok(cases)
}

/// Small configs of the families.
pub(crate) const FAMILIES: &[(&str, &str)] = &[
    (
        "qwen2",
        r#"{"hidden_size":256,"intermediate_size":640,"num_hidden_layers":3,"num_attention_heads":4,
        "num_key_value_heads":2,"vocab_size":1000,"rms_norm_eps":1e-6,"rope_theta":10000.0,"max_position_embeddings":4096,
        "tie_word_embeddings":true,"use_sliding_window":true,"sliding_window":50,"max_window_layers":1,"hidden_act":"silu"}"#,
    ),
    (
        "qwen3",
        r#"{"hidden_size":256,"intermediate_size":640,"num_hidden_layers":3,"num_attention_heads":4,
        "num_key_value_heads":2,"head_dim":128,"vocab_size":1000,"rms_norm_eps":1e-6,"rope_theta":1000000.0,
        "max_position_embeddings":4096,"tie_word_embeddings":false,"hidden_act":"silu"}"#,
    ),
    (
        "llama3",
        r#"{"hidden_size":256,"intermediate_size":640,"num_hidden_layers":3,"num_attention_heads":4,
        "num_key_value_heads":1,"vocab_size":1000,"rms_norm_eps":1e-5,"rope_theta":500000.0,
        "max_position_embeddings":4096,"tie_word_embeddings":false,"hidden_act":"silu","rope_scaling":{"rope_type":"llama3",
        "factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64}}"#,
    ),
];

/// Weights by name, the same on both devices: values that bf16 holds.
pub(crate) fn given(name: &str, shape: &[usize]) -> Vec<f32> {
    let seed = name.bytes().fold(7_u64, |h, b| h.wrapping_mul(0x0100_0000_01b3) ^ u64::from(b));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let norm = shape.len() == 1 && !name.ends_with("bias");
    let spread = if shape.len() == 1 { 0.2 } else { 1.5 / (*shape.last().unwrap_or(&1) as f32).sqrt() };
    let shift = if norm { 1.0 } else { 0.0 };
    let count = shape.iter().product();
    (0..count).map(|_| bf16::from_f32(shift + spread * rng.random_range(-1.0..1.0_f32)).to_f32()).collect()
}

/// An adapter on every linear whose A and B are not zero, in values that bf16 holds.
pub(crate) fn adapter(graph: &ModelGraph, zero_b: bool) -> Result<Adapter> {
    let config = AdapterConfig { rank: 8, alpha: 16.0, rslora: false, targets: Targets::AllLinear };
    let mut adapter = Adapter::new(graph, config, 1)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for site in adapter.sites.clone() {
        let [a, b] = adapter.ranges(&site);
        adapter.params[a].iter_mut().for_each(|p| *p = bf16::from_f32(*p).to_f32());
        let value = |_: &f32| bf16::from_f32(if zero_b { 0.0 } else { 0.1 } * rng.random_range(-1.0..1.0_f32)).to_f32();
        let values: Vec<f32> = adapter.params[b.clone()].iter().map(value).collect();
        adapter.params[b].copy_from_slice(&values);
    }
    Ok(adapter)
}

pub(crate) fn cpu(graph: &ModelGraph, tokens: usize, zero_b: bool) -> Result<CpuDevice> {
    CpuDevice::new(engine(graph, zero_b)?, tokens)
}

fn engine(graph: &ModelGraph, zero_b: bool) -> Result<Engine> {
    let tensor = |name: String, shape: &[usize]| -> Result<Tensor> {
        Ok(Tensor::from_vec(given(&name, shape), shape, &candle_core::Device::Cpu)?.to_dtype(DType::F32)?)
    };
    let of = blocks(graph).map(|(_, prefix, nodes)| {
        let of_node = |n: &dpo_plugin_api::graph::Node| -> Result<Vec<Tensor>> {
            n.weights.iter().map(|w| tensor(format!("{prefix}{}", w.tensor), &w.shape)).collect()
        };
        nodes.iter().map(of_node).collect::<Result<Vec<_>>>()
    });
    let weights = of.collect::<Result<Vec<_>>>()?;
    Engine::of(graph.clone(), weights, adapter(graph, zero_b)?)
}

/// Compares logits of texts that grow by many tokens and by one, and are taken back; a line of the table.
fn answers(index: usize, name: &str, graph: &ModelGraph) -> Result<bool> {
    let gpu = Gpu::open(index)?;
    let room = cuda::room(&gpu, None, None)?;
    let adapter = adapter(graph, false)?;
    let source = Source::Given(&given);
    let mut gpu = CudaDecoder::load(gpu, graph.clone(), &source, Some(adapter), room, &ProgressBar::hidden())?;
    let mut cpu = CpuDecoder::of(engine(graph, false)?)?;
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut worst = 0.0_f64;
    for (kept, count) in [(0, 70), (70, 1), (71, 1), (72, 130), (202, 1), (65, 1), (66, 63), (129, 1), (1, 5)] {
        let ids: Vec<u32> = (0..count).map(|_| rng.random_range(0..graph.vocab_size as u32)).collect();
        for voice in [Voice::Base, Voice::Tuned] {
            cpu.keep(voice, kept);
            gpu.keep(voice, kept);
            let off = distance(&gpu.feed(voice, &ids)?, &cpu.feed(voice, &ids)?);
            worst = if off.is_nan() { f64::NAN } else { worst.max(off) };
        }
    }
    let good = worst < TOLERANCE;
    println!("{:<44} {worst:>10.5} {}", format!("{name}, answers"), if good { "" } else { "FAILED" });
    Ok(good)
}

fn gpu(index: usize, graph: &ModelGraph, tokens: usize, zero_b: bool, recompute: Option<bool>) -> Result<CudaDevice> {
    let gpu = Gpu::open(index)?;
    let adapter = adapter(graph, zero_b)?;
    let wishes = Wishes { micro_batch_tokens: Some(tokens), recompute, ..Wishes::default() };
    let plan = GpuPlan::new(graph, &adapter, tokens, 2.0, cuda::room(&gpu, None, None)?, 1, wishes)?;
    CudaDevice::load(gpu, graph.clone(), &Source::Given(&given), adapter, (plan, 0), &ProgressBar::hidden())
}

/// Pairs with lengths that are multiples of nothing: one token, answers of one token, answers alike at the start.
pub(crate) fn pairs(vocab: usize, lengths: &[[usize; 3]], seed: u64) -> Vec<TokenPair> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut ids = |n: usize| (0..n).map(|_| rng.random_range(0..vocab as u32)).collect::<Vec<u32>>();
    let pair = |[p, c, r]: &[usize; 3]| TokenPair {
        prompt: ids(*p),
        chosen: ids(*c),
        rejected: ids(*r),
        place: String::new(),
    };
    lengths.iter().map(pair).collect()
}

/// `‖a − b‖ / ‖b‖`; NaN where a value is none.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = squares(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / squares(&mut b.iter().map(|b| f64::from(*b))).max(1e-12)
}

/// Compares log-probs and gradients; a line of the table.
fn compare(index: usize, name: &str, graph: &ModelGraph, quick: bool) -> Result<bool> {
    let all: &[&[[usize; 3]]] = &[
        &[[1, 1, 1]],
        &[[3, 1, 9], [1, 2, 1], [17, 5, 6]],
        &[[70, 33, 65], [129, 64, 1], [5, 200, 131], [64, 64, 64]],
        &[[301, 97, 210], [11, 401, 77], [1, 1, 600]],
    ];
    // Several tiles of queries and keys, and rows beside them, in as few tokens as that takes.
    let few: &[&[[usize; 3]]] = &[&[[3, 1, 9], [1, 2, 1], [70, 33, 65]]];
    let batches = if quick { few } else { all };
    let make = |lengths: &&[[usize; 3]]| Batch::of(&pairs(graph.vocab_size, lengths, 5));
    let batches: Vec<Batch> = batches.iter().map(make).collect();
    let tokens = batches.iter().map(Batch::tokens).max().unwrap_or(1);
    let mut cpu = cpu(graph, tokens, false)?;
    let mut worst = [0.0_f64; 2];
    let mut repeats = true;
    let mut devices = Vec::new();
    for recompute in if quick { &[Some(true)][..] } else { &[Some(false), Some(true)] } {
        devices.push(gpu(index, graph, tokens, false, *recompute)?);
    }
    let worse = |worst: &mut f64, is: f64| *worst = if is.is_nan() { f64::NAN } else { worst.max(is) };
    for batch in &batches {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let slopes: Vec<f32> = batch.targets.iter().map(|_| rng.random_range(-1.0..1.0_f32)).collect();
        cpu.clear_gradient()?;
        let exact = cpu.forward(batch, true)?;
        cpu.backward(batch, &slopes)?;
        let mut before: Option<(Vec<f32>, Vec<f32>)> = None;
        for device in &mut devices {
            for _ in 0..2 {
                device.clear_gradient()?;
                let own = device.forward(batch, true)?;
                device.backward(batch, &slopes)?;
                let gradient = device.gradient()?;
                worse(&mut worst[0], distance(&own.logps, &exact.logps));
                worse(&mut worst[0], distance(&own.log_sum_sq, &exact.log_sum_sq));
                worse(&mut worst[1], distance(&gradient, cpu.gradient()));
                let now = (own.logps, gradient);
                repeats &= before.as_ref().is_none_or(|b| *b == now);
                before = Some(now);
            }
        }
    }
    let good = worst.iter().all(|w| *w < TOLERANCE) && repeats;
    let verdict = if good { "" } else { "  FAILED" };
    println!(
        "{name:<44} {:>10.5} {:>10.5} {:>8}{verdict}",
        worst[0],
        worst[1],
        if repeats { "equal" } else { "differ" }
    );
    Ok(good)
}

/// Trains on both devices from the same start; a line of the table.
fn training(registry: &Registry, index: usize, name: &str, graph: &ModelGraph, steps: usize) -> Result<bool> {
    let lengths = [[20, 9, 14], [7, 30, 22], [41, 5, 3], [2, 17, 40]];
    let pairs = pairs(graph.vocab_size, &lengths, 11);
    let all: Vec<&TokenPair> = pairs.iter().collect();
    let tokens: usize = pairs.iter().map(laid_out).sum();
    let mut devices: [Box<dyn Device>; 2] =
        [Box::new(cpu(graph, tokens / 2 + 60, true)?), Box::new(gpu(index, graph, tokens / 2 + 60, true, None)?)];
    let options = ObjectiveOptions { losses: vec!["sigmoid".into()], ..ObjectiveOptions::default() };
    let optimizer = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let (mut losses, ranks) = ([Vec::new(), Vec::new()], &mut Ranks::alone());
    for (device, losses) in devices.iter_mut().zip(&mut losses) {
        let mut objective = Objective::new(registry, &options)?;
        let reference = train::score(ranks, device.as_mut(), &all, |_| {})?.logps;
        for _ in 0..steps {
            let step = train::gradient(ranks, device.as_mut(), &mut objective, &all, &reference)?;
            device.update(&optimizer, 1.0, 1e-3)?;
            losses.push(step.loss);
        }
    }
    let differences = losses[0].iter().zip(&losses[1]).map(|(a, b)| ((a - b) / a).abs());
    let worst = differences.fold(0.0, |w: f64, d| if d.is_nan() { f64::NAN } else { w.max(d) });
    let good = worst < LOSS_TOLERANCE;
    let last = |device: usize| losses[device].last().copied().unwrap_or(f64::NAN);
    let verdict = if good { "" } else { "  FAILED" };
    let title = format!("{name}, {steps} steps of training");
    println!("{title:<44} {worst:>10.5} loss {:.4} on the CPU, {:.4} here{verdict}", last(0), last(1));
    Ok(good)
}
