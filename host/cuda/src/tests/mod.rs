//! Lowered programs without a GPU: an [`emulator`] of them has to find the log-probs and gradients of the CPU engine. What it cannot see is
//! the kernels: those are compared by `dpo-host selftest` on a GPU.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

mod emulator;

pub(crate) use emulator::Emulation;

use dpo_plugin_api::graph::ModelGraph;

use super::chunks::TILE;
use super::footprint::{Footprint, LOGITS_ROWS, Mode};
use super::inputs::Rows;
use super::liveness::Passes;
use super::lowered::Lowered;
use super::matmul::Gates;
use super::plan::{GpuPlan, LOST_TOKENS, Room};
use super::program::Program;
use super::saved::SavedActivations;
use super::weights::NUMBERS;
use dpo_core::batch::Batch;
use dpo_core::device::Device;
use dpo_core::lora::{Adapter, AdapterConfig};
use dpo_core::ops;
use dpo_core::plan::{MemoryOptions, Packing};
use dpo_core::storage::{Numbers, Quantization};
use dpo_core::testing::{
    FAMILIES, adapter, cpu_as, distance, examples, experts_adapter, op_cases, patterned_adapter, router_dprobs,
    subtracting_adapter,
};
use dpo_plugins::Registry;
use dpo_plugins::shapes;
use emulator::Emulator;

/// Gated activations are computed by matmuls, forward and backward.
const ALL_GATES: Gates = Gates { forward: true, backward: true };

/// Every graph of the self-test, at every level of what is saved and in just as many bytes as a mixture of levels takes.
#[test]
fn programs_compute_what_the_cpu_computes() {
    let registry = Registry::discover(&[], None);
    let families = FAMILIES
        .iter()
        .map(|(name, config)| (name.to_string(), registry.family(name).unwrap().runnable(config).unwrap()));
    for (name, graph) in op_cases().unwrap().into_iter().chain(families).filter(runs_here) {
        compare(&name, &graph, &adapter(&graph, false).unwrap());
    }
}

/// A stack has columns for the largest rank of every linear in layers of a kind; where a layer has less, they are zero.
#[test]
fn linears_may_have_ranks_and_scales_of_their_own() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let adapter = patterned_adapter(&graph).unwrap();
    let ranks: std::collections::BTreeSet<usize> = adapter.sites.iter().map(|s| s.rank).collect();
    assert!(ranks.into_iter().eq([3, 8, 12, 16]), "{:?}", adapter.sites);
    compare("patterns", &graph, &adapter);
}

/// The update is the difference of two products, of which one stays.
#[test]
fn what_an_adapter_began_with_is_subtracted() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let adapter = subtracting_adapter(&graph).unwrap();
    assert!(adapter.subtracted.len() == adapter.params.len() && adapter.subtracted != adapter.params);
    compare("subtracted", &graph, &adapter);
}

/// Experts have an A and a B each, in bf16 and where their W is kept in fewer bits.
#[test]
fn experts_may_be_adapted() {
    let registry = Registry::discover(&[], None);
    let families = ["gpt_oss", "qwen3_moe", "granitemoe"];
    let families = FAMILIES
        .iter()
        .filter(|(name, _)| families.contains(name))
        .map(|(name, config)| (name.to_string(), registry.family(name).unwrap().runnable(config).unwrap()));
    let cases = op_cases().unwrap().into_iter().filter(|(name, _)| name.starts_with("experts"));
    for (at, (name, graph)) in cases.chain(families).enumerate() {
        let adapter = experts_adapter(&graph).unwrap();
        assert!(adapter.sites.iter().filter(|s| s.experts > 1).count() >= 2, "{name}: {:?}", adapter.sites);
        compare_as(&name, &graph, &adapter, [NUMBERS, Numbers::Nf4, Numbers::Mxfp4][at % 3]);
    }
}

/// Experts in e4m3 and mxfp4: their products read bf16. Where all are chosen, what e4m3 does to linears before chooses no other.
#[test]
fn experts_may_be_kept_in_fp8_and_mxfp4() {
    for (name, graph) in op_cases().unwrap().into_iter().filter(|(name, _)| name.starts_with("experts")) {
        for numbers in [Numbers::Fp8, Numbers::Mxfp4] {
            if numbers == Numbers::Mxfp4 || name.contains("all of") {
                compare_as(&name, &graph, &experts_adapter(&graph).unwrap(), numbers);
            }
        }
    }
}

