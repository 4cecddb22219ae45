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
        let (width, ffn, vocab) =
            (config.size("hidden_size")?, config.size("intermediate_size")?, config.size("vocab_size")?);
        let (heads, layers) = (config.size("num_attention_heads")?, config.layers()?);
        let kv_heads = config.opt_size("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = config.opt_size("head_dim")?.unwrap_or(width / heads);
        let eps = config.opt_float("rms_norm_eps")?.unwrap_or(1e-6);
        let (bias, mlp_bias) = (config.flag("attention_bias", false)?, config.flag("mlp_bias", false)?);
        let activation = config.opt_text("hidden_act")?.unwrap_or_else(|| "silu".into());
        let rope = Rope::from_config(config, head_dim, 10_000.0)?;
        let attention = Attention::new(heads, kv_heads, head_dim);

        let mut graph = GraphBuilder::decoder(width, vocab);
        graph.embed(|b, tokens| b.embedding("model.embed_tokens.weight", tokens, vocab, width));
        let block = graph.block("decoder", |b, x| {
            let h = b.rms_norm("input_layernorm", x, eps);
            let q = b.linear_if(bias, "self_attn.q_proj", h, heads * head_dim);
            let k = b.linear_if(bias, "self_attn.k_proj", h, kv_heads * head_dim);
            let v = b.linear_if(bias, "self_attn.v_proj", h, kv_heads * head_dim);
            let (q, k) = (b.rope(q, head_dim, &rope), b.rope(k, head_dim, &rope));
            let mixed = b.attention(q, k, v, attention);
            let o = b.linear_if(bias, "self_attn.o_proj", mixed, width);
            let x = b.add(x, o);
            let h = b.rms_norm("post_attention_layernorm", x, eps);
            let (gate, up) =
                (b.linear_if(mlp_bias, "mlp.gate_proj", h, ffn), b.linear_if(mlp_bias, "mlp.up_proj", h, ffn));
            let h = b.glu(&activation, gate, up);
            let down = b.linear_if(mlp_bias, "mlp.down_proj", h, width);
            b.add(x, down)
        });
        for layer in 0..layers {
            graph.layer(block, format!("model.layers.{layer}."));
        }
        let head = config.head_tensor("model.embed_tokens.weight", false)?;
        graph.head(|b, x| {
            let h = b.rms_norm("model.norm", x, eps);
            b.lm_head(head, h, vocab)
        });
        // Old conversions saved the frequencies beside the weights.
        graph.unused_tensor("model.layers.*.self_attn.rotary_emb.inv_freq");
        // A tied checkpoint may carry the projection all the same.
        graph.unused_tensor("lm_head.weight");
        graph.rope_limit(&rope);
        graph.finish(config)
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
