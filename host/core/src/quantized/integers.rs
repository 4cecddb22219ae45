//! Integers in words of 32 bits, groups of inputs with a scale and a zero for every output: GPTQ (arXiv 2210.17323), as AutoGPTQ and
//! GPTQModel write it; AWQ (arXiv 2306.00978), as AutoAWQ does in its layout `gemm`; compressed-tensors' `pack-quantized`. A value is
//! `scale · (code − zero)`, in the scale's own type.

use candle_core::DType;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Value;

use super::{Found, Method, Parts, Stated, Stored, misfit, part, rounded};
use crate::error::{Error, Result};

/// How a GPTQ checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gptq {
    bits: usize,
    /// Inputs of a group, where inputs do not name theirs; all of them are one group otherwise.
    group: Option<usize>,
    /// What a zero is more than its code: 1, unless the format is `gptq_v2`.
    more: u32,
}

/// How a checkpoint of compressed-tensors is packed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Packed {
    bits: usize,
    /// As in [`Gptq`].
    group: Option<usize>,
    /// Whether zeros are written; else all are the middle of the codes.
    zeros: bool,
}

/// Outputs that are worth a thread's while: whole words of either kind.
const AT_ONCE: usize = 64;

/// The output that each nibble of an AWQ word is of.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

pub(super) fn gptq(how: &Stated) -> Found<Method> {
    let bits = how.get("bits").and_then(Value::as_u64).unwrap_or_default() as usize;
    if ![4, 8].contains(&bits) {
        return Err("4 and 8 bits are read".into());
    }
    let format = how.get("checkpoint_format").or_else(|| how.get("format")).and_then(Value::as_str).unwrap_or("gptq");
    let more = match format {
        "gptq" => 1,
        "gptq_v2" => 0,
        other => return Err(format!("its format is {other}; gptq and gptq_v2 are read")),
    };
    if how.get("dynamic").is_some_and(|dynamic| dynamic.as_object().is_some_and(|rules| !rules.is_empty())) {
        return Err("bits of each module ('dynamic') are not read".into());
    }
    let group = how.get("group_size").and_then(Value::as_u64).map(|n| n as usize).filter(|n| *n > 0);
    Ok(Method::Gptq(Gptq { bits, group, more }))
}

pub(super) fn awq(how: &Stated) -> Found<Method> {
    let text = |key: &str, usual: &'static str| how.get(key).and_then(Value::as_str).unwrap_or(usual).to_lowercase();
    let bits = how.get("bits").or_else(|| how.get("w_bit")).and_then(Value::as_u64).unwrap_or(4);
    match (bits, text("version", "gemm").as_str()) {
        (4, "gemm") => Ok(Method::Awq),
        (4, version) => Err(format!("its layout is {version}; gemm is read")),
        _ => Err("4 bits are read".into()),
    }
}

/// Of the weights of a group of modules.
pub(super) fn packed(weights: &Value) -> Found<Method> {
    let text = |key: &str| weights.get(key).and_then(Value::as_str).unwrap_or_default();
    let number = |key: &str| weights.get(key).and_then(Value::as_u64).map(|n| n as usize).filter(|n| *n > 0);
    let (bits, strategy) = (number("num_bits").unwrap_or_default(), text("strategy"));
    if text("type") != "int" || ![4, 8].contains(&bits) || !["group", "channel"].contains(&strategy) {
        let kind = text("type");
        return Err(format!(
            "weights are {kind} of {bits} bits by {strategy}; int of 4 or 8 by group or channel is read"
        ));
    }
    let zeros = weights.get("symmetric").and_then(Value::as_bool) == Some(false);
    Ok(Method::Packed(Packed { bits, group: number("group_size").filter(|_| strategy == "group"), zeros }))
}

pub(super) fn dtype(parts: &Parts<'_>) -> Result<DType> {
    Ok(match parts.get("weight_scale").map_or_else(|| part(parts, "scales"), |scales| Ok(*scales))?.dtype {
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => DType::F32,
    })
}

