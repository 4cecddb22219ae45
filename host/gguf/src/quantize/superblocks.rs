//! Blocks of 256 values in parts with scales of their own, which are quantised, too. Scales, and minima where there are some, are searched for
//! by weighted least squares around the obvious ones.

use super::{nearest, put_f16};

/// Scales below this are zero.
const TINY: f32 = 1e-15;

/// How scale and minimum of a part are searched for.
struct Search {
    /// The largest code.
    most: i32,
    /// Candidates are `(first + step · i + most) / (max - min)`, of which there are `steps` + 1.
    first: f32,
    step: f32,
    steps: i32,
}

const OF_4_BITS: Search = Search { most: 15, first: -1.0, step: 0.1, steps: 20 };
const OF_5_BITS: Search = Search { most: 31, first: -0.5, step: 0.1, steps: 15 };

/// What was found for a part.
#[derive(Clone, Copy, Default)]
struct Found {
    scale: f32,
    /// The negative of the minimum; 0 where there is none.
    min: f32,
    /// By what the search has multiplied values to find their codes, which ggml keeps where the scale becomes zero afterwards.
    inverse: f32,
    /// What it has taken from them before.
    lowest: f32,
}

/// Scale and minimum with which codes are nearest to the 32 values, by the weights (`ggml-quants.c`, `make_qkx2_quants`).
fn scale_and_min(x: &[f32], weights: &[f32; 32], search: &Search) -> Found {
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (x, w) in x.iter().zip(weights).skip(1) {
        min = if *x < min { *x } else { min };
        max = if *x > max { *x } else { max };
        sum_w += w;
        sum_x += w * x;
    }
    min = if min > 0.0 { 0.0 } else { min };
    if max == min {
        return Found { min: -min, ..Found::default() };
    }
    let code = |x: f32, lowest: f32, inverse: f32| nearest(inverse * (x - lowest)).clamp(0, search.most) as f32;
    let inverse = search.most as f32 / (max - min);
    let mut found = Found { scale: 1.0 / inverse, min: -min, inverse, lowest: min };
    let error = |scale: f32, min: f32, lowest: f32, inverse: f32| {
        x.iter().zip(weights).fold(0.0_f32, |sum, (x, w)| {
            let off = scale * code(*x, lowest, inverse) + min - x;
            sum + w * (off * off)
        })
    };
    let mut best = error(found.scale, min, min, inverse);
    for i in 0..=search.steps {
        // Candidates go from the minimum that was the best so far.
        let inverse = (search.first + search.step * i as f32 + search.most as f32) / (max - min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0_f32, 0.0_f32, 0.0_f32);
        for (x, w) in x.iter().zip(weights) {
            let l = code(*x, min, inverse);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_min > 0.0 {
                (this_min, this_scale) = (0.0, sum_xl / sum_l2);
            }
            let this = error(this_scale, this_min, min, inverse);
            if this < best {
                found = Found { scale: this_scale, min: -this_min, inverse, lowest: min };
                (best, min) = (this, this_min);
            }
        }
    }
    found
}

/// Codes of 256 values with a scale and a minimum for every 32 of them, after their header: scale of scales and of minima in f16, eight of
/// either in 6 bits.
fn coded(x: &[f32], search: &Search, header: &mut [u8]) -> [u8; 256] {
    let mut found = [Found::default(); 8];
    for (found, x) in found.iter_mut().zip(x.chunks_exact(32)) {
        let mean = (x.iter().fold(0.0_f32, |sum, x| sum + x * x) / 32.0).sqrt();
        let weights = std::array::from_fn(|at| mean + x[at].abs());
        *found = scale_and_min(x, &weights, search);
    }
    let (scales, mins) = (found.map(|found| found.scale), found.map(|found| found.min));
    let largest = |values: &[f32; 8]| values.iter().fold(0.0_f32, |most, v| if *v > most { *v } else { most });
    let (max_scale, max_min) = (largest(&scales), largest(&mins));
    let in_6_bits = |value: f32, most: f32| {
        let inverse = if most > 0.0 { 63.0 / most } else { 0.0 };
        (nearest(inverse * value) as u8).min(63)
    };
    let scales = scales.map(|scale| in_6_bits(scale, max_scale));
    let mins = mins.map(|min| in_6_bits(min, max_min));
    let d = put_f16(max_scale / 63.0, &mut header[..2]);
    let d_min = put_f16(max_min / 63.0, &mut header[2..4]);
    let packed = &mut header[4..16];
    for part in 0..4 {
        packed[part] = scales[part] | (scales[part + 4] >> 4) << 6;
        packed[part + 4] = mins[part] | (mins[part + 4] >> 4) << 6;
        packed[part + 8] = (scales[part + 4] & 15) | (mins[part + 4] & 15) << 4;
    }
    let mut codes = [0; 256];
    for (part, (x, codes)) in x.chunks_exact(32).zip(codes.chunks_exact_mut(32)).enumerate() {
        let (d, min) = (d * f32::from(scales[part]), d_min * f32::from(mins[part]));
        let Found { inverse, lowest, .. } = found[part];
        let scaled = |x: &f32| if d == 0.0 { inverse * (x - lowest) } else { (x + min) / d };
        let code = |x: &f32| nearest(scaled(x)).clamp(0, search.most) as u8;
        codes.iter_mut().zip(x).for_each(|(to, x)| *to = code(x));
    }
    codes
}

