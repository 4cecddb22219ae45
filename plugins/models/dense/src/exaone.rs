//! EXAONE: a Llama under other names in version 3; norms behind, and layers without positions, in version 4.

use dpo_plugin_api::prelude::*;

use crate::Dense;

pub(crate) static EXAONE: Dense = Dense {
    name: "exaone",
    summary: "EXAONE 3.0, 3.5, Deep: a Llama whose files have other names",
    claims: &["ExaoneForCausalLM"],
    checkpoints: &[
        "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct",
        "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct",
        "LGAI-EXAONE/EXAONE-3.5-32B-Instruct",
        "LGAI-EXAONE/EXAONE-Deep-7.8B",
    ],
    example_config: include_str!("../configs/exaone.json"),
    graph: |config| {
        let names = [
            ("num_layers", "num_hidden_layers"),
            ("layer_norm_epsilon", "rms_norm_eps"),
            ("activation_function", "hidden_act"),
        ];
        let config = config.with_names(&names).with_defaults(&[
            ("num_key_value_heads", json!(8)),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_theta", json!(500_000.0)),
        ]);
        let mut decoder = Decoder::read(&config)?;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        let mut graph = decoder.build()?;
        name_published(&mut graph);
        graph.finish(&config)
    },
};

/// transformers, `conversion_mapping.py`, "exaone".
pub(crate) fn name_published(graph: &mut GraphBuilder) {
    graph.layout(&[
        ("model.embed_tokens.", "transformer.wte."),
        ("model.layers.", "transformer.h."),
        ("model.norm.", "transformer.ln_f."),
        (".self_attn.o_proj.", ".attn.attention.out_proj."),
        (".self_attn.", ".attn.attention."),
        (".input_layernorm.", ".ln_1."),
        (".post_attention_layernorm.", ".ln_2."),
        (".mlp.gate_proj.", ".mlp.c_fc_0."),
        (".mlp.up_proj.", ".mlp.c_fc_1."),
        (".mlp.down_proj.", ".mlp.c_proj."),
    ]);
    graph.unused_tensor("*.attn.attention.rotary.inv_freq");
}

pub(crate) static EXAONE4: Dense = Dense {
    name: "exaone4",
    summary: "EXAONE 4.0: norms behind, norms of queries and keys; rope only in layers with a window where there are such",
    claims: &["Exaone4ForCausalLM"],
    checkpoints: &["LGAI-EXAONE/EXAONE-4.0-1.2B", "LGAI-EXAONE/EXAONE-4.0-32B", "LGAI-EXAONE/EXAONE-4.0.1-32B"],
    example_config: include_str!("../configs/exaone4.json"),
    graph: exaone4,
};

/// transformers, `modeling_exaone4.py`, `configuration_exaone4.py`.
fn exaone4(config: &Config) -> Result<ModelGraph> {
    let config = config.with_defaults(&[
        ("num_key_value_heads", json!(32)),
        ("rms_norm_eps", json!(1e-5)),
        ("sliding_window", json!(4096)),
        ("sliding_window_pattern", json!(4)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.norms = LayerNorms::POST;
    decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
    let window = config.opt_size("sliding_window")?;
    // As text ("LLLG") it goes with layer_types.
    let every = match config.get("sliding_window_pattern").and_then(Value::as_u64) {
        Some(every) if every > 0 => every as usize,
        _ if window.is_none() || config.has("layer_types") => 1,
        _ => return bail!("config.json: sliding_window_pattern is no number, and there are no layer_types"),
    };
    let sliding =
        config.sliding_layers(decoder.layers.len(), |layer| window.is_some() && !(layer + 1).is_multiple_of(every))?;
    decoder.slide(window, &sliding);
    if window.is_some() {
        decoder.layers.iter_mut().filter(|layer| layer.window.is_none()).for_each(|layer| layer.rope = None);
    }
    decoder.graph(&config)
}
