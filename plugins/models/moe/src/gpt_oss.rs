//! gpt-oss: experts with biases whose gate and up take turns, a sink in every head's softmax, a window in every other layer.

use dpo_plugin_api::builder::Scoring;
use dpo_plugin_api::moe::{ExpertFiles, Moe};
use dpo_plugin_api::prelude::*;

pub(crate) static GPT_OSS: Family = Family {
    name: "gpt_oss",
    summary: "gpt-oss 20B and 120B, as published in mxfp4 or in bf16",
    claims: &["GptOssForCausalLM"],
    checkpoints: &[
        "openai/gpt-oss-20b",
        "openai/gpt-oss-120b",
        "openai/gpt-oss-safeguard-20b",
        "unsloth/gpt-oss-20b-BF16",
    ],
    example_config: include_str!("../configs/gpt_oss.json"),
    graph: gpt_oss,
};

/// transformers, `modeling_gpt_oss.py`, `configuration_gpt_oss.py`.
fn gpt_oss(config: &Config) -> Result<ModelGraph> {
    config.only("swiglu_alpha", &[json!(1.702)])?;
    let mut config = config
        .with_names(&[("experts_per_token", "num_experts_per_tok"), ("intermediate_size", "moe_intermediate_size")])
        .with_defaults(&[
            ("num_key_value_heads", json!(8)),
            ("head_dim", json!(64)),
            ("sliding_window", json!(128)),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_theta", json!(150_000.0)),
        ]);
    if config.get("rope_parameters").is_none() && config.get("rope_scaling").is_none() {
        let rule = json!({"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
            "original_max_position_embeddings": 4096});
        config = config.with_value("rope_parameters", rule);
    }
    let mut decoder = Decoder::read(&config)?;
    decoder.attention_bias(config.flag("attention_bias", true)?);
    decoder.sinks = Some("self_attn.sinks");
    let sliding = config.sliding_layers(decoder.layers.len(), |layer| layer.is_multiple_of(2))?;
    decoder.slide(config.opt_size("sliding_window")?, &sliding);
    let mut moe = Moe::read(&config, 0.0)?.with_aux_loss(&config, 0.001)?;
    (moe.gate, moe.gate_bias) = ("mlp.router".into(), true);
    (moe.router.scoring, moe.router.normalize) = (Scoring::SoftmaxOfChosen, None);
    moe.experts.activation = "swiglu_oai".into();
    moe.experts.limit = Some(config.opt_float("swiglu_limit")?.unwrap_or(7.0));
    (moe.experts.interleaved, moe.experts.bias) = (true, true);
    moe.files = ExpertFiles::Transposed;
    decoder.experts(&moe, |_| true);
    decoder.graph(&config)
}
