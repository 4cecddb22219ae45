//! How frozen weights are kept: as which numbers, and where. Both devices plan and load by it.

use dpo_plugin_api::graph::Weight;
use serde::Serialize;

use crate::nf4::Nf4;
use crate::{fp8, mxfp4, nf4};

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
    /// e4m3 of [`fp8`], with a scale in f32 for each row.
    Fp8,
    /// The codes and scales of [`nf4`].
    Nf4,
    /// Those of [`mxfp4`].
    Mxfp4,
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
    /// OCP's mxfp4 in blocks of 32: experts alone, as gpt-oss is published.
    Mxfp4,
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
    /// Bytes of so many values, without their scales.
    pub fn bytes(self, values: usize) -> usize {
        match self {
            Numbers::F32 => values * 4,
            Numbers::Bf16 => values * 2,
            Numbers::Fp8 => values,
            Numbers::Nf4 | Numbers::Mxfp4 => values.div_ceil(2),
        }
    }

    /// Bytes of a weight of this shape, with its scales.
    pub fn bytes_of(self, shape: &[usize]) -> usize {
        let values = shape.iter().product();
        match self {
            Numbers::F32 | Numbers::Bf16 => self.bytes(values),
            Numbers::Fp8 => values + 4 * (values / columns(shape)),
            Numbers::Nf4 => Nf4::bytes(values),
            Numbers::Mxfp4 => mxfp4::bytes(values / columns(shape), columns(shape)),
        }
    }
}

impl Quantization {
    /// As which numbers a matrix is kept.
    pub fn numbers(self) -> Numbers {
        match self {
            Quantization::Fp8 => Numbers::Fp8,
            Quantization::Nf4 => Numbers::Nf4,
            Quantization::Mxfp4 => Numbers::Mxfp4,
        }
    }

    /// Its name, as `--quantization` has it.
    pub fn name(self) -> &'static str {
        match self {
            Quantization::Fp8 => "fp8",
            Quantization::Nf4 => "nf4",
            Quantization::Mxfp4 => "mxfp4",
        }
    }

    /// A matrix as bytes: its codes, and behind them its scales.
    pub fn pack(self, shape: &[usize], values: &[f32]) -> Vec<u8> {
        match self {
            Quantization::Nf4 => nf4::quantize(values).to_bytes(),
            Quantization::Mxfp4 => mxfp4::quantize_rows(values, columns(shape)).to_bytes(),
            Quantization::Fp8 => {
                let (mut bytes, scales) = fp8::quantize_rows(values, columns(shape));
                bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
                bytes
            }
        }
    }

    /// The values of a matrix that was [packed](Self::pack): of nf4 and mxfp4 in bf16's steps, as a GPU computes with them; of fp8 as they
    /// are.
    pub fn unpack(self, shape: &[usize], bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; shape.iter().product()];
        match self {
            Quantization::Nf4 => Nf4::of_bytes(values.len(), bytes).dequantize(&mut values),
            Quantization::Mxfp4 => {
                let blocks = values.len() / columns(shape) * columns(shape).div_ceil(mxfp4::BLOCK);
                let (codes, scales) = bytes.split_at(blocks * mxfp4::BYTES);
                mxfp4::dequantize_rows(codes, scales, columns(shape), &mut values);
            }
            Quantization::Fp8 => {
                let (codes, scales) = bytes.split_at(values.len());
                let scales: Vec<f32> = scales.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                fp8::dequantize_rows(codes, &scales, columns(shape), &mut values);
            }
        }
        values
    }
}

/// Columns of a matrix, at least one.
fn columns(shape: &[usize]) -> usize {
    shape.last().copied().unwrap_or(1).max(1)
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

    /// Bytes of so many values, without their scales, on this rank's device.
    pub fn bytes(self, values: usize) -> usize {
        self.here(self.numbers.bytes(values))
    }

    /// Bytes of a weight of this shape, with its scales, on this rank's device.
    pub fn bytes_of(self, shape: &[usize]) -> usize {
        self.here(self.numbers.bytes_of(shape))
    }

    fn here(self, bytes: usize) -> usize {
        match self.place {
            Place::Resident => bytes,
            // Ranks exchange words of four bytes.
            Place::Sharded(ranks) => bytes.div_ceil(4).div_ceil(ranks) * 4,
            Place::Host => 0,
        }
    }
}

/// Whether a sharded base keeps a weight in parts. Vectors are small: every rank has them whole.
pub fn shards(weight: &Weight) -> bool {
    weight.shape.len() > 1
}
