//! Granite 3 with experts: multipliers, files with the experts' matrices together, in some an expert that every token takes, in some windows.

use dpo_plugin_api::builder::Scoring;
use dpo_plugin_api::moe::{ExpertFiles, Moe};
use dpo_plugin_api::prelude::*;

pub(crate) static GRANITEMOE: Family = Family {
    name: "granitemoe",
    summary: "Granite 3.x with experts: 1B-A400M, 3B-A800M",
    claims: &["GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"],
    checkpoints: &[
        "ibm-granite/granite-3.0-1b-a400m-instruct",
        "ibm-granite/granite-3.1-1b-a400m-instruct",
        "ibm-granite/granite-3.1-3b-a800m-instruct",
        "ibm-research/moe-7b-1b-active-shared-experts",
    ],
    example_config: include_str!("../configs/granitemoe.json"),
    graph: granitemoe,
};

/// transformers, `modeling_granitemoe.py`, `modeling_granitemoeshared.py`.
fn granitemoe(config: &Config) -> Result<ModelGraph> {
    let config = config.with_names(&[("intermediate_size", "moe_intermediate_size")]);
    finish(Decoder::read(&config)?, &config)
}

pub(crate) static GRANITEMOE_SWA: Family = Family {
    name: "granitemoe_swa",
    summary: "Granite with experts and windows: a sink in every head's softmax, a rotary embedding for each layer or none",
    claims: &["GraniteMoeSWAForCausalLM"],
    checkpoints: &["ibm-granite/granite-swash-3b-a600m"],
    example_config: include_str!("../configs/granitemoe_swa.json"),
    graph: granitemoe_swa,
};

/// transformers, `modeling_granitemoe_swa.py`.
fn granitemoe_swa(config: &Config) -> Result<ModelGraph> {
    let config = config
        .with_names(&[("intermediate_size", "moe_intermediate_size")])
        .with_defaults(&[("sliding_window", json!(128))]);
    let mut decoder = Decoder::read(&config)?;
    decoder.sinks = Some("self_attn.sinks");
    let sliding = config.sliding_layers(decoder.layers.len(), |layer| !layer.is_multiple_of(4))?;
    decoder.slide(config.opt_size("sliding_window")?, &sliding);
    decoder.layer_ropes(&config)?;
    finish(decoder, &config)
}

/// With multipliers and experts.
fn finish(mut decoder: Decoder, config: &Config) -> Result<ModelGraph> {
    let multiplier = |key: &str| Ok::<_, Error>(config.opt_float(key)?.unwrap_or(1.0));
    decoder.embedding_scale = multiplier("embedding_multiplier")?;
    decoder.residual_scale = multiplier("residual_multiplier")?;
    decoder.attention_scale = multiplier("attention_multiplier")?;
    decoder.logit_scale = 1.0 / multiplier("logits_scaling")?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    let mut moe = Moe::read(config, 0.0)?.with_aux_loss(config, 0.001)?;
    (moe.router.scoring, moe.router.normalize) = (Scoring::SoftmaxOfChosen, None);
    (moe.gate, moe.files) = ("block_sparse_moe.router".into(), ExpertFiles::Fused);
    moe.experts.up = "block_sparse_moe.experts.gate_up_proj".into();
    moe.experts.down = "block_sparse_moe.experts.down_proj".into();
    if let Some(shared) = config.opt_int("shared_intermediate_size")?.filter(|shared| *shared > 0) {
        (decoder.ffn, moe.beside_mlp) = (shared, true);
        decoder.names.fused_gate_up = Some("shared_mlp.input_linear");
        decoder.names.down = "shared_mlp.output_linear";
    }
    decoder.experts(&moe, |_| true);
    let mut graph = decoder.build()?;
    graph.layout(&[
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
        ("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
        ("block_sparse_moe.router.", "block_sparse_moe.router.layer."),
    ]);
    graph.finish(config)
}
