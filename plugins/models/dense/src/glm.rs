//! GLM-4: neighbouring columns of half a head turn, gate and up are one projection; the later one has norms behind, too.

use dpo_plugin_api::prelude::*;

/// transformers, `modeling_glm.py`.
fn read(config: &Config) -> Result<Decoder> {
    let config = config.with_defaults(&[
        ("num_key_value_heads", json!(2)),
        ("head_dim", json!(128)),
        ("rms_norm_eps", json!(1.5625e-7)),
        ("partial_rotary_factor", json!(0.5)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.interleave_rope();
    decoder.qkv_bias = config.flag("attention_bias", true)?;
    decoder.names.fused_gate_up = Some("mlp.gate_up_proj");
    Ok(decoder)
}

pub(crate) static GLM: Family = Family {
    name: "glm",
    summary: "GLM-4-9B of 2024, GLM-Edge",
    claims: &["GlmForCausalLM"],
    checkpoints: &["THUDM/glm-4-9b-chat-hf", "THUDM/glm-edge-1.5b-chat", "THUDM/glm-edge-4b-chat"],
    example_config: include_str!("../configs/glm.json"),
    graph: |config| read(config)?.graph(config),
};

pub(crate) static GLM4: Family = Family {
    name: "glm4",
    summary: "GLM-4-0414, GLM-Z1: norms before and behind attention and MLP",
    claims: &["Glm4ForCausalLM"],
    checkpoints: &["THUDM/GLM-4-9B-0414", "THUDM/GLM-4-32B-0414", "THUDM/GLM-Z1-9B-0414", "THUDM/GLM-Z1-32B-0414"],
    example_config: include_str!("../configs/glm4.json"),
    graph: |config| {
        let mut decoder = read(config)?;
        decoder.norms = LayerNorms {
            before_attention: Some("input_layernorm"),
            after_attention: Some("post_self_attn_layernorm"),
            before_mlp: Some("post_attention_layernorm"),
            after_mlp: Some("post_mlp_layernorm"),
            parallel: false,
        };
        decoder.graph(config)
    },
};
