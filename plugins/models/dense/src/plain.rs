//! Families that are a Llama but for a few lines.

use dpo_plugin_api::prelude::*;

pub(crate) static INTERNLM3: Family = Family {
    name: "internlm3",
    summary: "InternLM 3",
    claims: &["InternLM3ForCausalLM"],
    checkpoints: &["internlm/internlm3-8b-instruct"],
    example_config: include_str!("../configs/internlm3.json"),
    graph: |config| {
        let config = config.with_names(&[("qkv_bias", "attention_bias"), ("bias", "mlp_bias")]).with_defaults(&[
            ("num_key_value_heads", json!(2)),
            ("head_dim", json!(128)),
            ("rms_norm_eps", json!(1e-5)),
        ]);
        let mut decoder = Decoder::read(&config)?;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        if decoder.qkv_bias != decoder.mlp_bias {
            return bail!("config.json: 'qkv_bias' and 'bias' differ, for which transformers has no model");
        }
        decoder.graph(&config)
    },
};

pub(crate) static SEED_OSS: Family = Family {
    name: "seed_oss",
    summary: "Seed-OSS 36B: biases of queries, keys and values",
    claims: &["SeedOssForCausalLM"],
    checkpoints: &["ByteDance-Seed/Seed-OSS-36B-Instruct"],
    example_config: include_str!("../configs/seed_oss.json"),
    graph: |config| {
        let config = config.with_defaults(&[("num_key_value_heads", json!(8)), ("head_dim", json!(128))]);
        let mut decoder = Decoder::read(&config)?;
        decoder.qkv_bias = config.flag("attention_bias", true)?;
        decoder.o_bias = config.flag("attention_out_bias", false)?;
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        // Off, as all dropout.
        config.opt_float("residual_dropout")?;
        decoder.graph(&config)
    },
};

pub(crate) static IQUESTCODER: Family = Family {
    name: "iquestcoder",
    summary: "IQuest-Coder V1",
    claims: &["IQuestCoderForCausalLM"],
    checkpoints: &["IQuestLab/IQuest-Coder-V1-40B-Instruct"],
    example_config: include_str!("../configs/iquestcoder.json"),
    graph: |config| {
        config.only("clip_qkv", &[])?;
        config.only("use_sliding_window", &[json!(false)])?;
        let config = config.with_defaults(&[
            ("num_key_value_heads", json!(8)),
            ("head_dim", json!(128)),
            ("rms_norm_eps", json!(1e-5)),
        ]);
        let mut decoder = Decoder::read(&config)?;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        decoder.graph(&config)
    },
};