/// gpt-oss as it is published, on a card of 24 GiB: 4.25 bits a weight of experts, and one stack at a time in bf16.
#[test]
fn experts_stay_as_they_are_published_where_that_is_better() {
    let registry = Registry::discover(&[], None);
    let shape = shapes::Shape::named("gpt-oss-20b").unwrap();
    let graph = shape.graph(&registry).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let plan = |memory: usize, quantization, published| {
        let options = MemoryOptions { quantization, published, offload_base: Some(false), ..MemoryOptions::default() };
        let options = shape.memory(options, &graph).unwrap();
        GpuPlan::new(&graph, &adapter, 2048, 0.6, Room::of(memory, 1), 1, options)
    };
    let kind = Some(Quantization::Mxfp4);
    assert!(plan(24 << 30, None, None).is_err());
    let small = plan(24 << 30, None, kind).unwrap();
    assert!(small.total() <= 24 << 30 && small.layers.numbers == Numbers::Mxfp4 && small.waits > 0.0, "{small}");
    assert!(small.to_string().contains("experts in mxfp4, the rest in bf16"), "{small}");
    assert_eq!(plan(24 << 30, kind, None).unwrap().to_string(), small.to_string());
    // Where there is room, nothing is made before it is read.
    assert_eq!(plan(140 << 30, None, kind).unwrap().layers.numbers, NUMBERS);
    let dense = shapes::Shape::named("qwen2.5-7b").unwrap();
    let (graph, options) =
        (dense.graph(&registry).unwrap(), MemoryOptions { quantization: kind, ..MemoryOptions::default() });
    assert!(dense.memory(options, &graph).unwrap_err().message().contains("mxfp4 is for experts"));
    assert_eq!(
        dense.memory(MemoryOptions { published: kind, ..MemoryOptions::default() }, &graph).unwrap().published,
        None
    );
}

/// W of layers in nf4, whose members have blocks and groups of scales of their own; a dequantised stack lies among the values.
#[test]
fn layers_may_be_kept_in_nf4() {
    let registry = Registry::discover(&[], None);
    let (family, config) = FAMILIES[0];
    let graph = registry.family(family).unwrap().runnable(config).unwrap();
    for adapter in [patterned_adapter(&graph).unwrap(), subtracting_adapter(&graph).unwrap()] {
        compare_as("nf4", &graph, &adapter, Numbers::Nf4);
    }
    for (name, graph) in op_cases().unwrap() {
        if ["fused projections", "linear"].iter().any(|part| name.contains(part)) {
            compare_as(&name, &graph, &adapter(&graph, false).unwrap(), Numbers::Nf4);
        }
    }
}

/// W of layers in e4m3: rows of values and gradients are quantised too, before every product.
#[test]
fn layers_may_be_kept_in_fp8() {
    let registry = Registry::discover(&[], None);
    let (family, config) = FAMILIES[0];
    let graph = registry.family(family).unwrap().runnable(config).unwrap();
    for adapter in [patterned_adapter(&graph).unwrap(), subtracting_adapter(&graph).unwrap()] {
        compare_as("fp8", &graph, &adapter, Numbers::Fp8);
    }
    for (name, graph) in op_cases().unwrap() {
        if ["fused projections", "linear"].iter().any(|part| name.contains(part)) {
            compare_as(&name, &graph, &adapter(&graph, false).unwrap(), Numbers::Fp8);
        }
    }
}

