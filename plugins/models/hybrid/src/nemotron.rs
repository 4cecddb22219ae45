//! Nemotron-H and Nemotron 3: every layer is one norm and one mixer, of Mamba 2, attention without positions, an MLP or routed experts.

use dpo_plugin_api::builder::StateSpace;
use dpo_plugin_api::decoder::DecoderLayer;
use dpo_plugin_api::mixer::Mamba2;
use dpo_plugin_api::moe::{Moe, SharedExpert};
use dpo_plugin_api::prelude::*;

pub(crate) static NEMOTRON_H: Family = Family {
    name: "nemotron_h",
    summary: "Nemotron-H, Nemotron Nano 2, Nemotron 3: layers of Mamba 2, of attention, of an MLP and of routed experts",
    claims: &["NemotronHForCausalLM"],
    checkpoints: &[
        "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16",
    ],
    example_config: include_str!("../configs/nemotron_h.json"),
    graph,
};

/// What a layer is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Mamba,
    Attention,
    Mlp,
    Experts,
}

impl Kind {
    /// Of every layer, by names or by letters.
    fn all(config: &Config) -> Result<Vec<Kind>> {
        let mut stated = None;
        for key in ["layers_block_type", "layer_types"] {
            stated = stated.or(config.opt_texts(key)?);
        }
        let pattern = config.opt_text("hybrid_override_pattern")?;
        let names = stated.or(pattern.map(|letters| letters.chars().map(String::from).collect()));
        let Some(names) = names else {
            return bail!("config.json: neither layers_block_type nor hybrid_override_pattern");
        };
        let kind = |name: &String| match name.as_str() {
            "M" | "mamba" | "linear_attention" => Ok(Kind::Mamba),
            "*" | "attention" | "full_attention" => Ok(Kind::Attention),
            "-" | "mlp" => Ok(Kind::Mlp),
            "E" | "moe" => Ok(Kind::Experts),
            other => bail!("config.json: layer type '{other}' is not supported by this family"),
        };
        names.iter().map(kind).collect()
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Mamba => "mamba",
            Kind::Attention => "attention",
            Kind::Mlp => "mlp",
            Kind::Experts => "experts",
        }
    }
}

/// transformers, `modeling_nemotron_h.py`.
fn graph(config: &Config) -> Result<ModelGraph> {
    let kinds = Kind::all(config)?;
    // How weights begin, how much is computed at once and in what, which layers predict several tokens at once, and positions, which no
    // layer has.
    for key in [
        "chunk_size",
        "expand",
        "hidden_dropout",
        "mamba_proj_bias",
        "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap",
        "norm_eps",
        "mtp_hybrid_override_pattern",
        "mtp_layers_block_type",
        "num_hidden_layers",
        "num_logits_to_keep",
        "num_nextn_predict_layers",
        "output_router_logits",
        "partial_rotary_factor",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "rope_parameters",
        "rope_theta",
        "sliding_window",
        "time_step_floor",
        "time_step_limit",
        "time_step_max",
        "use_mamba_kernels",
    ] {
        config.get(key);
    }
    let config = &config
        .with_names(&[
            ("layer_norm_epsilon", "rms_norm_eps"),
            ("mlp_hidden_act", "hidden_act"),
            ("mamba_n_groups", "n_groups"),
            ("mamba_d_conv", "conv_kernel"),
            ("mamba_dt_min", "time_step_min"),
            ("mamba_conv_bias", "use_conv_bias"),
        ])
        .with_defaults(&[
            ("rms_norm_eps", json!(1e-5)),
            ("hidden_act", json!("relu2")),
            ("head_dim", json!(128)),
            ("num_key_value_heads", json!(8)),
            ("intermediate_size", json!(21504)),
            ("norm_topk_prob", json!(true)),
        ])
        .with_value("num_hidden_layers", json!(kinds.len()));
    // Of projections that transformers has without a bias whatever this says.
    config.only("attention_bias", &[json!(false)])?;
    config.only("mamba_hidden_act", &[json!("silu")])?;
    config.only("moe_latent_size", &[])?;
    let mut decoder = Decoder::without_rope(config)?;
    decoder.gated = false;
    decoder.mlp_bias = config.flag("mlp_bias", false)?;
    decoder.final_norm = "norm_f";
    decoder.names.qkv = ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj"];
    decoder.names.o = "mixer.o_proj";
    (decoder.names.up, decoder.names.down) = ("mixer.up_proj", "mixer.down_proj");

    let size = |key: &str, default: usize| Ok::<_, Error>(config.opt_size(key)?.unwrap_or(default));
    let bias = config.flag("use_bias", false)?;
    let mamba = Mamba2 {
        module: "mixer".into(),
        numbers: StateSpace {
            heads: size("mamba_num_heads", 128)?,
            head_dim: size("mamba_head_dim", 64)?,
            groups: size("n_groups", 8)?,
            state: size("ssm_state_size", 128)?,
            // Without an upper limit, whatever `time_step_limit` says.
            dt_limit: Some((config.opt_float("time_step_min")?.unwrap_or(0.001), f64::INFINITY)),
        },
        taps: size("conv_kernel", 4)?,
        conv_bias: config.flag("use_conv_bias", true)?,
        bias: [bias, bias],
        norm: Some(decoder.norm),
        norm_before_gate: false,
        scales: [1.0; 5],
        out_is_parameter: true,
    };
    let moe = match kinds.contains(&Kind::Experts) {
        true => Some(experts(config)?),
        false => {
            for key in OF_EXPERTS {
                config.get(key);
            }
            None
        }
    };
    let attention = DecoderLayer::default();
    let mut graph = decoder.build_of(
        &kinds,
        |kind| kind.name().into(),
        |b, x, kind| {
            let h = b.norm(decoder.norm, "norm", x);
            let y = match (kind, &moe) {
                (Kind::Mamba, _) => mamba.build(b, h),
                (Kind::Attention, _) => decoder.attention(b, h, &attention),
                (Kind::Experts, Some(moe)) => moe.build(b, h),
                _ => decoder.mlp(b, h),
            };
            b.add(x, y)
        },
    )?;
    moe.iter().for_each(|moe| moe.assemble(&mut graph));
    graph.layout(&[("model.embed_tokens.", "model.embeddings.")]);
    graph.layout(&[("model.embed_tokens.", "backbone.embeddings."), ("model.", "backbone.")]);
    graph.unused_tensor("mtp.*");
    graph.finish(config)
}

/// Keys that count only where layers have experts.
const OF_EXPERTS: &[&str] = &[
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "topk_group",
];

fn experts(config: &Config) -> Result<Moe> {
    config.only("n_shared_experts", &[json!(1)])?;
    let mut moe = Moe::read_sigmoid(config, "mixer.gate.e_score_correction_bias")?;
    moe.gate = "mixer.gate".into();
    moe.experts.gated = false;
    moe.experts.up = "mixer.experts.up_proj".into();
    moe.experts.down = "mixer.experts.down_proj".into();
    let inner = config.size("moe_shared_expert_intermediate_size")?;
    let bias = config.flag("mlp_bias", false)?;
    moe.shared = Some(SharedExpert { bias, ..SharedExpert::new("mixer.shared_experts", inner) });
    Ok(moe)
}
