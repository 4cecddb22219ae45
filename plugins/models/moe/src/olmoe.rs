//! OLMoE and FlexOlmo: norms over all heads of queries and of keys.

use dpo_plugin_api::moe::Moe;
use dpo_plugin_api::prelude::*;

/// Both but for what lies around attention and experts: transformers, `modeling_olmoe.py`, `modeling_flex_olmo.py`.
fn read(config: &Config) -> Result<Decoder> {
    // Of queries and keys behind their norms, in no published model.
    config.only("clip_qkv", &[])?;
    let config = config.with_names(&[("intermediate_size", "moe_intermediate_size")]);
    let mut decoder = Decoder::read(&config)?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    decoder.qk_norm = Some(QkNorm { over: QkNormOver::Row, ..QkNorm::heads(decoder.norm) });
    decoder.experts(&Moe::read(&config, 0.0)?.with_aux_loss(&config, 0.01)?, |_| true);
    Ok(decoder)
}

pub(crate) static OLMOE: Family = Family {
    name: "olmoe",
    summary: "OLMoE 1B-7B",
    claims: &["OlmoeForCausalLM"],
    checkpoints: &["allenai/OLMoE-1B-7B-0924-Instruct", "allenai/OLMoE-1B-7B-0125-Instruct"],
    example_config: include_str!("../configs/olmoe.json"),
    graph: |config| {
        let config = config.with_defaults(&[("rms_norm_eps", json!(1e-5))]);
        read(&config)?.graph(&config)
    },
};

pub(crate) static FLEX_OLMO: Family = Family {
    name: "flex_olmo",
    summary: "FlexOlmo 7x7B: norms behind attention and experts",
    claims: &["FlexOlmoForCausalLM"],
    checkpoints: &["allenai/FlexOlmo-7x7B-1T", "allenai/FlexOlmo-7x7B-1T-RT"],
    example_config: include_str!("../configs/flex_olmo.json"),
    graph: |config| {
        let config = config.with_defaults(&[("rope_theta", json!(5e5))]);
        let mut decoder = read(&config)?;
        decoder.norms = LayerNorms::POST;
        decoder.graph(&config)
    },
};