impl Gptq {
    pub(super) fn shape(self, parts: &Parts<'_>) -> Result<Vec<usize>> {
        let (codes, zeros, scales) = (part(parts, "qweight")?, part(parts, "qzeros")?, part(parts, "scales")?);
        let each = 32 / self.bits;
        let &[words, outputs] = codes.shape else { return Err(misfit("qweight", codes, &[])) };
        let shape = vec![outputs, words * each];
        match (scales.shape, zeros.shape) {
            (&[groups, columns], &[rows, words])
                if columns == outputs && rows == groups && groups > 0 && words == outputs.div_ceil(each) =>
            {
                Ok(shape)
            }
            (&[_, columns], _) if columns == outputs => Err(misfit("qzeros", zeros, &shape)),
            _ => Err(misfit("scales", scales, &shape)),
        }
    }

    pub(super) fn values(self, parts: &Parts<'_>) -> Result<(DType, Vec<f32>)> {
        let shape = self.shape(parts)?;
        let (outputs, inputs) = (shape[0], shape[1]);
        let (codes, zeros, stored) = (part(parts, "qweight")?, part(parts, "qzeros")?, part(parts, "scales")?);
        let (codes, zeros, scales, dtype) = (codes.words()?, zeros.words()?, stored.floats()?, dtype(parts)?);
        let groups = groups(parts.get("g_idx"), self.group, inputs, stored.shape[0])?;
        let (each, mask) = (32 / self.bits, u32::MAX >> (32 - self.bits));
        let across = outputs.div_ceil(each);
        let mut values = vec![0.0; outputs * inputs];
        values.par_chunks_mut(AT_ONCE * inputs.max(1)).enumerate().for_each(|(chunk, to)| {
            for (row, words) in codes.chunks(outputs.max(1)).enumerate() {
                for (own, to) in to.chunks_mut(inputs).enumerate() {
                    let output = chunk * AT_ONCE + own;
                    for at in 0..each {
                        let input = row * each + at;
                        let (code, group) = (words[output] >> (at * self.bits) & mask, groups[input]);
                        let zero = zeros[group * across + output / each] >> (output % each * self.bits) & mask;
                        let code = code as f32 - (zero + self.more) as f32;
                        to[input] = rounded(dtype, scales[group * outputs + output] * code);
                    }
                }
            }
        });
        Ok((dtype, values))
    }
}

/// The group of every input: that which it names, or those of so many inputs one after the other.
fn groups(index: Option<&Stored<'_>>, size: Option<usize>, inputs: usize, count: usize) -> Result<Vec<usize>> {
    let groups: Vec<usize> = match index {
        Some(index) => index.words()?.iter().map(|group| *group as usize).collect(),
        None => (0..inputs).map(|input| input / size.unwrap_or(inputs)).collect(),
    };
    match groups.len() == inputs && groups.iter().all(|group| *group < count) {
        true => Ok(groups),
        false => Err(Error::input(format!("its groups are not those of {inputs} inputs and {count} scales"))),
    }
}

