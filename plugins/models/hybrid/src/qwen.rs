//! Qwen's line since Qwen3-Next: three layers with a gated delta net, then one of attention whose queries come with a gate.

use dpo_plugin_api::mixer::{GatedDeltaNet, Mixer};
use dpo_plugin_api::moe::{Moe, SharedExpert};
use dpo_plugin_api::prelude::*;

use crate::{attention_layers, list};

pub(crate) static QWEN3_5: Family = Family {
    name: "qwen3_5",
    summary: "Qwen3.5, 3.6 and 3.8 dense, alone and in a wrapper: gated delta nets, gated attention in every fourth layer",
    claims: &["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"],
    checkpoints: &[
        "Qwen/Qwen3.5-0.8B",
        "Qwen/Qwen3.5-2B",
        "Qwen/Qwen3.5-4B",
        "Qwen/Qwen3.5-9B",
        "Qwen/Qwen3.5-27B",
        "Qwen/Qwen3.6-27B",
    ],
    example_config: include_str!("../configs/qwen3_5.json"),
    graph: |whole| {
        let config = whole.text()?;
        finish(read(&config)?, whole)
    },
};

pub(crate) static QWEN3_5_MOE: Family = Family {
    name: "qwen3_5_moe",
    summary: "Qwen3.5 and 3.6 with experts, alone and in a wrapper: qwen3_5 with routed experts and a gated shared one",
    claims: &["Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"],
    checkpoints: &["Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.6-35B-A3B", "Qwen/Qwen3.5-122B-A10B"],
    example_config: include_str!("../configs/qwen3_5_moe.json"),
    graph: |whole| {
        // No layer has an MLP of its own; scores are always divided by their sum.
        let config = whole.text()?.with_defaults(&[("intermediate_size", json!(1)), ("norm_topk_prob", json!(true))]);
        let mut decoder = read(&config)?;
        let moe = experts(&config)?;
        decoder.experts(&moe, |_| true);
        finish(decoder, whole)
    },
};

pub(crate) static QWEN3_NEXT: Family = Family {
    name: "qwen3_next",
    summary: "Qwen3-Next, Qwen3-Coder-Next: gated delta nets with fused projections, gated attention, routed experts and a gated shared one",
    claims: &["Qwen3NextForCausalLM"],
    checkpoints: &["Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3-Next-80B-A3B-Thinking", "Qwen/Qwen3-Coder-Next"],
    example_config: include_str!("../configs/qwen3_next.json"),
    graph: |config| {
        let config = config.with_defaults(&[("norm_topk_prob", json!(true))]);
        let mut decoder = read(&config)?;
        for layer in &mut decoder.layers {
            if let Some(Mixer::GatedDelta(net)) = &mut layer.mixer {
                net.fused = true;
            }
        }
        let moe = experts(&config)?;
        let step = config.opt_size("decoder_sparse_step")?.unwrap_or(1);
        let dense = list(&config, "mlp_only_layers")?.unwrap_or_default();
        decoder.experts(&moe, |at| !dense.contains(&at) && (at + 1).is_multiple_of(step));
        finish(decoder, &config)
    },
};

/// transformers, `modeling_qwen3_5.py`, `modeling_qwen3_next.py`.
fn read(config: &Config) -> Result<Decoder> {
    let config = config.with_defaults(&[
        ("head_dim", json!(256)),
        ("partial_rotary_factor", json!(0.25)),
        ("linear_conv_kernel_dim", json!(4)),
        ("linear_key_head_dim", json!(128)),
        ("linear_value_head_dim", json!(128)),
        ("linear_num_key_heads", json!(16)),
        ("linear_num_value_heads", json!(32)),
    ]);
    config.only("attn_output_gate", &[json!(true)])?;
    // What the recurrence is computed in; how positions of images are laid out, which are those of text in a text.
    config.get("mamba_ssm_dtype");
    for key in ["rope_parameters", "rope_scaling"] {
        if let Some(rope) = config.opt_object(key)? {
            rope.get("mrope_section");
            rope.get("mrope_interleaved");
        }
    }
    // Of the layers that predict several tokens at once.
    for key in ["mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"] {
        config.get(key);
    }
    let mut decoder = Decoder::read(&config)?;
    let every = config.opt_size("full_attention_interval")?.unwrap_or(4);
    let attends = |at: usize| (at + 1).is_multiple_of(every);
    let attends = attention_layers(&config, decoder.layers.len(), &["linear_attention"], attends)?;
    let net = GatedDeltaNet::read(&config)?;
    for (layer, attends) in decoder.layers.iter_mut().zip(attends) {
        if !attends {
            (layer.rope, layer.mixer) = (None, Some(Mixer::GatedDelta(net.clone())));
        }
    }
    decoder.norm = decoder.norm.offset(1.0);
    decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
    decoder.names.gated_queries = true;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    Ok(decoder)
}

fn experts(config: &Config) -> Result<Moe> {
    let mut moe = Moe::read(config, 0.0)?.with_aux_loss(config, 0.001)?;
    let inner = config.size("shared_expert_intermediate_size")?;
    let gate = Some("mlp.shared_expert_gate".into());
    moe.shared = Some(SharedExpert { gate, ..SharedExpert::new("mlp.shared_expert", inner) });
    Ok(moe)
}

/// Modules of a wrapped language model.
const WRAPPED: &str = "model.language_model.";

/// The graph of a model that is published alone, as `model.layers.0`, and in a wrapper.
fn finish(mut decoder: Decoder, whole: &Config) -> Result<ModelGraph> {
    let wrapped = whole.has("text_config");
    if wrapped {
        decoder.prefix = WRAPPED;
    }
    let mut graph = decoder.build()?;
    // The language model of a wrapper by itself, and under a wrapper's config.
    match wrapped {
        true => graph.layout(&[(WRAPPED, "model.")]),
        false => graph.layout(&[("model.", WRAPPED)]),
    }
    ["mtp.*", "model.visual.*", "visual.*"].iter().for_each(|tensors| graph.unused_tensor(tensors));
    graph.finish(whole)
}
