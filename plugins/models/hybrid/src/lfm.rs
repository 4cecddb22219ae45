//! LFM2 and LFM3 of Liquid AI: short convolutions between two gates, and layers of attention.

use dpo_plugin_api::builder::{Router, Scoring};
use dpo_plugin_api::mixer::{Mixer, ShortConv};
use dpo_plugin_api::moe::{ExpertFiles, Moe};
use dpo_plugin_api::prelude::*;

use crate::{attention_layers, list};

pub(crate) static LFM2: Family = Family {
    name: "lfm2",
    summary: "LFM2 and LFM2.5 dense: short convolutions between two gates, some layers of attention",
    claims: &["Lfm2ForCausalLM"],
    checkpoints: &[
        "LiquidAI/LFM2-350M",
        "LiquidAI/LFM2-700M",
        "LiquidAI/LFM2-1.2B",
        "LiquidAI/LFM2-2.6B",
        "LiquidAI/LFM2.5-1.2B-Instruct",
    ],
    example_config: include_str!("../configs/lfm2.json"),
    graph: |config| {
        let old = config.opt_size("block_ff_dim")?;
        let config = config.with_defaults(&[("block_ffn_dim_multiplier", json!(1.0))]);
        let mut decoder = read(&config, true)?;
        decoder.ffn = old.unwrap_or(decoder.ffn);
        if config.flag("block_auto_adjust_ff_dim", true)? {
            decoder.ffn = decoder.ffn * 2 / 3;
            let of = config.opt_size("block_multiple_of")?.unwrap_or(256);
            if let Some(multiplier) = config.opt_float("block_ffn_dim_multiplier")? {
                decoder.ffn = ((multiplier * decoder.ffn as f64) as usize).next_multiple_of(of);
            }
        }
        decoder.graph(&config)
    },
};

pub(crate) static LFM2_MOE: Family = Family {
    name: "lfm2_moe",
    summary: "LFM2 with experts: lfm2 with routed experts behind its first layers",
    claims: &["Lfm2MoeForCausalLM"],
    checkpoints: &["LiquidAI/LFM2-8B-A1B", "LiquidAI/LFM2-24B-A2B"],
    example_config: include_str!("../configs/lfm2_moe.json"),
    graph: |config| {
        let mut decoder = read(config, true)?;
        // Of the loss that keeps experts busy.
        config.get("output_router_logits");
        let config = config.with_defaults(&[("norm_topk_prob", json!(true))]);
        let mut moe = Moe::read(&config, 1e-6)?;
        let biased = config.flag("use_expert_bias", true)?;
        let mut router = Router::new(Scoring::Sigmoid, moe.router.top_k);
        router.normalize = moe.router.normalize;
        router.scale = config.opt_float("routed_scaling_factor")?.unwrap_or(1.0);
        router.selection_bias = biased.then(|| "feed_forward.expert_bias".into());
        moe.router = router;
        moe.gate = "feed_forward.gate".into();
        moe.experts.up = "feed_forward.experts.gate_up_proj".into();
        moe.experts.down = "feed_forward.experts.down_proj".into();
        moe.files = ExpertFiles::Each(["w1", "w3", "w2"]);
        let dense = config.opt_int("num_dense_layers")?.unwrap_or(2);
        decoder.experts(&moe, |at| at >= dense);
        decoder.graph(&config)
    },
};