impl Packed {
    pub(super) fn shape(self, parts: &Parts<'_>) -> Result<Vec<usize>> {
        let (codes, scales) = (part(parts, "weight_packed")?, part(parts, "weight_scale")?);
        let shape = part(parts, "weight_shape")?;
        let sides: Vec<usize> = match shape.dtype {
            Dtype::I64 => shape.bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b) as usize).collect(),
            _ => shape.words()?.iter().map(|side| *side as usize).collect(),
        };
        let each = 32 / self.bits;
        let &[outputs, inputs] = sides.as_slice() else { return Err(misfit("weight_shape", shape, &sides)) };
        if codes.shape != [outputs, inputs.div_ceil(each)] {
            return Err(misfit("weight_packed", codes, &sides));
        }
        let &[rows, groups] = scales.shape else { return Err(misfit("weight_scale", scales, &sides)) };
        if rows != outputs || groups == 0 {
            return Err(misfit("weight_scale", scales, &sides));
        }
        if self.zeros {
            let zeros = part(parts, "weight_zero_point")?;
            if zeros.shape != [outputs.div_ceil(each), groups] {
                return Err(misfit("weight_zero_point", zeros, &sides));
            }
        }
        Ok(sides)
    }

    pub(super) fn values(self, parts: &Parts<'_>) -> Result<(DType, Vec<f32>)> {
        let shape = self.shape(parts)?;
        let (outputs, inputs) = (shape[0], shape[1]);
        let (codes, stored, dtype) =
            (part(parts, "weight_packed")?.words()?, part(parts, "weight_scale")?, dtype(parts)?);
        let (scales, count) = (stored.floats()?, stored.shape[1]);
        let zeros = if self.zeros { Some(part(parts, "weight_zero_point")?.words()?) } else { None };
        let groups = groups(parts.get("weight_g_idx"), self.group, inputs, count)?;
        let (each, mask) = (32 / self.bits, u32::MAX >> (32 - self.bits));
        let at = |words: &[u32], place: usize, inside: usize| words[place] >> (inside % each * self.bits) & mask;
        let mut values = vec![0.0; outputs * inputs];
        let rows = values.par_chunks_mut(inputs.max(1)).zip(codes.par_chunks(inputs.div_ceil(each).max(1)));
        rows.enumerate().for_each(|(output, (to, words))| {
            for (input, to) in to.iter_mut().enumerate() {
                let group = groups[input];
                let middle = 1 << (self.bits - 1);
                let zero = zeros.as_ref().map_or(middle, |zeros| at(zeros, output / each * count + group, output));
                let code = at(words, input / each, input) as f32 - zero as f32;
                *to = rounded(dtype, scales[output * count + group] * code);
            }
        });
        Ok((dtype, values))
    }
}

pub(super) fn awq_shape(parts: &Parts<'_>) -> Result<Vec<usize>> {
    let (codes, zeros, scales) = (part(parts, "qweight")?, part(parts, "qzeros")?, part(parts, "scales")?);
    let &[inputs, words] = codes.shape else { return Err(misfit("qweight", codes, &[])) };
    let shape = vec![words * 8, inputs];
    match (scales.shape, zeros.shape) {
        (&[groups, outputs], &[rows, across])
            if outputs == words * 8 && rows == groups && across == words && groups > 0 && inputs % groups == 0 =>
        {
            Ok(shape)
        }
        (&[_, outputs], _) if outputs == words * 8 => Err(misfit("qzeros", zeros, &shape)),
        _ => Err(misfit("scales", scales, &shape)),
    }
}

pub(super) fn awq_values(parts: &Parts<'_>) -> Result<(DType, Vec<f32>)> {
    let shape = awq_shape(parts)?;
    let (outputs, inputs) = (shape[0], shape[1]);
    let (codes, zeros, stored) = (part(parts, "qweight")?, part(parts, "qzeros")?, part(parts, "scales")?);
    let (codes, zeros, scales, dtype) = (codes.words()?, zeros.words()?, stored.floats()?, dtype(parts)?);
    let (across, group) = (outputs / 8, inputs / stored.shape[0]);
    let mut values = vec![0.0; outputs * inputs];
    values.par_chunks_mut(8 * inputs.max(1)).enumerate().for_each(|(word, to)| {
        for (input, codes) in codes.chunks(across).enumerate() {
            let group = input / group;
            for (nibble, output) in AWQ_ORDER.into_iter().enumerate() {
                let [code, zero] = [codes[word], zeros[group * across + word]].map(|w| w >> (4 * nibble) & 15);
                let scale = scales[group * outputs + word * 8 + output];
                to[output * inputs + input] = rounded(dtype, scale * (code as f32 - zero as f32));
            }
        }
    });
    Ok((dtype, values))
}
