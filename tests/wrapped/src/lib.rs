//! For tests: Qwen2's decoder as the language model of a wrapper, whose files name its tensors in two ways.

use dpo_plugin_api::prelude::*;

/// The family.
pub struct Wrapped;

impl ModelFamily for Wrapped {
    fn name(&self) -> &'static str {
        "wrapped"
    }

    fn summary(&self) -> &'static str {
        "for tests: Qwen2 in a wrapper"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["WrappedForConditionalGeneration"]
    }

    fn checkpoints(&self) -> &'static [&'static str] {
        &["tests/Wrapped-1B", "tests/Wrapped-2B", "tests/Wrapped-3B", "tests/Wrapped-4B", "tests/Wrapped-5B"]
    }

    fn example_config(&self) -> &'static str {
        r#"{"architectures": ["WrappedForConditionalGeneration"], "tie_word_embeddings": true, "image_token_id": 7,
            "vision_config": {"depth": 2}, "text_config": {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}}"#
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let config = config.text()?;
        let (width, ffn, vocab) =
            (config.size("hidden_size")?, config.size("intermediate_size")?, config.size("vocab_size")?);
        let (heads, kv_heads) = (config.size("num_attention_heads")?, config.size("num_key_value_heads")?);
        let (head_dim, eps) = (width / heads, config.opt_float("rms_norm_eps")?.unwrap_or(1e-6));
        let rope = Rope::from_config(&config, head_dim, 10_000.0)?;
        let attention = Attention::new(heads, kv_heads, head_dim);

        let mut graph = GraphBuilder::decoder(width, vocab);
        graph.embed(|b, tokens| b.embedding("model.embed_tokens.weight", tokens, vocab, width));
        let block = graph.block("decoder", |b, x| {
            let h = b.rms_norm("input_layernorm", x, eps);
            let q = b.linear_bias("self_attn.q_proj", h, heads * head_dim);
            let k = b.linear_bias("self_attn.k_proj", h, kv_heads * head_dim);
            let v = b.linear_bias("self_attn.v_proj", h, kv_heads * head_dim);
            let (q, k) = (b.rope(q, head_dim, &rope), b.rope(k, head_dim, &rope));
            let mixed = b.attention(q, k, v, attention);
            let o = b.linear("self_attn.o_proj", mixed, width);
            let x = b.add(x, o);
            let h = b.rms_norm("post_attention_layernorm", x, eps);
            let (gate, up) = (b.linear("mlp.gate_proj", h, ffn), b.linear("mlp.up_proj", h, ffn));
            let h = b.glu("silu", gate, up);
            let down = b.linear("mlp.down_proj", h, width);
            b.add(x, down)
        });
        for layer in 0..config.layers()? {
            graph.layer(block, format!("model.layers.{layer}."));
        }
        let head = config.head_tensor("model.embed_tokens.weight", false)?;
        graph.head(|b, x| {
            let h = b.rms_norm("model.norm", x, eps);
            b.lm_head(head, h, vocab)
        });
        graph.layout(&[("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")]);
        graph.layout(&[
            ("model.layers.", "transformer.h."),
            ("self_attn.", "attn.attention."),
            ("model.", "transformer."),
        ]);
        graph.unused_tensor("vision_tower.*");
        graph.rope_limit(&rope);
        graph.finish(&config)
    }
}

plugin! { models: [Wrapped] }
