//! Hunyuan-A13B: Hunyuan's norms of queries and keys, experts by softmax beside one that every token takes.

use dpo_plugin_api::moe::{Moe, SharedExpert};
use dpo_plugin_api::prelude::*;

pub(crate) static HUNYUAN_MOE: Family = Family {
    name: "hunyuan_moe",
    summary: "Hunyuan-A13B: norms of queries and keys behind the rotary embedding, an expert that is shared",
    claims: &["HunYuanMoEV1ForCausalLM"],
    checkpoints: &["tencent/Hunyuan-A13B-Instruct"],
    example_config: include_str!("../configs/hunyuan_moe.json"),
    graph: hunyuan_moe,
};

/// The one value of a key that may list it layer by layer.
fn same_in_all_layers(config: &Config, key: &str) -> Result<Option<Value>> {
    match config.get(key) {
        Some(Value::Array(list)) if list.iter().all(|value| *value == list[0]) => Ok(list.first().cloned()),
        Some(Value::Array(_)) => {
            bail!("config.json: {key} differs from layer to layer, which this family does not have")
        }
        other => Ok(other.filter(|value| !value.is_null()).cloned()),
    }
}

/// transformers, `modeling_hunyuan_v1_moe.py`.
fn hunyuan_moe(config: &Config) -> Result<ModelGraph> {
    config.only("use_qk_norm", &[json!(true)])?;
    config.only("use_cla", &[json!(false)])?;
    config.only("use_mixed_mlp_moe", &[json!(true)])?;
    config.only("use_mla", &[json!(false)])?;
    config.only("norm_type", &[json!("rms"), json!("hf_rms")])?;
    config.only("use_rotary_pos_emb", &[json!(true)])?;
    config.only("moe_layer_num_skipped", &[json!(0)])?;
    config.only("mlp_bias", &[json!(false)])?;
    // Those of a shared cache, which is off, and of a classifier.
    for key in ["attention_head_dim", "cla_share_factor", "class_num", "dense_list", "pool_type"] {
        config.get(key);
    }
    // What transformers does, whatever the config says.
    for key in ["norm_topk_prob", "routed_scaling_factor"] {
        config.get(key);
    }
    let config = config.with_defaults(&[("rms_norm_eps", json!(1e-5))]);
    let (Some(top_k), inner) = (same_in_all_layers(&config, "moe_topk")?, config.size("intermediate_size")?) else {
        return bail!("config.json: moe_topk is missing");
    };
    for (key, expected) in [("moe_intermediate_size", json!(inner)), ("num_shared_expert", json!(1))] {
        if let Some(other) = same_in_all_layers(&config, key)?.filter(|value| *value != expected) {
            return bail!("config.json: {key} is {other}; transformers computes {expected}");
        }
    }
    let config = config
        .with_value("num_experts_per_tok", top_k)
        .with_value("moe_intermediate_size", json!(inner))
        .with_value("norm_topk_prob", json!(true));
    let mut decoder = Decoder::read(&config)?;
    decoder.attention_bias(config.flag("attention_bias", false)?);
    let (q, k) = ("self_attn.query_layernorm", "self_attn.key_layernorm");
    decoder.qk_norm = Some(QkNorm { q, k, after_rope: true, ..QkNorm::heads(decoder.norm) });
    let mut moe = Moe::read(&config, 0.0)?;
    (moe.gate, moe.gate_is_linear) = ("mlp.gate.wg".into(), true);
    moe.shared = Some(SharedExpert::new("mlp.shared_mlp", inner));
    decoder.experts(&moe, |_| true);
    decoder.graph(&config)
}
