//! EXAONE 4: norms behind, and layers without positions. Version 3 is a Llama under other names, in that family's crate.

use dpo_plugin_api::prelude::*;

pub(crate) static EXAONE4: Family = Family {
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
