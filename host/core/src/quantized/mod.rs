//! Published checkpoints that are quantised: which ways are read, which tensors make a weight, and its values as the tool that wrote
//! them computes them. What is read of a file is a tensor at a time, when it is needed; nothing is kept of it.
//!
//! Activations, which some of these also quantise, are not: what says how (`input_scale` and the like) is left out of account.

mod bitsandbytes;
mod compressed;
mod integers;
mod mxfp4;
mod scaled;

use std::collections::BTreeMap;

use candle_core::DType;
use dpo_plugin_api::config_keys::value_at;
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::mxfp4::Mxfp4;
use crate::nf4::Nf4;
use crate::storage::Quantization;

/// Where a checkpoint says how its weights are quantised.
pub const KEYS: &[&str] =
    &["quantization_config", "compression_config", "text_config.quantization_config", "text_config.compression_config"];

/// A way to quantise that is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Four bits of bitsandbytes, nf4 and fp4, with double quantisation or without.
    Bitsandbytes,
    /// e4m3 or int8 with scales of blocks of so many rows and columns, of rows, or of the matrix: DeepSeek's, transformers' `fp8`,
    /// compressed-tensors.
    Scaled([usize; 2]),
    /// GPTQ: 4 or 8 bits along the inputs, each of which names its group.
    Gptq(integers::Gptq),
    /// AWQ: 4 bits along the outputs, in the layout `gemm`.
    Awq,
    /// compressed-tensors' `pack-quantized`: 4 or 8 bits along the inputs.
    Packed(integers::Packed),
    /// mxfp4 of experts, as gpt-oss has it.
    Mxfp4,
}

/// A tensor as it lies in a file.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// The tensors that make a weight, by their names behind the module's.
pub type Parts<'a> = BTreeMap<&'static str, Stored<'a>>;

/// A config's own words on how its weights are quantised.
type Stated = Map<String, Value>;

/// What is found there, or why it is not read.
type Found<T> = std::result::Result<T, String>;

impl Method {
    /// Of a `config.json`: nothing if no weight is quantised. Keys that are ignored say nothing.
    ///
    /// # Errors
    /// A way that is not read, by its name.
    pub fn of(config: &Map<String, Value>, ignored: &[String]) -> Result<Option<Method>> {
        let stated = KEYS.iter().filter(|path| !ignored.iter().any(|i| i == *path));
        let Some(how) = stated.filter_map(|path| value_at(config, path)?.1.as_object()).find(|how| !how.is_empty())
        else {
            return Ok(None);
        };
        let load_in = ["load_in_4bit", "load_in_8bit"].map(|key| how.get(key).and_then(Value::as_bool));
        if load_in.iter().any(Option::is_some) && !load_in.contains(&Some(true)) {
            return Ok(None);
        }
        let by_key = if load_in.contains(&Some(true)) { "bitsandbytes" } else { "in an unknown way" };
        let method = how.get("quant_method").and_then(Value::as_str).unwrap_or(by_key);
        let found = match method {
            "bitsandbytes" if load_in[1] == Some(true) => Err("its 8 bits are int8 with outliers apart".to_owned()),
            "bitsandbytes" => Ok(Method::Bitsandbytes),
            "fp8" => scaled::fine_grained(how),
            "compressed-tensors" => compressed::method(how),
            "gptq" => integers::gptq(how),
            "awq" => integers::awq(how),
            "mxfp4" => Ok(Method::Mxfp4),
            _ => Err(READ.to_owned()),
        };
        found.map(Some).map_err(|why| {
            let bits = how.get("bits").and_then(Value::as_u64).map(|bits| format!(", {bits} bits")).unwrap_or_default();
            Error::input(format!("the model is quantised ({method}{bits}): {why}"))
        })
    }

    /// The module of whose weight a tensor is the sign.
    pub fn module(self, name: &str, dtype: Dtype) -> Option<&str> {
        match self {
            Method::Bitsandbytes => bitsandbytes::STATES.iter().find_map(|state| name.strip_suffix(state)),
            Method::Scaled(_) => name.strip_suffix("weight").filter(|_| [Dtype::F8_E4M3, Dtype::I8].contains(&dtype)),
            Method::Gptq(_) | Method::Awq => name.strip_suffix("qweight"),
            Method::Packed(_) => name.strip_suffix("weight_packed"),
            Method::Mxfp4 => return name.strip_suffix("_blocks"),
        }
        .filter(|module| module.ends_with('.'))
    }

