//! W of a stack in nf4: the codes of `[outputs, inputs]`, the 8-bit scale of every block, then scale and offset of every 256 scales,
//! which kernels read as `struct Nf4` of `nf4.cu`. Rows and columns of a member are multiples of 8, so that no block is of two members;
//! 256 scales may be, so that every member's begin anew.

use std::ops::Range;

use super::super::arena::aligned;
use super::super::gpu::{Address, Args};
use dpo_core::nf4::{BLOCK, Nf4, SCALE_BLOCK};

/// Where a stack's codes and scales lie among its bytes.
pub(crate) struct Layout {
    pub codes: Range<usize>,
    pub scales: Range<usize>,
    /// Two f32 each.
    pub groups: Range<usize>,
    /// Of every member its first block and its first group, as `int2`.
    pub members: Vec<[i32; 2]>,
    inputs: usize,
}

/// A stack's W on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadedNf4 {
    pub codes: Address,
    scales: Address,
    groups: Address,
    members: Address,
    count: usize,
    inputs: usize,
    outputs: usize,
}

/// Bytes of scale and offset of a group.
const GROUP: usize = 8;

impl Layout {
    /// Of members of so many inputs, and so many outputs each.
    pub(super) fn new(inputs: usize, outputs: impl Iterator<Item = usize>) -> Layout {
        let (mut blocks, mut groups, mut members) = (0, 0, Vec::new());
        for width in outputs {
            members.push([blocks as i32, groups as i32]);
            let own = (width * inputs).div_ceil(BLOCK);
            blocks += own;
            groups += own.div_ceil(SCALE_BLOCK);
        }
        let codes = 0..blocks * BLOCK / 2;
        let first = aligned(codes.end);
        let scales = first..first + blocks;
        let first = aligned(scales.end);
        Layout { codes, scales, groups: first..first + groups * GROUP, members, inputs }
    }

    /// All bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.groups.end
    }

    /// Writes a member among the bytes of its stack.
    pub(crate) fn write(&self, bytes: &mut [u8], member: usize, values: &Nf4) {
        let [block, group] = self.members[member].map(|first| first as usize);
        let mut put = |at: usize, from: &[u8]| bytes[at..at + from.len()].copy_from_slice(from);
        put(self.codes.start + block * BLOCK / 2, &values.codes);
        put(self.scales.start + block, &values.scales);
        for (at, scale) in values.scale_scales.iter().enumerate() {
            let both = [scale.to_le_bytes(), values.offset.to_le_bytes()];
            put(self.groups.start + (group + at) * GROUP, both.as_flattened());
        }
    }

    /// Where it lies, from an address on, with the table of members apart.
    pub(crate) fn at(&self, at: Address, members: Address) -> LoadedNf4 {
        LoadedNf4 {
            codes: at + self.codes.start as u64,
            scales: at + self.scales.start as u64,
            groups: at + self.groups.start as u64,
            members,
            count: self.members.len(),
            inputs: self.inputs,
            outputs: self.codes.end * 2 / self.inputs,
        }
    }
}

impl LoadedNf4 {
    /// As the first arguments of a kernel.
    pub(crate) fn args(&self) -> Args {
        let args = Args::default().with(self.codes).with(self.scales).with(self.groups).with(self.members);
        args.with(self.count as i32).with(self.inputs as i32).with(self.outputs as i32)
    }
}
