//! Llama 3, 3.1, 3.2, and older Llama checkpoints: the plain decoder, with every rope scaling they were published with.

use dpo_plugin_api::prelude::*;

/// The family of `LlamaForCausalLM` (transformers, `modeling_llama.py`).
pub struct Llama3;

impl ModelFamily for Llama3 {
    fn name(&self) -> &'static str {
        "llama3"
    }

    fn summary(&self) -> &'static str {
        "Llama 2, 3, 3.1, 3.2: llama3, linear and dynamic rope scaling"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["LlamaForCausalLM"]
    }

    fn example_config(&self) -> &'static str {
        include_str!("../example_config.json")
    }

    fn chat_template(&self) -> Option<&'static str> {
        Some(include_str!("../chat_template.jinja"))
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let mut decoder = Decoder::read(config)?;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        decoder.graph(config)
    }
}

plugin! { models: [Llama3] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::check_model;

    use super::*;

    #[test]
    fn published_config() {
        let graph = check_model(&Llama3);
        assert_eq!(graph.layers.len(), 32);
        let rope = graph.blocks[0].nodes.iter().find(|n| n.op == "rope").unwrap();
        let slowest = rope.attrs["inv_freq"].as_array().unwrap().last().unwrap().as_f64().unwrap();
        // The slowest wave is divided by the factor of 8.
        assert!((slowest * 8.0 - 500_000.0_f64.powf(-126.0 / 128.0)).abs() < 1e-12, "{slowest}");
    }
}
