//! OLMo: norms without weights in the first, norms behind attention and MLP in the later ones.

use dpo_plugin_api::prelude::*;

pub(crate) static OLMO: Family = Family {
    name: "olmo",
    summary: "OLMo 1: layer norms without weights, clamped queries, keys and values",
    claims: &["OlmoForCausalLM"],
    checkpoints: &["allenai/OLMo-1B-hf", "allenai/OLMo-7B-hf", "allenai/OLMo-7B-0724-Instruct-hf"],
    example_config: include_str!("../configs/olmo.json"),
    graph: |config| {
        let mut decoder = Decoder::read(config)?;
        // The epsilon is not of the config (transformers, `modeling_olmo.py`).
        decoder.norm = Norm::layer(1e-5).plain();
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.clamp_qkv = config.opt_float("clip_qkv")?;
        decoder.graph(config)
    },
};

/// transformers, `modeling_olmo2.py`.
fn second(mut decoder: Decoder, config: &Config) -> Result<Decoder> {
    decoder.norms = LayerNorms::POST;
    decoder.qk_norm = Some(QkNorm { over: QkNormOver::Row, ..QkNorm::heads(decoder.norm) });
    decoder.attention_bias(config.flag("attention_bias", false)?);
    Ok(decoder)
}

pub(crate) static OLMO2: Family = Family {
    name: "olmo2",
    summary: "OLMo 2: norms behind attention and MLP, a norm over all heads of queries and of keys",
    claims: &["Olmo2ForCausalLM"],
    checkpoints: &[
        "allenai/OLMo-2-0425-1B-Instruct",
        "allenai/OLMo-2-1124-7B-Instruct",
        "allenai/OLMo-2-1124-13B-Instruct",
        "allenai/OLMo-2-0325-32B-Instruct",
    ],
    example_config: include_str!("../configs/olmo2.json"),
    graph: |config| {
        let config = config.with_defaults(&[("rms_norm_eps", json!(1e-5))]);
        second(Decoder::read(&config)?, &config)?.graph(&config)
    },
};

pub(crate) static OLMO3: Family = Family {
    name: "olmo3",
    summary: "OLMo 3, 3.1: OLMo 2 with a window in three layers of four, rope scaling in the others",
    claims: &["Olmo3ForCausalLM"],
    checkpoints: &[
        "allenai/Olmo-3-7B-Instruct",
        "allenai/Olmo-3-7B-Think",
        "allenai/Olmo-3-32B-Think",
        "allenai/Olmo-3.1-32B-Instruct",
    ],
    example_config: include_str!("../configs/olmo3.json"),
    graph: olmo3,
};

/// transformers, `modeling_olmo3.py`, `configuration_olmo3.py`.
fn olmo3(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[("rms_norm_eps", json!(1e-5)), ("sliding_window", json!(4096))]);
    let mut decoder = second(Decoder::without_rope(&config)?, &config)?;
    let sliding = config.sliding_layers(decoder.layers.len(), |layer| !(layer + 1).is_multiple_of(4))?;
    decoder.slide(config.opt_size("sliding_window")?, &sliding);
    let theta = config.opt_float("rope_theta")?.unwrap_or(500_000.0);
    let [local, global] = Rope::sliding_and_full(&config, decoder.head_dim, theta, theta)?;
    decoder.ropes(&sliding, &local, &global);
    decoder.graph(&config)
}