/// The plan of a base in nf4: codes and scales take 0.516 bytes a weight, and one stack at a time is dequantised.
#[test]
fn a_base_in_nf4_is_small() {
    let graph = shapes::Shape::named("qwen2.5-7b").unwrap().graph(&Registry::discover(&[], None)).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let lowered = |numbers| Lowered::new(&graph, &adapter, numbers, Gates::default()).unwrap();
    let layers = |numbers| lowered(numbers).layers(&graph).iter().sum::<usize>() as f64;
    let ratio = layers(Numbers::Nf4) / layers(NUMBERS);
    assert!((0.255..0.262).contains(&ratio), "{ratio}");
    assert_eq!(lowered(Numbers::Nf4).dequantized(), (2 * 18_944 + 16) * (3_584 + 64) * 2);
    let options = MemoryOptions { quantization: Some(Quantization::Nf4), ..MemoryOptions::default() };
    let plan = |memory: usize| GpuPlan::new(&graph, &adapter, 2048, 0.6, Room::of(memory, 1), 1, options).unwrap();
    let roomy = plan(7 << 30);
    assert!(roomy.total() <= 7 << 30 && roomy.host_layers == 0 && roomy.waits > 0.0, "{roomy}");
    // Where they leave little for values, layers that come fast are better in host memory.
    let tight = plan(6 << 30);
    assert!(tight.total() <= 6 << 30 && tight.host_layers > 0 && tight.micro_batch_tokens >= 8192, "{tight}");
}

/// Layers that do not fit stay in host memory: two are on the GPU, and micro-batches are as large as it takes to compute while they
/// come.
#[test]
fn layers_that_do_not_fit_stay_in_host_memory() {
    let graph = shapes::Shape::named("qwen2.5-14b").unwrap().graph(&Registry::discover(&[], None)).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let plan = |memory: usize, offload_base: Option<bool>, host: Option<usize>| {
        let options = MemoryOptions { offload_base, ..MemoryOptions::default() };
        let room = Room { host, ..Room::of(memory, 1) };
        GpuPlan::new(&graph, &adapter, 2048, 0.6, room, 1, options)
    };
    let auto = plan(24 << 30, None, None).unwrap();
    assert!(auto.total() <= 24 << 30 && auto.host_layers > 24 << 30, "{auto}");
    assert!(auto.micro_batch_tokens >= 4096 && auto.to_string().contains("stay in host memory"), "{auto}");
    assert_eq!(plan(48 << 30, None, None).unwrap().host_layers, 0);
    assert!(plan(48 << 30, Some(true), None).unwrap().host_layers > 0);
    let refused = |offload, host| plan(24 << 30, offload, host).unwrap_err().to_string();
    assert!(refused(Some(false), None).contains("weights 26.2 GiB"));
    assert!(refused(Some(true), Some(8 << 30)).contains("of host memory, 8.0 GiB are free"));
}

#[test]
fn kinds_of_adapter_without_kernels_are_refused() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let plain = || AdapterConfig::new(4, 8.0);
    for (config, flag) in [
        (AdapterConfig { dora: true, ..plain() }, "--use-dora"),
        (AdapterConfig { dropout: 0.1, ..plain() }, "--lora-dropout"),
    ] {
        let adapter = Adapter::planned(&graph, config).unwrap();
        let Err(error) = Lowered::new(&graph, &adapter, NUMBERS, Gates::default()) else { panic!("{flag} is taken") };
        assert!(error.to_string().contains(flag) && error.to_string().contains("--device cpu"), "{error}");
    }
}

/// What is computed in chunks of rows, with chunks of tokens and of rows that predict, is what is computed at once.
#[test]
fn chunks_compute_what_the_cpu_computes() {
    let registry = Registry::discover(&[], None);
    let families = FAMILIES
        .iter()
        .map(|(name, config)| (name.to_string(), registry.family(name).unwrap().runnable(config).unwrap()));
    let lengths: [&[usize]; 3] = [&[5, 20, 41], &[30, 9], &[2, 3, 1, 5]];
    for (at, (name, graph)) in op_cases().unwrap().into_iter().chain(families).filter(runs_here).enumerate() {
        let (gates, level) = ([Gates::default(), ALL_GATES][at % 2], SavedActivations::ALL[at / 2 % 4]);
        let least = (vec![SavedActivations::BlockInput], SavedActivations::BlockInput, 1.0);
        let some = (SavedActivations::ALL[at / 2 % 4..].to_vec(), level, 0.9);
        let levels = [(some, gates), (least, ALL_GATES)].into_iter();
        let numbers = [NUMBERS, Numbers::Nf4][at % 3 / 2];
        compare_at(&name, (&graph, &adapter(&graph, false).unwrap(), numbers), &lengths, (TILE, false), levels);
    }
}

