//! Published shapes of models, for plans and benchmarks without a checkpoint.

use clap::ValueEnum;
use dpo_plugin_api::graph::ModelGraph;

use crate::error::Result;
use crate::plugins::Registry;

/// A published shape.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    #[value(name = "qwen2.5-0.5b")]
    Qwen25_05b,
    #[value(name = "qwen2.5-1.5b")]
    Qwen25_15b,
    #[value(name = "qwen2.5-3b")]
    Qwen25_3b,
    #[value(name = "qwen2.5-7b")]
    Qwen25_7b,
    #[value(name = "qwen3-4b")]
    Qwen3_4b,
    #[value(name = "qwen3-8b")]
    Qwen3_8b,
    #[value(name = "llama3-8b")]
    Llama3_8b,
    #[value(name = "qwen2.5-14b")]
    Qwen25_14b,
    #[value(name = "qwen2.5-32b")]
    Qwen25_32b,
}

/// A row of the table: family, hidden and intermediate size, layers, query and key heads, columns of a head, vocabulary,
/// whether the projection is the embedding table.
type Row = (&'static str, usize, usize, usize, usize, usize, usize, usize, bool);

impl Shape {
    /// As the `config.json` of the published checkpoint has it; numbers without a say in speed and memory are alike.
    fn row(self) -> Row {
        match self {
            Shape::Qwen25_05b => ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, true),
            Shape::Qwen25_15b => ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, true),
            Shape::Qwen25_3b => ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, true),
            Shape::Qwen25_7b => ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, false),
            Shape::Qwen3_4b => ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, true),
            Shape::Qwen3_8b => ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, false),
            Shape::Llama3_8b => ("llama3", 4096, 14336, 32, 32, 8, 128, 128256, false),
            Shape::Qwen25_14b => ("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, false),
            Shape::Qwen25_32b => ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, false),
        }
    }

    /// Its name on the command line.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
    }

    /// Its graph.
    pub(crate) fn graph(self, registry: &Registry) -> Result<ModelGraph> {
        let (family, hidden, inner, layers, heads, kv_heads, dim, vocab, tied) = self.row();
        let mut config = serde_json::json!({"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": tied, "hidden_act": "silu"});
        if family != "qwen2" {
            config["head_dim"] = dim.into();
        }
        registry.family(family)?.graph(&config.to_string())
    }
}
