//! StableLM: layer norms with biases, a quarter of a head turns.

use dpo_plugin_api::prelude::*;

pub(crate) static STABLELM: Family = Family {
    name: "stablelm",
    summary: "StableLM 3B, 2-1.6B, 2-12B, Zephyr: layer norms, partial rope, optionally side by side",
    claims: &["StableLmForCausalLM"],
    checkpoints: &[
        "stabilityai/stablelm-3b-4e1t",
        "stabilityai/stablelm-zephyr-3b",
        "stabilityai/stablelm-2-zephyr-1_6b",
        "stabilityai/stablelm-2-12b-chat",
    ],
    example_config: include_str!("../configs/stablelm.json"),
    graph: stablelm,
};

/// transformers, `modeling_stablelm.py`.
fn stablelm(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("num_key_value_heads", json!(32)),
        ("partial_rotary_factor", json!(0.25)),
        ("layer_norm_eps", json!(1e-5)),
    ]);
    // Columns of a head are not a setting of this family.
    config.only("head_dim", &[json!(config.size("hidden_size")? / config.size("num_attention_heads")?)])?;
    let mut decoder = Decoder::read(&config)?;
    decoder.norm = Norm::layer(config.float("layer_norm_eps")?);
    decoder.qkv_bias = config.flag("use_qkv_bias", false)?;
    if config.flag("use_parallel_residual", false)? {
        decoder.norms = LayerNorms::PARALLEL;
    }
    if config.flag("qk_layernorm", false)? {
        let (q, k) = ("self_attn.q_layernorm", "self_attn.k_layernorm");
        let norm = decoder.norm.bias(false);
        decoder.qk_norm = Some(QkNorm { norm, q, k, over: QkNormOver::ModulePerHead, after_rope: false });
    }
    decoder.graph(&config)
}