/// Inputs of layers that wait in host memory come back in time, and over nothing that is still read: those of an odd and of an even number of
/// layers.
#[test]
fn inputs_of_layers_wait_in_host_memory() {
    let (family, config) = FAMILIES[0];
    for layers in ["3", "6", "7"] {
        let config = format!("{},\"num_hidden_layers\":{layers}}}", config.strip_suffix('}').unwrap());
        let graph = Registry::discover(&[], None).family(family).unwrap().runnable(&config).unwrap();
        assert_eq!(graph.layers.len().to_string(), layers);
        let adapter = adapter(&graph, false).unwrap();
        let levels = [0, 3].map(|level| (SavedActivations::ALL[level..].to_vec(), SavedActivations::ALL[level], 0.9));
        let levels = levels.into_iter().map(|level| (level, ALL_GATES));
        compare_at(layers, (&graph, &adapter, NUMBERS), &[&[3, 1, 9], &[17, 5, 6]], (usize::MAX, true), levels);
    }
}

/// Log-probs and gradient of a graph with an adapter, in the emulator and on the CPU.
fn compare(name: &str, graph: &ModelGraph, adapter: &Adapter) {
    compare_as(name, graph, adapter, NUMBERS);
}

/// The same, with layers kept as such numbers.
fn compare_as(name: &str, graph: &ModelGraph, adapter: &Adapter, numbers: Numbers) {
    let lengths: [&[usize]; 6] = [&[3, 1, 9], &[17, 5, 6], &[1, 1, 1], &[4, 3], &[2, 3, 1, 5], &[1, 2, 4, 1, 3, 1]];
    let levels = SavedActivations::ALL.map(|level| (vec![level], level, 1.0)).into_iter();
    // Less than everything, so that layers save different parts.
    let mixed = [0.9, 0.97].map(|part| (SavedActivations::ALL.to_vec(), SavedActivations::All, part));
    let forward = Gates { forward: true, backward: false };
    let gates = [Gates::default(), forward, ALL_GATES];
    let levels = levels.chain(mixed).flat_map(|l| gates.map(|g| (l.clone(), g)));
    compare_at(name, (graph, adapter, numbers), &lengths, (usize::MAX, false), levels);
}

/// The same of examples of such lengths, in chunks of so many rows, with inputs of layers here or in host memory, at levels of what is saved: those that are allowed, and the bytes to
/// save them in, as a part of those that one of them takes.
fn compare_at(
    name: &str,
    (graph, adapter, numbers): (&ModelGraph, &Adapter, Numbers),
    lengths: &[&[usize]],
    (chunk, offload): (usize, bool),
    levels: impl Iterator<Item = ((Vec<SavedActivations>, SavedActivations, f64), Gates)>,
) {
    let batch = Batch::of(&examples(graph.vocab_size, lengths, 5).unwrap());
    let dlogps: Vec<f32> = (0..batch.targets.len()).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut exact = cpu_as(graph, batch.tokens(), adapter.clone(), numbers).unwrap();
    let logps = exact.forward(&batch, true).unwrap().logps;
    let load = exact.router_load().unwrap();
    let dprobs = router_dprobs(graph);
    exact.set_router_dprobs(dprobs.clone());
    exact.backward(&batch, &dlogps).unwrap();
    let (tokens, answers) = (batch.tokens(), batch.targets.len());
    assert!(chunk == usize::MAX || tokens.min(answers) > chunk, "{tokens} tokens, {answers} answers");
    let mode = Mode { logits: LOGITS_ROWS[0], chunk, offload };
    for ((allowed, level, part), gates) in levels {
        let mut own = Emulator::new(graph, adapter, batch.clone(), gates, numbers, |f| {
            let [whole, least] =
                [level, SavedActivations::BlockInput].map(|level| f.whole(tokens, answers, level, mode));
            let bytes = least.max((whole as f64 * part) as usize).next_multiple_of(2);
            (bytes, f.arranged(tokens, answers, bytes, &allowed, mode))
        });
        let found = own.forward();
        assert_eq!((own.load.tokens, &own.load.counts), (load.tokens, &load.counts), "{name}");
        assert!(own.load.probs.iter().zip(&load.probs).all(|(a, b)| (a - b).abs() <= 1e-4 * load.tokens), "{name}");
        own.router_dprobs = dprobs.iter().map(|dprob| *dprob as f32).collect();
        let gradient = own.backward(&dlogps);
        let what = format!("{name}, {gates:?}, {allowed:?}, {:?}", own.arrangement.saved);
        let off = [distance(&found, &logps), distance(&gradient, exact.gradient())];
        // The CPU rounds no values that products read; the emulator does, to twelve bits.
        let most = if numbers == Numbers::Fp8 { 5e-3 } else { 1e-4 };
        assert!(off.iter().all(|d| *d < most), "{what}: log-probs and gradient are off by {off:?}");
        if level != SavedActivations::BlockInput {
            continue;
        }
        let mut alone = Emulator::new(graph, adapter, batch.clone(), gates, numbers, |f: &Footprint| {
            let bytes = f.forward(tokens, answers, mode);
            (bytes, f.arrange_forward(tokens, answers, bytes, mode))
        });
        assert_eq!(alone.forward(), found, "{what}: without a backward pass");
    }
}

