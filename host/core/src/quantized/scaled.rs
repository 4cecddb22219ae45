//! Codes of a byte, e4m3 or int8, with scales: of blocks (DeepSeek-V3, section 3.3.2; transformers' `FineGrainedFP8Config`), of rows, or of
//! the whole matrix (compressed-tensors). A value is its code times its scale, in bf16, or in f16 where the scales are.

use candle_core::DType;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Value;

use super::{Found, Method, Parts, Stated, Stored, misfit, part, rounded};
use crate::error::{Error, Result};
use crate::fp8;

/// The weight, its scales by one of their names, and what is of activations and the KV cache.
pub(super) const PARTS: &[&str] =
    &["weight", SCALES[0], SCALES[1], "input_scale", "activation_scale", "k_scale", "v_scale"];

/// Of DeepSeek and transformers; of compressed-tensors.
const SCALES: [&str; 2] = ["weight_scale_inv", "weight_scale"];

/// Blocks where nothing is said of them.
const BLOCK: [usize; 2] = [128, 128];

pub(super) fn fine_grained(how: &Stated) -> Found<Method> {
    match how.get("fmt").and_then(Value::as_str) {
        None | Some("e4m3") => Ok(Method::Scaled(block(how.get("weight_block_size"))?)),
        Some(other) => Err(format!("fmt is {other}; e4m3 is read")),
    }
}

/// Of the weights of a group of modules of compressed-tensors: fp8, or int8, whose codes have scales just so.
pub(super) fn compressed(weights: &Value) -> Found<Method> {
    let text = |key: &str| weights.get(key).and_then(Value::as_str).unwrap_or_default();
    let bits = weights.get("num_bits").and_then(Value::as_u64).unwrap_or_default();
    let symmetric = weights.get("symmetric").and_then(Value::as_bool) != Some(false);
    let (kind, strategy) = (text("type"), text("strategy"));
    if !["float", "int"].contains(&kind)
        || bits != 8
        || !symmetric
        || !["tensor", "channel", "block"].contains(&strategy)
    {
        let zeros = if symmetric { "" } else { " with zeros" };
        return Err(format!(
            "weights are {kind} of {bits} bits by {strategy}{zeros}; 8 by tensor, channel or block without are read"
        ));
    }
    Ok(Method::Scaled(block(weights.get("block_structure").filter(|_| strategy == "block"))?))
}

fn block(stated: Option<&Value>) -> Found<[usize; 2]> {
    let Some(stated) = stated.filter(|stated| !stated.is_null()) else { return Ok(BLOCK) };
    let sides: Vec<usize> =
        stated.as_array().into_iter().flatten().filter_map(|n| Some(n.as_u64()? as usize)).collect();
    sides.try_into().ok().filter(|sides: &[usize; 2]| !sides.contains(&0)).ok_or(format!("blocks of {stated}"))
}

fn scales<'a>(parts: &Parts<'a>) -> Result<(&'static str, Stored<'a>)> {
    let found = SCALES.iter().find_map(|name| Some((*name, *parts.get(name)?)));
    found.ok_or_else(|| Error::input("its tensor 'weight_scale_inv' or 'weight_scale' is missing"))
}

/// Rows and columns of which a scale is.
fn of_scale(parts: &Parts<'_>, block: [usize; 2]) -> Result<[usize; 2]> {
    let (weight, (name, scales)) = (part(parts, "weight")?, scales(parts)?);
    let &[rows, columns] = weight.shape else {
        return Err(Error::input(format!("is quantised and has shape {:?}; matrices are read", weight.shape)));
    };
    match scales.shape {
        [] | [1] | [1, 1] => Ok([rows, columns]),
        [count] | [count, 1] if *count == rows => Ok([1, columns]),
        [down, across] if [*down, *across] == [rows.div_ceil(block[0]), columns.div_ceil(block[1])] => Ok(block),
        _ => Err(misfit(name, scales, weight.shape)),
    }
}

pub(super) fn shape(parts: &Parts<'_>, block: [usize; 2]) -> Result<Vec<usize>> {
    of_scale(parts, block)?;
    Ok(part(parts, "weight")?.shape.to_vec())
}

pub(super) fn dtype(parts: &Parts<'_>) -> Result<DType> {
    Ok(if scales(parts)?.1.dtype == Dtype::F16 { DType::F16 } else { DType::BF16 })
}

pub(super) fn values(parts: &Parts<'_>, block: [usize; 2]) -> Result<(DType, Vec<f32>)> {
    let [down, across] = of_scale(parts, block)?;
    let (codes, (_, stored)) = (part(parts, "weight")?, scales(parts)?);
    let (dtype, scales, columns) = (dtype(parts)?, stored.floats()?, codes.shape[1].max(1));
    let mut values = vec![0.0; codes.bytes.len()];
    let rows = values.par_chunks_mut(columns).zip(codes.bytes.par_chunks(columns)).enumerate();
    let integers = codes.dtype == Dtype::I8;
    let of = |code: u8| if integers { f32::from(code as i8) } else { fp8::VALUES[usize::from(code)] };
    rows.for_each(|(row, (values, codes))| {
        let scales = &scales[row / down * columns.div_ceil(across)..];
        for ((values, codes), scale) in values.chunks_mut(across).zip(codes.chunks(across)).zip(scales) {
            values.iter_mut().zip(codes).for_each(|(to, code)| *to = rounded(dtype, of(*code) * scale));
        }
    });
    Ok((dtype, values))
}
