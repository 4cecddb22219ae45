//! Dense decoders with multi-head latent attention.

use dpo_plugin_api::prelude::*;

pub(crate) static YOUTU: Family = Family {
    name: "youtu",
    summary: "Youtu-LLM 2B: multi-head latent attention",
    claims: &["YoutuForCausalLM"],
    checkpoints: &["tencent/Youtu-LLM-2B", "tencent/Youtu-LLM-2B-Base"],
    example_config: include_str!("../configs/youtu.json"),
    graph: |config| {
        let config = config.with_defaults(&[
            ("qk_nope_head_dim", json!(128)),
            ("qk_rope_head_dim", json!(64)),
            ("v_head_dim", json!(128)),
            ("q_lora_rank", json!(1536)),
            ("kv_lora_rank", json!(512)),
            ("tie_word_embeddings", json!(true)),
        ]);
        let mut decoder = Decoder::without_rope(&config)?;
        decoder.latent_attention(&config)?;
        // A setting of training.
        config.opt_float("embedding_initializer_range")?;
        decoder.graph(&config)
    },
};

pub(crate) static MINICPM3: Family = Family {
    name: "minicpm3",
    summary: "MiniCPM3 4B: multi-head latent attention; multipliers of embedding, residual stream and logits",
    claims: &["MiniCPM3ForCausalLM"],
    checkpoints: &["openbmb/MiniCPM3-4B"],
    example_config: include_str!("../configs/minicpm3.json"),
    graph: minicpm3,
};

/// transformers, `modeling_minicpm3.py`.
fn minicpm3(config: &Config) -> Result<ModelGraph> {
    let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
    let config = config.with_defaults(&[
        ("qk_nope_head_dim", json!(64)),
        ("qk_rope_head_dim", json!(32)),
        ("q_lora_rank", json!(768)),
        ("kv_lora_rank", json!(256)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_interleave", json!(false)),
        ("tie_word_embeddings", json!(true)),
        ("scale_emb", json!(12)),
        ("scale_depth", json!(1.4)),
        ("dim_model_base", json!(256)),
    ]);
    let value_dim = config.opt_size("v_head_dim")?.unwrap_or(hidden / heads);
    let config = config.with_value("v_head_dim", json!(value_dim));
    let mut decoder = Decoder::without_rope(&config)?;
    decoder.latent_attention(&config)?;
    decoder.mlp_bias = config.flag("mlp_bias", false)?;
    let layers = decoder.layers.len() as f64;
    decoder.embedding_scale = config.float("scale_emb")?;
    decoder.residual_scale = config.opt_float("scale_depth")?.map_or(1.0, |depth| depth / layers.sqrt());
    decoder.logit_scale = config.opt_float("dim_model_base")?.map_or(1.0, |base| base / decoder.hidden as f64);
    decoder.graph(&config)
}
