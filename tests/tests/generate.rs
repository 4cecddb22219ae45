//! Answers: what is remembered of a text gives what computing all of it again gives, for every family of the goldens, with
//! the adapter and without; text comes in whole characters.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use candle_core::{D, Tensor};
use dpo_core::base::Base;
use dpo_core::batch::Batch;
use dpo_core::cpu_decoder::CpuDecoder;
use dpo_core::decoder::{Decoder, Sequences};
use dpo_core::engine::{Engine, Loras};
use dpo_core::example::{Answer, Example};
use dpo_core::lora::{Adapter, AdapterConfig, Init, Targets, in_one_shape};
use dpo_core::ops::KvCache;
use dpo_core::plan::MemoryOptions;
use dpo_core::weights::Checkpoint;
use dpo_data::ChatTokenizer;
use dpo_generate::{Generator, Sampling, Stop, TextStream, Variant, compare};
use dpo_hub::model::{Model, ModelOptions};
use dpo_plugin_api::graph::ModelGraph;
use dpo_plugins::Registry;
use dpo_tests::{CONFIGS, Numbers, golden, logits};

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
    let (registry, folder) = (Registry::discover(&[], None), golden("trajectories").join(case));
    let model = Model::open(&registry, &folder.join("model"), &ModelOptions::default()).unwrap();
    let adapter = Adapter::load(&model.graph, &folder.join("final_adapter")).unwrap();
    let base = Base::load(&model.graph, &Checkpoint::of(&folder.join("model"), &model.graph).unwrap()).unwrap();
    Engine::new(model.graph, base, adapter).unwrap()
}

fn text(vocab: usize, seed: u64) -> Vec<u32> {
    let mut numbers = Numbers::new(seed);
    (0..TOKENS).map(|_| numbers.below(vocab) as u32).collect()
}

/// Log-probs of all tokens but the first, from the pass that training runs.
fn trained(engine: &mut Engine, ids: &[u32], adapted: bool) -> Vec<f32> {
    let example = Example::new(ids[..1].to_vec(), vec![Answer::new(ids[1..].to_vec(), 1.0)], "").unwrap();
    let params = engine.adapter().params.clone();
    if !adapted {
        engine.update(|params| params.fill(0.0)).unwrap();
    }
    let logps = engine.forward(&Batch::of([&example]), false).unwrap().logps.logps;
    engine.update(|own| own.copy_from_slice(&params)).unwrap();
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
                let (mut past, mut at) = (KvCache::default(), 0);
                while at + part < ids.len() {
                    let next = logits(&engine, &ids[at..at + part], &mut past, adapted);
                    at += part;
                    let (is, expected) = (logp(next, ids[at]), expected[at - 1]);
                    let off = (is - expected).abs();
                    assert!(off < 2e-5 * expected.abs().max(1.0), "{case} {adapted} {part} {at}: {is}, not {expected}");
                }
            }
        }
    }
}

/// Weights that stay in bf16 are the numbers they are in f32, tied or not, for a prompt and for single tokens.
#[test]
fn weights_kept_in_bf16_give_the_same_log_probs() {
    for case in ["qwen2", "llama3", "qwen3-tied-bias", "gpt_oss", "qwen3_5", "nemotron_h", "deepseek_v3"] {
        let (registry, folder) = (Registry::discover(&[], None), golden("trajectories").join(case));
        let narrow = tempfile::tempdir().unwrap();
        let cpu = candle_core::Device::Cpu;
        let mut tensors = candle_core::safetensors::load(folder.join("model/model.safetensors"), &cpu).unwrap();
        tensors.values_mut().for_each(|t| *t = t.to_dtype(candle_core::DType::BF16).unwrap());
        candle_core::safetensors::save(&tensors, narrow.path().join("model.safetensors")).unwrap();
        let model = Model::open(&registry, &folder.join("model"), &ModelOptions::default()).unwrap();
        let adapter = || Adapter::load(&model.graph, &folder.join("final_adapter")).unwrap();
        let checkpoint = Checkpoint::of(narrow.path(), &model.graph).unwrap();
        let base = Base::load(&model.graph, &checkpoint).unwrap();
        let mut wide = Engine::new(model.graph.clone(), base, adapter()).unwrap();
        let mut kept =
            CpuDecoder::load(&model.graph, &checkpoint, &[adapter()], Sequences::of(2), MemoryOptions::default())
                .unwrap();
        let ids = text(model.graph.vocab_size, 3);
        for (sequence, adapted) in [false, true].into_iter().enumerate() {
            let expected = trained(&mut wide, &ids, adapted);
            for at in 10..ids.len() {
                let new = if at == 10 { &ids[..10] } else { &ids[at - 1..at] };
                let next = kept.append(adapted.then_some(0), &[(sequence, new)]).unwrap().swap_remove(0);
                let (is, expected) = (logp(next, ids[at]), expected[at - 1]);
                let off = (is - expected).abs();
                assert!(off < 2e-5 * expected.abs().max(1.0), "{case} {adapted} {at}: {is}, not {expected}");
            }
        }
    }
}

