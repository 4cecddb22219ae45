//! Muse Glimmer's language model: a normed embedding, weightless norms of queries and keys, a gate behind the attention.

use dpo_plugin_api::prelude::*;

use crate::{WRAPPED, name_wrapped};

pub(crate) static MUSE_GLIMMER: Family = Family {
    name: "muse_glimmer",
    summary: "the text of Muse Glimmer 30B",
    claims: &["MuseGlimmerForConditionalGeneration"],
    checkpoints: &["meta-muse/Muse-Glimmer-30B"],
    example_config: include_str!("../configs/muse_glimmer.json"),
    graph: muse_glimmer,
};

/// transformers, `modeling_muse_glimmer.py`.
fn muse_glimmer(whole: &Config) -> Result<ModelGraph> {
    let config = whole.text()?.with_defaults(&[
        ("vocab_size", json!(202_048)),
        ("hidden_size", json!(6656)),
        ("intermediate_size", json!(19_968)),
        ("num_hidden_layers", json!(52)),
        ("num_attention_heads", json!(32)),
        ("num_key_value_heads", json!(2)),
        ("head_dim", json!(128)),
        ("rms_norm_eps", json!(1e-5)),
        ("sliding_window", json!(2048)),
        ("final_logit_softcapping", json!(20.0)),
        ("qk_scale_factor", json!(3.87)),
        ("output_multiplier", json!(0.196_116_135_138_184_04)),
        ("post_norm_eps", json!(1e-8)),
    ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.prefix = WRAPPED;
    let plain = decoder.norm;
    decoder.embedding_norm = Some(plain);
    decoder.of_final_norm = Some(plain);
    decoder.norm = plain.offset(1.0);
    decoder.after_norm = Some(Norm::rms(config.float("post_norm_eps")?).offset(1.0));
    decoder.norms = LayerNorms::SANDWICH;
    decoder.qk_norm = Some(QkNorm::heads(plain.plain()));
    decoder.attention_bias(config.flag("attention_bias", false)?);
    // A factor on queries is one on scores.
    decoder.attention_scale *= config.float("qk_scale_factor")?;
    decoder.activation = config.activation("hidden_activation", "silu")?;
    decoder.names.output_gate = Some("self_attn.gate_proj");
    decoder.logit_scale = config.float("output_multiplier")?;
    decoder.logit_softcap = config.opt_float("final_logit_softcapping")?;
    let last = decoder.layers.len() - 1;
    let sliding = config.sliding_layers(last + 1, |layer| !(last - layer).is_multiple_of(4))?;
    decoder.slide(config.opt_size("sliding_window")?, &sliding);
    if config.get("layer_rope_theta").is_none() {
        let layers = decoder.layers.iter_mut().enumerate();
        layers.filter(|(at, _)| (last - at).is_multiple_of(4)).for_each(|(_, layer)| layer.rope = None);
    }
    decoder.layer_ropes(&config)?;
    let mut graph = decoder.build()?;
    name_wrapped(&mut graph);
    graph.finish(whole)
}
