//! DeepSeek-V2 and V3 and what is built like them: experts behind multi-head latent attention.

use dpo_plugin_api::builder::GroupScore;
use dpo_plugin_api::moe::{Moe, SharedExpert};
use dpo_plugin_api::prelude::*;

use crate::{leave_mtp, sparse_layers};

/// A decoder with latent attention, whose layers have experts from one on, or where the config says.
fn decoder(config: &Config, mut moe: Moe, first_sparse: usize) -> Result<Decoder> {
    config.only("moe_layer_freq", &[json!(1)])?;
    // Of expert parallelism.
    config.get("ep_size");
    let mut decoder = Decoder::without_rope(config)?;
    decoder.latent_attention(config)?;
    let bias = config.flag("mlp_bias", false)?;
    decoder.mlp_bias = bias;
    if let Some(count) = config.opt_size("n_shared_experts")? {
        let inner = count * moe.experts.inner;
        moe.shared = Some(SharedExpert { bias, ..SharedExpert::new("mlp.shared_experts", inner) });
    }
    let sparse = sparse_layers(config, decoder.layers.len(), |layer| layer >= first_sparse)?;
    decoder.experts(&moe, |layer| sparse[layer]);
    Ok(decoder)
}

/// The graph of a decoder whose files may have layers for predicting several tokens at once.
fn finish(decoder: &Decoder, config: &Config) -> Result<ModelGraph> {
    let mut graph = decoder.build()?;
    leave_mtp(&mut graph, config, decoder.layers.len())?;
    graph.finish(config)
}

pub(crate) static DEEPSEEK_V2: Family = Family {
    name: "deepseek_v2",
    summary: "DeepSeek-V2, V2.5, V2-Lite, Coder-V2: latent attention, experts by softmax, not divided by their sum",
    claims: &["DeepseekV2ForCausalLM"],
    checkpoints: &[
        "deepseek-ai/DeepSeek-V2-Lite-Chat",
        "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
        "deepseek-ai/DeepSeek-V2-Chat",
        "deepseek-ai/DeepSeek-V2.5",
    ],
    example_config: include_str!("../configs/deepseek_v2.json"),
    graph: deepseek_v2,
};

/// transformers, `modeling_deepseek_v2.py`.
fn deepseek_v2(config: &Config) -> Result<ModelGraph> {
    config.only("scoring_func", &[json!("softmax")])?;
    // Transformers leaves scores as they are whatever it says, the model's own code does not.
    config.only("norm_topk_prob", &[json!(false)])?;
    let config = config.with_defaults(&[
        ("q_lora_rank", json!(1536)),
        ("kv_lora_rank", json!(512)),
        ("qk_nope_head_dim", json!(128)),
        ("qk_rope_head_dim", json!(64)),
        ("v_head_dim", json!(128)),
        ("n_routed_experts", json!(64)),
        ("n_shared_experts", json!(2)),
        ("topk_method", json!("greedy")),
    ]);
    let mut moe = Moe::read(&config, 0.0)?;
    moe.router.scale = config.opt_float("routed_scaling_factor")?.unwrap_or(1.0);
    config.only("topk_method", &[json!("greedy"), json!("group_limited_greedy")])?;
    let groups = Moe::groups(&config, GroupScore::Max)?;
    moe.router.groups = groups.filter(|_| config.opt_text("topk_method") == Ok(Some("group_limited_greedy".into())));
    finish(&decoder(&config, moe, config.opt_int("first_k_dense_replace")?.unwrap_or(0))?, &config)
}

pub(crate) static DEEPSEEK_V3: Family = Family {
    name: "deepseek_v3",
    summary: "DeepSeek-V3, R1, Moonlight: latent attention, experts by sigmoid with a bias of the choice",
    claims: &["DeepseekV3ForCausalLM"],
    checkpoints: &[
        "moonshotai/Moonlight-16B-A3B-Instruct",
        "deepseek-ai/DeepSeek-V3-0324",
        "deepseek-ai/DeepSeek-V3.1",
        "deepseek-ai/DeepSeek-R1-0528",
        "moonshotai/Kimi-K2-Instruct",
    ],
    example_config: include_str!("../configs/deepseek_v3.json"),
    graph: deepseek_v3,
};

/// transformers, `modeling_deepseek_v3.py`.
fn deepseek_v3(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("q_lora_rank", json!(1536)),
        ("kv_lora_rank", json!(512)),
        ("qk_nope_head_dim", json!(128)),
        ("qk_rope_head_dim", json!(64)),
        ("v_head_dim", json!(128)),
        ("n_routed_experts", json!(256)),
        ("n_shared_experts", json!(1)),
        ("num_experts_per_tok", json!(8)),
        ("n_group", json!(8)),
        ("topk_group", json!(4)),
        ("routed_scaling_factor", json!(2.5)),
        ("norm_topk_prob", json!(true)),
    ]);
    sigmoid(&config, 3)
}

pub(crate) static GLM4_MOE_LITE: Family = Family {
    name: "glm4_moe_lite",
    summary: "GLM-4.7-Flash: latent attention, the router of DeepSeek-V3",
    claims: &["Glm4MoeLiteForCausalLM"],
    checkpoints: &["zai-org/GLM-4.7-Flash"],
    example_config: include_str!("../configs/glm4_moe_lite.json"),
    graph: glm4_moe_lite,
};

/// transformers, `modeling_glm4_moe_lite.py`.
fn glm4_moe_lite(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("q_lora_rank", json!(768)),
        ("kv_lora_rank", json!(512)),
        ("qk_nope_head_dim", json!(192)),
        ("qk_rope_head_dim", json!(64)),
        ("v_head_dim", json!(256)),
        ("n_routed_experts", json!(64)),
        ("n_shared_experts", json!(1)),
        ("num_experts_per_tok", json!(4)),
        ("routed_scaling_factor", json!(1.8)),
        ("norm_topk_prob", json!(true)),
        ("rms_norm_eps", json!(1e-5)),
    ]);
    sigmoid(&config, 1)
}

/// The router of DeepSeek-V3.
fn sigmoid(config: &Config, first_sparse: usize) -> Result<ModelGraph> {
    config.only("scoring_func", &[json!("sigmoid")])?;
    config.only("topk_method", &[json!("noaux_tc")])?;
    let moe = Moe::read_sigmoid(config, "mlp.gate.e_score_correction_bias")?;
    let first_sparse = config.opt_int("first_k_dense_replace")?.unwrap_or(first_sparse);
    finish(&decoder(config, moe, first_sparse)?, config)
}