/// The header, then codes in 4 bits: of every 64 values the first and the second half side by side.
pub(super) fn q4_k(x: &[f32], to: &mut [u8]) {
    let (header, nibbles) = to.split_at_mut(16);
    let codes = coded(x, &OF_4_BITS, header);
    for (to, codes) in nibbles.chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
        (0..32).for_each(|at| to[at] = codes[at] | codes[at + 32] << 4);
    }
}

/// The header, the fifth bits of codes, of every 32 values at the same bit, then their lower four as in [`q4_k`].
pub(super) fn q5_k(x: &[f32], to: &mut [u8]) {
    let (header, rest) = to.split_at_mut(16);
    let (fifth, nibbles) = rest.split_at_mut(32);
    let codes = coded(x, &OF_5_BITS, header);
    fifth.fill(0);
    for (pair, (to, codes)) in nibbles.chunks_exact_mut(32).zip(codes.chunks_exact(64)).enumerate() {
        for at in 0..32 {
            let (low, high) = (codes[at], codes[at + 32]);
            to[at] = (low & 15) | (high & 15) << 4;
            fifth[at] |= (low >> 4) << (2 * pair) | (high >> 4) << (2 * pair + 1);
        }
    }
}

/// The scale with which codes from -32 to 31 are nearest to the 16 values, weighted by their squares (`ggml-quants.c`, `make_qx_quants`), and
/// by what the search has multiplied values to find these; nothing where all values are zero.
fn scale_of_16(x: &[f32]) -> Option<(f32, f32)> {
    const MOST: f32 = 32.0;
    let extreme = x.iter().fold(0.0_f32, |most, x| if x.abs() > most.abs() { *x } else { most });
    if extreme.abs() < TINY {
        return None;
    }
    let sums = |inverse: f32| {
        x.iter().fold((0.0_f32, 0.0_f32), |(sum_lx, sum_l2), x| {
            let l = nearest(inverse * x).clamp(-32, 31) as f32;
            let w = x * x;
            (sum_lx + w * x * l, sum_l2 + w * l * l)
        })
    };
    let mut of_best = -MOST / extreme;
    let (sum_lx, sum_l2) = sums(of_best);
    let mut scale = if sum_l2 != 0.0 { sum_lx / sum_l2 } else { 0.0 };
    let mut best = scale * sum_lx;
    for i in (-9..=9).filter(|i| *i != 0) {
        let inverse = -(MOST + 0.1 * i as f32) / extreme;
        let (sum_lx, sum_l2) = sums(inverse);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            of_best = inverse;
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    Some((scale, of_best))
}

/// The lower four bits of codes, their upper two, 16 scales in 8 bits, and the scale of scales in f16.
pub(super) fn q6_k(x: &[f32], to: &mut [u8]) {
    let found: [Option<(f32, f32)>; 16] = std::array::from_fn(|part| scale_of_16(&x[16 * part..16 * part + 16]));
    let scales = found.map(|found| found.map_or(0.0, |(scale, _)| scale));
    let extreme = scales.iter().fold(0.0_f32, |most, s| if s.abs() > most.abs() { *s } else { most });
    if extreme.abs() < TINY {
        to.fill(0);
        return;
    }
    let inverse = -128.0 / extreme;
    let (lower, rest) = to.split_at_mut(128);
    let (upper, rest) = rest.split_at_mut(64);
    let (packed, scale) = rest.split_at_mut(16);
    let d = put_f16(1.0 / inverse, scale);
    let mut codes = [0_u8; 256];
    for (part, (x, codes)) in x.chunks_exact(16).zip(codes.chunks_exact_mut(16)).enumerate() {
        let scale = nearest(inverse * scales[part]).min(127) as i8;
        packed[part] = scale as u8;
        let d = d * f32::from(scale);
        // Where the scale has become zero, ggml keeps the codes of the search, which stand for zeros all the same.
        let Some((_, inverse)) = found[part] else { continue };
        let scaled = |x: &f32| if d == 0.0 { inverse * x } else { x / d };
        codes.iter_mut().zip(x).for_each(|(to, x)| *to = (nearest(scaled(x)).clamp(-32, 31) + 32) as u8);
    }
    let halves = codes.chunks_exact(128).zip(lower.chunks_exact_mut(64).zip(upper.chunks_exact_mut(32)));
    for (codes, (lower, upper)) in halves {
        for at in 0..32 {
            let [a, b, c, d] = [0, 32, 64, 96].map(|from| codes[at + from]);
            lower[at] = (a & 15) | (c & 15) << 4;
            lower[at + 32] = (b & 15) | (d & 15) << 4;
            upper[at] = (a >> 4) | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
        }
    }
}