/// The goldens' adapters change answers, so that a variant that is the other one would be seen.
#[test]
fn voices_differ() {
    for case in cases() {
        let engine = engine(&case);
        let ids = text(engine.graph().vocab_size, 3);
        let logits = |adapted| dpo_tests::logits(&engine, &ids, &mut KvCache::default(), adapted);
        assert_ne!(logits(false), logits(true), "{case}");
    }
}

#[test]
fn greedy_answers_are_those_of_whole_passes() {
    for case in cases() {
        let engine = engine(&case);
        for adapted in [false, true] {
            let mut ids = text(engine.graph().vocab_size, 5)[..9].to_vec();
            let mut past = KvCache::default();
            let mut next = logits(&engine, &ids, &mut past, adapted);
            for step in 0..TOKENS {
                let whole = logits(&engine, &ids, &mut KvCache::default(), adapted);
                let off = next.iter().zip(&whole).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
                let size = whole.iter().fold(0.0_f32, |most, l| most.max(l.abs()));
                assert!(off <= 1e-5 * size.max(1.0), "{case} {adapted} step {step}: off by {off} of {size}");
                assert_eq!(likeliest(&next), likeliest(&whole), "{case} {adapted} step {step}");
                ids.push(likeliest(&whole));
                next = logits(&engine, &ids[ids.len() - 1..], &mut past, adapted);
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
    let mut past = KvCache::default();
    let other: Vec<u32> = ids.iter().rev().copied().collect();
    logits(&engine, &ids[..20], &mut past, true);
    logits(&engine, &other, &mut past, true);
    past.truncate(20);
    for at in 20..TOKENS - 1 {
        let is = logp(logits(&engine, &ids[at..=at], &mut past, true), ids[at + 1]);
        assert!((is - expected[at]).abs() < 2e-5 * expected[at].abs().max(1.0), "{at}: {is}, not {}", expected[at]);
    }
}

/// A state cannot be cut: it is taken back to where several tokens were appended at once, or to the beginning.
#[test]
fn a_state_is_taken_back_to_where_it_was_kept() {
    let mut engine = engine("qwen3_5");
    let ids = text(engine.graph().vocab_size, 11);
    let other: Vec<u32> = ids.iter().rev().copied().collect();
    let mut past = KvCache::default();
    let append = |engine: &Engine, past: &mut KvCache, ids: &[u32]| logits(engine, ids, past, true);
    append(&engine, &mut past, &ids[..20]);
    append(&engine, &mut past, &ids[20..30]);
    (0..5).for_each(|at| drop(append(&engine, &mut past, &other[at..=at])));
    assert_eq!([past.truncate(40), past.truncate(34), past.truncate(19)], [35, 20, 0]);
    let expected = trained(&mut engine, &ids, true);
    for end in [20, 30, 50] {
        // A wrong end each time, which is taken back.
        let begin = past.tokens();
        append(&engine, &mut past, &ids[begin..end]);
        append(&engine, &mut past, &other[..7]);
        let left = past.truncate(end);
        assert_eq!(left, end);
        let is = logp(append(&engine, &mut past, &ids[left..=end]), ids[end + 1]);
        assert!((is - expected[end]).abs() < 2e-5 * expected[end].abs().max(1.0), "{end}: {is}, not {}", expected[end]);
    }
}

const MIXED: &str = "Rice 🍚, 👩‍🍳 and café: 先把米淘到水清，再小火慢煮！ naïve — ok\n\n\tend 🇨🇳";

/// What a stream makes of tokens, piece by piece.
fn pieces(tokenizer: &ChatTokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = TextStream::default();
    let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(tokenizer, *id)).collect();
    pieces.push(stream.end(tokenizer));
    pieces
}

fn check_stream(tokenizer: &ChatTokenizer) {
    let ids = tokenizer.encode(MIXED, false).unwrap();
    assert!(ids.len() > MIXED.chars().count() / 2, "the text is not cut within characters");
    let pieces_of_text = pieces(tokenizer, &ids);
    assert!(!pieces_of_text.iter().any(|p| p.contains('\u{FFFD}')), "{pieces_of_text:?}");
    assert_eq!(pieces_of_text.concat(), tokenizer.decode(&ids, false));
    assert_eq!(pieces_of_text.last().map(String::as_str), Some(""), "a text that is whole was held back");
    // Characters come as soon as they are whole.
    let shown = pieces_of_text[..ids.len() / 2].concat();
    assert_eq!(shown, tokenizer.decode(&ids[..ids.len() / 2], false).trim_end_matches('\u{FFFD}'));
}

#[test]
fn text_comes_in_whole_characters() {
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../datasets/demo/model");
    let tokenizer = ChatTokenizer::open(&demo, None).unwrap();
    check_stream(&tokenizer);
    // Tokens in no order: broken bytes among whole characters.
    let mut numbers = Numbers::new(4);
    for _ in 0..20 {
        let ids: Vec<u32> = (0..40).map(|_| numbers.below(2045) as u32).collect();
        assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids, false));
    }
    let special = tokenizer.eos_ids()[0];
    let hi = tokenizer.encode("hi", false).unwrap();
    assert_eq!(pieces(&tokenizer, &[&[special], &hi[..], &[special]].concat()).concat(), "hi");
}