/// Parts of a fused projection, and their gradients, lie where the projection and its gradient do.
#[test]
fn parts_are_not_copied() {
    let cases = op_cases().unwrap();
    let graph = &cases.iter().find(|(name, _)| name == "fused projections").unwrap().1;
    let lowered = Lowered::new(graph, &adapter(graph, false).unwrap(), NUMBERS, Gates::default()).unwrap();
    let program = &lowered.programs[0];
    let labels = program.forward.iter().chain(&program.backward).map(|s| s.label);
    let moves: Vec<_> = labels.filter(|l| ["add, copy", "zero", "narrow vjp"].contains(l)).collect();
    assert!(moves.is_empty(), "{moves:?}");
    // And the gradients of gate and up lie where these were.
    let of = |label: &str| program.backward.iter().find(|s| s.label == label).unwrap();
    assert_eq!(of("glu vjp").reads[..2], of("glu vjp").writes);
}

/// A matmul computes the gated activation of what it makes: gate and up have no place where nobody reads them, and where they are
/// saved, the activation is computed again from them, not by the matmul.
#[test]
fn gated_activations_are_computed_by_the_matmul() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let lowered = Lowered::new(&graph, &adapter(&graph, false).unwrap(), NUMBERS, ALL_GATES).unwrap();
    let program = &lowered.programs[0];
    let gated = program.forward.iter().find(|s| s.cheaper.is_some()).unwrap();
    assert!(program.forward.iter().all(|s| s.label != "glu"));
    assert!(program.backward.iter().all(|s| s.label != "glu vjp"));
    let both = gated.writes[0].buffer;
    for level in SavedActivations::ALL {
        let scheduled = &lowered.schedules[0][level as usize];
        let again = |label: &str| {
            scheduled.steps.iter().filter(|s| s.label == label && s.writes(gated.writes[1].buffer)).count()
        };
        let Passes { forward, backward } = &scheduled.whole;
        let (saved, placed) = (forward.saved[both].is_some(), forward.scratch[both].is_some());
        let expected = match level {
            SavedActivations::All => (true, [0, 0]),
            SavedActivations::Matmuls => (true, [1, 0]),
            SavedActivations::SmallMatmuls | SavedActivations::BlockInput => (false, [0, 1]),
        };
        assert_eq!((saved, [again("glu"), again("matmul")]), expected, "{level:?}");
        assert!(!placed && (saved || backward.scratch[both].is_some()), "{level:?}");
    }
}

