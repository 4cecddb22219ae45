//! Frozen weights on the GPU, as the steps of a program read them: stacked matrices, vectors, tables. Where layers lie, all here
//! or a part on every rank, in host memory, is said in `store` and `streamed`; how they are loaded, in `loading` beside this room.

mod fp8;
mod mxfp4;
mod nf4;
mod stack;
mod store;
mod streamed;

pub(crate) use fp8::{LoadedFp8, transposed_ld};
#[cfg(test)]
pub(crate) use mxfp4::Layout as Mxfp4Layout;
pub(crate) use mxfp4::LoadedMxfp4;
#[cfg(test)]
pub(crate) use nf4::Layout;
pub(crate) use nf4::LoadedNf4;
pub(crate) use stack::{LoadedStack, Matrix, Member, NUMBERS, Stack};
pub(crate) use store::LayerStore;

use super::gpu::Address;
use dpo_core::storage::Numbers;

/// A vector that a node's steps read.
#[derive(Clone, Debug)]
pub(crate) struct Vector {
    pub node: usize,
    pub role: &'static str,
    pub width: usize,
    /// f32 where what is chosen follows from it, else bf16.
    pub numbers: Numbers,
}

/// A block's weights, each where its program counts it.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlockWeights {
    pub stacks: Vec<LoadedStack>,
    pub vectors: Vec<Address>,
    pub tables: Vec<Address>,
}

impl Vector {
    pub(super) fn bytes(&self) -> usize {
        self.numbers.bytes(self.width)
    }
}