/// Sentencepiece's way: bytes by name, spaces as letters, and a text that loses the first one.
#[test]
fn words_of_sentencepiece_keep_their_spaces() {
    let mut vocab: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    vocab.extend(["▁", "▁Hello", "▁world", "<unk>"].map(str::to_owned));
    let vocab: serde_json::Map<String, serde_json::Value> =
        vocab.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
    let text = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer":
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": []},
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), text.to_string()).unwrap();
    let tokenizer = ChatTokenizer::open(folder.path(), None).unwrap();
    assert_eq!(pieces(&tokenizer, &[257, 258, 258]), ["Hello", " world", " world", ""]);
    check_stream(&tokenizer);
}

/// A generator over a golden model.
fn generator(case: &str) -> Generator {
    let (registry, folder) = (Registry::discover(&[], None), golden("trajectories").join(case));
    let model = Model::open(&registry, &folder.join("model"), &ModelOptions::default()).unwrap();
    let adapter = Adapter::load(&model.graph, &folder.join("final_adapter")).unwrap();
    let (cpu, sequences) = (dpo_core::backend::Cpu, Sequences::of(4));
    Generator::open(&model, vec![adapter], &cpu, sequences, MemoryOptions::default()).unwrap()
}

fn go_on(generator: &mut Generator, variant: Variant, ids: &[u32], limit: usize) -> (Vec<u32>, Option<Stop>) {
    let sampling = Sampling { max_new_tokens: limit, ..Sampling::default() };
    let mut answer = generator.begin(variant.adapter(), ids.to_vec(), &sampling).unwrap();
    while generator.step(&mut answer).unwrap().is_some() {}
    (answer.ids().to_vec(), answer.stop())
}

/// A text that shares its head with the one before is not begun again, and gives what it gives alone; long prompts are taken
/// in parts; variants do not mix.
#[test]
fn conversations_go_on_from_what_was_heard() {
    let case = "qwen2-window";
    let mut long = text(320, 8);
    while long.len() < 400 {
        long.extend(text(320, long.len() as u64));
    }
    let mut one = generator(case);
    for (variant, end) in
        [(Variant::Base, 30), (Variant::Tuned, 30), (Variant::Tuned, 44), (Variant::Base, 400), (Variant::Base, 37)]
    {
        let (ids, stop) = go_on(&mut one, variant, &long[..end], 20);
        assert_eq!(
            (&ids, stop),
            (&go_on(&mut generator(case), variant, &long[..end], 20).0, stop),
            "{variant:?} {end}"
        );
        let adapted = variant == Variant::Tuned;
        let first = logits(&engine(case), &long[..end], &mut KvCache::default(), adapted);
        assert_eq!(ids[0], likeliest(&first), "{variant:?} {end}");
    }
}

/// Sequences of other lengths in one pass, each by as many tokens as it likes, have the logits that they have alone.
#[test]
fn sequences_side_by_side_do_not_mix() {
    for case in cases() {
        let engine = engine(&case);
        let loras = Loras::of(engine.adapter()).unwrap();
        let texts: Vec<Vec<u32>> = (0..3).map(|seed| text(engine.graph().vocab_size, seed)).collect();
        let (mut together, mut alone): (Vec<KvCache>, Vec<KvCache>) =
            (0..3).map(|_| (KvCache::default(), KvCache::default())).unzip();
        let mut at = [0; 3];
        for counts in [[20, 1, 7], [1, 1, 1], [1, 5, 1], [9, 1, 1]] {
            let ids: Vec<&[u32]> = (0..3).map(|i| &texts[i][at[i]..at[i] + counts[i]]).collect();
            let mut new: Vec<(&[u32], &mut KvCache)> = ids.iter().copied().zip(&mut together).collect();
            let all = engine.logits(&mut new, Some(&loras)).unwrap();
            for (i, is) in all.iter().enumerate() {
                let expected = logits(&engine, ids[i], &mut alone[i], true);
                let off = is.iter().zip(&expected).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
                let size = expected.iter().fold(0.0_f32, |most, l| most.max(l.abs()));
                assert!(off <= 1e-5 * size.max(1.0), "{case}, sequence {i}: off by {off} of {size}");
                at[i] += counts[i];
            }
        }
    }
}

