//! Bamba: layers of Mamba 2, some of attention, each with an MLP.

use dpo_plugin_api::mixer::{Mamba2, Mixer};
use dpo_plugin_api::prelude::*;

use crate::{attention_layers, list};

pub(crate) static BAMBA: Family = Family {
    name: "bamba",
    summary: "Bamba: layers of Mamba 2, some of attention with half of every head turned",
    claims: &["BambaForCausalLM"],
    checkpoints: &["ibm-ai-platform/Bamba-9B-v1", "ibm-ai-platform/Bamba-9B-v2"],
    example_config: include_str!("../configs/bamba.json"),
    graph,
};

/// transformers, `modeling_bamba.py`.
fn graph(config: &Config) -> Result<ModelGraph> {
    // Of a loss that training adds, and what generation keeps.
    for key in ["z_loss_coefficient", "num_logits_to_keep"] {
        config.get(key);
    }
    let config = &config.with_defaults(&[
        ("num_key_value_heads", json!(8)),
        ("rms_norm_eps", json!(1e-5)),
        ("mamba_n_heads", json!(128)),
        ("partial_rotary_factor", json!(0.5)),
    ]);
    let mut decoder = Decoder::read(config)?;
    decoder.norms.before_mlp = Some("pre_ff_layernorm");
    decoder.final_norm = "final_layernorm";
    (decoder.names.gate, decoder.names.up, decoder.names.down) =
        ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj");
    decoder.attention_bias(config.flag("attention_bias", false)?);
    decoder.mlp_bias = config.flag("mlp_bias", false)?;
    let stated = list(config, "attn_layer_indices")?.unwrap_or_default();
    let attends = |at: usize| stated.contains(&at);
    let attends = attention_layers(config, decoder.layers.len(), &["mamba", "linear_attention"], attends)?;
    let mamba = Mamba2::read(config, decoder.hidden * config.opt_size("mamba_expand")?.unwrap_or(2))?;
    for (layer, _) in decoder.layers.iter_mut().zip(attends).filter(|(_, attends)| !attends) {
        (layer.rope, layer.mixer) = (None, Some(Mixer::Mamba(mamba.clone())));
    }
    decoder.graph(config)
}
