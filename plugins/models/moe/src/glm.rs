//! GLM-4.5 to 4.7: the router of DeepSeek-V3, half of a head turns.

use dpo_plugin_api::moe::{Moe, SharedExpert};
use dpo_plugin_api::prelude::*;

use crate::leave_mtp;

pub(crate) static GLM4_MOE: Family = Family {
    name: "glm4_moe",
    summary: "GLM-4.5, 4.5-Air, 4.6, 4.7",
    claims: &["Glm4MoeForCausalLM"],
    checkpoints: &["zai-org/GLM-4.5-Air", "zai-org/GLM-4.5", "zai-org/GLM-4.6", "zai-org/GLM-4.7"],
    example_config: include_str!("../configs/glm4_moe.json"),
    graph: glm4_moe,
};

/// transformers, `modeling_glm4_moe.py`.
fn glm4_moe(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("num_key_value_heads", json!(8)),
        ("rms_norm_eps", json!(1e-5)),
        ("partial_rotary_factor", json!(0.5)),
        ("norm_topk_prob", json!(true)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.qkv_bias = config.flag("attention_bias", false)?;
    decoder.qk_norm = config.flag("use_qk_norm", false)?.then(|| QkNorm::heads(decoder.norm));
    let mut moe = Moe::read_sigmoid(&config, "mlp.gate.e_score_correction_bias")?;
    let shared = config.opt_size("n_shared_experts")?.unwrap_or(1);
    moe.shared = Some(SharedExpert::new("mlp.shared_experts", shared * moe.experts.inner));
    let dense = config.opt_int("first_k_dense_replace")?.unwrap_or(1);
    decoder.experts(&moe, |layer| layer >= dense);
    let mut graph = decoder.build()?;
    leave_mtp(&mut graph, &config, decoder.layers.len())?;
    graph.finish(&config)
}
