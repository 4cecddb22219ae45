//! nf4: four bits a weight, as bitsandbytes has it for QLoRA (arXiv 2305.14314). Every 64 weights have a scale, their largest
//! magnitude, and a weight is the nearest of 16 quantiles of a normal distribution times that. The scales are quantised in turn
//! ("double quantisation"): what they differ by from their mean, in 8 bits, in blocks of 256.
//!
//! Codes and rounding are those of bitsandbytes' CUDA kernels, with two liberties: the mean of the scales is rounded once, where
//! torch rounds as it adds up, in an order that depends on the device; and a reciprocal is exact to half a bit, where
//! theirs is the processor's approximation.

use half::bf16;
use rayon::prelude::*;

/// Weights that share a scale.
pub const BLOCK: usize = 64;

/// Scales that share a scale.
pub const SCALE_BLOCK: usize = 256;

/// What a code of four bits stands for. The values are those of bitsandbytes, `get_4bit_type("nf4")`.
pub const VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// What a code of eight bits stands for: bitsandbytes' signed dynamic map, `create_dynamic_map()`. Its seven decades have 1, 2,
/// 4, … 64 values of either sign; beside them are 0, at 127, and 1, at 255.
pub const SCALES: [f32; 256] = dynamic_map();

/// Between which of the values a number goes up to the next.
const BOUNDS: [f32; 15] = midpoints(&VALUES);
const SCALE_BOUNDS: [f32; 255] = midpoints(&SCALES);

/// The code of zero in [`SCALES`].
const ZERO: usize = 127;

/// Blocks that are worth a thread's while.
const AT_ONCE: usize = 256;

/// A tensor in nf4.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4 {
    /// Two values a byte, the first in the high half; an odd number of them ends with the code of zero.
    pub codes: Vec<u8>,
    /// Of every block, its scale's code.
    pub scales: Vec<u8>,
    /// Of every [`SCALE_BLOCK`] scales, their scale.
    pub scale_scales: Vec<f32>,
    /// The mean of the scales.
    pub offset: f32,
}

const fn dynamic_map() -> [f32; 256] {
    const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut map = [0.0; 256];
    map[255] = 1.0;
    let (mut at, mut decade) = (1, 0);
    while decade < DECADES.len() {
        let (steps, mut step) = (1 << decade, 0);
        while step < steps {
            // The middle of a step from 0.1 to 1.
            let value = DECADES[decade] * ((boundary(step, steps) + boundary(step + 1, steps)) / 2.0);
            map[ZERO + at] = value;
            map[ZERO - at] = -value;
            at += 1;
            step += 1;
        }
        decade += 1;
    }
    map
}

/// As torch's linspace from 0.1 to 1 has it: counted from the end that is nearer, rounded once.
const fn boundary(at: usize, steps: usize) -> f32 {
    let step = ((1.0 - 0.1_f32) / steps as f32) as f64;
    let value =
        if at < steps.div_ceil(2) { 0.1_f32 as f64 + step * at as f64 } else { 1.0 - step * (steps - at) as f64 };
    value as f32
}

const fn midpoints<const N: usize, const M: usize>(values: &[f32; N]) -> [f32; M] {
    let mut all = [0.0; M];
    let mut at = 0;
    while at < M {
        all[at] = (values[at] + values[at + 1]) / 2.0;
        at += 1;
    }
    all
}

/// Quantises a tensor's values, in the order in which they lie.
pub fn quantize(values: &[f32]) -> Nf4 {
    let mut codes = vec![0; values.len().div_ceil(2)];
    let mut scales = vec![0.0; values.len().div_ceil(BLOCK)];
    let parts = values.par_chunks(AT_ONCE * BLOCK).zip(codes.par_chunks_mut(AT_ONCE * BLOCK / 2));
    parts.zip(scales.par_chunks_mut(AT_ONCE)).for_each(|((values, codes), scales)| {
        for ((values, codes), scale) in values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / 2)).zip(scales) {
            *scale = quantize_block(values, codes);
        }
    });
    Nf4::of_scales(codes, &scales)
}

/// The scale of a block, and its codes.
fn quantize_block(values: &[f32], codes: &mut [u8]) -> f32 {
    let scale = largest(values);
    let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let (mut normed, mut each) = ([0.0; BLOCK], [0_u32; BLOCK]);
    normed.iter_mut().zip(values).for_each(|(normed, value)| *normed = value * factor);
    // A search would compare less, but not many values at once.
    for bound in BOUNDS {
        each.iter_mut().zip(normed).for_each(|(code, value)| *code += u32::from(value > bound));
    }
    codes.iter_mut().zip(each.as_chunks().0).for_each(|(byte, [high, low])| *byte = (high << 4 | low) as u8);
    scale
}

/// The largest magnitude; NaN where one is. By their bits: those of NaN are the highest.
fn largest(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().map(|value| value.abs().to_bits()).max().unwrap_or(0))
}

