//! W of experts in mxfp4: the codes of `[outputs, inputs]` in rows of whole blocks, then the exponent of every block.

use std::ops::Range;

use super::super::arena::aligned;
use super::super::gpu::{Address, Args};
use dpo_core::mxfp4::{BLOCK, BYTES, Mxfp4};

/// Where a stack's codes and scales lie among its bytes.
pub(crate) struct Layout {
    pub codes: Range<usize>,
    pub scales: Range<usize>,
    inputs: usize,
    outputs: usize,
}

/// A stack's W on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadedMxfp4 {
    pub codes: Address,
    pub scales: Address,
    inputs: usize,
    outputs: usize,
}

impl Layout {
    /// Of so many inputs and outputs.
    pub(super) fn new(inputs: usize, outputs: usize) -> Layout {
        let blocks = outputs * inputs.div_ceil(BLOCK);
        let codes = 0..blocks * BYTES;
        let first = aligned(codes.end);
        Layout { codes, scales: first..first + blocks, inputs, outputs }
    }

    /// All bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.scales.end
    }

    /// Writes a member, whose first row this is, among the bytes of its stack.
    pub(crate) fn write(&self, bytes: &mut [u8], row: usize, values: &Mxfp4) {
        let first = row * self.inputs.div_ceil(BLOCK);
        let mut put = |at: usize, from: &[u8]| bytes[at..at + from.len()].copy_from_slice(from);
        put(self.codes.start + first * BYTES, &values.codes);
        put(self.scales.start + first, &values.scales);
    }

    /// Where it lies, from an address on.
    pub(crate) fn at(&self, at: Address) -> LoadedMxfp4 {
        let [codes, scales] = [&self.codes, &self.scales].map(|range| at + range.start as u64);
        LoadedMxfp4 { codes, scales, inputs: self.inputs, outputs: self.outputs }
    }
}

impl LoadedMxfp4 {
    /// As the first arguments of a kernel.
    pub(crate) fn args(&self) -> Args {
        Args::default().with(self.codes).with(self.scales).with(self.inputs as i32).with(self.outputs as i32)
    }
}
