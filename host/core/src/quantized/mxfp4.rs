//! Experts in [`mxfp4`](crate::mxfp4) as gpt-oss has them: codes `[experts, outputs, inputs / 32, 16]` in `NAME_blocks`, exponents plus
//! 127 `[experts, outputs, inputs / 32]` in `NAME_scales`. The weight is what transformers makes of them, `[experts, inputs, outputs]` in
//! bf16; codes and scales lie as those of that transposed.

use candle_core::DType;
use rayon::prelude::*;
use safetensors::Dtype;

use super::{Parts, misfit, part};
use crate::error::{Error, Result};
use crate::mxfp4::{BLOCK, BYTES, Mxfp4, VALUES, scale};

pub(super) const PARTS: &[&str] = &["_blocks", "_scales"];

pub(super) fn shape(parts: &Parts<'_>) -> Result<Vec<usize>> {
    let (codes, scales) = (part(parts, "_blocks")?, part(parts, "_scales")?);
    let &[experts, outputs, blocks, BYTES] = codes.shape else {
        return Err(Error::input(format!("its codes have shape {:?}; blocks of 16 bytes are read", codes.shape)));
    };
    if let Some(other) = [codes, scales].iter().find(|part| part.dtype != Dtype::U8) {
        return Err(Error::input(format!("its codes or scales are of type {:?}; bytes are read", other.dtype)));
    }
    match scales.shape == [experts, outputs, blocks] {
        true => Ok(vec![experts, blocks * BLOCK, outputs]),
        false => Err(misfit("_scales", scales, codes.shape)),
    }
}

pub(super) fn values(parts: &Parts<'_>) -> Result<(DType, Vec<f32>)> {
    let shape = shape(parts)?;
    let (inputs, outputs) = (shape[1], shape[2]);
    let (codes, scales) = (part(parts, "_blocks")?.bytes, part(parts, "_scales")?.bytes);
    let mut values = vec![0.0; shape.iter().product()];
    let experts = values.par_chunks_mut((inputs * outputs).max(1)).enumerate();
    experts.for_each(|(expert, values)| {
        for (block, exponent) in
            scales[expert * outputs * inputs / BLOCK..][..outputs * inputs / BLOCK].iter().enumerate()
        {
            let (output, first) = (block * BLOCK / inputs, block * BLOCK % inputs);
            let scale = scale(*exponent);
            let own = &codes[(expert * outputs * inputs / BLOCK + block) * BYTES..][..BYTES];
            for (at, byte) in own.iter().enumerate() {
                let to = (first + 2 * at) * outputs + output;
                values[to] = VALUES[usize::from(byte & 15)] * scale;
                values[to + outputs] = VALUES[usize::from(byte >> 4)] * scale;
            }
        }
    });
    Ok((DType::BF16, values))
}

/// The codes and scales as they lie.
pub(super) fn packed(parts: &Parts<'_>) -> Result<Mxfp4> {
    shape(parts)?;
    let bytes = |name: &str| Ok::<_, Error>(part(parts, name)?.bytes.to_vec());
    Ok(Mxfp4 { codes: bytes("_blocks")?, scales: bytes("_scales")? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::super::Stored;
    use super::*;

    /// The numbers are those of transformers' `convert_moe_packed_tensors`.
    #[test]
    fn values_are_those_of_transformers() {
        let codes: [u8; 96] = [
            37, 235, 140, 72, 255, 137, 203, 133, 79, 192, 144, 129, 204, 71, 237, 252, 134, 25, 178, 20, 254, 101,
            146, 212, 139, 252, 234, 156, 157, 142, 50, 68, 215, 215, 233, 241, 247, 222, 96, 86, 141, 233, 137, 7, 63,
            61, 22, 57, 1, 128, 60, 209, 8, 216, 141, 115, 175, 234, 121, 200, 30, 71, 131, 198, 149, 49, 57, 3, 196,
            24, 241, 43, 76, 26, 52, 80, 109, 115, 41, 210, 15, 64, 196, 25, 111, 226, 215, 135, 26, 153, 104, 22, 9,
            195, 231, 126,
        ];
        let scales = [122, 124, 123, 123, 124, 130];
        let stored = |shape, bytes| Stored { dtype: Dtype::U8, shape, bytes };
        let parts = Parts::from([
            ("_blocks", stored(&[1, 3, 2, 16], &codes[..])),
            ("_scales", stored(&[1, 3, 2], &scales[..])),
        ]);
        assert_eq!(shape(&parts).unwrap(), [1, 64, 3]);
        let (dtype, values) = values(&parts).unwrap();
        assert_eq!(dtype, DType::BF16);
        let first =
            [0.09375, 0.375, 0.375, 0.03125, -0.1875, -0.0625, -0.046875, 0.375, 0.0625, -0.125, -0.1875, 0.1875];
        let others = [-0.0625, -0.03125, 0.125, -0.1875, 0.09375, -0.375, 0.5, 0.03125, -48.0, 0.0, 0.0, 0.0];
        assert_eq!(values[..12], first);
        assert_eq!(values[90..102], others);
        assert_eq!(values.iter().sum::<f32>(), 78.640625);
        assert_eq!(scale(0), 2.0_f32.powi(-127));
        let odd =
            Parts::from([("_blocks", stored(&[1, 3, 2, 16], &codes[..])), ("_scales", stored(&[3, 2], &scales[..]))]);
        assert!(shape(&odd).is_err());
    }
}
