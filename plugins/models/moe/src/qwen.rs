//! Qwen2 and Qwen3 with experts.

use dpo_plugin_api::moe::{Moe, SharedExpert};
use dpo_plugin_api::prelude::*;

/// Experts in every `decoder_sparse_step`-th layer, but in none that `mlp_only_layers` lists.
fn with_experts(decoder: &mut Decoder, moe: &Moe, config: &Config) -> Result<()> {
    let step = config.opt_size("decoder_sparse_step")?.unwrap_or(1);
    let dense: Vec<Value> = config.get("mlp_only_layers").and_then(Value::as_array).cloned().unwrap_or_default();
    decoder.experts(moe, |layer| !dense.contains(&json!(layer)) && (layer + 1).is_multiple_of(step));
    Ok(())
}

pub(crate) static QWEN3_MOE: Family = Family {
    name: "qwen3_moe",
    summary: "Qwen3 with experts: 30B-A3B, 235B-A22B, Coder",
    claims: &["Qwen3MoeForCausalLM"],
    checkpoints: &[
        "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "Qwen/Qwen3-30B-A3B-Thinking-2507",
        "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        "Qwen/Qwen3-235B-A22B",
        "Qwen/Qwen3-235B-A22B-Instruct-2507",
        "Alibaba-NLP/Tongyi-DeepResearch-30B-A3B",
    ],
    example_config: include_str!("../configs/qwen3_moe.json"),
    graph: qwen3_moe,
};

/// transformers, `modeling_qwen3_moe.py`.
fn qwen3_moe(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[("num_key_value_heads", json!(4)), ("sliding_window", json!(4096))]);
    let mut decoder = Decoder::read(&config)?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
    let window = config.opt_size("sliding_window")?;
    let window = window.filter(|_| config.flag("use_sliding_window", false) == Ok(true));
    decoder.slide(window, &vec![true; decoder.layers.len()]);
    with_experts(&mut decoder, &Moe::read(&config, 0.0)?.with_aux_loss(&config, 0.001)?, &config)?;
    decoder.graph(&config)
}

pub(crate) static QWEN2_MOE: Family = Family {
    name: "qwen2_moe",
    summary: "Qwen1.5 and Qwen2 with experts: A2.7B, 57B-A14B; an expert that is shared, with a gate",
    claims: &["Qwen2MoeForCausalLM"],
    checkpoints: &["Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2-57B-A14B-Instruct"],
    example_config: include_str!("../configs/qwen2_moe.json"),
    graph: qwen2_moe,
};

/// transformers, `modeling_qwen2_moe.py`, `configuration_qwen2_moe.py`.
fn qwen2_moe(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("num_key_value_heads", json!(16)),
        ("sliding_window", json!(4096)),
        ("max_window_layers", json!(28)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.qkv_bias = config.flag("qkv_bias", true)?;
    let (window, last) = (config.opt_int("sliding_window")?, config.int("max_window_layers")?);
    // Files of transformers 5 have 0 where none is used.
    let window = window.filter(|window| *window > 0 && config.flag("use_sliding_window", false) == Ok(true));
    let slides = |layer: usize| window.is_some() && layer.is_multiple_of(2) && layer < last;
    let sliding = config.sliding_layers(decoder.layers.len(), slides)?;
    decoder.slide(window, &sliding);
    let mut moe = Moe::read(&config, 0.0)?.with_aux_loss(&config, 0.001)?;
    let shared = SharedExpert::new("mlp.shared_expert", config.size("shared_expert_intermediate_size")?);
    moe.shared = Some(SharedExpert { gate: Some("mlp.shared_expert_gate".into()), ..shared });
    with_experts(&mut decoder, &moe, &config)?;
    decoder.graph(&config)
}
