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

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let (width, ffn, vocab) =
            (config.size("hidden_size")?, config.size("intermediate_size")?, config.size("vocab_size")?);
        let (heads, layers) = (config.size("num_attention_heads")?, config.layers()?);
        let kv_heads = config.opt_size("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = config.opt_size("head_dim")?.unwrap_or(128);
        let eps = config.opt_float("rms_norm_eps")?.unwrap_or(1e-6);
        let bias = config.flag("attention_bias", false)?;
        let activation = config.opt_text("hidden_act")?.unwrap_or_else(|| "silu".into());
        let rope = Rope::from_config(config, head_dim, 10_000.0)?;
        let attention = Attention::new(heads, kv_heads, head_dim);

        let mut graph = GraphBuilder::decoder(width, vocab);
        graph.embed(|b, tokens| b.embedding("model.embed_tokens.weight", tokens, vocab, width));
        for (layer, window) in config.layer_windows(layers)?.into_iter().enumerate() {
            let name = if window.is_some() { "decoder, sliding window" } else { "decoder" };
            let block = graph.block_once(name, |b, x| {
                let h = b.rms_norm("input_layernorm", x, eps);
                let q = b.linear_if(bias, "self_attn.q_proj", h, heads * head_dim);
                let k = b.linear_if(bias, "self_attn.k_proj", h, kv_heads * head_dim);
                let v = b.linear_if(bias, "self_attn.v_proj", h, kv_heads * head_dim);
                let q = b.head_norm(Norm::rms(eps), "self_attn.q_norm", q, head_dim);
                let k = b.head_norm(Norm::rms(eps), "self_attn.k_norm", k, head_dim);
                let (q, k) = (b.rope(q, head_dim, &rope), b.rope(k, head_dim, &rope));
                let mixed = b.attention(q, k, v, attention.window(window));
                let o = b.linear_if(bias, "self_attn.o_proj", mixed, width);
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