/// Answers that go on together are those that each is alone, whichever adapter it is with; what there is no sequence for is refused.
#[test]
fn answers_side_by_side_are_those_of_each_alone() {
    let case = "qwen3";
    let prompts: Vec<Vec<u32>> = (0..4).map(|seed| text(320, seed)[..4 + 9 * seed as usize].to_vec()).collect();
    let sampling =
        |seed| Sampling { max_new_tokens: 12 + seed as usize, temperature: 0.8, seed, ..Sampling::default() };
    let mut together = generator(case);
    let adapter = |at: usize| (at % 2 == 1).then_some(0);
    let mut answers: Vec<_> =
        (0..4).map(|at| together.begin(adapter(at), prompts[at].clone(), &sampling(at as u64)).unwrap()).collect();
    assert!(together.free() == 0 && together.begin(None, prompts[0].clone(), &sampling(0)).is_err());
    while answers.iter().any(|answer| answer.stop().is_none()) {
        let mut all: Vec<_> = answers.iter_mut().collect();
        together.step_all(&mut all).into_iter().for_each(|result| drop(result.unwrap()));
    }
    assert_eq!(together.free(), 4);
    for (at, answer) in answers.iter().enumerate() {
        let mut alone = generator(case);
        let mut expected = alone.begin(adapter(at), prompts[at].clone(), &sampling(at as u64)).unwrap();
        while alone.step(&mut expected).unwrap().is_some() {}
        assert_eq!(
            (answer.ids(), answer.text(), answer.stop()),
            (expected.ids(), expected.text(), expected.stop()),
            "{at}"
        );
    }
}

/// Adapters of other ranks, scales and modules in one shape are the updates that they were, of experts too.
#[test]
fn adapters_in_one_shape_change_what_they_did() {
    let config = |rank, alpha, targets: &[&str], parameters: &[&str]| AdapterConfig {
        targets: Targets::Names(targets.iter().map(|t| (*t).to_owned()).collect()),
        parameters: parameters.iter().map(|p| (*p).to_owned()).collect(),
        ..AdapterConfig::new(rank, alpha)
    };
    let dense = dpo_tests::graph(CONFIGS[0].0, CONFIGS[0].1);
    let subtracting = AdapterConfig { init: Init::Olora, ..config(2, 3.0, &["q_proj", "down_proj"], &[]) };
    let both = [config(2, 8.0, &["q_proj", "v_proj"], &[]), config(5, 7.0, &["down_proj", "v_proj"], &[]), subtracting];
    check_one_shape(&dense, &both);
    let (registry, folder) = (Registry::discover(&[], None), golden("trajectories/qwen3_moe/model"));
    let moe = Model::open(&registry, &folder, &ModelOptions::default()).unwrap().graph;
    let (up, down) = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj");
    check_one_shape(&moe, &[config(2, 8.0, &["q_proj"], &[up, down]), config(3, 9.0, &["v_proj"], &[down])]);
    let dora = AdapterConfig { dora: true, ..AdapterConfig::new(2, 4.0) };
    let (dora, plain) =
        (Adapter::new(&dense, dora, 0).unwrap(), Adapter::new(&dense, AdapterConfig::new(2, 4.0), 0).unwrap());
    assert!(in_one_shape(vec![dora.clone(), plain]).is_err() && in_one_shape(vec![dora]).is_ok());
}