impl Nf4 {
    /// Of codes whose blocks have these scales, which are quantised.
    pub fn of_scales(codes: Vec<u8>, scales: &[f32]) -> Nf4 {
        let sum: f64 = scales.iter().map(|scale| f64::from(*scale)).sum();
        let offset = (sum / scales.len().max(1) as f64) as f32;
        let mut own = vec![0; scales.len()];
        let parts = scales.par_chunks(SCALE_BLOCK).zip(own.par_chunks_mut(SCALE_BLOCK));
        let scale_scales = parts.map(|(scales, own)| {
            let mut rest = [0.0; SCALE_BLOCK];
            rest.iter_mut().zip(scales).for_each(|(rest, scale)| *rest = scale - offset);
            let scale = largest(&rest);
            let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            own.iter_mut().zip(rest).for_each(|(code, rest)| *code = scale_code(rest * factor));
            scale
        });
        Nf4 { scale_scales: scale_scales.collect(), codes, scales: own, offset }
    }

    /// The values, in bf16's steps, as bitsandbytes has them for a model in bf16.
    pub fn dequantize(&self, to: &mut [f32]) {
        to.par_chunks_mut(AT_ONCE * BLOCK).enumerate().for_each(|(part, to)| {
            for (block, to) in to.chunks_mut(BLOCK).enumerate() {
                self.dequantize_block(part * AT_ONCE + block, to);
            }
        });
    }

    fn dequantize_block(&self, block: usize, to: &mut [f32]) {
        let scale = self.scale(block);
        let values = VALUES.map(|value| bf16::from_f32(value * scale).to_f32());
        let codes = &self.codes[block * BLOCK / 2..];
        for (to, code) in to.chunks_mut(2).zip(codes) {
            to[0] = values[usize::from(code >> 4)];
            if let Some(to) = to.get_mut(1) {
                *to = values[usize::from(code & 15)];
            }
        }
    }

    /// The scale of a block.
    pub fn scale(&self, block: usize) -> f32 {
        SCALES[usize::from(self.scales[block])] * self.scale_scales[block / SCALE_BLOCK] + self.offset
    }

    /// All of it as bytes: codes, scales, their scales, the offset.
    pub fn to_bytes(&self) -> Vec<u8> {
        let floats = self.scale_scales.iter().chain([&self.offset]).flat_map(|value| value.to_le_bytes());
        self.codes.iter().chain(&self.scales).copied().chain(floats).collect()
    }

    /// From the [bytes](Self::to_bytes) of so many values.
    pub fn of_bytes(values: usize, bytes: &[u8]) -> Nf4 {
        let (codes, rest) = bytes.split_at(values.div_ceil(2));
        let (scales, floats) = rest.split_at(values.div_ceil(BLOCK));
        let floats = floats.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let mut floats: Vec<f32> = floats.take(scales.len().div_ceil(SCALE_BLOCK) + 1).collect();
        let offset = floats.pop().unwrap_or(0.0);
        Nf4 { codes: codes.to_vec(), scales: scales.to_vec(), scale_scales: floats, offset }
    }

    /// Bytes of so many values.
    pub const fn bytes(values: usize) -> usize {
        let blocks = values.div_ceil(BLOCK);
        values.div_ceil(2) + blocks + blocks.div_ceil(SCALE_BLOCK) * 4 + 4
    }
}

/// The nearest of [`SCALES`]; of two that are as near, that of the even code, where bitsandbytes' search ends.
fn scale_code(value: f32) -> u8 {
    let code = SCALE_BOUNDS.partition_point(|bound| *bound < value);
    let tie = SCALE_BOUNDS.get(code) == Some(&value) && code % 2 == 1;
    (code + usize::from(tie)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_rise_and_zero_is_exact() {
        assert!(VALUES.is_sorted_by(|a, b| a < b) && SCALES.is_sorted_by(|a, b| a < b));
        assert_eq!((VALUES[7], SCALES[ZERO], SCALES[255]), (0.0, 0.0, 1.0));
    }

    #[test]
    fn of_two_scales_that_are_as_near_the_even_code_is_taken() {
        for (at, bound) in SCALE_BOUNDS.iter().enumerate() {
            let even = at + at % 2;
            assert_eq!(usize::from(scale_code(*bound)), even, "{bound}");
            assert_eq!(usize::from(scale_code(bound.next_down())), at, "below {bound}");
            assert_eq!(usize::from(scale_code(bound.next_up())), at + 1, "above {bound}");
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        let mut back = [0.0; 70];
        quantize(&std::array::from_fn::<f32, 70, _>(|at| if at == 3 { f32::NAN } else { 0.5 })).dequantize(&mut back);
        assert!(back.iter().any(|value| value.is_nan()));
    }

    #[test]
    fn an_odd_number_of_values_and_zeros() {
        let values: Vec<f32> = (0..131).map(|at| if at < 64 { 0.0 } else { 1.0 - at as f32 / 100.0 }).collect();
        let nf4 = quantize(&values);
        assert_eq!((nf4.codes.len(), nf4.scales.len(), nf4.codes[65] & 15), (66, 3, 7));
        assert_eq!(Nf4::bytes(131), nf4.to_bytes().len());
        assert_eq!(Nf4::of_bytes(131, &nf4.to_bytes()), nf4);
        let mut back = vec![1.0; 131];
        nf4.dequantize(&mut back);
        assert!(back[..64].iter().all(|value| *value == 0.0));
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 0.07;
        assert!(back.iter().zip(&values).all(near), "{back:?}");
    }
}
