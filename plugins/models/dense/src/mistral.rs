//! Mistral: a Llama with a window in some versions; alone or with a vision tower, which is left as it is.

use dpo_plugin_api::prelude::*;

use crate::finish;

pub(crate) static MISTRAL: Family = Family {
    name: "mistral",
    summary: "Mistral 7B, Nemo, Small, Codestral, Devstral; the text of Mistral Small 3.1, 3.2 and Ministral 3",
    claims: &["MistralForCausalLM", "Mistral3ForConditionalGeneration"],
    checkpoints: &[
        "mistralai/Mistral-7B-Instruct-v0.3",
        "mistralai/Mistral-Nemo-Instruct-2407",
        "mistralai/Mistral-Small-24B-Instruct-2501",
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
        "mistralai/Codestral-22B-v0.1",
        "mistralai/Devstral-Small-2505",
        "mistralai/Ministral-3-8B-Instruct-2512-BF16",
        "HuggingFaceH4/zephyr-7b-beta",
    ],
    example_config: include_str!("../configs/mistral.json"),
    graph: mistral,
};

/// transformers, `modeling_mistral.py`, `modeling_mistral3.py`.
fn mistral(whole: &Config) -> Result<ModelGraph> {
    let config = whole.text()?;
    if config.opt_text("model_type")?.as_deref() == Some("ministral3") {
        return ministral3(whole);
    }
    let config = config.with_defaults(&[("num_key_value_heads", json!(8)), ("sliding_window", json!(4096))]);
    let mut decoder = Decoder::read(&config)?;
    let layers = decoder.layers.len();
    decoder.slide(config.opt_size("sliding_window")?, &vec![true; layers]);
    finish(decoder, whole)
}

pub(crate) static MINISTRAL: Family = Family {
    name: "ministral",
    summary: "Ministral 8B (2410): a window in the layers that layer_types names",
    claims: &["MinistralForCausalLM"],
    checkpoints: &["mistralai/Ministral-8B-Instruct-2410"],
    example_config: include_str!("../configs/ministral.json"),
    graph: |config| {
        let config = config.with_defaults(&[("num_key_value_heads", json!(8)), ("sliding_window", json!(4096))]);
        let mut decoder = Decoder::read(&config)?;
        let window = config.opt_size("sliding_window")?;
        let sliding = config.sliding_layers(decoder.layers.len(), |_| window.is_some())?;
        decoder.slide(window, &sliding);
        decoder.graph(&config)
    },
};

pub(crate) static MINISTRAL3: Family = Family {
    name: "ministral3",
    summary: "Ministral 3 without its vision tower: YaRN, queries that grow with their position",
    claims: &["Ministral3ForCausalLM"],
    checkpoints: &["mistralai/Ministral-3-3B-Instruct-2512-BF16", "mistralai/Ministral-3-14B-Instruct-2512-BF16"],
    example_config: include_str!("../configs/ministral3.json"),
    graph: ministral3,
};

/// transformers, `modeling_ministral3.py`.
fn ministral3(whole: &Config) -> Result<ModelGraph> {
    let config = whole.text()?.with_defaults(&[
        ("num_key_value_heads", json!(8)),
        ("head_dim", json!(128)),
        ("rms_norm_eps", json!(1e-5)),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}),
        ),
    ]);
    let mut decoder = Decoder::read(&config)?;
    let layers = decoder.layers.len();
    decoder.slide(config.opt_size("sliding_window")?, &vec![true; layers]);
    finish(decoder, whole)
}