/// Behind its attention the last layer runs on the rows that predict, forward and backward; the others run on all.
#[test]
fn the_last_layer_runs_where_it_predicts() {
    let (family, config) = FAMILIES[0];
    let graph = Registry::discover(&[], None).family(family).unwrap().runnable(config).unwrap();
    let lowered = Lowered::new(&graph, &adapter(&graph, false).unwrap(), NUMBERS, Gates::default()).unwrap();
    let last = graph.layers.last().unwrap().block;
    for (kind, program) in lowered.programs.iter().enumerate() {
        let all = program.forward.iter().chain(&program.backward);
        if kind != last {
            assert!(all.clone().all(|s| s.rows == Rows::Tokens));
            continue;
        }
        let count = |label: &str, rows: Rows| all.clone().filter(|s| s.label == label && s.rows == rows).count();
        let both = |label: &str| [Rows::Tokens, Rows::Predictors].map(|rows| count(label, rows));
        // Of attention and of the residual stream.
        assert_eq!([both("gather"), both("gather vjp")], [[0, 2], [2, 0]]);
        // Queries, keys and values are one matmul; o, gate with up, down.
        assert_eq!([both("matmul"), both("matmul vjp")], [[1, 3], [1, 3]]);
        assert_eq!([both("norm"), both("glu"), both("attention")], [[1, 1], [0, 1], [1, 0]]);
    }
    // What is computed again is, too, whatever computes it.
    let gated = Lowered::new(&graph, &adapter(&graph, false).unwrap(), NUMBERS, ALL_GATES).unwrap();
    let again = &gated.schedules[last][SavedActivations::Matmuls as usize].steps;
    assert!(
        again.iter().any(|s| s.label == "glu") && again.iter().all(|s| s.label != "glu" || s.rows == Rows::Predictors)
    );
    assert!(lowered.head.forward.iter().chain(&lowered.head.backward).all(|s| s.rows == Rows::Predictors));
}

/// A plan stays within its memory, and more memory never makes it slower.
#[test]
fn plans_use_what_there_is() {
    let registry = Registry::discover(&[], None);
    let (family, config) = FAMILIES[0];
    let graph = registry.family(family).unwrap().runnable(config).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let plan =
        |memory: usize| GpuPlan::new(&graph, &adapter, 3000, 0.6, Room::of(memory, 1), 1, MemoryOptions::default());
    let least = (1..4096).map(|n| n << 20).find(|m| plan(*m).is_ok()).unwrap();
    let error = plan(least - (1 << 20)).unwrap_err().to_string();
    assert!(error.contains("3000 tokens") && error.contains("help: lower --max-length"), "{error}");
    let cost = |p: &GpuPlan| (1.0 + p.again) * (1.0 + LOST_TOKENS / p.micro_batch_tokens as f64);
    let mut before = f64::INFINITY;
    for memory in (0..40).map(|n| least + n * (16 << 20)) {
        let plan = plan(memory).unwrap();
        assert!(plan.total() <= memory, "{} of {memory}", plan.total());
        assert!(cost(&plan) <= before * 1.006, "more memory makes it slower: {plan}");
        before = cost(&plan);
    }
}

/// Rows of 30,000 tokens fit within 24 GiB in chunks, rows twice as long where the layers' inputs wait in host memory; packing decides chunks, so
/// that a resumed run has them.
#[test]
fn long_rows_fit() {
    let graph = shapes::Shape::named("qwen2.5-7b").unwrap().graph(&Registry::discover(&[], None)).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let plan = |longest: usize, host: Option<usize>, packing: Option<Packing>| {
        let room = Room { host, ..Room::of(24 << 30, 1) };
        let options = MemoryOptions { packing, offload_base: Some(false), ..MemoryOptions::default() };
        GpuPlan::new(&graph, &adapter, longest, 0.02, room, 1, options)
    };
    let long = plan(30_000, Some(0), None).unwrap();
    assert!(long.chunk_rows.is_some() && !long.offloads() && long.total() <= 24 << 30, "{long}");
    assert!(plan(60_000, Some(0), None).is_err());
    let longer = plan(60_000, None, None).unwrap();
    assert!(longer.chunk_rows.is_some() && longer.offloads() && longer.total() <= 24 << 30, "{longer}");
    for plan in [plan(30_000, None, Some(long.packing())), plan(60_000, None, Some(longer.packing()))] {
        let plan = plan.unwrap();
        assert!([long.packing(), longer.packing()].contains(&plan.packing()), "{plan}");
    }
    // Rows that fit at once are computed at once.
    let short = plan(4_096, None, None).unwrap();
    assert_eq!(short.chunk_rows, None, "{short}");
}

