//! ERNIE 4.5 with experts: a bias of the choice behind a softmax, neighbouring columns turn.

use dpo_plugin_api::moe::{Moe, SharedExpert};
use dpo_plugin_api::prelude::*;

pub(crate) static ERNIE4_5_MOE: Family = Family {
    name: "ernie4_5_moe",
    summary: "ERNIE 4.5 21B-A3B, 300B-A47B",
    claims: &["Ernie4_5_MoeForCausalLM"],
    checkpoints: &[
        "baidu/ERNIE-4.5-21B-A3B-PT",
        "baidu/ERNIE-4.5-21B-A3B-Base-PT",
        "baidu/ERNIE-4.5-21B-A3B-Thinking",
        "baidu/ERNIE-4.5-300B-A47B-PT",
    ],
    example_config: include_str!("../configs/ernie4_5_moe.json"),
    graph: ernie4_5_moe,
};

/// Keys of how it was trained: of losses of the router, of tokens that did not fit.
const OF_TRAINING: &[&str] = &["moe_capacity", "moe_gate", "moe_use_aux_free", "moe_dropout_prob", "moe_group"];

/// transformers, `modeling_ernie4_5_moe.py`.
fn ernie4_5_moe(config: &Config) -> Result<ModelGraph> {
    for key in OF_TRAINING {
        config.get(key);
    }
    config.only("use_rmsnorm", &[json!(true)])?;
    config.only("moe_gate_act", &[json!("softmax")])?;
    // It keeps a sum of chosen scores from being zero, which it never is.
    config.opt_float("moe_norm_min")?;
    let config =
        config.with_names(&[("moe_num_experts", "num_experts"), ("moe_k", "num_experts_per_tok")]).with_defaults(&[
            ("num_key_value_heads", json!(4)),
            ("num_experts", json!(64)),
            ("num_experts_per_tok", json!(6)),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_theta", json!(5e5)),
            ("tie_word_embeddings", json!(true)),
            ("norm_topk_prob", json!(true)),
        ]);
    let mut decoder = Decoder::read(&config)?;
    decoder.interleave_rope();
    let bias = config.flag("use_bias", false)?;
    decoder.attention_bias(bias);
    decoder.mlp_bias = bias;
    let mut moe = Moe::read(&config, 0.0)?.with_aux_loss(&config, 0.001)?;
    moe.router.selection_bias = Some("mlp.gate.moe_statics.e_score_correction_bias".into());
    let shared = config.opt_int("moe_num_shared_experts")?.unwrap_or(2);
    let of_shared = SharedExpert { bias, ..SharedExpert::new("mlp.shared_experts", shared * moe.experts.inner) };
    moe.shared = (shared > 0).then_some(of_shared);
    let (layers, every) = (decoder.layers.len(), config.opt_size("moe_layer_interval")?.unwrap_or(1));
    let first = config.opt_int("moe_layer_start_index")?.unwrap_or(1);
    let last = config.get("moe_layer_end_index").and_then(Value::as_u64).map_or(layers - 1, |last| last as usize);
    decoder.experts(&moe, |layer| (layer + 1).is_multiple_of(every) && (first..=last).contains(&layer));
    let mut graph = decoder.build()?;
    graph.layout(&[("mlp.gate.moe_statics.", "mlp.moe_statics.")]);
    graph.unused_tensor("model.mtp_*");
    graph.finish(&config)
}
