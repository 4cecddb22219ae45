//! Arcee's Trinity: a gate on what the attention gives, no positions in the layers without a window, norms before and behind everything.

use dpo_plugin_api::builder::Scoring;
use dpo_plugin_api::moe::{Moe, SharedExpert};
use dpo_plugin_api::prelude::*;

pub(crate) static AFMOE: Family = Family {
    name: "afmoe",
    summary: "Arcee Trinity Nano and Mini: gated attention, windows and layers without positions, experts by sigmoid",
    claims: &["AfmoeForCausalLM"],
    checkpoints: &["arcee-ai/Trinity-Nano-Preview", "arcee-ai/Trinity-Mini"],
    example_config: include_str!("../configs/afmoe.json"),
    graph: afmoe,
};

/// transformers, `modeling_afmoe.py`.
fn afmoe(config: &Config) -> Result<ModelGraph> {
    config.only("score_func", &[json!("sigmoid")])?;
    config.only("route_norm", &[json!(true)])?;
    config.only("n_group", &[json!(1)])?;
    config.only("topk_group", &[json!(1)])?;
    for key in ["load_balance_coeff", "num_expert_groups", "num_limited_groups", "use_grouped_mm"] {
        config.get(key);
    }
    let config = config.with_defaults(&[
        ("head_dim", json!(128)),
        ("rms_norm_eps", json!(1e-5)),
        ("sliding_window", json!(1024)),
        ("norm_topk_prob", json!(true)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    decoder.norms = LayerNorms {
        before_mlp: Some("pre_mlp_layernorm"),
        after_mlp: Some("post_mlp_layernorm"),
        ..LayerNorms::SANDWICH
    };
    decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
    decoder.names.output_gate = Some("self_attn.gate_proj");
    if config.flag("mup_enabled", false)? {
        decoder.embedding_scale = (decoder.hidden as f64).sqrt();
    }
    let every = config.opt_size("global_attn_every_n_layers")?.unwrap_or(4);
    let sliding = config.sliding_layers(decoder.layers.len(), |layer| !(layer + 1).is_multiple_of(every))?;
    decoder.slide(config.opt_size("sliding_window")?, &sliding);
    let layers = decoder.layers.iter_mut().zip(&sliding);
    layers.filter(|(_, slides)| !**slides).for_each(|(layer, _)| layer.rope = None);
    let mut moe = Moe::read(&config, 1e-20)?;
    (moe.gate, moe.gate_is_linear) = ("mlp.router.gate".into(), true);
    moe.router.scoring = Scoring::Sigmoid;
    moe.router.selection_bias = Some("mlp.expert_bias".into());
    moe.router.scale = config.opt_float("route_scale")?.unwrap_or(1.0);
    let shared = config.opt_int("num_shared_experts")?.unwrap_or(2) * moe.experts.inner;
    moe.shared = (shared > 0).then(|| SharedExpert::new("mlp.shared_experts", shared));
    let dense = config.opt_int("num_dense_layers")?.unwrap_or(1);
    decoder.experts(&moe, |layer| layer >= dense);
    decoder.graph(&config)
}
