//! The three families against candle-transformers' models: the log-probs of every answer token, prefix by prefix.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{llama, qwen2, qwen3};
use dpo_core::batch::Batch;
use dpo_core::engine::Engine;
use dpo_core::lora::{Adapter, AdapterConfig};
use dpo_core::weights::blocks;
use dpo_plugin_api::graph::ModelGraph;
use dpo_tests::{CONFIGS, examples, graph, weights};
use serde_json::{Value, json};

/// The engine without an effect of its adapter, whose B is zero.
fn base(graph: &ModelGraph, weights: &HashMap<String, Tensor>) -> Engine {
    let of_node = |prefix: &str, n: &dpo_plugin_api::graph::Node| {
        n.weights.iter().map(|w| weights[&format!("{prefix}{}", w.tensor)].clone()).collect()
    };
    let all = blocks(graph).map(|(_, prefix, nodes)| nodes.iter().map(|n| of_node(prefix, n)).collect()).collect();
    let config = AdapterConfig::new(1, 1.0);
    Engine::of(graph.clone(), all, Adapter::new(graph, config, 0).unwrap()).unwrap()
}

fn check(family: &str, change: Value, oracle: impl Fn(VarBuilder<'_>, &[u32]) -> candle_core::Result<Tensor>) {
    let (_, text) = CONFIGS.iter().find(|(name, _)| *name == family).unwrap();
    let mut config: Value = serde_json::from_str(text).unwrap();
    for (key, value) in change.as_object().unwrap() {
        config[key] = value.clone();
    }
    let graph = graph(family, &config.to_string());
    let weights = weights(&graph, 13);
    let engine = base(&graph, &weights);
    for example in examples(graph.vocab_size, 14, &[&[5, 3, 4], &[1, 1, 1], &[9, 7], &[3, 2, 8, 4]]) {
        let ours = engine.forward(&Batch::of([&example]), false).unwrap().logps.logps;
        let prefix = |ids: &[u32], i: usize| ([example.prompt(), &ids[..i]].concat(), ids[i]);
        let prefixes = example.answers().iter().flat_map(|a| (0..a.ids.len()).map(|i| prefix(&a.ids, i)));
        for ((prefix, target), ours) in prefixes.zip(ours) {
            let vb = VarBuilder::from_tensors(weights.clone(), DType::F32, &Device::Cpu);
            let logits = oracle(vb, &prefix).unwrap().flatten_all().unwrap();
            let theirs = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap().to_vec1::<f32>().unwrap();
            let theirs = theirs[target as usize];
            assert!(
                (ours - theirs).abs() < 2e-5 * theirs.abs().max(1.0),
                "{family} {}: {ours} {theirs}",
                example.place
            );
        }
    }
}

fn row(prefix: &[u32]) -> candle_core::Result<Tensor> {
    Tensor::new(prefix, &Device::Cpu)?.unsqueeze(0)
}

#[test]
fn qwen2_is_candles() {
    let config = qwen2::Config {
        vocab_size: 96,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 128,
        sliding_window: 128,
        max_window_layers: 2,
        tie_word_embeddings: true,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    };
    check("qwen2", json!({"use_sliding_window": false}), |vb, prefix| {
        qwen2::ModelForCausalLM::new(&config, vb)?.forward(&row(prefix)?, 0)
    });
}

#[test]
fn qwen3_is_candles() {
    let config = |attention_bias| qwen3::Config {
        vocab_size: 96,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        head_dim: 12,
        attention_bias,
        num_key_value_heads: 2,
        max_position_embeddings: 128,
        sliding_window: None,
        max_window_layers: 2,
        tie_word_embeddings: false,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    };
    for bias in [false, true] {
        check("qwen3", json!({"attention_bias": bias}), |vb, prefix| {
            qwen3::ModelForCausalLM::new(&config(bias), vb)?.forward(&row(prefix)?, 0)
        });
    }
}

#[test]
fn llama3_is_candles() {
    let (_, text) = CONFIGS.iter().find(|(name, _)| *name == "llama3").unwrap();
    let config = serde_json::from_str::<llama::LlamaConfig>(text).unwrap().into_config(false);
    check("llama3", json!({}), |vb, prefix| {
        let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
        llama::Llama::load(vb, &config)?.forward(&row(prefix)?, 0, &mut cache)
    });
}