fn check_one_shape(graph: &ModelGraph, configs: &[AdapterConfig]) {
    let mut numbers = Numbers::new(9);
    let mut adapters: Vec<Adapter> =
        configs.iter().map(|config| Adapter::planned(graph, config.clone()).unwrap()).collect();
    for adapter in &mut adapters {
        let count = adapter.parameters();
        let mut random = |count: usize| (0..count).map(|_| numbers.below(2000) as f32 / 5000.0 - 0.2).collect();
        adapter.params = random(count);
        adapter.subtracted = random(adapter.subtracted_parameters());
    }
    let shaped = in_one_shape(adapters.clone()).unwrap();
    assert!(shaped.iter().all(|one| one.shape() == shaped[0].shape() && one.params.len() == shaped[0].params.len()));
    let engine = dpo_tests::engine(graph, &dpo_tests::weights(graph, 1), 2);
    let ids = text(graph.vocab_size, 11);
    for (own, shaped) in adapters.iter().zip(&shaped) {
        let [is, expected] = [shaped, own].map(|adapter| {
            let loras = Loras::of(adapter).unwrap();
            engine.logits(&mut [(&ids, &mut KvCache::default())], Some(&loras)).unwrap().swap_remove(0)
        });
        let off = is.iter().zip(&expected).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
        let plain = logits(&engine, &ids, &mut KvCache::default(), false);
        let change = plain.iter().zip(&expected).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(off < 2e-5 && change > 1e-2, "off by {off}, where the adapter changes {change}");
    }
}

#[test]
fn answers_end() {
    let mut generator = generator("qwen2-window");
    let ids = text(320, 8);
    let (short, stop) = go_on(&mut generator, Variant::Base, &ids, 5);
    assert!(stop == Some(Stop::Limit) && short.len() == 5 || stop == Some(Stop::Turn), "{short:?} {stop:?}");
    // The model is made for 512 tokens.
    let long: Vec<u32> = (0..508).map(|i| ids[i % ids.len()]).collect();
    let (rest, stop) = go_on(&mut generator, Variant::Base, &long, 50);
    assert!(stop == Some(Stop::Length) && rest.len() == 4 || stop == Some(Stop::Turn), "{rest:?} {stop:?}");
    let full: Vec<u32> = (0..512).map(|i| ids[i % ids.len()]).collect();
    let refused = generator.begin(None, full, &Sampling::default()).err().unwrap().to_string();
    assert!(refused.contains("512 tokens"), "{refused}");
    assert!(generator.begin(None, vec![320], &Sampling::default()).is_err(), "a token that the model does not have");
}

/// A device that always says the same.
struct Parrot(u32);

impl Decoder for Parrot {
    fn name(&self) -> String {
        "parrot".into()
    }

    fn sequences(&self) -> (usize, usize) {
        (1, 512)
    }

    fn append(&mut self, _: Option<usize>, new: &[(usize, &[u32])]) -> dpo_core::error::Result<Vec<Vec<f32>>> {
        Ok(new.iter().map(|_| (0..320).map(|id| f32::from(u8::from(id == self.0))).collect()).collect())
    }

    fn truncate(&mut self, _: usize, tokens: usize) -> usize {
        tokens
    }
}

/// Also at an end that only the template names.
#[test]
fn a_turn_ends_where_the_model_ends_it() {
    let (registry, folder) = (Registry::discover(&[], None), golden("trajectories/qwen2/model"));
    let model = Model::open(&registry, &folder, &ModelOptions::default()).unwrap();
    let tokenizer = || ChatTokenizer::open(&folder, None).unwrap();
    for end in tokenizer().eos_ids().iter().copied().chain(tokenizer().turn_end()) {
        let mut generator = Generator::of(&model, tokenizer(), Box::new(Parrot(end)));
        assert_eq!(go_on(&mut generator, Variant::Base, &[1, 2], 50), (vec![end], Some(Stop::Turn)));
    }
}

/// Before and after, as a report shows it.
#[test]
fn both_voices_answer_the_same_prompts() {
    let case = "qwen3";
    let tokenizer = ChatTokenizer::open(&golden("trajectories").join(case).join("model"), None).unwrap();
    let prompts: Vec<Vec<u32>> = ["hello", "rice?"].iter().map(|p| tokenizer.encode(p, false).unwrap()).collect();
    let sampling = Sampling { max_new_tokens: 12, temperature: 1.0, ..Sampling::default() };
    let mut one = generator(case);
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let both = compare(&mut one, &prompts, &sampling).unwrap();
    assert_eq!(both.iter().map(|c| c.prompt.as_str()).collect::<Vec<_>>(), ["hello", "rice?"]);
    for (comparison, prompt) in both.iter().zip(&prompts) {
        for (variant, text) in [(Variant::Base, &comparison.base), (Variant::Tuned, &comparison.tuned)] {
            let mut alone = generator(case);
            let mut answer = alone.begin(variant.adapter(), prompt.to_vec(), &sampling).unwrap();
            while alone.step(&mut answer).unwrap().is_some() {}
            assert_eq!(answer.text(), text, "{variant:?}");
        }
        assert_ne!(comparison.base, comparison.tuned);
    }
}
