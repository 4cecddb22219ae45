//! W of a stack in e4m3: the codes of `[outputs, inputs]` in rows of whole pieces of 16 bytes, then an f32 scale of every row.

use std::ops::Range;

use super::super::arena::aligned;
use super::super::gpu::{Address, Args};

/// Where a stack's codes and scales lie among its bytes.
pub(crate) struct Layout {
    pub codes: Range<usize>,
    pub scales: Range<usize>,
    /// Bytes from row to row.
    pub ld: usize,
    inputs: usize,
    outputs: usize,
}

/// A stack's W on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadedFp8 {
    pub codes: Address,
    pub ld: usize,
    pub scales: Address,
    inputs: usize,
    outputs: usize,
}

impl Layout {
    /// Of so many inputs and outputs.
    pub(super) fn new(inputs: usize, outputs: usize) -> Layout {
        let ld = inputs.next_multiple_of(16);
        let codes = 0..outputs * ld;
        let first = aligned(codes.end);
        Layout { codes, scales: first..first + outputs * 4, ld, inputs, outputs }
    }

    /// All bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.scales.end
    }

    /// Where it lies, from an address on.
    pub(crate) fn at(&self, at: Address) -> LoadedFp8 {
        let [codes, scales] = [&self.codes, &self.scales].map(|range| at + range.start as u64);
        LoadedFp8 { codes, ld: self.ld, scales, inputs: self.inputs, outputs: self.outputs }
    }
}

impl LoadedFp8 {
    /// As the first arguments of a kernel that makes bf16 of it.
    pub(crate) fn args(&self) -> Args {
        let args = Args::default().with(self.codes).with(self.scales).with(self.ld as i32);
        args.with(self.inputs as i32).with(self.outputs as i32)
    }
}

/// Bytes from row to row of W transposed.
pub(crate) fn transposed_ld(outputs: usize) -> usize {
    outputs.next_multiple_of(16)
}