pub(crate) static LFM3: Family = Family {
    name: "lfm3",
    summary: "LFM3: longer short convolutions, attention with a window in some layers, a gate of every head, norms before and after",
    claims: &["Lfm3ForCausalLM"],
    checkpoints: &["LiquidAI/LFM3-1.7B"],
    example_config: include_str!("../configs/lfm3.json"),
    graph: |config| {
        let config = config.with_defaults(&[("head_dim", json!(128)), ("conv_L_cache", json!(7))]);
        let layers = config.layers()?;
        let kinds = match config.opt_texts("layer_types")? {
            Some(kinds) if kinds.len() == layers => kinds,
            Some(kinds) => return bail!("config.json: {} layer_types for {layers} layers", kinds.len()),
            None => {
                let kind = |at: usize| match at % 4 {
                    2 => "full_attention",
                    0 if at > 0 => "sliding_attention",
                    _ => "conv",
                };
                (0..layers).map(|at| kind(at).into()).collect()
            }
        };
        let slides = |kind: &String| kind == "sliding_attention";
        let named: Vec<&str> = kinds.iter().map(|kind| if slides(kind) { "full_attention" } else { kind }).collect();
        let rules = json!({"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5}});
        let config = config.with_defaults(&[("rope_parameters", rules)]).with_value("layer_types", json!(named));
        let mut decoder = read(&config, false)?;
        let sliding: Vec<bool> = kinds.iter().map(slides).collect();
        let [of_sliding, of_full] = Rope::sliding_and_full(&config, decoder.head_dim, 1e4, 1e6)?;
        let window = if config.has("sliding_window") { config.opt_size("sliding_window")? } else { Some(256) };
        decoder.slide(window, &sliding);
        for (layer, slides) in decoder.layers.iter_mut().zip(sliding).filter(|(layer, _)| layer.mixer.is_none()) {
            layer.rope = Some(if slides { of_sliding.clone() } else { of_full.clone() });
        }
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
        decoder.names.o = "self_attn.o_proj";
        decoder.names.output_gate = config.flag("use_attention_gate", true)?.then_some("self_attn.g_proj");
        decoder.names.head_gate = true;
        if config.flag("use_sandwich_norm", true)? {
            (decoder.norms.after_attention, decoder.norms.after_mlp) =
                (Some("post_operator_norm"), Some("post_ffn_norm"));
        }
        let mut graph = decoder.build()?;
        graph.layout(&[("self_attn.g_proj.", "self_attn.gate_proj.")]);
        graph.finish(&config)
    },
};

/// transformers, `modeling_lfm2.py`, `modeling_lfm2_moe.py`, `modeling_lfm3.py`.
fn read(config: &Config, roped: bool) -> Result<Decoder> {
    // Notes of training, and sizes that are said twice.
    for key in [
        "block_dim",
        "block_mlp_init_scale",
        "block_norm_eps",
        "block_out_init_scale",
        "block_use_xavier_init",
        "conv_dim",
        "conv_dim_out",
        "conv_use_xavier_init",
        "num_heads",
    ] {
        config.get(key);
    }
    config.only("block_use_swiglu", &[json!(true)])?;
    config.only("use_pos_enc", &[json!(true)])?;
    let config =
        config.with_names(&[("norm_eps", "rms_norm_eps"), ("tie_embedding", "tie_word_embeddings")]).with_defaults(&[
            ("intermediate_size", json!(12288)),
            ("rms_norm_eps", json!(1e-5)),
            ("tie_word_embeddings", json!(true)),
            ("rope_theta", json!(1e6)),
        ]);
    let mut decoder = if roped { Decoder::read(&config)? } else { Decoder::without_rope(&config)? };
    let stated = list(&config, "full_attn_idxs")?;
    let attends = |at: usize| stated.as_ref().is_none_or(|list| list.contains(&at));
    let attends = attention_layers(&config, decoder.layers.len(), &["conv"], attends)?;
    let (taps, bias) = (config.opt_size("conv_L_cache")?.unwrap_or(3), config.flag("conv_bias", false)?);
    for (layer, attends) in decoder.layers.iter_mut().zip(attends) {
        if !attends {
            let conv = ShortConv { module: "conv".into(), taps, bias };
            (layer.rope, layer.mixer) = (None, Some(Mixer::ShortConv(conv)));
        }
    }
    decoder.norms.before_attention = Some("operator_norm");
    decoder.norms.before_mlp = Some("ffn_norm");
    decoder.final_norm = "embedding_norm";
    let (q, k) = ("self_attn.q_layernorm", "self_attn.k_layernorm");
    decoder.qk_norm = Some(QkNorm { q, k, ..QkNorm::heads(decoder.norm) });
    decoder.names.o = "self_attn.out_proj";
    (decoder.names.gate, decoder.names.up, decoder.names.down) =
        ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2");
    Ok(decoder)
}
