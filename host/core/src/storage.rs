//! How frozen weights are kept: as which numbers, and where. Both devices plan and load by it.

use dpo_plugin_api::graph::Weight;
use serde::Serialize;

use crate::nf4::Nf4;

/// How a frozen weight is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Storage {
    /// As which numbers.
    pub numbers: Numbers,
    /// Where.
    pub place: Place,
}

/// What a value is kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Numbers {
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
    /// As [`Quantization::Fp8`].
    Fp8,
    /// As [`Quantization::Nf4`].
    Nf4,
}

/// What frozen matrices of layers are kept as where they are smaller than what a device computes in. Embeddings, the head, norms,
/// biases and LoRA's matrices stay as they are, as they do in bitsandbytes and PEFT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// float8 e4m3 with an f32 scale a row.
    Fp8,
    /// 4-bit NormalFloat (QLoRA, arXiv 2305.14314) in blocks of 64, with double quantisation.
    Nf4,
}

/// Where values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// All of them on the device.
    Resident,
    /// A part on the device of each of so many ranks, gathered when they are used.
    Sharded(usize),
    /// In host memory that the device reads.
    Host,
}

impl Numbers {
    /// Bytes of so many values; of e4m3 without its scales.
    pub fn bytes(self, values: usize) -> usize {
        match self {
            Numbers::F32 => values * 4,
            Numbers::Bf16 => values * 2,
            Numbers::Fp8 => values,
            Numbers::Nf4 => Nf4::bytes(values),
        }
    }
}

impl Storage {
    /// Of a weight of a base that is sharded over so many ranks; on one, it is whole.
    pub fn of(weight: &Weight, numbers: Numbers, ranks: usize) -> Storage {
        let sharded = ranks > 1 && shards(weight);
        Storage { numbers, place: if sharded { Place::Sharded(ranks) } else { Place::Resident } }
    }

    /// Whether ranks keep parts.
    pub fn is_sharded(self) -> bool {
        matches!(self.place, Place::Sharded(_))
    }

    /// Bytes of so many values on this rank's device.
    pub fn bytes(self, values: usize) -> usize {
        match self.place {
            Place::Resident => self.numbers.bytes(values),
            Place::Sharded(ranks) => self.numbers.bytes(values.div_ceil(ranks)),
            Place::Host => 0,
        }
    }
}

/// Whether a sharded base keeps a weight in parts. Vectors are small: every rank has them whole.
pub fn shards(weight: &Weight) -> bool {
    weight.shape.len() > 1
}
