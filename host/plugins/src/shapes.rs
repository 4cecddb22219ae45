//! Published shapes of models, for plans and benchmarks without a checkpoint.

use dpo_core::error::{Error, Result};
use dpo_core::plan::MemoryOptions;
use dpo_core::quantized::Method;
use dpo_plugin_api::graph::ModelGraph;
use dpo_plugin_api::ops::AUX_LOSS_COEF;
use serde_json::{Map, Value, json};

use crate::Registry;

/// A published shape: numbers of a checkpoint's `config.json`. Those without a say in speed and memory are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// What the command line calls it.
    pub name: &'static str,
    family: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    tied: bool,
    /// What its config has beside, as JSON.
    more: &'static str,
}

macro_rules! shapes {
    ($([$name:literal, $family:literal, $h:literal, $i:literal, $l:literal, $q:literal, $kv:literal, $d:literal, $v:literal, $t:literal, $more:expr]),* $(,)?) => {
        &[$(Shape {
            name: $name, family: $family, hidden: $h, intermediate: $i, layers: $l, heads: $q, kv_heads: $kv, head_dim: $d,
            vocab: $v, tied: $t, more: $more,
        }),*]
    };
}

/// Gated delta nets in three of four layers.
const QWEN3_5: &str = r#"{"full_attention_interval": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7,
    "partial_rotary_factor": 0.25}}"#;

/// Experts in all layers.
const QWEN3_MOE: &str =
    r#"{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": true}"#;

/// Experts in all layers, in mxfp4, a window in every other one.
const GPT_OSS: &str = r#"{"num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "rope_theta": 150000.0,
    "quantization_config": {"quant_method": "mxfp4"}}"#;
const GPT_OSS_120B: &str = r#"{"num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128, "rope_theta": 150000.0,
    "quantization_config": {"quant_method": "mxfp4"}}"#;

/// All shapes: name, family, hidden, intermediate, layers, heads, key heads, columns of a head, vocabulary, tied projection, what else.
pub const SHAPES: &[Shape] = shapes![
    ["qwen2.5-0.5b", "qwen2", 896, 4864, 24, 14, 2, 64, 151936, true, "{}"],
    ["qwen2.5-1.5b", "qwen2", 1536, 8960, 28, 12, 2, 128, 151936, true, "{}"],
    ["qwen2.5-3b", "qwen2", 2048, 11008, 36, 16, 2, 128, 151936, true, "{}"],
    ["qwen2.5-7b", "qwen2", 3584, 18944, 28, 28, 4, 128, 152064, false, "{}"],
    ["qwen3-4b", "qwen3", 2560, 9728, 36, 32, 8, 128, 151936, true, "{}"],
    ["qwen3-8b", "qwen3", 4096, 12288, 36, 32, 8, 128, 151936, false, "{}"],
    ["llama3-8b", "llama3", 4096, 14336, 32, 32, 8, 128, 128256, false, "{}"],
    ["mistral-7b", "mistral", 4096, 14336, 32, 32, 8, 128, 32768, false, r#"{"sliding_window": null}"#],
    ["gemma3-4b", "gemma3", 2560, 10240, 34, 8, 4, 256, 262208, true, r#"{"sliding_window": 1024}"#],
    ["gemma3-12b", "gemma3", 3840, 15360, 48, 16, 8, 256, 262208, true, r#"{"sliding_window": 1024}"#],
    ["glm4-9b", "glm4", 4096, 13696, 40, 32, 2, 128, 151552, false, "{}"],
    ["phi4-14b", "phi3", 5120, 17920, 40, 40, 10, 128, 100352, false, r#"{"original_max_position_embeddings": 32768}"#],
    ["qwen3.5-4b", "qwen3_5", 2560, 9216, 32, 16, 4, 256, 248320, true, QWEN3_5],
    ["qwen3.5-9b", "qwen3_5", 4096, 12288, 32, 16, 4, 256, 248320, false, QWEN3_5],
    ["qwen3-30b-a3b", "qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151936, false, QWEN3_MOE],
    ["gpt-oss-20b", "gpt_oss", 2880, 2880, 24, 64, 8, 64, 201088, false, GPT_OSS],
    ["gpt-oss-120b", "gpt_oss", 2880, 2880, 36, 64, 8, 64, 201088, false, GPT_OSS_120B],
    ["qwen2.5-14b", "qwen2", 5120, 13824, 48, 40, 8, 128, 152064, false, "{}"],
    ["qwen2.5-32b", "qwen2", 5120, 27648, 64, 40, 8, 128, 152064, false, "{}"],
    ["qwen2.5-72b", "qwen2", 8192, 29568, 80, 64, 8, 128, 152064, false, "{}"],
];

impl Shape {
    /// The shape of a name.
    ///
    /// # Errors
    /// An unknown name, with those that are known.
    pub fn named(name: &str) -> Result<Shape> {
        let found = SHAPES.iter().find(|s| s.name.eq_ignore_ascii_case(name));
        found.copied().ok_or_else(|| Error::unknown("shape", name, SHAPES.iter().map(|s| s.name)))
    }

    /// Its graph, as devices run it, without an auxiliary loss of routers.
    ///
    /// # Errors
    /// A registry without its family.
    pub fn graph(self, registry: &Registry) -> Result<ModelGraph> {
        self.graph_with(registry, 0.0)
    }

    /// The same with such a loss, where its family has one.
    ///
    /// # Errors
    /// A registry without its family.
    pub fn graph_with(self, registry: &Registry, router_aux_loss_coef: f64) -> Result<ModelGraph> {
        let mut config = self.config()?;
        if self.more.contains("experts") {
            config[AUX_LOSS_COEF] = router_aux_loss_coef.into();
        }
        registry.family(self.family)?.runnable(&config.to_string())
    }

    /// Options on its memory, as far as they are for it.
    ///
    /// # Errors
    /// A quantisation that is for none of its weights.
    pub fn memory(self, options: MemoryOptions, graph: &ModelGraph) -> Result<MemoryOptions> {
        let config = self.config()?;
        let method = config.as_object().map(|config| Method::of(config, &[])).transpose()?.flatten();
        options.of_model(graph, method.and_then(Method::kept))
    }

    fn config(self) -> Result<Value> {
        let mut config = json!({"hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
            "tie_word_embeddings": self.tied, "hidden_act": "silu"});
        if self.family != "qwen2" {
            config["head_dim"] = self.head_dim.into();
        }
        let more: Map<String, Value> = serde_json::from_str(self.more)
            .map_err(|e| Error::run(format!("the shape '{}' is not written well: {e}", self.name)))?;
        more.into_iter().for_each(|(key, value)| config[key] = value);
        Ok(config)
    }
}
