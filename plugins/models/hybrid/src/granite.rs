//! Granite 4: layers of Mamba 2 and of attention, each with an MLP that every token takes, some models with routed experts beside it.

use dpo_plugin_api::builder::{Router, Scoring};
use dpo_plugin_api::mixer::{Mamba2, Mixer};
use dpo_plugin_api::moe::{ExpertFiles, Moe};
use dpo_plugin_api::prelude::*;

use crate::attention_layers;

pub(crate) static GRANITE4: Family = Family {
    name: "granite4",
    summary: "Granite 4.0: attention, Mamba 2 in the h models, routed experts beside the MLP in tiny and small",
    claims: &["GraniteMoeHybridForCausalLM"],
    checkpoints: &[
        "ibm-granite/granite-4.0-350m",
        "ibm-granite/granite-4.0-1b",
        "ibm-granite/granite-4.0-micro",
        "ibm-granite/granite-4.0-h-350m",
        "ibm-granite/granite-4.0-h-1b",
        "ibm-granite/granite-4.0-h-micro",
        "ibm-granite/granite-4.0-h-tiny",
        "ibm-granite/granite-4.0-h-small",
    ],
    example_config: include_str!("../configs/granite4.json"),
    graph,
};

/// transformers, `modeling_granitemoehybrid.py`.
fn graph(config: &Config) -> Result<ModelGraph> {
    let inner = config.opt_size("intermediate_size")?.unwrap_or(11008);
    let shared = config.opt_size("shared_intermediate_size")?.unwrap_or(1024);
    let config = config.with_value("intermediate_size", json!(shared));
    // How weights begin, how experts are kept busy in training, and what all norms are.
    for key in ["init_method", "output_router_logits", "router_aux_loss_coef", "time_step_min", "time_step_max"] {
        config.get(key);
    }
    config.only("normalization_function", &[json!("rmsnorm")])?;
    let mut decoder = match config.opt_text("position_embedding_type")?.as_deref() {
        Some("rope") => Decoder::read(&config)?,
        _ => {
            for key in ["rope_theta", "rope_scaling", "rope_parameters"] {
                config.get(key);
            }
            Decoder::without_rope(&config)?
        }
    };
    let multiplier = |key: &str| Ok::<_, Error>(config.opt_float(key)?.unwrap_or(1.0));
    decoder.embedding_scale = multiplier("embedding_multiplier")?;
    decoder.residual_scale = multiplier("residual_multiplier")?;
    decoder.attention_scale = multiplier("attention_multiplier")?;
    decoder.logit_scale = 1.0 / multiplier("logits_scaling")?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    decoder.names.fused_gate_up = Some("shared_mlp.input_linear");
    decoder.names.down = "shared_mlp.output_linear";

    let attends = attention_layers(&config, decoder.layers.len(), &["mamba", "linear_attention"], |_| false)?;
    let wide = decoder.hidden * config.opt_size("mamba_expand")?.unwrap_or(2);
    let mamba = Mamba2::read(&config.with_defaults(&[("mamba_n_heads", json!(128))]), wide);
    if attends.iter().all(|attends| *attends) {
        // Sizes of layers that there are none of need not fit.
        drop(mamba);
    } else {
        let mamba = mamba?;
        for (layer, _) in decoder.layers.iter_mut().zip(&attends).filter(|(_, attends)| !**attends) {
            (layer.rope, layer.mixer) = (None, Some(Mixer::Mamba(mamba.clone())));
        }
    }

    let (count, top_k) = (config.opt_int("num_local_experts")?.unwrap_or(8), config.opt_int("num_experts_per_tok")?);
    if count > 0 {
        let mut moe = Moe::new(count, top_k.unwrap_or(2), inner, &decoder.activation);
        moe.gate = "block_sparse_moe.router".into();
        moe.router = Router::new(Scoring::SoftmaxOfChosen, moe.router.top_k);
        let mut moe = moe.with_aux_loss(&config, 0.001)?;
        moe.experts.up = "block_sparse_moe.experts.gate_up_proj".into();
        moe.experts.down = "block_sparse_moe.experts.down_proj".into();
        moe.files = ExpertFiles::Fused;
        moe.beside_mlp = true;
        decoder.experts(&moe, |_| true);
    }
    let mut graph = decoder.build()?;
    graph.layout(&[
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
        ("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
        ("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),
    ]);
    graph.finish(&config)
}
