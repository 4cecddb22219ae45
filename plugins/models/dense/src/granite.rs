//! Granite and MiniCPM: Llamas with multipliers.

use dpo_plugin_api::prelude::*;

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

pub(crate) static GRANITE: Family = Family {
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

pub(crate) static MINICPM: Family = Family {
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

pub(crate) static GRANITE_SWA: Family = Family {
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
    decoder.layer_ropes(&config)?;
    decoder.graph(&config)
}
