//! Matrices of linears that read one value, with their adapters: `[[W, s·B], [A, 0]]` in bf16.

use super::super::arena::padded;
use super::super::gpu::{Address, View};
use crate::storage::Numbers;

/// What the values of a stack are.
pub(crate) const NUMBERS: Numbers = Numbers::Bf16;

/// Linears with one input, in the order of the block.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stack {
    pub members: Vec<Member>,
    pub inputs: usize,
    pub outputs: usize,
    /// LoRA columns of all members, 0 where none is adapted.
    pub rank: usize,
    pub bias: bool,
}

/// A linear of a stack.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub node: usize,
    /// Its first column among the outputs and among the LoRA columns.
    pub column: usize,
    pub rank_column: usize,
    pub width: usize,
}

/// A stack on the GPU.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LoadedStack {
    pub at: Address,
    /// Elements from row to row.
    pub ld: usize,
    /// f32 gradients by A `[rank, inputs]` and, transposed, by B `[rank, outputs]`.
    pub gradients: [Address; 2],
    pub bias: Address,
}

impl Stack {
    /// The member of a node.
    pub(crate) fn member(&self, node: usize) -> Option<&Member> {
        self.members.iter().find(|m| m.node == node)
    }

    /// Elements from row to row.
    pub(crate) fn ld(&self) -> usize {
        padded(self.inputs + self.rank)
    }

    /// Bytes of its rows.
    pub(crate) fn bytes(&self) -> usize {
        NUMBERS.bytes((self.outputs + self.rank) * self.ld())
    }

    /// Bytes of its bias.
    pub(crate) fn bias_bytes(&self) -> usize {
        if self.bias { NUMBERS.bytes(self.outputs) } else { 0 }
    }

    /// Bytes of the f32 gradients: by A `[rank, inputs]` and by B `[rank, outputs]`.
    pub(crate) fn gradient_bytes(&self) -> [usize; 2] {
        [self.inputs, self.outputs].map(|n| Numbers::F32.bytes(self.rank * n))
    }
}

impl LoadedStack {
    /// Where an element lies.
    pub(crate) fn element(&self, row: usize, column: usize) -> Address {
        self.at + NUMBERS.bytes(row * self.ld + column) as u64
    }

    /// Rows and columns from an element on.
    pub(crate) fn view(&self, row: usize, column: usize) -> View {
        View { at: self.element(row, column), ld: self.ld as i64 }
    }
}
