//! Families with the router of DeepSeek-V3, sigmoid with a bias of the choice, and attention like Qwen3's or a Llama's.

use dpo_plugin_api::moe::{Moe, SharedExpert};
use dpo_plugin_api::prelude::*;

use crate::{leave_mtp, sparse_layers};

pub(crate) static HY_V3: Family = Family {
    name: "hy_v3",
    summary: "Hunyuan 3 with experts",
    claims: &["HYV3ForCausalLM"],
    checkpoints: &["tencent/Hy3-preview"],
    example_config: include_str!("../configs/hy_v3.json"),
    graph: hy_v3,
};

/// transformers, `modeling_hy_v3.py`.
fn hy_v3(config: &Config) -> Result<ModelGraph> {
    // Sums are in f32 wherever values are.
    config.flag("enable_moe_fp32_combine", true)?;
    let config = config.with_names(&[("router_scaling_factor", "routed_scaling_factor")]).with_defaults(&[
        ("num_key_value_heads", json!(8)),
        ("head_dim", json!(128)),
        ("rms_norm_eps", json!(1e-5)),
        ("routed_scaling_factor", json!(2.826)),
        ("norm_topk_prob", json!(true)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    let bias = config.flag("mlp_bias", false)?;
    decoder.mlp_bias = bias;
    decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
    let mut moe = Moe::read_sigmoid(&config, "mlp.e_score_correction_bias")?;
    let shared = config.opt_size("num_shared_experts")?.unwrap_or(1) * moe.experts.inner;
    moe.shared = Some(SharedExpert { bias, ..SharedExpert::new("mlp.shared_experts", shared) });
    let sparse = sparse_layers(&config, decoder.layers.len(), |layer| layer > 0)?;
    decoder.experts(&moe, |layer| sparse[layer]);
    let mut graph = decoder.build()?;
    graph.layout(&[
        ("mlp.gate.", "mlp.router.gate."),
        ("mlp.e_score_correction_bias", "mlp.expert_bias"),
        ("mlp.shared_experts.", "mlp.shared_mlp."),
    ]);
    leave_mtp(&mut graph, &config, decoder.layers.len())?;
    graph.finish(&config)
}

pub(crate) static EXAONE_MOE: Family = Family {
    name: "exaone_moe",
    summary: "K-EXAONE 236B-A23B: rope only in layers with a window",
    claims: &["ExaoneMoeForCausalLM"],
    checkpoints: &["LGAI-EXAONE/K-EXAONE-236B-A23B"],
    example_config: include_str!("../configs/exaone_moe.json"),
    graph: exaone_moe,
};

/// transformers, `modeling_exaone_moe.py`, `configuration_exaone_moe.py`.
fn exaone_moe(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("num_key_value_heads", json!(32)),
        ("rms_norm_eps", json!(1e-5)),
        ("sliding_window", json!(4096)),
        ("sliding_window_pattern", json!(4)),
        ("norm_topk_prob", json!(true)),
        ("routed_scaling_factor", json!(2.5)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
    let (layers, window) = (decoder.layers.len(), config.opt_size("sliding_window")?);
    // As text ("LLLG") it goes with layer_types.
    let every = match config.get("sliding_window_pattern").and_then(Value::as_u64) {
        Some(every) if every > 0 => every as usize,
        _ if window.is_none() || config.has("layer_types") => 1,
        _ => return bail!("config.json: sliding_window_pattern is no number, and there are no layer_types"),
    };
    let sliding = config.sliding_layers(layers, |layer| window.is_some() && !(layer + 1).is_multiple_of(every))?;
    decoder.slide(window, &sliding);
    if window.is_some() {
        decoder.layers.iter_mut().filter(|layer| layer.window.is_none()).for_each(|layer| layer.rope = None);
    }
    let mut moe = Moe::read_sigmoid(&config, "mlp.gate.e_score_correction_bias")?;
    let shared = config.opt_size("num_shared_experts")?.unwrap_or(1) * moe.experts.inner;
    moe.shared = Some(SharedExpert::new("mlp.shared_experts", shared));
    let dense = config.opt_int("first_k_dense_replace")?.unwrap_or(1);
    let sparse = sparse_layers(&config, layers, |layer| layer >= dense)?;
    decoder.experts(&moe, |layer| sparse[layer]);
    let mut graph = decoder.build()?;
    graph.layout(&[("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias")]);
    leave_mtp(&mut graph, &config, layers)?;
    graph.finish(&config)
}

pub(crate) static DOTS1: Family = Family {
    name: "dots1",
    summary: "dots.llm1",
    claims: &["Dots1ForCausalLM"],
    checkpoints: &["rednote-hilab/dots.llm1.inst"],
    example_config: include_str!("../configs/dots1.json"),
    graph: dots1,
};

/// transformers, `modeling_dots1.py`, `configuration_dots1.py`.
fn dots1(config: &Config) -> Result<ModelGraph> {
    config.only("scoring_func", &[json!("sigmoid"), json!("noaux_tc")])?;
    config.only("topk_method", &[json!("noaux_tc")])?;
    config.only("moe_layer_freq", &[json!(1)])?;
    let config = config.with_defaults(&[("sliding_window", json!(4096)), ("max_window_layers", json!(62))]);
    let mut decoder = Decoder::read(&config)?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
    let (layers, window) = (decoder.layers.len(), config.opt_size("sliding_window")?);
    let first = config.int("max_window_layers")?;
    let sliding = config.sliding_layers(layers, |layer| window.is_some() && layer >= first)?;
    decoder.slide(window, &sliding);
    let mut moe = Moe::read_sigmoid(&config, "mlp.gate.e_score_correction_bias")?;
    let shared = config.size("n_shared_experts")? * moe.experts.inner;
    moe.shared = Some(SharedExpert::new("mlp.shared_experts", shared));
    let dense = config.opt_int("first_k_dense_replace")?.unwrap_or(0);
    decoder.experts(&moe, |layer| layer >= dense);
    decoder.graph(&config)
}

pub(crate) static SOLAR_OPEN: Family = Family {
    name: "solar_open",
    summary: "Solar Open 100B",
    claims: &["SolarOpenForCausalLM"],
    checkpoints: &["upstage/Solar-Open-100B"],
    example_config: include_str!("../configs/solar_open.json"),
    graph: solar_open,
};

/// transformers, `modeling_solar_open.py`.
fn solar_open(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("num_key_value_heads", json!(8)),
        ("head_dim", json!(128)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(1e6)),
        ("norm_topk_prob", json!(true)),
        // No layer has an MLP of its own.
        ("intermediate_size", json!(1)),
    ]);
    config.only("first_k_dense_replace", &[json!(0)])?;
    config.only("use_qk_norm", &[json!(false)])?;
    let mut decoder = Decoder::read(&config)?;
    decoder.qkv_bias = config.flag("attention_bias", false)?;
    let mut moe = Moe::read_sigmoid(&config, "mlp.gate.e_score_correction_bias")?;
    let shared = config.opt_size("n_shared_experts")?.unwrap_or(1) * moe.experts.inner;
    moe.shared = Some(SharedExpert::new("mlp.shared_experts", shared));
    decoder.experts(&moe, |_| true);
    decoder.graph(&config)
}
