//! fp8, e4m3: four bits of exponent, three of fraction, no infinity (arXiv 2209.05433; ONNX' FLOAT8E4M3FN, torch.float8_e4m3fn). Every
//! row of a matrix has a scale in f32, its largest magnitude over 448.

use rayon::prelude::*;

/// The largest finite value.
pub const MAX: f32 = 448.0;

/// What a code stands for.
pub const VALUES: [f32; 256] = values();

/// Values that are worth a thread's while.
const AT_ONCE: usize = 1 << 14;

const fn values() -> [f32; 256] {
    let mut all = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, fraction) = ((code >> 3) & 15, (code & 7) as u32);
        // Below 2^-6 steps are of 2^-9. Above, the exponent's bias is 7, in f32 127, and the fraction's bits are the highest.
        let magnitude = match (exponent, fraction) {
            (15, 7) => f32::NAN,
            (0, _) => fraction as f32 / 512.0,
            _ => f32::from_bits((exponent as u32 + 120) << 23 | fraction << 20),
        };
        all[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    all
}

/// The code of the nearest value, of two that are as near the even one; what is larger than the largest becomes that.
pub fn code(value: f32) -> u8 {
    let magnitude = value.abs();
    let bits = magnitude.min(MAX).to_bits();
    // The 20 lower bits of the fraction are rounded away.
    let normal = (bits + 0x7_ffff + (bits >> 20 & 1)).wrapping_sub(120 << 23) >> 20;
    // A step of f32 at 2^14 is 2^-9.
    let small = (magnitude + 16_384.0).to_bits() & 0xff;
    let code = if magnitude < 1.0 / 64.0 { small } else { normal };
    let code = if value.is_nan() { 0x7f } else { code };
    (value.to_bits() >> 24 & 0x80 | code) as u8
}

/// Quantises a matrix by rows of so many columns: its codes, and of every row its scale. A row of zeros has the scale 1.
pub fn quantize_rows(values: &[f32], columns: usize) -> (Vec<u8>, Vec<f32>) {
    let columns = columns.max(1);
    let (mut codes, mut scales) = (vec![0; values.len()], vec![0.0; values.len() / columns]);
    let rows = AT_ONCE.div_ceil(columns);
    let parts = values.par_chunks(rows * columns).zip(codes.par_chunks_mut(rows * columns));
    parts.zip(scales.par_chunks_mut(rows)).for_each(|((values, codes), scales)| {
        for ((values, codes), scale) in values.chunks(columns).zip(codes.chunks_mut(columns)).zip(scales) {
            // By their bits, of which those of NaN are the highest.
            let largest = f32::from_bits(values.iter().map(|value| value.abs().to_bits()).max().unwrap_or(0));
            *scale = if largest == 0.0 { 1.0 } else { largest / MAX };
            codes.iter_mut().zip(values).for_each(|(to, value)| *to = code(value / *scale));
        }
    });
    (codes, scales)
}

/// The values of so many columns a row that codes and scales stand for, in f32.
pub fn dequantize_rows(codes: &[u8], scales: &[f32], columns: usize, to: &mut [f32]) {
    let rows = codes.par_chunks(columns.max(1)).zip(to.par_chunks_mut(columns.max(1)));
    rows.zip(scales).for_each(|((codes, to), scale)| {
        to.iter_mut().zip(codes).for_each(|(to, code)| *to = VALUES[usize::from(*code)] * scale);
    });
}
