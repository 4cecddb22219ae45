//! Answers: what is remembered of a text gives what computing all of it again gives, for every family of the goldens, with
//! the adapter and without; text comes in whole characters.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use candle_core::{D, Tensor};
use dpo_host::base::Base;
use dpo_host::batch::Batch;
use dpo_host::data::TokenPair;
use dpo_host::engine::Engine;
use dpo_host::lora::Adapter;
use dpo_host::model::Model;
use dpo_host::ops::Past;
use dpo_host::plugins::Registry;
use dpo_host::weights::Checkpoint;
use dpo_tests::{CONFIGS, Numbers, golden};

/// Longer than the goldens' windows and than the lengths where yarn and llama3's rope begin to differ.
const TOKENS: usize = 60;

/// The names of all golden cases.
fn cases() -> Vec<String> {
    let folders = std::fs::read_dir(golden("trajectories")).unwrap().map(|e| e.unwrap().path());
    let mut names: Vec<String> =
        folders.filter(|f| f.is_dir()).map(|f| f.file_name().unwrap().to_string_lossy().into_owned()).collect();
    names.sort();
    assert!(names.len() >= 7, "{names:?}");
    names
}

/// A golden model with its trained adapter.
fn engine(case: &str) -> Engine {
    let (registry, folder) = (Registry::discover(&[]), golden("trajectories").join(case));
    let model = Model::open(&registry, &folder.join("model"), None).unwrap();
    let adapter = Adapter::load(&model.graph, &folder.join("final_adapter")).unwrap();
    let base = Base::load(&model.graph, &Checkpoint::open(&folder.join("model")).unwrap()).unwrap();
    Engine::new(model.graph, base, adapter).unwrap()
}

fn text(vocab: usize, seed: u64) -> Vec<u32> {
    let mut numbers = Numbers::new(seed);
    (0..TOKENS).map(|_| numbers.below(vocab) as u32).collect()
}

/// Log-probs of all tokens but the first, from the pass that training runs.
fn trained(engine: &mut Engine, ids: &[u32], adapted: bool) -> Vec<f32> {
    let pair = TokenPair {
        prompt: ids[..1].to_vec(),
        chosen: ids[1..].to_vec(),
        rejected: ids[..1].to_vec(),
        place: String::new(),
    };
    let params = engine.adapter().params.clone();
    if !adapted {
        engine.update(|params| params.fill(0.0)).unwrap();
    }
    let mut logps = engine.forward(&Batch::of([&pair]), false).unwrap().logps;
    engine.update(|own| own.copy_from_slice(&params)).unwrap();
    logps.truncate(ids.len() - 1);
    logps
}

fn logp(logits: Vec<f32>, id: u32) -> f32 {
    let logits = Tensor::new(logits, &candle_core::Device::Cpu).unwrap();
    candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap().to_vec1::<f32>().unwrap()[id as usize]
}

fn likeliest(logits: &[f32]) -> u32 {
    (0..logits.len() as u32).max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize])).unwrap()
}

#[test]
fn remembered_tokens_give_the_log_probs_of_training() {
    for case in cases() {
        let mut engine = engine(&case);
        let ids = text(engine.graph().vocab_size, 3);
        for adapted in [false, true] {
            let expected = trained(&mut engine, &ids, adapted);
            // Token by token, and in parts of several.
            for part in [1, 2, 7, 25] {
                let (mut past, mut at) = (Past::default(), 0);
                while at + part < ids.len() {
                    let logits = engine.logits(&ids[at..at + part], &mut past, adapted).unwrap();
                    at += part;
                    let (is, expected) = (logp(logits, ids[at]), expected[at - 1]);
                    let off = (is - expected).abs();
                    assert!(off < 2e-5 * expected.abs().max(1.0), "{case} {adapted} {part} {at}: {is}, not {expected}");
                }
            }
        }
    }
}

/// The goldens' adapters change answers, so that a voice that is the other one would be seen.
#[test]
fn voices_differ() {
    for case in cases() {
        let engine = engine(&case);
        let ids = text(engine.graph().vocab_size, 3);
        let logits = |adapted| engine.logits(&ids, &mut Past::default(), adapted).unwrap();
        assert_ne!(logits(false), logits(true), "{case}");
    }
}

#[test]
fn greedy_answers_are_those_of_whole_passes() {
    for case in cases() {
        let engine = engine(&case);
        for adapted in [false, true] {
            let mut ids = text(engine.graph().vocab_size, 5)[..9].to_vec();
            let mut past = Past::default();
            let mut logits = engine.logits(&ids, &mut past, adapted).unwrap();
            for step in 0..TOKENS {
                let whole = engine.logits(&ids, &mut Past::default(), adapted).unwrap();
                let off = logits.iter().zip(&whole).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
                let size = whole.iter().fold(0.0_f32, |most, l| most.max(l.abs()));
                assert!(off <= 1e-5 * size.max(1.0), "{case} {adapted} step {step}: off by {off} of {size}");
                assert_eq!(likeliest(&logits), likeliest(&whole), "{case} {adapted} step {step}");
                ids.push(likeliest(&whole));
                logits = engine.logits(&ids[ids.len() - 1..], &mut past, adapted).unwrap();
            }
        }
    }
}

#[test]
fn a_soft_cap_and_a_forgotten_end() {
    let (family, config) = CONFIGS[0];
    let mut graph = dpo_tests::graph(family, config);
    for node in graph.blocks.iter_mut().flat_map(|b| &mut b.nodes).filter(|n| n.op == "attention") {
        node.attrs.insert("softcap".into(), serde_json::json!(0.7));
    }
    let mut engine = dpo_tests::engine(&graph, &dpo_tests::weights(&graph, 1), 2);
    let ids = text(graph.vocab_size, 11);
    let expected = trained(&mut engine, &ids, true);
    let mut past = Past::default();
    let other: Vec<u32> = ids.iter().rev().copied().collect();
    engine.logits(&ids[..20], &mut past, true).unwrap();
    engine.logits(&other, &mut past, true).unwrap();
    past.keep(20);
    for at in 20..TOKENS - 1 {
        let is = logp(engine.logits(&ids[at..=at], &mut past, true).unwrap(), ids[at + 1]);
        assert!((is - expected[at]).abs() < 2e-5 * expected[at].abs().max(1.0), "{at}: {is}, not {}", expected[at]);
    }
}
