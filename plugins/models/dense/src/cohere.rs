//! Cohere: attention and MLP side by side behind one layer norm without a bias, neighbouring columns turn, scaled logits.

use dpo_plugin_api::prelude::*;

/// transformers, `modeling_cohere.py`.
fn read(config: &Config, theta: f64) -> Result<Decoder> {
    let config = config.with_defaults(&[
        ("rope_theta", json!(theta)),
        ("tie_word_embeddings", json!(true)),
        ("layer_norm_eps", json!(1e-5)),
        ("logit_scale", json!(0.0625)),
    ]);
    config.only("position_embedding_type", &[json!("rope_gptj")])?;
    for always in ["use_gated_activation", "use_parallel_block"] {
        config.only(always, &[json!(true)])?;
    }
    config.only("rotary_pct", &[json!(1.0)])?;
    let mut decoder = Decoder::read(&config)?;
    decoder.interleave_rope();
    decoder.norm = Norm::layer(config.float("layer_norm_eps")?).bias(false);
    decoder.norms = LayerNorms::PARALLEL;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    decoder.logit_scale = config.float("logit_scale")?;
    Ok(decoder)
}

pub(crate) static COHERE: Family = Family {
    name: "cohere",
    summary: "Command-R, Command-R+, Aya 23, Aya Expanse",
    claims: &["CohereForCausalLM"],
    checkpoints: &[
        "CohereLabs/c4ai-command-r-v01",
        "CohereLabs/c4ai-command-r-08-2024",
        "CohereLabs/c4ai-command-r-plus-08-2024",
        "CohereLabs/aya-expanse-8b",
        "CohereLabs/aya-expanse-32b",
    ],
    example_config: include_str!("../configs/cohere.json"),
    graph: |config| {
        let mut decoder = read(config, 500_000.0)?;
        if config.flag("use_qk_norm", false)? {
            decoder.qk_norm = Some(QkNorm { over: QkNormOver::EachHead, ..QkNorm::heads(decoder.norm) });
        }
        decoder.graph(config)
    },
};

pub(crate) static COHERE2: Family = Family {
    name: "cohere2",
    summary: "Command-R7B, Command A: three layers with a window and rope for one without both",
    claims: &["Cohere2ForCausalLM"],
    checkpoints: &[
        "CohereLabs/c4ai-command-r7b-12-2024",
        "CohereLabs/c4ai-command-a-03-2025",
        "CohereLabs/command-a-reasoning-08-2025",
    ],
    example_config: include_str!("../configs/cohere2.json"),
    graph: |config| {
        for (key, computed) in [
            ("layer_switch", json!(4)),
            ("order_of_interleaved_layers", json!("local_attn_first")),
            ("position_embedding_type", json!("rope_gptj")),
            ("use_embedding_sharing", json!(true)),
            ("use_gated_activation", json!(true)),
            ("use_parallel_block", json!(true)),
        ] {
            config.only(key, &[computed])?;
        }
        let config = config.with_defaults(&[("sliding_window", json!(4096))]);
        let mut decoder = read(&config, 10_000.0)?;
        let every = config.opt_size("sliding_window_pattern")?.unwrap_or(4);
        let sliding = config.sliding_layers(decoder.layers.len(), |layer| !(layer + 1).is_multiple_of(every))?;
        decoder.slide(config.opt_size("sliding_window")?, &sliding);
        decoder.layers.iter_mut().filter(|layer| layer.window.is_none()).for_each(|layer| layer.rope = None);
        decoder.graph(&config)
    },
};
