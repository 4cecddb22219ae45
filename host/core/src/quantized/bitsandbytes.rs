//! Four bits of bitsandbytes, as its `Params4bit` is saved: codes, two a byte; a scale of every block, or its code with the scale of
//! every block of scales; what codes stand for; and the rest as JSON in a tensor of bytes (`QuantState.as_dict`).

use candle_core::DType;
use rayon::prelude::*;
use serde_json::Value;

use super::{Parts, part, rounded};
use crate::error::{Error, Result};
use crate::nf4::{self, Nf4};

pub(super) const STATES: &[&str] = &["weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"];

pub(super) const PARTS: &[&str] = &[
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    STATES[0],
    STATES[1],
];

/// What the JSON says.
struct State {
    shape: Vec<usize>,
    dtype: DType,
    block: usize,
    /// Of scales that are quantised, their block and their mean.
    nested: Option<(usize, f32)>,
}

fn state(parts: &Parts<'_>) -> Result<State> {
    let text = STATES.iter().find_map(|name| parts.get(name)).map_or(&[][..], |part| part.bytes);
    let wrong = |what: String| Error::input(format!("its quant_state {what}"));
    let state: Value = serde_json::from_slice(text).map_err(|e| wrong(format!("is no JSON: {e}")))?;
    let number = |name: &str| state.get(name).and_then(Value::as_u64).map(|n| n as usize).filter(|n| *n > 0);
    let shape = state.get("shape").and_then(Value::as_array).into_iter().flatten();
    let shape: Vec<usize> = shape.filter_map(|n| Some(n.as_u64()? as usize)).collect();
    let dtype = match state.get("dtype").and_then(Value::as_str) {
        Some("bfloat16") => DType::BF16,
        Some("float16") => DType::F16,
        Some("float32") => DType::F32,
        other => return Err(wrong(format!("says the type {other:?}; bfloat16, float16 and float32 are read"))),
    };
    let block = number("blocksize").ok_or_else(|| wrong("says no blocksize".into()))?;
    let mean = state.get("nested_offset").and_then(Value::as_f64);
    let nested = number("nested_blocksize").zip(mean).map(|(block, mean)| (block, mean as f32));
    let values = shape.iter().try_fold(1_usize, |all, n| all.checked_mul(*n)).unwrap_or(usize::MAX);
    let (codes, scales) = (part(parts, "weight")?.bytes.len(), part(parts, "weight.absmax")?.count());
    if shape.len() != 2 || codes != values.div_ceil(2) || scales != values.div_ceil(block) {
        return Err(wrong(format!("says shape {shape:?} in blocks of {block}, for {codes} bytes and {scales} scales")));
    }
    Ok(State { shape, dtype, block, nested })
}

pub(super) fn shape(parts: &Parts<'_>) -> Result<Vec<usize>> {
    Ok(state(parts)?.shape)
}

pub(super) fn dtype(parts: &Parts<'_>) -> Result<DType> {
    Ok(state(parts)?.dtype)
}

/// The scale of every block.
fn scales(parts: &Parts<'_>, state: &State) -> Result<Vec<f32>> {
    let scales = part(parts, "weight.absmax")?;
    let Some((block, mean)) = state.nested else { return scales.floats() };
    let (map, of) = (part(parts, "weight.nested_quant_map")?.floats()?, part(parts, "weight.nested_absmax")?.floats()?);
    if map.len() != 256 || of.len() != scales.count().div_ceil(block) || scales.bytes.len() != scales.count() {
        return Err(Error::input("its nested scales are not as many as its quant_state says"));
    }
    let scale = |(at, code): (usize, &u8)| map[usize::from(*code)] * of[at / block] + mean;
    Ok(scales.bytes.iter().enumerate().map(scale).collect())
}

pub(super) fn values(parts: &Parts<'_>) -> Result<(DType, Vec<f32>)> {
    let state = state(parts)?;
    let (codes, scales) = (part(parts, "weight")?.bytes, scales(parts, &state)?);
    let map = part(parts, "weight.quant_map")?.floats()?;
    if map.len() != 16 || state.block % 2 != 0 {
        return Err(Error::input(format!("its quant_map has {} values for blocks of {}", map.len(), state.block)));
    }
    let mut values = vec![0.0; state.shape.iter().product()];
    let blocks = values.par_chunks_mut(state.block).zip(codes.par_chunks(state.block / 2)).zip(scales);
    blocks.for_each(|((values, codes), scale)| {
        for (at, value) in values.iter_mut().enumerate() {
            let code = codes[at / 2] >> if at % 2 == 0 { 4 } else { 0 } & 15;
            *value = rounded(state.dtype, map[usize::from(code)] * scale);
        }
    });
    Ok((state.dtype, values))
}

pub(super) fn nf4(parts: &Parts<'_>) -> Result<Option<Nf4>> {
    let state = state(parts)?;
    let same = |name: &str, own: &[f32]| Ok::<_, Error>(part(parts, name)?.floats()? == own);
    if state.block != nf4::BLOCK || !same("weight.quant_map", &nf4::VALUES)? {
        return Ok(None);
    }
    let codes = part(parts, "weight")?.bytes.to_vec();
    match state.nested {
        Some((nf4::SCALE_BLOCK, offset)) if same("weight.nested_quant_map", &nf4::SCALES)? => {
            let scale_scales = part(parts, "weight.nested_absmax")?.floats()?;
            // Their number is checked.
            scales(parts, &state)?;
            Ok(Some(Nf4 { codes, scales: part(parts, "weight.absmax")?.bytes.to_vec(), scale_scales, offset }))
        }
        _ => Ok(Some(Nf4::of_scales(codes, &scales(parts, &state)?))),
    }
}