/// What a config of Llama's scaling leaves out.
fn scaling(theta: f64, factor: f64) -> Value {
    json!({"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})
}

/// Whether a config says nothing of its rotary embedding.
fn says_no_rope(config: &Config) -> bool {
    config.get("rope_parameters").is_none() && config.get("rope_scaling").is_none()
}

pub(crate) static CWM: Family = Family {
    name: "cwm",
    summary: "Code World Model 32B: a window in three layers of four",
    claims: &["CwmForCausalLM"],
    checkpoints: &["facebook/cwm", "facebook/cwm-sft"],
    example_config: include_str!("../configs/cwm.json"),
    graph: |config| {
        let mut config = config.with_defaults(&[
            ("num_key_value_heads", json!(8)),
            ("head_dim", json!(128)),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_theta", json!(1e6)),
            ("sliding_window", json!(8192)),
        ]);
        if says_no_rope(&config) {
            config = config.with_value("rope_parameters", scaling(1e6, 16.0));
        }
        let mut decoder = Decoder::read(&config)?;
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        let sliding = config.sliding_layers(decoder.layers.len(), |layer| !layer.is_multiple_of(4))?;
        decoder.slide(config.opt_size("sliding_window")?, &sliding);
        decoder.graph(&config)
    },
};

pub(crate) static SMOLLM3: Family = Family {
    name: "smollm3",
    summary: "SmolLM3 3B: no positions in every fourth layer",
    claims: &["SmolLM3ForCausalLM"],
    checkpoints: &["HuggingFaceTB/SmolLM3-3B"],
    example_config: include_str!("../configs/smollm3.json"),
    graph: |config| {
        let config = config.with_defaults(&[
            ("num_key_value_heads", json!(4)),
            ("rope_theta", json!(2e6)),
            ("tie_word_embeddings", json!(true)),
        ]);
        let mut decoder = Decoder::read(&config)?;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        let (layers, every) = (decoder.layers.len(), config.opt_size("no_rope_layer_interval")?.unwrap_or(4));
        let stated: Option<Vec<bool>> = config.get("no_rope_layers").map(|list| {
            let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
            list.iter().map(|turns| turns.as_u64() != Some(0)).collect()
        });
        // 1 is for a layer with rope, the name of the list notwithstanding.
        let turns = stated.unwrap_or_else(|| (0..layers).map(|layer| !(layer + 1).is_multiple_of(every)).collect());
        if turns.len() != layers {
            return bail!("config.json: {} no_rope_layers for {layers} layers", turns.len());
        }
        let window = config.opt_size("sliding_window")?;
        let window = window.filter(|_| config.flag("use_sliding_window", false) == Ok(true));
        let sliding = config.sliding_layers(layers, |layer| window.is_some() && !turns[layer])?;
        decoder.slide(window, &sliding);
        decoder.layers.iter_mut().zip(turns).filter(|(_, turns)| !turns).for_each(|(layer, _)| layer.rope = None);
        decoder.graph(&config)
    },
};

pub(crate) static HUNYUAN: Family = Family {
    name: "hunyuan",
    summary: "Hunyuan dense 0.5B to 7B, HY-MT: norms of queries and keys behind the rotary embedding",
    claims: &["HunYuanDenseV1ForCausalLM"],
    checkpoints: &[
        "tencent/Hunyuan-0.5B-Instruct",
        "tencent/Hunyuan-1.8B-Instruct",
        "tencent/Hunyuan-4B-Instruct",
        "tencent/Hunyuan-7B-Instruct",
        "tencent/HY-MT1.5-7B",
    ],
    example_config: include_str!("../configs/hunyuan.json"),
    graph: |config| {
        config.only("use_qk_norm", &[json!(true)])?;
        config.only("use_cla", &[json!(false)])?;
        config.only("norm_type", &[json!("rms"), json!("hf_rms")])?;
        config.only("use_rotary_pos_emb", &[json!(true)])?;
        // Those of a shared cache, which is off, and of a classifier.
        for key in ["attention_head_dim", "cla_share_factor", "class_num", "dense_list", "pool_type"] {
            config.get(key);
        }
        let config = config.with_defaults(&[("rms_norm_eps", json!(1e-5))]);
        let mut decoder = Decoder::read(&config)?;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        let (q, k) = ("self_attn.query_layernorm", "self_attn.key_layernorm");
        decoder.qk_norm = Some(QkNorm { q, k, after_rope: true, ..QkNorm::heads(decoder.norm) });
        decoder.graph(&config)
    },
};

pub(crate) static ERNIE4_5: Family = Family {
    name: "ernie4_5",
    summary: "ERNIE 4.5 0.3B: neighbouring columns turn",
    claims: &["Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"],
    checkpoints: &["baidu/ERNIE-4.5-0.3B-PT", "baidu/ERNIE-4.5-0.3B-Base-PT"],
    example_config: include_str!("../configs/ernie4_5.json"),
    graph: |config| {
        config.only("compression_ratio", &[json!(1.0), json!(1)])?;
        let config = config.with_defaults(&[
            ("num_key_value_heads", json!(2)),
            ("head_dim", json!(128)),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_theta", json!(500_000.0)),
            ("tie_word_embeddings", json!(true)),
        ]);
        let mut decoder = Decoder::read(&config)?;
        decoder.interleave_rope();
        let bias = config.flag("use_bias", false)?;
        decoder.attention_bias(bias);
        decoder.mlp_bias = bias;
        decoder.graph(&config)
    },
};

pub(crate) static APERTUS: Family = Family {
    name: "apertus",
    summary: "Apertus 8B, 70B: an MLP without a gate, its activation with learned parameters",
    claims: &["ApertusForCausalLM"],
    checkpoints: &["swiss-ai/Apertus-8B-Instruct-2509", "swiss-ai/Apertus-70B-Instruct-2509"],
    example_config: include_str!("../configs/apertus.json"),
    graph: |config| {
        let mut config = config.with_defaults(&[
            ("hidden_act", json!("xielu")),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_theta", json!(12e6)),
        ]);
        if says_no_rope(&config) {
            config = config.with_value("rope_parameters", scaling(12e6, 8.0));
        }
        config.only("qk_norm", &[json!(true)])?;
        config.only("post_norm", &[json!(false)])?;
        let mut decoder = Decoder::read(&config)?;
        decoder.gated = false;
        decoder.norms.before_attention = Some("attention_layernorm");
        decoder.norms.before_mlp = Some("feedforward_layernorm");
        decoder.qk_norm = Some(QkNorm::heads(decoder.norm));
        decoder.attention_bias(config.flag("attention_bias", false)?);
        config.only("mlp_bias", &[json!(false)])?;
        decoder.graph(&config)
    },
};

pub(crate) static ARCEE: Family = Family {
    name: "arcee",
    summary: "AFM 4.5B: an MLP without a gate, of squared relu",
    claims: &["ArceeForCausalLM"],
    checkpoints: &["arcee-ai/AFM-4.5B"],
    example_config: include_str!("../configs/arcee.json"),
    graph: |config| {
        let config = config.with_defaults(&[("hidden_act", json!("relu2")), ("rms_norm_eps", json!(1e-5))]);
        let mut decoder = Decoder::read(&config)?;
        decoder.gated = false;
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        decoder.graph(&config)
    },
};

pub(crate) static NEMOTRON: Family = Family {
    name: "nemotron",
    summary: "Nemotron 3, 4 and Minitron: layer norms whose weights count from 1, squared relu, half of a head turns",
    claims: &["NemotronForCausalLM"],
    checkpoints: &["nvidia/Minitron-4B-Base", "nvidia/Minitron-8B-Base", "nvidia/Nemotron-Mini-4B-Instruct"],
    example_config: include_str!("../configs/nemotron.json"),
    graph: |config| {
        let config = config.with_defaults(&[
            ("hidden_act", json!("relu2")),
            ("partial_rotary_factor", json!(0.5)),
            ("norm_eps", json!(1e-5)),
        ]);
        let mut decoder = Decoder::read(&config)?;
        decoder.gated = false;
        decoder.norm = Norm::layer(config.float("norm_eps")?).offset(1.0);
        decoder.attention_bias(config.flag("attention_bias", false)?);
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        decoder.graph(&config)
    },
};

pub(crate) static STARCODER2: Family = Family {
    name: "starcoder2",
    summary: "StarCoder2: layer norms, biases, an MLP without a gate",
    claims: &["Starcoder2ForCausalLM"],
    checkpoints: &["bigcode/starcoder2-3b", "bigcode/starcoder2-7b", "bigcode/starcoder2-15b-instruct-v0.1"],
    example_config: include_str!("../configs/starcoder2.json"),
    graph: |config| {
        config.only("mlp_type", &[json!("default")])?;
        let config = config.with_defaults(&[
            ("num_key_value_heads", json!(2)),
            ("hidden_act", json!("gelu_pytorch_tanh")),
            ("norm_epsilon", json!(1e-5)),
            ("tie_word_embeddings", json!(true)),
        ]);
        config.only("norm_type", &[json!("layer_norm")])?;
        let mut decoder = Decoder::read(&config)?;
        decoder.gated = false;
        decoder.norm = Norm::layer(config.float("norm_epsilon")?);
        let bias = config.flag("use_bias", true)?;
        decoder.attention_bias(bias);
        decoder.mlp_bias = bias;
        (decoder.names.up, decoder.names.down) = ("mlp.c_fc", "mlp.c_proj");
        let layers = decoder.layers.len();
        decoder.slide(config.opt_size("sliding_window")?, &vec![true; layers]);
        decoder.graph(&config)
    },
};

pub(crate) static HELIUM: Family = Family {
    name: "helium",
    summary: "Helium 1: neighbouring columns turn",
    claims: &["HeliumForCausalLM"],
    checkpoints: &["kyutai/helium-1-2b", "kyutai/helium-1-preview-2b"],
    example_config: include_str!("../configs/helium.json"),
    graph: |config| {
        let config = config.with_defaults(&[
            ("num_key_value_heads", json!(20)),
            ("head_dim", json!(128)),
            ("rms_norm_eps", json!(1e-8)),
            ("rope_theta", json!(100_000.0)),
        ]);
        let mut decoder = Decoder::read(&config)?;
        decoder.interleave_rope();
        decoder.qkv_bias = config.flag("attention_bias", false)?;
        decoder.mlp_bias = config.flag("mlp_bias", false)?;
        decoder.graph(&config)
    },
};
