//! In which number format each tensor is kept: llama.cpp's own choice (`src/llama-quant.cpp`; for 16 bits and q8_0 `convert_hf_to_gguf.py`, which
//! does the same).

use crate::architecture::Architecture;
use crate::facts::Facts;
use crate::quantize::TensorType;

/// What `--quantize` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixture {
    /// 16 bits.
    F16,
    /// 16 bits as a checkpoint in bf16 has them.
    Bf16,
    /// 8 bits.
    Q8_0,
    /// 4 bits, and 6 where it matters most.
    Q4KM,
}

/// What a mixture is.
struct Row {
    of: Mixture,
    name: &'static str,
    /// Its number (`llama.h`, `enum llama_ftype`).
    file_type: u32,
    kind: TensorType,
}

const ROWS: [Row; 4] = [
    Row { of: Mixture::F16, name: "f16", file_type: 1, kind: TensorType::F16 },
    Row { of: Mixture::Bf16, name: "bf16", file_type: 32, kind: TensorType::Bf16 },
    Row { of: Mixture::Q8_0, name: "q8_0", file_type: 7, kind: TensorType::Q8_0 },
    Row { of: Mixture::Q4KM, name: "q4_k_m", file_type: 15, kind: TensorType::Q4K },
];

/// What decides of a tensor's format beside its name.
pub(crate) struct Place<'a> {
    pub(crate) architecture: &'a Architecture,
    pub(crate) facts: &'a Facts,
    /// The layer that it is in.
    pub(crate) layer: Option<usize>,
}

impl Mixture {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Mixture> {
        ROWS.iter().map(|row| row.of)
    }

    fn row(self) -> &'static Row {
        ROWS.iter().find(|row| row.of == self).unwrap_or(&ROWS[0])
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    pub(crate) fn file_type(self) -> u32 {
        self.row().file_type
    }

    /// The format of a tensor of this name and shape.
    pub(crate) fn kind_of(self, name: &str, shape: &[usize], place: &Place<'_>) -> TensorType {
        let is_kept = shape.len() < 2
            || !name.ends_with("weight")
            || name.ends_with("_norm.weight")
            || name.ends_with("ffn_gate_inp.weight");
        if is_kept {
            return TensorType::F32;
        }
        let kind = if self == Mixture::Q4KM { of_4_bits(name, place) } else { self.row().kind };
        fitting(kind, shape.last().copied().unwrap_or(1))
    }
}

/// Where a mixture of 4 bits takes more of them: half of the layers' values and last projections, in turn, and what makes logits.
fn of_4_bits(name: &str, place: &Place<'_>) -> TensorType {
    let Facts { layers, heads, kv_heads, tied, .. } = *place.facts;
    let (layer, eighth) = (place.layer.unwrap_or(0), layers / 8);
    let matters = layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2;
    let more = if matters { TensorType::Q6K } else { TensorType::Q4K };
    let is_of_8_experts = place.facts.experts.as_ref().is_some_and(|experts| experts.count == 8);
    // Eight heads share what these models have of values.
    let is_70b = layers == 80
        && match place.architecture.name {
            "llama" => heads != kv_heads,
            name => name == "qwen2",
        };
    match name.rsplit_once("blk.").map_or(name, |(_, own)| own.split_once('.').map_or(own, |(_, own)| own)) {
        "output.weight" => TensorType::Q6K,
        "token_embd.weight" if tied => TensorType::Q6K,
        "attn_v.weight" | "attn_k.weight" if is_of_8_experts => TensorType::Q8_0,
        "attn_output.weight" if is_of_8_experts => TensorType::Q5K,
        "attn_v.weight" | "attn_qkv.weight" if is_70b && more == TensorType::Q4K => TensorType::Q5K,
        "attn_v.weight" | "attn_qkv.weight" => more,
        own if own.starts_with("ffn_down") => more,
        _ => TensorType::Q4K,
    }
}

/// The format, or what stands in for it where rows are no whole blocks of it.
fn fitting(kind: TensorType, columns: usize) -> TensorType {
    let instead = match kind {
        _ if columns.is_multiple_of(kind.block()) => return kind,
        TensorType::Q4K => TensorType::Q5_0,
        TensorType::Q5K => TensorType::Q5_1,
        TensorType::Q6K => TensorType::Q8_0,
        _ => TensorType::F16,
    };
    fitting(instead, columns)
}
