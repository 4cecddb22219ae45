//! Qwen3 (dense): every head of q and k is normalised, and a head may be wider than `hidden_size / heads`.

use dpo_plugin_api::prelude::*;

/// The family of `Qwen3ForCausalLM` (transformers, `modeling_qwen3.py`).
pub struct Qwen3;

impl ModelFamily for Qwen3 {
    fn name(&self) -> &'static str {
        "qwen3"
    }

    fn summary(&self) -> &'static str {
        "Qwen3: norm on every head of q and k, own head_dim, optional bias; YaRN"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["Qwen3ForCausalLM"]
    }

    fn example_config(&self) -> &'static str {
        include_str!("../example_config.json")
    }

    fn chat_template(&self) -> Option<&'static str> {
        Some(include_str!("../chat_template.jinja"))
    }

    fn checkpoints(&self) -> &'static [&'static str] {
        &[
            "Qwen/Qwen3-0.6B",
            "Qwen/Qwen3-1.7B",
            "Qwen/Qwen3-4B",
            "Qwen/Qwen3-4B-Instruct-2507",
            "Qwen/Qwen3-8B",
            "Qwen/Qwen3-14B",
            "Qwen/Qwen3-32B",
            "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        ]
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let config = config.with_defaults(&[("head_dim", json!(128))]);
        let mut decoder = Decoder::read(&config)?;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
        decoder.windows(config.layer_windows(decoder.layers.len())?);
        decoder.graph(&config)
    }
}

plugin! { models: [Qwen3] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::check_model;

    use super::*;

    #[test]
    fn published_config() {
        let graph = check_model(&Qwen3);
        assert_eq!(graph.layers.len(), 36);
        let nodes = &graph.blocks[0].nodes;
        let q_norm = nodes.iter().find(|n| n.module() == Some("self_attn.q_norm")).unwrap();
        assert_eq!((q_norm.weights[0].shape.as_slice(), q_norm.width), ([128].as_slice(), 4096));
        assert!(nodes.iter().all(|n| n.weights.len() < 2), "an 8B of this family has no bias");
    }
}
