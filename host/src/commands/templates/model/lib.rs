//! The model family `@name@`.
//!
//! As it stands it is the plain decoder of Llama. Go through `modeling_*.py` of your family beside
//! `graph`, line by line, and change what differs; put a published `config.json` into
//! `example_config.json`.

use dpo_plugin_api::prelude::*;

/// Say here which checkpoints these are, and which file their arithmetic was read from.
pub struct Family;

impl ModelFamily for Family {
    /// What `--plugin` takes: lower case, unique among all plugins.
    fn name(&self) -> &'static str {
        "@name@"
    }

    /// The line of `dpo-host list`.
    fn summary(&self) -> &'static str {
        "plain decoder"
    }

    /// Entries of `architectures` in `config.json` for which `--plugin` may be left out.
    fn claims(&self) -> &'static [&'static str] {
        &["@Name@ForCausalLM"]
    }

    /// The host makes a graph of it at start-up; the test below counts its layers.
    fn example_config(&self) -> &'static str {
        include_str!("../example_config.json")
    }

    /// Names and widths as the checkpoint has them; `dpo-host list ops` prints every op. A key of
    /// `config.json` that is not read here refuses the checkpoint, for it may change the
    /// arithmetic.
    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let width = config.size("hidden_size")?;
        let ffn = config.size("intermediate_size")?;
        let vocab = config.size("vocab_size")?;
        let heads = config.size("num_attention_heads")?;
        let layers = config.layers()?;
        let kv_heads = config.opt_size("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = config.opt_size("head_dim")?.unwrap_or(width / heads);
        let eps = config.opt_float("rms_norm_eps")?.unwrap_or(1e-6);
        let activation = config.opt_text("hidden_act")?;
        let activation = activation.as_deref().unwrap_or("silu");
        let rope = Rope::from_config(config, head_dim, 10_000.0)?;
        let attention = Attention::new(heads, kv_heads, head_dim);

        let mut graph = GraphBuilder::decoder(width, vocab);
        graph.embed(|b, tokens| b.embedding("model.embed_tokens.weight", tokens, vocab, width));
        let block = graph.block("decoder", |b, x| {
            let h = b.rms_norm("input_layernorm", x, eps);
            let q = b.linear("self_attn.q_proj", h, heads * head_dim);
            let k = b.linear("self_attn.k_proj", h, kv_heads * head_dim);
            let v = b.linear("self_attn.v_proj", h, kv_heads * head_dim);
            let q = b.rope(q, head_dim, &rope);
            let k = b.rope(k, head_dim, &rope);
            let mixed = b.attention(q, k, v, attention);
            let o = b.linear("self_attn.o_proj", mixed, width);
            let x = b.add(x, o);
            let h = b.rms_norm("post_attention_layernorm", x, eps);
            let gate = b.linear("mlp.gate_proj", h, ffn);
            let up = b.linear("mlp.up_proj", h, ffn);
            let h = b.glu(activation, gate, up);
            let down = b.linear("mlp.down_proj", h, width);
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
        graph.rope_limit(&rope);
        graph.finish(config)
    }
}

plugin! { models: [Family] }

#[cfg(test)]
mod tests {
    use super::*;
    use dpo_plugin_api::testing::check_model;

    #[test]
    fn the_example_is_whole() {
        let graph = check_model(&Family);
        assert_eq!(graph.layers.len(), 4);
    }
}
