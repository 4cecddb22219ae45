//! Which family is which architecture of llama.cpp: one row each, and what tensors of the one are tensors of the other.
//!
//! Names and rows are those of llama.cpp's `convert_hf_to_gguf.py` and `gguf-py/gguf/constants.py`; what an architecture computes beside its
//! tensors is in llama.cpp's `src/models`.

use dpo_core::error::{Error, Result};

/// An architecture as a family needs it.
pub struct Architecture {
    /// The family's name here.
    pub family: &'static str,
    /// The architecture's name in llama.cpp, which begins its keys.
    pub name: &'static str,
    /// Tensors of a layer.
    pub(crate) tensors: &'static [&'static [Counterpart]],
    /// The activation of its gated MLPs and experts.
    pub(crate) activation: &'static str,
    /// Which layers have a window.
    pub(crate) windows: Windows,
    /// What is done with scaled rotary frequencies.
    pub(crate) rope: RopeScaling,
    /// What the embedding is multiplied with.
    pub(crate) embedding: EmbeddingScale,
    /// Whether attention, residual stream and logits have multipliers.
    pub(crate) multipliers: bool,
    /// Whether there are soft caps of scores and of logits.
    pub(crate) softcaps: bool,
    /// Of how many layers the last one has no rotary embedding.
    pub(crate) no_rope_every: Option<usize>,
    /// Layers of the size whose scores are scaled by `hidden / heads`, not by the width of a head.
    pub(crate) wide_scores_at: Option<usize>,
    /// How its router scores experts.
    pub(crate) scoring: &'static str,
    /// Bound of what goes into the activation of experts.
    pub(crate) limit: Option<f64>,
    /// Positions where `config.json` says none, as transformers has it.
    pub(crate) positions: Option<usize>,
}

/// A tensor of a layer here and in a file.
pub(crate) struct Counterpart {
    /// Its name without the layer's prefix.
    pub(crate) here: &'static str,
    /// Its name without `blk.N.`; of gate and up together with `{}` in the place of either.
    pub(crate) there: &'static str,
    /// Where its rows go.
    pub(crate) rows: Rows,
}

/// Where rows of a tensor go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// They stay.
    Same,
    /// Of every head the halves take turns: llama.cpp turns neighbouring columns where transformers turns column `j` with `j + n`.
    Turned,
    /// Those of the gate and those of up become two tensors.
    GateAndUp,
}

/// Which layers have a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Windows {
    /// None has: llama.cpp computes attention without one.
    None,
    /// The same, although the metadata say how long it is, 0 for none.
    Ignored,
    /// Of so many layers all but the last.
    AllButEvery(usize),
}

/// What an architecture does with rotary frequencies that are scaled, beside YaRN and one factor for all, which each of them knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopeScaling {
    /// Nothing.
    Plain,
    /// It reads a factor for each frequency.
    Factors,
    /// It reads two lists of factors, for short and for long texts.
    LongRope,
    /// Layers with a window have plain frequencies of a base of their own.
    TwoBases,
}

/// What an architecture multiplies the embedding with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EmbeddingScale {
    /// Nothing.
    None,
    /// The root of the width, which it does not ask for.
    RootOfWidth,
    /// What the metadata say.
    Stated,
}

const fn same(here: &'static str, there: &'static str) -> Counterpart {
    Counterpart { here, there, rows: Rows::Same }
}

const fn turned(here: &'static str, there: &'static str) -> Counterpart {
    Counterpart { here, there, rows: Rows::Turned }
}

const QKV: &[Counterpart] = &[
    same("self_attn.q_proj.weight", "attn_q.weight"),
    same("self_attn.k_proj.weight", "attn_k.weight"),
    same("self_attn.v_proj.weight", "attn_v.weight"),
    same("self_attn.q_proj.bias", "attn_q.bias"),
    same("self_attn.k_proj.bias", "attn_k.bias"),
    same("self_attn.v_proj.bias", "attn_v.bias"),
];

