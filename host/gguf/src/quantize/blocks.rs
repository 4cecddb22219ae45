//! Blocks of 32 values with one scale in f16, or a scale and a minimum.

use super::put_f16;

/// `d`, then 32 times `round(x / d)` in 8 bits; d is the largest magnitude over 127.
pub(super) fn q8_0(x: &[f32], to: &mut [u8]) {
    let largest = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let d = largest / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let (scale, codes) = to.split_at_mut(2);
    put_f16(d, scale);
    codes.iter_mut().zip(x).for_each(|(code, x)| *code = whole((x * inverse).round()) as u8);
}

/// `d`, then codes in 5 bits. d is the value of the largest magnitude over -16.
pub(super) fn q5_0(x: &[f32], to: &mut [u8]) {
    let extreme = x.iter().fold(0.0_f32, |most, x| if x.abs() > most.abs() { *x } else { most });
    let d = extreme / -16.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    put_f16(d, &mut to[..2]);
    let code = |x: f32| whole(x * inverse + 16.5).min(31) as u8;
    five_bits(x, code, &mut to[2..]);
}

/// `d`, the minimum, then as in [`q5_0`] codes from it. d is a thirty-first of the way to the maximum.
pub(super) fn q5_1(x: &[f32], to: &mut [u8]) {
    // By comparisons, since the sign of a zero is written.
    let min = x.iter().fold(f32::MAX, |min, x| if *x < min { *x } else { min });
    let max = x.iter().fold(f32::MIN, |max, x| if *x > max { *x } else { max });
    let d = (max - min) / 31.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    put_f16(d, &mut to[..2]);
    put_f16(min, &mut to[2..4]);
    five_bits(x, |x| whole((x - min) * inverse + 0.5) as u8, &mut to[4..]);
}

/// The fifth bits of 32 codes, then their lower four: the first and the second half side by side.
fn five_bits(x: &[f32], code: impl Fn(f32) -> u8, to: &mut [u8]) {
    let (upper, lower) = to.split_at_mut(4);
    let mut fifth = 0_u32;
    for j in 0..16 {
        let (low, high) = (code(x[j]), code(x[j + 16]));
        lower[j] = (low & 15) | ((high & 15) << 4);
        fifth |= u32::from(low >> 4 & 1) << j | u32::from(high >> 4 & 1) << (j + 16);
    }
    upper.copy_from_slice(&fifth.to_le_bytes());
}

/// A whole number. Where the scale is so small that its inverse is infinite, processors make 0 of what is no number.
fn whole(value: f32) -> i8 {
    if value.is_finite() { value as i8 } else { 0 }
}
