//! Dense decoders of many houses: one file for each lineage, in which a family is a row of a table and what it differs in from a
//! Llama.

mod cohere;
mod exaone;
mod gemma;
mod gemma4;
mod glm;
mod granite;
mod latent;
mod mistral;
mod muse;
mod olmo;
mod phi;
mod plain;
mod stability;

use dpo_plugin_api::builder::GraphBuilder;
use dpo_plugin_api::prelude::*;

/// Whether the checkpoint is of a wrapper of several modalities, of which the language model is trained.
fn is_wrapped(config: &Config) -> bool {
    config.has("text_config")
}

/// Modules of a wrapped language model, as the classes of transformers 5 name them.
const WRAPPED: &str = "model.language_model.";

/// The graph of a model that is published alone, as `model.layers.0`, and in a wrapper.
fn finish(mut decoder: Decoder, whole: &Config) -> Result<ModelGraph> {
    if !is_wrapped(whole) {
        return decoder.graph(whole);
    }
    decoder.prefix = WRAPPED;
    let mut graph = decoder.build()?;
    name_wrapped(&mut graph);
    graph.finish(whole)
}

/// Names the files of a wrapper: as transformers 5 and 4 write them, and what belongs to other modalities.
fn name_wrapped(graph: &mut GraphBuilder) {
    graph.layout(&[(WRAPPED, "language_model.model."), ("lm_head.", "language_model.lm_head.")]);
    // The language model alone, under the wrapper's config.
    graph.layout(&[(WRAPPED, "model.")]);
    graph.unused_tensor("language_model.lm_head.weight");
    for part in [
        "vision_tower",
        "audio_tower",
        "multi_modal_projector",
        "vision_adapter",
        "vision_projection",
        "embed_vision",
        "embed_audio",
    ] {
        graph.unused_tensor(&format!("{part}.*"));
        graph.unused_tensor(&format!("model.{part}.*"));
    }
}

plugin! {
    models: [
        &mistral::MISTRAL, &mistral::MINISTRAL, &mistral::MINISTRAL3,
        &gemma::GEMMA, &gemma::GEMMA2, &gemma::GEMMA3, &gemma4::GEMMA4,
        &phi::PHI, &phi::PHI3,
        &glm::GLM, &glm::GLM4,
        &olmo::OLMO, &olmo::OLMO2, &olmo::OLMO3,
        &granite::GRANITE, &granite::GRANITE_SWA, &granite::MINICPM,
        &latent::YOUTU, &latent::MINICPM3,
        &cohere::COHERE, &cohere::COHERE2,
        &exaone::EXAONE4,
        &stability::STABLELM,
        &muse::MUSE_GLIMMER,
        &plain::INTERNLM3, &plain::SEED_OSS, &plain::IQUESTCODER, &plain::CWM, &plain::SMOLLM3, &plain::HUNYUAN,
        &plain::ERNIE4_5, &plain::APERTUS, &plain::ARCEE, &plain::NEMOTRON, &plain::STARCODER2, &plain::HELIUM
    ]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use dpo_plugin_api::testing::{check_config, check_model};

    use super::*;

    fn layers_with(graph: &ModelGraph, what: impl Fn(&dpo_plugin_api::graph::Node) -> bool) -> usize {
        let has: Vec<bool> = graph.blocks.iter().map(|b| b.nodes.iter().any(&what)).collect();
        graph.layers.iter().filter(|l| has[l.block]).count()
    }

    /// Of every family's published config: layers, layers with a window, layers with rope, widths of a head.
    #[test]
    fn published_configs() {
        let window = |n: &dpo_plugin_api::graph::Node| n.attrs.contains_key("window");
        let rope = |n: &dpo_plugin_api::graph::Node| n.op == "rope";
        let expected: &[(&'static Family, [usize; 3])] = &[
            (&mistral::MISTRAL, [32, 0, 32]),
            (&mistral::MINISTRAL, [36, 27, 36]),
            (&gemma::GEMMA2, [42, 21, 42]),
            (&gemma::GEMMA3, [34, 29, 34]),
            (&gemma4::GEMMA4, [60, 50, 60]),
            (&olmo::OLMO3, [32, 24, 32]),
            (&cohere::COHERE, [32, 0, 32]),
            (&cohere::COHERE2, [32, 24, 24]),
            (&exaone::EXAONE4, [64, 48, 48]),
            (&muse::MUSE_GLIMMER, [52, 39, 39]),
            (&plain::CWM, [64, 48, 64]),
            (&plain::SMOLLM3, [36, 0, 27]),
            (&granite::GRANITE_SWA, [24, 18, 18]),
            (&latent::YOUTU, [32, 0, 32]),
            (&latent::MINICPM3, [62, 0, 62]),
        ];
        for (family, counts) in expected {
            let graph = check_model(family);
            let is = [graph.layers.len(), layers_with(&graph, window), layers_with(&graph, rope)];
            assert_eq!(is, *counts, "{}", family.name);
        }
    }

    /// A small Gemma 4 whose last layers share keys, with embeddings for every layer.
    #[test]
    fn shared_keys_lie_behind_the_stream() {
        let config = r#"{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "vocab_size": 50, "num_kv_shared_layers": 3,
            "vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 4, "sliding_window": 8,
            "use_double_wide_mlp": true, "layer_types": ["sliding_attention", "sliding_attention", "full_attention",
            "sliding_attention", "sliding_attention", "full_attention"]}"#;
        let graph = check_config(&&gemma4::GEMMA4, config);
        // 32 of the stream, 6 · 4 of embeddings, two keys and values of 2 · 8, two of 2 · 16.
        assert_eq!(graph.hidden_size, 32 + 24 + 32 + 64);
        assert_eq!(layers_with(&graph, |n| n.module() == Some("self_attn.k_proj")), 3);
        assert!(graph.unused_tensors.iter().any(|t| t == "*layers.3.self_attn.k_proj.*"));
    }
}
