//! mxfp4 of OCP's Microscaling Formats (version 1.0, section 5.3): e2m1, two a byte, the first one in the low bits. Every 32 numbers of
//! a row have a scale that is a power of two, so that bf16 has every value exactly. gpt-oss is published so.
//!
//! What is rounded here is rounded as transformers' quantiser does it, `downcast_to_mxfp` of triton_kernels.

use rayon::prelude::*;

/// Numbers of a row that share a scale; the last ones of a row may be fewer.
pub const BLOCK: usize = 32;

/// Bytes of the codes of a block.
pub const BYTES: usize = BLOCK / 2;

/// What a code of four bits stands for.
pub const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Between which of the magnitudes a number goes up to the next; one in the middle does.
const BOUNDS: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];

/// The largest magnitude.
const MOST: f32 = 6.0;

/// Rows of a matrix in mxfp4.
#[derive(Clone, Debug, PartialEq)]
pub struct Mxfp4 {
    /// [`BYTES`] for every block of a row, row by row; codes of zero fill up the last block.
    pub codes: Vec<u8>,
    /// Of every block, its scale's exponent plus 127; 255 is NaN.
    pub scales: Vec<u8>,
}

/// Quantises rows of so many columns.
pub fn quantize_rows(values: &[f32], columns: usize) -> Mxfp4 {
    let (columns, blocks) = (columns.max(1), columns.max(1).div_ceil(BLOCK));
    let count = values.len() / columns * blocks;
    let (mut codes, mut scales) = (vec![0; count * BYTES], vec![0; count]);
    let rows = values.par_chunks(columns).zip(codes.par_chunks_mut(blocks * BYTES));
    rows.zip(scales.par_chunks_mut(blocks)).for_each(|((values, codes), scales)| {
        for ((values, codes), scale) in values.chunks(BLOCK).zip(codes.chunks_mut(BYTES)).zip(scales) {
            *scale = quantize_block(values, codes);
        }
    });
    Mxfp4 { codes, scales }
}

/// The scale of a block, so that its largest magnitude is not beyond the largest value, and its codes.
fn quantize_block(values: &[f32], codes: &mut [u8]) -> u8 {
    // By their bits, of which those of NaN are the highest.
    let largest = f32::from_bits(values.iter().map(|value| value.abs().to_bits()).max().unwrap_or(0));
    // The next power of two, unless it is one.
    let exponent = (((largest / MOST).to_bits() + 0x7f_ffff) >> 23).min(255) as u8;
    let scale = scale(exponent);
    for (to, pair) in codes.iter_mut().zip(values.chunks(2)) {
        *to = pair.iter().enumerate().fold(0, |byte, (at, value)| byte | code(value / scale) << (4 * at));
    }
    exponent
}

fn code(value: f32) -> u8 {
    let magnitude = BOUNDS.iter().filter(|bound| value.abs() >= **bound).count() as u8;
    magnitude | if value.is_sign_negative() { 8 } else { 0 }
}

/// Two to the power of an exponent plus 127; the last one is NaN.
pub fn scale(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// The values of so many columns a row that codes and scales stand for.
pub fn dequantize_rows(codes: &[u8], scales: &[u8], columns: usize, to: &mut [f32]) {
    let (columns, blocks) = (columns.max(1), columns.max(1).div_ceil(BLOCK));
    let rows = codes.par_chunks(blocks * BYTES).zip(scales.par_chunks(blocks));
    to.par_chunks_mut(columns).zip(rows).for_each(|(to, (codes, scales))| {
        for ((to, codes), exponent) in to.chunks_mut(BLOCK).zip(codes.chunks(BYTES)).zip(scales) {
            let scale = scale(*exponent);
            for (to, byte) in to.chunks_mut(2).zip(codes) {
                let codes = [byte & 15, byte >> 4];
                to.iter_mut().zip(codes).for_each(|(to, code)| *to = VALUES[usize::from(code)] * scale);
            }
        }
    });
}

impl Mxfp4 {
    /// All of it as bytes: codes, then scales.
    pub fn to_bytes(&self) -> Vec<u8> {
        [self.codes.as_slice(), &self.scales].concat()
    }
}

/// Bytes of so many rows of so many columns.
pub const fn bytes(rows: usize, columns: usize) -> usize {
    rows * columns.div_ceil(BLOCK) * (BYTES + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By definition: the least power of two with which nothing is beyond 6, and the nearest value, of two the larger one.
    #[test]
    fn a_number_becomes_the_nearest_value_of_its_block() {
        let values: Vec<f32> =
            (0..3 * 40).map(|at| ((at * 37 % 101) as f32 - 50.0) * 0.013 * (1 + at / 40) as f32).collect();
        let packed = quantize_rows(&values, 40);
        assert_eq!((packed.codes.len(), packed.scales.len(), bytes(3, 40)), (96, 6, packed.to_bytes().len()));
        let mut back = vec![f32::NAN; values.len()];
        dequantize_rows(&packed.codes, &packed.scales, 40, &mut back);
        for (row, (values, back)) in values.chunks(40).zip(back.chunks(40)).enumerate() {
            for (block, (values, back)) in values.chunks(BLOCK).zip(back.chunks(BLOCK)).enumerate() {
                let own = scale(packed.scales[row * 2 + block]);
                let largest = values.iter().fold(0.0, |most: f32, v| most.max(v.abs()));
                assert!(largest <= 6.0 * own && largest > 3.0 * own, "{largest} {own}");
                for (value, found) in values.iter().zip(back) {
                    let least = VALUES.iter().map(|v| (v * own - value).abs()).fold(f32::MAX, f32::min);
                    assert_eq!((found - value).abs(), least, "{value} {found}");
                }
            }
        }
        for (at, bound) in BOUNDS.into_iter().enumerate() {
            assert_eq!([bound, bound.next_down(), -bound].map(code), [at as u8 + 1, at as u8, at as u8 + 9]);
        }
    }

    #[test]
    fn what_has_values_already_keeps_them() {
        let codes: Vec<u8> = (0..64 * 16).map(|at| (at * 89 % 251) as u8).collect();
        let scales: Vec<u8> = (0..64).map(|at| 90 + at as u8).collect();
        let [mut values, mut again] = [(); 2].map(|()| vec![0.0; 64 * 32]);
        dequantize_rows(&codes, &scales, 64, &mut values);
        let packed = quantize_rows(&values, 64);
        dequantize_rows(&packed.codes, &packed.scales, 64, &mut again);
        assert_eq!(values, again);
    }

    #[test]
    fn zeros_stay_and_what_is_not_a_number() {
        let mut values = [0.0; 70];
        (values[3], values[40]) = (f32::NAN, -1e-41);
        let packed = quantize_rows(&values, 70);
        let mut back = [1.0; 70];
        dequantize_rows(&packed.codes, &packed.scales, 70, &mut back);
        assert!(back[..32].iter().all(|value| value.is_nan()), "{back:?}");
        assert!(back[32..].iter().all(|value| value.abs() < 1e-38), "{back:?}");
    }
}
