//! Granite and MiniCPM: Llamas with multipliers.

use dpo_plugin_api::prelude::*;

use crate::{Dense, layer_bases};

/// transformers, `modeling_granite.py`.
fn multiply(decoder: &mut Decoder, config: &Config) -> Result<()> {
    let multiplier = |key: &str| Ok::<_, Error>(config.opt_float(key)?.unwrap_or(1.0));
    decoder.embedding_scale = multiplier("embedding_multiplier")?;
    decoder.residual_scale = multiplier("residual_multiplier")?;
    decoder.attention_scale = multiplier("attention_multiplier")?;
    decoder.logit_scale = 1.0 / multiplier("logits_scaling")?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    Ok(())
}

pub(crate) static GRANITE: Dense = Dense {
    name: "granite",
    summary: "Granite 3.x: multipliers of embedding, residual stream, attention and logits",
    claims: &["GraniteForCausalLM"],
    checkpoints: &[
        "ibm-granite/granite-3.1-2b-instruct",
        "ibm-granite/granite-3.3-2b-instruct",
        "ibm-granite/granite-3.3-8b-instruct",
    ],
    example_config: include_str!("../configs/granite.json"),
    graph: |config| {
        let mut decoder = Decoder::read(config)?;
        multiply(&mut decoder, config)?;
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        decoder.graph(config)
    },
};

pub(crate) static GRANITE4: Dense = Dense {
    name: "granite4",
    summary: "Granite 4.0 without Mamba layers and experts: 350m, 1b, micro",
    claims: &["GraniteMoeHybridForCausalLM"],
    checkpoints: &["ibm-granite/granite-4.0-350m", "ibm-granite/granite-4.0-1b", "ibm-granite/granite-4.0-micro"],
    example_config: include_str!("../configs/granite4.json"),
    graph: granite4,
};

/// Keys of layers and experts that these checkpoints have none of.
const OF_OTHERS: &[&str] = &[
    "mamba_n_heads",
    "mamba_n_groups",
    "mamba_d_state",
    "mamba_d_head",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_chunk_size",
    "mamba_conv_bias",
    "mamba_proj_bias",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
    "time_step_limit",
    "time_step_min",
    "time_step_max",
    "intermediate_size",
    "normalization_function",
    "init_method",
];

/// transformers, `modeling_granitemoehybrid.py`.
fn granite4(config: &Config) -> Result<ModelGraph> {
    for key in ["layer_types", "layers_block_type"] {
        let types = config.opt_texts(key)?.unwrap_or_default();
        if let Some(other) = types.iter().find(|kind| !["attention", "full_attention"].contains(&kind.as_str())) {
            return bail!(
                "config.json: a layer of {key} is '{other}'; of this model only layers of attention are computed"
            );
        }
    }
    if !config.has("layer_types") && !config.has("layers_block_type") {
        return bail!("config.json: without layer_types all layers are Mamba's, which are not computed");
    }
    match config.opt_int("num_local_experts")? {
        Some(0) => {}
        other => return bail!("config.json: num_local_experts is {}, experts are not computed", other.unwrap_or(8)),
    }
    for key in OF_OTHERS {
        config.get(key);
    }
    let config =
        config.with_value("intermediate_size", json!(config.opt_size("shared_intermediate_size")?.unwrap_or(1024)));
    let mut decoder = match config.opt_text("position_embedding_type")?.as_deref() {
        Some("rope") => Decoder::read(&config)?,
        _ => {
            for key in ["rope_theta", "rope_scaling", "rope_parameters"] {
                config.get(key);
            }
            Decoder::without_rope(&config)?
        }
    };
    multiply(&mut decoder, &config)?;
    decoder.names.fused_gate_up = Some("shared_mlp.input_linear");
    decoder.names.down = "shared_mlp.output_linear";
    decoder.graph(&config)
}

pub(crate) static MINICPM: Dense = Dense {
    name: "minicpm",
    summary: "MiniCPM 1, 2, 4, 4.1 with dense attention: multipliers of embedding, residual stream and logits",
    claims: &["MiniCPMForCausalLM"],
    checkpoints: &[
        "openbmb/MiniCPM4-8B",
        "openbmb/MiniCPM4-0.5B",
        "openbmb/MiniCPM4.1-8B",
        "openbmb/MiniCPM-2B-dpo-bf16",
    ],
    example_config: include_str!("../configs/minicpm.json"),
    graph: |config| {
        config.only("sparse_config", &[])?;
        // A setting of training.
        config.opt_float("mup_denominator")?;
        let mut decoder = Decoder::read(config)?;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        let layers = decoder.layers.len() as f64;
        // As the model's own code and vLLM's `minicpm.py` have it.
        decoder.embedding_scale = config.opt_float("scale_emb")?.unwrap_or(1.0);
        decoder.residual_scale = config.opt_float("scale_depth")?.unwrap_or(1.0) / layers.sqrt();
        decoder.logit_scale = config.opt_float("dim_model_base")?.unwrap_or(1.0) / decoder.hidden as f64;
        decoder.graph(config)
    },
};

pub(crate) static GRANITE_SWA: Dense = Dense {
    name: "granite_swa",
    summary: "Granite with windows: a sink in every head's softmax, a rotary embedding for each layer or none",
    claims: &["GraniteSWAForCausalLM"],
    checkpoints: &["ibm-granite/granite-swash-2b"],
    example_config: include_str!("../configs/granite_swa.json"),
    graph: granite_swa,
};

/// transformers, `modeling_granite_swa.py`.
fn granite_swa(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("num_key_value_heads", json!(4)),
        ("rms_norm_eps", json!(1e-5)),
        ("sliding_window", json!(128)),
        ("tie_word_embeddings", json!(true)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    multiply(&mut decoder, &config)?;
    decoder.mlp_bias = config.flag("mlp_bias", false)?;
    decoder.sinks = Some("self_attn.sinks");
    let sliding = config.sliding_layers(decoder.layers.len(), |layer| !layer.is_multiple_of(4))?;
    decoder.slide(config.opt_size("sliding_window")?, &sliding);
    if let Some(bases) = layer_bases(&config, decoder.layers.len())? {
        if let Some(rule) = config.opt_object("rope_parameters")? {
            rule.only("rope_type", &[json!("default")])?;
        }
        let (dim, layers) = (decoder.head_dim, decoder.layers.iter_mut());
        layers.zip(bases).for_each(|(layer, base)| layer.rope = (base != 0.0).then(|| Rope::plain(dim, base)));
    }
    decoder.graph(&config)
}
