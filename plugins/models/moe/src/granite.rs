//! Granite 3 with experts: multipliers, files with the experts' matrices together.

use dpo_plugin_api::builder::Scoring;
use dpo_plugin_api::moe::{ExpertFiles, Moe};
use dpo_plugin_api::prelude::*;

pub(crate) static GRANITEMOE: Family = Family {
    name: "granitemoe",
    summary: "Granite 3.x with experts: 1B-A400M, 3B-A800M",
    claims: &["GraniteMoeForCausalLM"],
    checkpoints: &[
        "ibm-granite/granite-3.0-1b-a400m-instruct",
        "ibm-granite/granite-3.1-1b-a400m-instruct",
        "ibm-granite/granite-3.1-3b-a800m-instruct",
    ],
    example_config: include_str!("../configs/granitemoe.json"),
    graph: granitemoe,
};

/// transformers, `modeling_granitemoe.py`.
fn granitemoe(config: &Config) -> Result<ModelGraph> {
    let config = config.with_names(&[("intermediate_size", "moe_intermediate_size")]);
    let mut decoder = Decoder::read(&config)?;
    let multiplier = |key: &str| Ok::<_, Error>(config.opt_float(key)?.unwrap_or(1.0));
    decoder.embedding_scale = multiplier("embedding_multiplier")?;
    decoder.residual_scale = multiplier("residual_multiplier")?;
    decoder.attention_scale = multiplier("attention_multiplier")?;
    decoder.logit_scale = 1.0 / multiplier("logits_scaling")?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    let mut moe = Moe::read(&config, 0.0)?.with_aux_loss(&config, 0.001)?;
    (moe.router.scoring, moe.router.normalize) = (Scoring::SoftmaxOfChosen, None);
    (moe.gate, moe.files) = ("block_sparse_moe.router".into(), ExpertFiles::Fused);
    moe.experts.up = "block_sparse_moe.experts.gate_up_proj".into();
    moe.experts.down = "block_sparse_moe.experts.down_proj".into();
    decoder.experts(&moe, |_| true);
    let mut graph = decoder.build()?;
    graph.layout(&[
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
        ("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
        ("block_sparse_moe.router.", "block_sparse_moe.router.layer."),
    ]);
    graph.finish(&config)
}