const QKV_TURNED: &[Counterpart] = &[
    turned("self_attn.q_proj.weight", "attn_q.weight"),
    turned("self_attn.k_proj.weight", "attn_k.weight"),
    same("self_attn.v_proj.weight", "attn_v.weight"),
    turned("self_attn.q_proj.bias", "attn_q.bias"),
    turned("self_attn.k_proj.bias", "attn_k.bias"),
    same("self_attn.v_proj.bias", "attn_v.bias"),
];

const OUTPUT: &[Counterpart] = &[same("self_attn.o_proj.weight", "attn_output.weight")];

const OUTPUT_BIAS: &[Counterpart] = &[same("self_attn.o_proj.bias", "attn_output.bias")];

const QK_NORMS: &[Counterpart] =
    &[same("self_attn.q_norm.weight", "attn_q_norm.weight"), same("self_attn.k_norm.weight", "attn_k_norm.weight")];

const NORMS: &[Counterpart] =
    &[same("input_layernorm.weight", "attn_norm.weight"), same("post_attention_layernorm.weight", "ffn_norm.weight")];

const SANDWICH: &[Counterpart] = &[
    same("input_layernorm.weight", "attn_norm.weight"),
    same("post_attention_layernorm.weight", "post_attention_norm.weight"),
    same("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    same("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
];

const MLP: &[Counterpart] = &[
    same("mlp.gate_proj.weight", "ffn_gate.weight"),
    same("mlp.up_proj.weight", "ffn_up.weight"),
    same("mlp.down_proj.weight", "ffn_down.weight"),
];

const MLP_BIAS: &[Counterpart] = &[
    same("mlp.gate_proj.bias", "ffn_gate.bias"),
    same("mlp.up_proj.bias", "ffn_up.bias"),
    same("mlp.down_proj.bias", "ffn_down.bias"),
];

const EXPERTS: &[Counterpart] = &[
    same("mlp.gate.weight", "ffn_gate_inp.weight"),
    Counterpart { here: "mlp.experts.gate_up_proj", there: "ffn_{}_exps.weight", rows: Rows::GateAndUp },
    same("mlp.experts.down_proj", "ffn_down_exps.weight"),
];

const FUSED: &[Counterpart] = &[
    same("self_attn.qkv_proj.weight", "attn_qkv.weight"),
    same("mlp.gate_up_proj.weight", "ffn_up.weight"),
    same("mlp.down_proj.weight", "ffn_down.weight"),
];

const GPT_OSS: &[Counterpart] = &[
    same("input_layernorm.weight", "attn_norm.weight"),
    same("post_attention_layernorm.weight", "post_attention_norm.weight"),
    same("self_attn.sinks", "attn_sinks.weight"),
    same("mlp.router.weight", "ffn_gate_inp.weight"),
    same("mlp.router.bias", "ffn_gate_inp.bias"),
    Counterpart { here: "mlp.experts.gate_up_proj", there: "ffn_{}_exps.weight", rows: Rows::GateAndUp },
    Counterpart { here: "mlp.experts.gate_up_proj_bias", there: "ffn_{}_exps.bias", rows: Rows::GateAndUp },
    same("mlp.experts.down_proj", "ffn_down_exps.weight"),
    same("mlp.experts.down_proj_bias", "ffn_down_exps.bias"),
];

/// A Llama without anything.
const PLAIN: Architecture = Architecture {
    family: "",
    name: "",
    tensors: &[],
    activation: "silu",
    windows: Windows::None,
    rope: RopeScaling::Plain,
    embedding: EmbeddingScale::None,
    multipliers: false,
    softcaps: false,
    no_rope_every: None,
    wide_scores_at: None,
    scoring: "softmax",
    limit: None,
    positions: None,
};

/// All families that can be written.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture { family: "qwen2", name: "qwen2", tensors: &[QKV, OUTPUT, NORMS, MLP], ..PLAIN },
    Architecture { family: "qwen3", name: "qwen3", tensors: &[QKV, OUTPUT, QK_NORMS, NORMS, MLP], ..PLAIN },
    Architecture { family: "qwen3_moe", name: "qwen3moe", tensors: &[QKV, OUTPUT, QK_NORMS, NORMS, EXPERTS], ..PLAIN },
    Architecture {
        family: "llama3",
        name: "llama",
        tensors: &[QKV_TURNED, OUTPUT, OUTPUT_BIAS, NORMS, MLP, MLP_BIAS],
        rope: RopeScaling::Factors,
        ..PLAIN
    },
    Architecture {
        family: "mistral",
        name: "llama",
        tensors: &[QKV_TURNED, OUTPUT, OUTPUT_BIAS, NORMS, MLP, MLP_BIAS],
        rope: RopeScaling::Factors,
        ..PLAIN
    },
    Architecture {
        family: "mixtral",
        name: "llama",
        tensors: &[QKV_TURNED, OUTPUT, NORMS, EXPERTS],
        rope: RopeScaling::Factors,
        ..PLAIN
    },
    Architecture {
        family: "smollm3",
        name: "smollm3",
        tensors: &[QKV_TURNED, OUTPUT, NORMS, MLP],
        no_rope_every: Some(4),
        ..PLAIN
    },
    Architecture {
        family: "granite",
        name: "granite",
        tensors: &[QKV_TURNED, OUTPUT, OUTPUT_BIAS, NORMS, MLP, MLP_BIAS],
        rope: RopeScaling::Factors,
        embedding: EmbeddingScale::Stated,
        multipliers: true,
        ..PLAIN
    },
    Architecture {
        family: "phi3",
        name: "phi3",
        tensors: &[FUSED, OUTPUT, NORMS],
        windows: Windows::Ignored,
        rope: RopeScaling::LongRope,
        ..PLAIN
    },
    Architecture {
        family: "gemma2",
        name: "gemma2",
        tensors: &[QKV, OUTPUT, SANDWICH, MLP],
        activation: "gelu_tanh",
        windows: Windows::AllButEvery(2),
        embedding: EmbeddingScale::RootOfWidth,
        softcaps: true,
        wide_scores_at: Some(46),
        ..PLAIN
    },
    Architecture {
        family: "gemma3",
        name: "gemma3",
        tensors: &[QKV, OUTPUT, QK_NORMS, SANDWICH, MLP],
        activation: "gelu_tanh",
        windows: Windows::AllButEvery(6),
        rope: RopeScaling::TwoBases,
        embedding: EmbeddingScale::RootOfWidth,
        wide_scores_at: Some(62),
        positions: Some(131_072),
        ..PLAIN
    },
    Architecture {
        family: "gpt_oss",
        name: "gpt-oss",
        tensors: &[QKV, OUTPUT, OUTPUT_BIAS, GPT_OSS],
        activation: "swiglu_oai",
        windows: Windows::AllButEvery(2),
        scoring: "softmax_of_chosen",
        limit: Some(7.0),
        ..PLAIN
    },
];

