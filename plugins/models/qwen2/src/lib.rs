//! Qwen2 and Qwen2.5: a bias on q, k and v, a sliding window only where the config turns it on.

use dpo_plugin_api::prelude::*;

/// The family of `Qwen2ForCausalLM` (transformers, `modeling_qwen2.py`).
pub struct Qwen2;

impl ModelFamily for Qwen2 {
    fn name(&self) -> &'static str {
        "qwen2"
    }

    fn summary(&self) -> &'static str {
        "Qwen2, Qwen2.5: bias on q, k, v; optional sliding window; YaRN"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["Qwen2ForCausalLM"]
    }

    fn example_config(&self) -> &'static str {
        include_str!("../example_config.json")
    }

    fn chat_template(&self) -> Option<&'static str> {
        Some(include_str!("../chat_template.jinja"))
    }

    fn checkpoints(&self) -> &'static [&'static str] {
        &[
            "Qwen/Qwen2.5-0.5B-Instruct",
            "Qwen/Qwen2.5-1.5B-Instruct",
            "Qwen/Qwen2.5-3B-Instruct",
            "Qwen/Qwen2.5-7B-Instruct",
            "Qwen/Qwen2.5-14B-Instruct",
            "Qwen/Qwen2.5-32B-Instruct",
            "Qwen/Qwen2.5-72B-Instruct",
            "Qwen/Qwen2.5-Coder-7B-Instruct",
            "Qwen/QwQ-32B",
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        ]
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let mut decoder = Decoder::read(config)?;
        decoder.qkv_bias = true;
        decoder.windows(config.layer_windows(decoder.layers.len())?);
        decoder.graph(config)
    }
}

plugin! { models: [Qwen2] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::{check_config, check_model};

    use super::*;

    #[test]
    fn published_config() {
        let graph = check_model(&Qwen2);
        assert_eq!(graph.layers.len(), 28);
        assert_eq!(graph.blocks.len(), 1);
        assert!(graph.unread_config.iter().all(|k| k != "sliding_window"), "{:?}", graph.unread_config);
    }

    #[test]
    fn window_only_where_it_is_used() {
        let with = |change: &str| {
            let mut config: serde_json::Map<String, Value> = serde_json::from_str(Qwen2.example_config()).unwrap();
            config.extend(serde_json::from_str::<serde_json::Map<String, Value>>(change).unwrap());
            check_config(&Qwen2, &Value::Object(config).to_string())
        };
        let windows = |graph: &ModelGraph| {
            let of = |block: usize| {
                graph.blocks[block].nodes.iter().find(|n| n.op == "attention").map(|n| n.attrs.contains_key("window"))
            };
            graph.layers.iter().filter(|l| of(l.block) == Some(true)).count()
        };
        assert_eq!(windows(&with(r#"{"use_sliding_window": false, "sliding_window": 64}"#)), 0);
        assert_eq!(windows(&with(r#"{"use_sliding_window": true, "sliding_window": 64, "max_window_layers": 20}"#)), 8);
    }
}