    /// What the weight is named behind the module's name: nothing where it is a parameter of experts.
    pub fn weight(self) -> &'static str {
        if self == Method::Mxfp4 { "" } else { "weight" }
    }

    /// What a weight's tensors are named behind the module's name, as far as they are there.
    pub fn parts(self) -> &'static [&'static str] {
        match self {
            Method::Bitsandbytes => bitsandbytes::PARTS,
            Method::Scaled(_) => scaled::PARTS,
            Method::Gptq(_) => &["qweight", "qzeros", "scales", "g_idx"],
            Method::Awq => &["qweight", "qzeros", "scales"],
            Method::Mxfp4 => mxfp4::PARTS,
            Method::Packed(_) => {
                &["weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"]
            }
        }
    }

    /// The weight's shape.
    ///
    /// # Errors
    /// Parts that are missing, or do not fit each other.
    pub fn shape(self, parts: &Parts<'_>) -> Result<Vec<usize>> {
        match self {
            Method::Bitsandbytes => bitsandbytes::shape(parts),
            Method::Scaled(block) => scaled::shape(parts, block),
            Method::Gptq(gptq) => gptq.shape(parts),
            Method::Awq => integers::awq_shape(parts),
            Method::Packed(packed) => packed.shape(parts),
            Method::Mxfp4 => mxfp4::shape(parts),
        }
    }

    /// The type in whose steps the weight's values are.
    ///
    /// # Errors
    /// As [`shape`](Self::shape).
    pub fn dtype(self, parts: &Parts<'_>) -> Result<DType> {
        match self {
            Method::Bitsandbytes => bitsandbytes::dtype(parts),
            Method::Scaled(_) => scaled::dtype(parts),
            Method::Mxfp4 => Ok(DType::BF16),
            Method::Gptq(_) | Method::Awq | Method::Packed(_) => integers::dtype(parts),
        }
    }

    /// The weight's values, in the steps of a type: that in which the tool that wrote them has them.
    ///
    /// # Errors
    /// As [`shape`](Self::shape).
    pub fn values(self, parts: &Parts<'_>) -> Result<(DType, Vec<f32>)> {
        match self {
            Method::Bitsandbytes => bitsandbytes::values(parts),
            Method::Scaled(block) => scaled::values(parts, block),
            Method::Gptq(gptq) => gptq.values(parts),
            Method::Awq => integers::awq_values(parts),
            Method::Packed(packed) => packed.values(parts),
            Method::Mxfp4 => mxfp4::values(parts),
        }
    }

    /// The codes of a weight that is in nf4 as it would be quantised here; scales that were not quantised are.
    ///
    /// # Errors
    /// As [`shape`](Self::shape).
    pub fn nf4(self, parts: &Parts<'_>) -> Result<Option<Nf4>> {
        match self {
            Method::Bitsandbytes => bitsandbytes::nf4(parts),
            _ => Ok(None),
        }
    }

    /// The codes of a weight that is in mxfp4, in rows of the weight transposed.
    ///
    /// # Errors
    /// As [`shape`](Self::shape).
    pub fn mxfp4(self, parts: &Parts<'_>) -> Result<Option<Mxfp4>> {
        (self == Method::Mxfp4).then(|| mxfp4::packed(parts)).transpose()
    }

    /// What matrices can be kept as with the very values that they have in bf16.
    pub fn kept(self) -> Option<Quantization> {
        (self == Method::Mxfp4).then_some(Quantization::Mxfp4)
    }
}

/// What is read, for the one whose is not.
const READ: &str = "read are 4 bits of bitsandbytes, fp8 of DeepSeek, compressed-tensors, GPTQ, AWQ and mxfp4";

impl Stored<'_> {
    /// Which of its numbers is the first that is NaN or infinite.
    pub fn first_not_finite(&self) -> Option<usize> {
        // The numbers whose exponent's bits are all set.
        let two = |bits: u16| self.bytes.as_chunks().0.iter().position(|b| u16::from_le_bytes(*b) & bits == bits);
        match self.dtype {
            Dtype::F32 => {
                let is = |b: &[u8; 4]| u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000;
                self.bytes.as_chunks().0.iter().position(is)
            }
            Dtype::BF16 => two(0x7f80),
            Dtype::F16 => two(0x7c00),
            _ => None,
        }
    }

    fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its values, of bf16, f16 or f32.
    fn floats(&self) -> Result<Vec<f32>> {
        let (two, four) = (self.bytes.as_chunks().0.iter(), self.bytes.as_chunks().0.iter());
        match self.dtype {
            Dtype::F32 => Ok(four.map(|b| f32::from_le_bytes(*b)).collect()),
            Dtype::BF16 => Ok(two.map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
            Dtype::F16 => Ok(two.map(|b| f16::from_le_bytes(*b).to_f32()).collect()),
            other => Err(Error::input(format!("its scales are of type {other:?}; bf16, f16 and f32 are read"))),
        }
    }

    /// Its words of 32 bits.
    fn words(&self) -> Result<Vec<u32>> {
        match self.dtype {
            Dtype::I32 | Dtype::U32 => Ok(self.bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()),
            other => Err(Error::input(format!("its codes are of type {other:?}; words of 32 bits are read"))),
        }
    }
}

/// A part that has to be there.
fn part<'a>(parts: &Parts<'a>, name: &str) -> Result<Stored<'a>> {
    parts.get(name).copied().ok_or_else(|| Error::input(format!("its tensor '{name}' is missing")))
}

fn misfit(name: &str, part: Stored<'_>, weight: &[usize]) -> Error {
    Error::input(format!("its tensor '{name}' has shape {:?}, which is not for a weight of {weight:?}", part.shape))
}

/// A value in the steps of a type.
fn rounded(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Values as bytes of a type in whose steps they are.
pub fn bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}
