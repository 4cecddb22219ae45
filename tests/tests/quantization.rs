//! Frozen matrices that are kept small: nf4 against bitsandbytes, fp8 against its definition.
//!
//! Goldens are in `tests/golden/quantization`, made by `tests/oracle/bitsandbytes_nf4.py`.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeSet;

use dpo_core::{fp8, nf4};
use dpo_tests::{Numbers, golden};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn f32s(tensor: &TensorView<'_>) -> Vec<f32> {
    let of = |b: &[u8]| {
        f32::from_bits(b.iter().rev().fold(0, |bits, byte| bits << 8 | u32::from(*byte)) << (32 - 8 * b.len()))
    };
    tensor.data().chunks(if tensor.dtype() == safetensors::Dtype::BF16 { 2 } else { 4 }).map(of).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn nf4_has_the_bits_of_bitsandbytes() {
    let file = std::fs::read(golden("quantization/nf4.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let of = |case: &str, name: &str| f32s(&file.tensor(&format!("{case}.{name}")).unwrap());
    assert_eq!(bits(&nf4::VALUES), bits(&f32s(&file.tensor("values").unwrap())));
    assert_eq!(bits(&nf4::SCALES), bits(&f32s(&file.tensor("scales").unwrap())));
    let names = file.names();
    let cases: BTreeSet<&str> = names.iter().filter_map(|name| Some(name.split_once('.')?.0)).collect();
    assert_eq!(cases.len(), 10);
    for case in cases {
        let (values, codes) = (of(case, "values"), |name| file.tensor(&format!("{case}.{name}")).unwrap());
        let ours = nf4::quantize(&values);
        assert_eq!(ours.codes, codes("codes").data(), "{case}");
        assert_eq!(ours.scales, codes("scales").data(), "{case}");
        assert_eq!(bits(&ours.scale_scales), bits(&of(case, "scale_scales")), "{case}");
        assert_eq!(bits(&[ours.offset]), bits(&of(case, "offset")), "{case}");
        let mut back = vec![f32::NAN; values.len()];
        ours.dequantize(&mut back);
        assert_eq!(bits(&back), bits(&of(case, "dequantized")), "{case}");
    }
}

#[test]
fn fp8_takes_the_nearest_value() {
    for code in 0..=255 {
        assert_eq!(fp8::code(fp8::VALUES[usize::from(code)]), code);
    }
    for (low, high) in (0..126_u8).map(|code| (code, code + 1)) {
        let middle = (fp8::VALUES[usize::from(low)] + fp8::VALUES[usize::from(high)]) / 2.0;
        for (sign, bit) in [(1.0, 0), (-1.0, 0x80)] {
            assert_eq!(fp8::code(sign * middle), bit | (low + low % 2), "{middle}");
            assert_eq!(fp8::code(sign * middle.next_down()), bit | low, "below {middle}");
            assert_eq!(fp8::code(sign * middle.next_up()), bit | high, "above {middle}");
        }
    }
    assert_eq!([500.0, f32::INFINITY, -1e30].map(fp8::code), [0x7e, 0x7e, 0xfe]);
}

#[test]
fn fp8_has_a_scale_for_every_row() {
    let mut values: Vec<f32> = (0..3 * 40)
        .map({
            let mut n = Numbers::new(1);
            move |_| n.draw() as f32
        })
        .collect();
    values[40..80].fill(0.0);
    values[7] = -96.0;
    let (codes, scales) = fp8::quantize_rows(&values, 40);
    assert_eq!((scales.len(), scales[0], scales[1], codes[7]), (3, 96.0 / 448.0, 1.0, 0xfe));
    let mut back = vec![f32::NAN; values.len()];
    fp8::dequantize_rows(&codes, &scales, 40, &mut back);
    for (at, (a, b)) in values.iter().zip(&back).enumerate() {
        let step = (a.abs() / 16.0).max(scales[at / 40] / 1024.0);
        assert!((a - b).abs() <= step * 1.000_001, "{a} {b}");
    }
}