/// Layers that ranks share take a part of their bytes on each, and the places of two layers.
#[test]
fn a_shared_base_fits_where_a_whole_one_does_not() {
    let graph = shapes::Shape::named("qwen2.5-7b").unwrap().graph(&Registry::discover(&[], None)).unwrap();
    let adapter = adapter(&graph, true).unwrap();
    let plan = |ranks: usize| {
        let options = MemoryOptions { offload_base: (ranks == 1).then_some(false), ..MemoryOptions::default() };
        GpuPlan::new(&graph, &adapter, 2048, 0.6, Room::of(12 << 30, ranks), ranks, options)
    };
    let error = plan(1).unwrap_err().to_string();
    assert!(error.contains("weights 13.2 GiB"), "{error}");
    let shared = plan(4).unwrap();
    assert!(shared.total() <= 12 << 30);
    let rest = Lowered::new(&graph, &adapter, NUMBERS, Gates::default()).unwrap().rest();
    let layers = shared.whole - rest;
    let (expected, layer) = (layers / 4 + 2 * layers / graph.layers.len(), 28 * 4 * 256);
    assert!((shared.weights - rest).abs_diff(expected) <= layer, "{} of {}", shared.weights, shared.whole);
}

/// Ops that only the CPU has.
const CPU_ONLY: &[&str] = &[];

/// Whether the GPU has all ops of a graph.
fn runs_here((_, graph): &(String, ModelGraph)) -> bool {
    graph.parts().all(|(_, block)| block.nodes.iter().all(|node| !CPU_ONLY.contains(&node.op.as_str())))
}

/// Every op of the CPU has a file here or is listed, and no other has.
#[test]
fn every_op_of_the_cpu_is_known() {
    let set = |names: &mut dyn Iterator<Item = &'static str>| names.collect::<std::collections::BTreeSet<_>>();
    let own = super::ops::OPS.iter().chain(super::ops::INTERNAL).map(|o| o.name);
    let own = set(&mut own.chain(CPU_ONLY.iter().copied()));
    assert_eq!(own, set(&mut ops::OPS.iter().chain(ops::INTERNAL).map(|o| o.name)));
}

/// An op that changes a gradient in place which is another value's, too.
#[test]
fn a_step_that_overwrites_what_is_still_read_is_refused() {
    use super::lowering::{CudaOp, Frame};
    use super::{ops::find, sum::sum};
    static RASH: CudaOp = CudaOp::new(
        "rope",
        |l, index| {
            let [x] = l.inputs(index)?;
            let y = l.place(index);
            l.push(sum(x, x, y))
        },
        |l, index| {
            let Some(dy) = l.take_gradient(index) else { return Ok(()) };
            l.push(sum(dy, dy, dy))?;
            l.pass_on(l.nodes[index].inputs[0], dy)
        },
    );
    let with_rash = |name: &str| if name == RASH.name { Ok(&RASH) } else { find(name) };
    let cases = op_cases().unwrap();
    let lower = |name: &str| {
        let block = &cases.iter().find(|(n, _)| n == name).unwrap().1.blocks[0];
        let frame = Frame {
            widths: [104; 2],
            behind: 0,
            rank: &|_, _| 0,
            numbers: NUMBERS,
            backward: true,
            rows: Rows::Tokens,
            gates: Gates::default(),
        };
        Program::lower(block, (&block.nodes, block.output), with_rash, &frame).map(|_| ())
    };
    let error = lower("rope of a value, added to itself").unwrap_err().to_string();
    assert!(error.contains("step 'add, copy' would overwrite"), "{error}");
    assert!(lower("rms_norm of heads, rope").is_ok());
}

/// A published checkpoint of every family runs on a GPU.
#[test]
fn published_models_are_lowered() {
    let registry = Registry::discover(&[], None);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/models/dense/configs");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let refused = |path: &std::path::PathBuf| {
        let family = path.file_stem().unwrap().to_str().unwrap();
        let config = std::fs::read_to_string(path).unwrap();
        let mut graph = registry.family(family).unwrap().runnable(&config).unwrap();
        // A layer of every kind will do.
        let mut kinds = std::collections::BTreeSet::new();
        graph.layers.retain(|l| kinds.insert(l.block));
        let lowered = Lowered::new(&graph, &adapter(&graph, true).unwrap(), NUMBERS, Gates::default());
        Some(format!("{family}: {}", lowered.err()?))
    };
    assert!(files.len() > 30, "{files:?}");
    assert_eq!(files.iter().filter_map(refused).collect::<Vec<_>>(), Vec::<String>::new());
}
