//! Number formats of tensors in a GGUF file, and how values are packed into them: the bytes are those that ggml's own quantisers make
//! without an importance matrix (`ggml-quants.c`, `quantize_row_*_ref`), whose order of operations in f32 is kept for that.

mod blocks;
mod superblocks;

use half::{bf16, f16};
use rayon::prelude::*;

/// A number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    /// 32 bits.
    F32,
    /// 16 bits, up to 65504.
    F16,
    /// The upper half of f32.
    Bf16,
    /// 5 bits; blocks of 32 with a scale.
    Q5_0,
    /// 5 bits; blocks of 32 with a scale and a minimum.
    Q5_1,
    /// 8 bits; blocks of 32 with a scale.
    Q8_0,
    /// 4 bits; blocks of 256 with a scale and a minimum for every 32.
    Q4K,
    /// 5 bits; blocks of 256 with a scale and a minimum for every 32.
    Q5K,
    /// 6 bits; blocks of 256 with a scale for every 16.
    Q6K,
}

/// What a format is in a file.
struct Layout {
    of: TensorType,
    name: &'static str,
    /// Its number (`ggml.h`, `enum ggml_type`).
    id: u32,
    /// Values of a block.
    values: usize,
    /// Bytes of a block.
    bytes: usize,
    /// Packs a block.
    pack: fn(&[f32], &mut [u8]),
}

const LAYOUTS: [Layout; 9] = [
    Layout { of: TensorType::F32, name: "f32", id: 0, values: 1, bytes: 4, pack: f32 },
    Layout { of: TensorType::F16, name: "f16", id: 1, values: 1, bytes: 2, pack: half },
    Layout { of: TensorType::Bf16, name: "bf16", id: 30, values: 1, bytes: 2, pack: brain },
    Layout { of: TensorType::Q5_0, name: "q5_0", id: 6, values: 32, bytes: 22, pack: blocks::q5_0 },
    Layout { of: TensorType::Q5_1, name: "q5_1", id: 7, values: 32, bytes: 24, pack: blocks::q5_1 },
    Layout { of: TensorType::Q8_0, name: "q8_0", id: 8, values: 32, bytes: 34, pack: blocks::q8_0 },
    Layout { of: TensorType::Q4K, name: "q4_K", id: 12, values: 256, bytes: 144, pack: superblocks::q4_k },
    Layout { of: TensorType::Q5K, name: "q5_K", id: 13, values: 256, bytes: 176, pack: superblocks::q5_k },
    Layout { of: TensorType::Q6K, name: "q6_K", id: 14, values: 256, bytes: 210, pack: superblocks::q6_k },
];

impl TensorType {
    /// Every format.
    pub fn all() -> impl Iterator<Item = TensorType> {
        LAYOUTS.iter().map(|layout| layout.of)
    }

    fn layout(self) -> &'static Layout {
        LAYOUTS.iter().find(|layout| layout.of == self).unwrap_or(&LAYOUTS[0])
    }

    /// Its name in ggml.
    pub fn name(self) -> &'static str {
        self.layout().name
    }

    /// Its number in a file.
    pub fn id(self) -> u32 {
        self.layout().id
    }

    /// Values that are packed together; rows are of whole blocks.
    pub fn block(self) -> usize {
        self.layout().values
    }

    /// Bytes of so many values, which are whole blocks.
    pub fn bytes(self, values: usize) -> usize {
        values / self.layout().values * self.layout().bytes
    }

    /// Packs values, which are whole blocks and finite.
    pub fn pack(self, values: &[f32]) -> Vec<u8> {
        let layout = self.layout();
        let mut packed = vec![0; self.bytes(values.len())];
        // A block takes too little time to be a task of its own.
        let (blocks, many) = (values.par_chunks(layout.values * MANY), layout.bytes * MANY);
        packed.par_chunks_mut(many).zip(blocks).for_each(|(to, from)| {
            let pairs = to.chunks_exact_mut(layout.bytes).zip(from.chunks_exact(layout.values));
            pairs.for_each(|(to, from)| (layout.pack)(from, to));
        });
        packed
    }
}

/// Blocks that a thread packs at once.
const MANY: usize = 64;

fn f32(values: &[f32], to: &mut [u8]) {
    to.copy_from_slice(&values[0].to_le_bytes());
}

fn half(values: &[f32], to: &mut [u8]) {
    to.copy_from_slice(&f16::from_f32(values[0]).to_le_bytes());
}

fn brain(values: &[f32], to: &mut [u8]) {
    to.copy_from_slice(&bf16::from_f32(values[0]).to_le_bytes());
}

/// The nearest whole number, an even one of two, as ggml finds it: by the rounding of an addition.
fn nearest(value: f32) -> i32 {
    ((value + 12_582_912.0).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// Writes a value as f16, and gives what it has become.
fn put_f16(value: f32, to: &mut [u8]) -> f32 {
    let rounded = f16::from_f32(value);
    to.copy_from_slice(&rounded.to_le_bytes());
    rounded.to_f32()
}
