//! Gemma 1, 2 and 3: norms whose weights count from 1, a scaled embedding that is the output projection too.

use dpo_plugin_api::prelude::*;

use crate::finish;

/// What all three have (transformers, `modeling_gemma.py`); the rotary embedding is for the version to set.
fn read(config: &Config) -> Result<Decoder> {
    config.only("use_bidirectional_attention", &[json!(false)])?;
    let config = config.with_defaults(&[("head_dim", json!(256)), ("tie_word_embeddings", json!(true))]);
    let mut decoder = Decoder::without_rope(&config)?;
    decoder.norm = decoder.norm.offset(1.0);
    decoder.embedding_scale = (decoder.hidden as f64).sqrt();
    decoder.attention_bias(config.flag("attention_bias", false)?);
    Ok(decoder)
}

/// What the second and the third have, too (transformers, `modeling_gemma2.py`).
fn read_second(config: &Config) -> Result<Decoder> {
    let mut decoder = read(config)?;
    decoder.norms = LayerNorms::SANDWICH;
    decoder.activation = config.activation("hidden_activation", "gelu_tanh")?;
    decoder.attention_scale = config.float("query_pre_attn_scalar")?.powf(-0.5);
    decoder.logit_softcap = config.opt_float("final_logit_softcapping")?;
    Ok(decoder)
}

pub(crate) static GEMMA: Family = Family {
    name: "gemma",
    summary: "Gemma 1, 1.1, CodeGemma",
    claims: &["GemmaForCausalLM"],
    checkpoints: &["google/gemma-1.1-2b-it", "google/gemma-1.1-7b-it", "google/codegemma-7b-it"],
    example_config: include_str!("../configs/gemma.json"),
    graph: |config| {
        let config = config.with_defaults(&[("num_key_value_heads", json!(16)), ("hidden_act", json!("gelu_tanh"))]);
        let mut decoder = read(&config)?;
        // An old value of the official files, which means the approximation (transformers, `configuration_gemma.py`).
        if decoder.activation == "gelu" {
            decoder.activation = "gelu_tanh".into();
        }
        // Nothing in transformers reads it for this version.
        config.opt_text("hidden_activation")?;
        decoder.rope(&Rope::from_config(&config, decoder.head_dim, 10_000.0)?);
        decoder.graph(&config)
    },
};

pub(crate) static GEMMA2: Family = Family {
    name: "gemma2",
    summary: "Gemma 2: norms before and behind, soft caps, a window in every other layer",
    claims: &["Gemma2ForCausalLM"],
    checkpoints: &["google/gemma-2-2b-it", "google/gemma-2-9b-it", "google/gemma-2-27b-it"],
    example_config: include_str!("../configs/gemma2.json"),
    graph: |config| {
        let config = config.with_defaults(&[
            ("num_key_value_heads", json!(4)),
            ("query_pre_attn_scalar", json!(256)),
            ("sliding_window", json!(4096)),
            ("attn_logit_softcapping", json!(50.0)),
            ("final_logit_softcapping", json!(30.0)),
        ]);
        let mut decoder = read_second(&config)?;
        decoder.attention_softcap = config.opt_float("attn_logit_softcapping")?;
        // The official files say the window twice, by another name.
        config.only("sliding_window_size", &[json!(config.opt_size("sliding_window")?)])?;
        let sliding = config.sliding_layers(decoder.layers.len(), |layer| layer % 2 == 0)?;
        decoder.slide(config.opt_size("sliding_window")?, &sliding);
        decoder.rope(&Rope::from_config(&config, decoder.head_dim, 10_000.0)?);
        decoder.graph(&config)
    },
};

pub(crate) static GEMMA3: Family = Family {
    name: "gemma3",
    summary: "Gemma 3: norms of queries and keys, five layers with a window for one without; the text of its vision models",
    claims: &["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"],
    checkpoints: &[
        "google/gemma-3-270m-it",
        "google/gemma-3-1b-it",
        "google/gemma-3-4b-it",
        "google/gemma-3-12b-it",
        "google/gemma-3-27b-it",
        "google/medgemma-4b-it",
        "google/functiongemma-270m-it",
    ],
    example_config: include_str!("../configs/gemma3.json"),
    graph: gemma3,
};

/// transformers, `modeling_gemma3.py`. The files of the vision models leave out what is as in `configuration_gemma3.py`.
fn gemma3(whole: &Config) -> Result<ModelGraph> {
    let config = whole.text()?.with_defaults(&[
        ("vocab_size", json!(262_208)),
        ("hidden_size", json!(2304)),
        ("intermediate_size", json!(9216)),
        ("num_hidden_layers", json!(26)),
        ("num_attention_heads", json!(8)),
        ("num_key_value_heads", json!(4)),
        ("query_pre_attn_scalar", json!(256)),
        ("sliding_window", json!(4096)),
    ]);
    let mut decoder = read_second(&config)?;
    // Transformers has the key for this version, and no code that reads it.
    config.opt_float("attn_logit_softcapping")?;
    decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
    let written = config.opt_size("_sliding_window_pattern")?;
    let every = config.opt_size("sliding_window_pattern")?.or(written).unwrap_or(6);
    let sliding = config.sliding_layers(decoder.layers.len(), |layer| !(layer + 1).is_multiple_of(every))?;
    decoder.slide(config.opt_size("sliding_window")?, &sliding);
    let [local, global] = Rope::sliding_and_full(&config, decoder.head_dim, 10_000.0, 1e6)?;
    decoder.ropes(&sliding, &local, &global);
    finish(decoder, whole)
}
