//! Matrices of linears that read one value, with their adapters: `[[W, s·B], [A, 0]]` in bf16. Those of experts are as many of these, one
//! below the other. Where W is kept in other numbers, its bytes are its layer's, s·B and A lie apart, one expert's below the other's, and
//! what is computed with is made of them before every use.

use super::super::arena::padded;
use super::super::gpu::{Address, View};
use super::fp8::{self, LoadedFp8, transposed_ld};
use super::mxfp4::{self, LoadedMxfp4};
use super::nf4::{Layout, LoadedNf4};
use dpo_core::storage::Numbers;

/// What matmuls read.
pub(crate) const NUMBERS: Numbers = Numbers::Bf16;

/// Linears with one input, in the order of the block.
#[derive(Clone, Debug)]
pub(crate) struct Stack {
    /// What W is kept as.
    pub numbers: Numbers,
    /// What matmuls read of it: e4m3 as it is kept, or bf16, which is made of all else.
    pub read_as: Numbers,
    pub members: Vec<Member>,
    /// Matrices of one form: experts, or 1.
    pub groups: usize,
    pub inputs: usize,
    /// Of all groups.
    pub outputs: usize,
    /// LoRA columns of all members, of one group; 0 where none is adapted.
    pub rank: usize,
    pub bias: bool,
}

/// A matrix of a stack: a linear's, or those of all experts of a node, one below the other.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub node: usize,
    pub role: &'static str,
    /// Its first column among the outputs and among the LoRA columns.
    pub column: usize,
    pub rank_column: usize,
    pub width: usize,
}

/// A stack on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadedStack {
    /// W as it is kept.
    pub w: Matrix,
    /// A `[rank, inputs]` and s·B `[outputs, rank]`, of the first group.
    pub a: View,
    pub sb: View,
    /// Rows from a group's A to the next one's, and of s·B.
    pub steps: [usize; 2],
    /// f32 gradients by A `[groups, rank, inputs]` and, transposed, by B `[groups, rank, outputs / groups]`.
    pub gradients: [Address; 2],
    pub bias: Address,
}

/// W of a stack on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Matrix {
    /// `[[W, s·B], [A, 0]]`, with A and s·B in it.
    Bf16(View),
    Nf4(LoadedNf4),
    Fp8(LoadedFp8),
    Mxfp4(LoadedMxfp4),
}

impl Matrix {
    /// Of one in e4m3, where the scales of its rows lie; else nowhere.
    pub(crate) fn scales(&self) -> Address {
        if let Matrix::Fp8(w) = self { w.scales } else { 0 }
    }
}

impl Stack {
    /// Without linears yet.
    pub(crate) fn new(numbers: Numbers, inputs: usize) -> Stack {
        Stack { numbers, read_as: NUMBERS, members: Vec::new(), groups: 1, inputs, outputs: 0, rank: 0, bias: false }
    }

    /// The member of a node's weight.
    pub(crate) fn member(&self, node: usize, role: &str) -> Option<&Member> {
        self.members.iter().find(|m| m.node == node && m.role == role)
    }

    /// Outputs of a group.
    pub(crate) fn height(&self) -> usize {
        self.outputs / self.groups
    }

    /// Elements from row to row of what matmuls read. Rows that are made before every use begin at lines of the cache.
    pub(crate) fn ld(&self) -> usize {
        let columns = self.inputs + self.rank;
        if self.numbers == NUMBERS { padded(columns) } else { columns.next_multiple_of(64) }
    }

    /// Bytes of W, and of what lies in it, among those of its layer.
    pub(crate) fn bytes(&self) -> usize {
        match self.numbers {
            Numbers::Nf4 => self.nf4().bytes(),
            Numbers::Fp8 => self.fp8().bytes(),
            Numbers::Mxfp4 => self.mxfp4().bytes(),
            _ => self.whole_bytes(),
        }
    }

    /// Bytes of what lies apart from the layer's: A, s·B, and where members begin.
    pub(crate) fn apart(&self) -> [usize; 3] {
        match self.numbers {
            NUMBERS => [0; 3],
            _ => {
                let [a, sb] = [self.groups * self.inputs, self.outputs].map(|n| NUMBERS.bytes(self.rank * n));
                [a, sb, self.members.len() * size_of::<[i32; 2]>()]
            }
        }
    }

    /// Bytes of what is made of it before it is read: `[[W, s·B], [A, 0]]` in bf16, or of e4m3 that is read W transposed.
    pub(crate) fn made_bytes(&self) -> usize {
        match self.numbers {
            NUMBERS => 0,
            _ if self.read_as == Numbers::Fp8 => self.inputs * transposed_ld(self.outputs),
            _ => self.whole_bytes(),
        }
    }

    fn whole_bytes(&self) -> usize {
        NUMBERS.bytes((self.outputs + self.groups * self.rank) * self.ld())
    }

    /// Where all of it lies, from these addresses on.
    pub(crate) fn at(&self, w: Address, [a, sb, members]: [Address; 3]) -> LoadedStack {
        let view = |at, ld: usize| View { at, ld: ld as i64 };
        let apart = (view(a, self.inputs), view(sb, self.rank), [self.rank, self.height()]);
        let (w, (a, sb, steps)) = match self.numbers {
            Numbers::Nf4 => (Matrix::Nf4(self.nf4().at(w, members)), apart),
            Numbers::Fp8 => (Matrix::Fp8(self.fp8().at(w)), apart),
            Numbers::Mxfp4 => (Matrix::Mxfp4(self.mxfp4().at(w)), apart),
            _ => {
                let whole = view(w, self.ld());
                let steps = [self.height() + self.rank; 2];
                (Matrix::Bf16(whole), (whole.row(self.height()), whole.column(self.inputs), steps))
            }
        };
        LoadedStack { w, a, sb, steps, gradients: [0; 2], bias: 0 }
    }

    /// Where codes and scales of W lie among its bytes.
    pub(crate) fn nf4(&self) -> Layout {
        Layout::new(self.inputs, self.members.iter().map(|m| m.width))
    }

    /// Where codes and scales of W lie where that is kept in e4m3.
    pub(crate) fn fp8(&self) -> fp8::Layout {
        fp8::Layout::new(self.inputs, self.outputs)
    }

    /// The same in mxfp4.
    pub(crate) fn mxfp4(&self) -> mxfp4::Layout {
        mxfp4::Layout::new(self.inputs, self.outputs)
    }

    /// Bytes of its bias.
    pub(crate) fn bias_bytes(&self) -> usize {
        if self.bias { NUMBERS.bytes(self.outputs) } else { 0 }
    }

    /// Bytes of the f32 gradients: by A `[groups, rank, inputs]` and by B `[groups, rank, outputs / groups]`.
    pub(crate) fn gradient_bytes(&self) -> [usize; 2] {
        [self.groups * self.inputs, self.outputs].map(|n| Numbers::F32.bytes(self.rank * n))
    }
}
