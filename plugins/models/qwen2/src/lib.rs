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

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let (width, ffn, vocab) =
            (config.size("hidden_size")?, config.size("intermediate_size")?, config.size("vocab_size")?);
        let (heads, layers) = (config.size("num_attention_heads")?, config.layers()?);
        let kv_heads = config.opt_size("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = config.opt_size("head_dim")?.unwrap_or(width / heads);
        let eps = config.opt_float("rms_norm_eps")?.unwrap_or(1e-6);
        let activation = config.opt_text("hidden_act")?.unwrap_or_else(|| "silu".into());
        let rope = Rope::from_config(config, head_dim, 10_000.0)?;
        let attention = Attention::new(heads, kv_heads, head_dim);

        let mut graph = GraphBuilder::decoder(width, vocab);
        graph.embed(|b, tokens| b.embedding("model.embed_tokens.weight", tokens, vocab, width));
        for (layer, window) in config.layer_windows(layers)?.into_iter().enumerate() {
            let name = if window.is_some() { "decoder, sliding window" } else { "decoder" };
            let block = graph.block_once(name, |b, x| {
                let h = b.rms_norm("input_layernorm", x, eps);
                let q = b.linear_bias("self_attn.q_proj", h, heads * head_dim);
                let k = b.linear_bias("self_attn.k_proj", h, kv_heads * head_dim);
                let v = b.linear_bias("self_attn.v_proj", h, kv_heads * head_dim);
                let (q, k) = (b.rope(q, head_dim, &rope), b.rope(k, head_dim, &rope));
                let mixed = b.attention(q, k, v, attention.window(window));
                let o = b.linear("self_attn.o_proj", mixed, width);
                let x = b.add(x, o);
                let h = b.rms_norm("post_attention_layernorm", x, eps);
                let (gate, up) = (b.linear("mlp.gate_proj", h, ffn), b.linear("mlp.up_proj", h, ffn));
                let h = b.glu(&activation, gate, up);
                let down = b.linear("mlp.down_proj", h, width);
                b.add(x, down)
            });
            graph.layer(block, format!("model.layers.{layer}."));
        }
        let head = config.head_tensor("model.embed_tokens.weight", false)?;
        graph.head(|b, x| {
            let h = b.rms_norm("model.norm", x, eps);
            b.lm_head(head, h, vocab)
        });
        // A tied checkpoint may carry the projection all the same.
        graph.unused_tensor("lm_head.weight");
        graph.rope_limit(&rope);
        graph.finish(config)
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