impl Windows {
    /// Whether a layer has one.
    pub(crate) fn has(self, layer: usize) -> bool {
        match self {
            Windows::None | Windows::Ignored => false,
            Windows::AllButEvery(period) => !(layer + 1).is_multiple_of(period),
        }
    }
}

impl Architecture {
    /// The row of a family.
    ///
    /// # Errors
    /// A family that has none.
    pub fn of(family: &str) -> Result<&'static Architecture> {
        ARCHITECTURES.iter().find(|row| row.family == family).ok_or_else(|| {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|row| row.family).collect();
            Error::input(format!("models of the family '{family}' are not written as GGUF; {} are", known.join(", ")))
                .at("--format gguf")
                .help("merge into safetensors, and use llama.cpp's convert_hf_to_gguf.py")
        })
    }

    /// The counterpart of a layer's tensor.
    ///
    /// # Errors
    /// One that the architecture has not.
    pub(crate) fn counterpart(&self, tensor: &str) -> Result<&'static Counterpart> {
        let mut all = self.tensors.iter().flat_map(|some| some.iter());
        all.find(|own| own.here == tensor).ok_or_else(|| {
            Error::input(format!("llama.cpp's architecture '{}' has no counterpart of tensor '{tensor}'", self.name))
                .at("--format gguf")
        })
    }
}
