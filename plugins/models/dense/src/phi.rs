//! Phi-2 and its kin, with attention and MLP side by side; Phi-3 and Phi-4, Llamas with fused projections.

use dpo_plugin_api::prelude::*;

pub(crate) static PHI: Family = Family {
    name: "phi",
    summary: "Phi-1, 1.5, 2: one layer norm for attention and MLP, biases, half of a head turns",
    claims: &["PhiForCausalLM"],
    checkpoints: &["microsoft/phi-1_5", "microsoft/phi-2"],
    example_config: include_str!("../configs/phi.json"),
    graph: phi,
};

/// transformers, `modeling_phi.py`.
fn phi(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("hidden_act", json!("gelu_new")),
        ("partial_rotary_factor", json!(0.5)),
        ("layer_norm_eps", json!(1e-5)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.norm = Norm::layer(config.float("layer_norm_eps")?);
    decoder.norms = LayerNorms::PARALLEL;
    decoder.final_norm = "final_layernorm";
    decoder.attention_bias(true);
    (decoder.mlp_bias, decoder.head_bias, decoder.gated) = (true, true, false);
    (decoder.names.o, decoder.names.up, decoder.names.down) = ("self_attn.dense", "mlp.fc1", "mlp.fc2");
    if config.flag("qk_layernorm", false)? {
        let (q, k) = ("self_attn.q_layernorm", "self_attn.k_layernorm");
        decoder.qk_norm = Some(QkNorm { norm: decoder.norm, q, k, over: QkNormOver::Head, after_rope: false });
    }
    decoder.graph(&config)
}

pub(crate) static PHI3: Family = Family {
    name: "phi3",
    summary: "Phi-3, 3.5, Phi-4, Phi-4-mini: fused projections, LongRoPE up to the original length",
    claims: &["Phi3ForCausalLM"],
    checkpoints: &[
        "microsoft/Phi-3-mini-4k-instruct",
        "microsoft/Phi-3.5-mini-instruct",
        "microsoft/Phi-3-medium-4k-instruct",
        "microsoft/phi-4",
        "microsoft/Phi-4-reasoning",
        "microsoft/Phi-4-mini-instruct",
    ],
    example_config: include_str!("../configs/phi3.json"),
    graph: phi3,
};

/// transformers, `modeling_phi3.py`.
fn phi3(config: &Config) -> Result<ModelGraph> {
    config.only("full_attn_mod", &[json!(1)])?;
    config.only("interpolate_factor", &[json!(1)])?;
    let config = config.with_defaults(&[
        ("rms_norm_eps", json!(1e-5)),
        ("max_position_embeddings", json!(4096)),
        ("original_max_position_embeddings", json!(4096)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.names.fused_qkv = Some("self_attn.qkv_proj");
    decoder.names.fused_gate_up = Some("mlp.gate_up_proj");
    let layers = decoder.layers.len();
    decoder.slide(config.opt_size("sliding_window")?, &vec![true; layers]);
    decoder.graph(&config)
}
