//! Mixtral, and MiniMax-M2, whose files name experts as Mixtral's do.

use dpo_plugin_api::moe::{ExpertFiles, Moe};
use dpo_plugin_api::prelude::*;

/// The graph of files that call experts `block_sparse_moe`, and their projections `w1`, `w3` and `w2`.
fn finish(mut decoder: Decoder, mut moe: Moe, config: &Config) -> Result<ModelGraph> {
    moe.files = ExpertFiles::Each(["w1", "w3", "w2"]);
    decoder.experts(&moe, |_| true);
    // Noise on what routers read is off, as all that is random in training.
    config.opt_float("router_jitter_noise")?;
    let mut graph = decoder.build()?;
    graph.layout(&[(".mlp.", ".block_sparse_moe.")]);
    graph.finish(config)
}

/// Experts whose width is that of the MLP, whose scores are divided by their sum.
fn experts(config: &Config) -> Result<Moe> {
    let config = config.with_names(&[("intermediate_size", "moe_intermediate_size")]);
    let mut moe = Moe::read(&config, 0.0)?.with_aux_loss(&config, 0.001)?;
    moe.router.normalize = Some(0.0);
    Ok(moe)
}

pub(crate) static MIXTRAL: Family = Family {
    name: "mixtral",
    summary: "Mixtral 8x7B, 8x22B",
    claims: &["MixtralForCausalLM"],
    checkpoints: &[
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO",
    ],
    example_config: include_str!("../configs/mixtral.json"),
    graph: mixtral,
};

/// transformers, `modeling_mixtral.py`.
fn mixtral(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("num_key_value_heads", json!(8)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(1e6)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.slide(config.opt_size("sliding_window")?, &vec![true; decoder.layers.len()]);
    finish(decoder, experts(&config)?, &config)
}

pub(crate) static MINIMAX_M2: Family = Family {
    name: "minimax_m2",
    summary: "MiniMax-M2: sigmoid of the router, norms over all heads of queries and of keys",
    claims: &["MiniMaxM2ForCausalLM"],
    checkpoints: &["MiniMaxAI/MiniMax-M2", "MiniMaxAI/MiniMax-M2.1"],
    example_config: include_str!("../configs/minimax_m2.json"),
    graph: minimax_m2,
};

/// transformers, `modeling_minimax_m2.py`, `configuration_minimax_m2.py`.
fn minimax_m2(config: &Config) -> Result<ModelGraph> {
    config.only("scoring_func", &[json!("sigmoid")])?;
    config.only("use_routing_bias", &[json!(true)])?;
    config.only("use_qk_norm", &[json!(true)])?;
    config.only("qk_norm_type", &[json!("per_layer")])?;
    config.only("shared_intermediate_size", &[json!(0)])?;
    config.get("attn_type_list");
    config.get("use_mtp");
    config.get("num_mtp_modules");
    let config = config.with_defaults(&[("num_key_value_heads", json!(8)), ("head_dim", json!(128))]);
    let partial = match config.opt_float("rotary_dim")? {
        Some(turning) => turning / config.float("head_dim")?,
        None => 1.0,
    };
    let config = config.with_defaults(&[("partial_rotary_factor", json!(partial)), ("rope_theta", json!(5e6))]);
    let mut decoder = Decoder::read(&config)?;
    decoder.qk_norm = Some(QkNorm { over: QkNormOver::Row, ..QkNorm::heads(decoder.norm) });
    let mut moe = experts(&config)?;
    moe.router.scoring = dpo_plugin_api::builder::Scoring::Sigmoid;
    moe.router.selection_bias = Some("mlp.e_score_correction_bias".into());
    finish(decoder, moe, &config)
}
