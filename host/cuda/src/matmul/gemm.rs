//! Matmuls of our own, as kernels are compiled for them.

use super::super::gpu::{Address, View};
use super::Matmul;
use serde::Serialize;

/// What a kernel is compiled for: how the weights lie, and what happens to a product before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gemm {
    /// Whether the weights lie as `[features, k]`, as a linear has them; else as `[k, features]`.
    pub weight_rows: bool,
    /// Whether a value is added.
    pub adds: bool,
    /// Whether a bias is added.
    pub biased: bool,
    /// The activation of a gated one, as `activations.cuh` counts them.
    pub gate: Option<usize>,
    /// Whether a gated activation leaves gate and up.
    pub keeps: bool,
    /// Whether the product is the gradient of a gated activation, and becomes those of gate and up.
    pub differentiates: bool,
    /// Whether the matrices are of e4m3, and `weight_rows` says how their LoRA part lies.
    pub fp8: bool,
    /// Whether rows are those of groups with weights of their own.
    pub grouped: bool,
}

/// Rows of groups, one group after the other, whose weights lie one below the other.
#[derive(Clone, Copy)]
pub(crate) struct Groups {
    pub count: usize,
    /// Rows from a group's weights to the next one's.
    pub apart: usize,
    /// Where `count + 1` numbers lie: of every group its first row, and where the last one's end.
    pub begins: Address,
}

/// Gated activations that a card's matmuls compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Gates {
    /// Of what a matmul makes.
    pub forward: bool,
    /// The VJP of one, whose gradient a matmul makes.
    pub backward: bool,
}

/// What a product of e4m3 is of: `D = (X8 · W8ᵀ) · scales by row and by feature + U · op(L)`, whose last term, LoRA's, is of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Fp8 {
    /// Rows of codes `[m, k]`, each with its scale in f32 behind it.
    pub x: View,
    /// Codes `[n, k]`, and bytes from row to row.
    pub w: (Address, usize),
    /// An f32 of every row of W; none where they are 1.
    pub scales: Address,
    /// `[m, rank]`.
    pub u: View,
    /// `[n, rank]`, or `[rank, n]` where the kernel's `weight_rows` is false.
    pub l: View,
    /// 0 without an adapter.
    pub rank: usize,
}

impl Gemm {
    /// The product of a linear's input and its weights.
    pub(crate) const PLAIN: Gemm = Gemm {
        weight_rows: true,
        adds: false,
        biased: false,
        gate: None,
        keeps: false,
        differentiates: false,
        fp8: false,
        grouped: false,
    };

    /// What computes a matmul.
    pub(super) fn of(matmul: &Matmul) -> Gemm {
        Gemm { weight_rows: matmul.b_transposed, adds: matmul.add, biased: matmul.bias, ..Gemm::PLAIN }
    }

    /// What tells its kernels from others.
    pub(super) fn key(self) -> usize {
        let kind = self.epilogue() * 2 + usize::from(self.grouped);
        kind * 64 + usize::from(self.fp8) * 32 + usize::from(self.weight_rows) * 16 + self.gate.unwrap_or(0)
    }

    /// The sum of 1, where a value is added, 2 with a bias, 4 with a gated activation, 8 where that leaves gate and up, 16 with the VJP
    /// of one.
    pub(super) fn epilogue(self) -> usize {
        let gated = self.gate.is_some() && !self.differentiates;
        [self.adds, self.biased, gated, self.keeps, self.differentiates]
            .iter()
            .rev()
            .fold(0, |all, on| all * 2 + usize::from(*on))
    }
}

/// Those that most models need.
pub(super) fn usual() -> Vec<Gemm> {
    let gated = Gemm { gate: Some(0), ..Gemm::PLAIN };
    vec![
        Gemm::PLAIN,
        Gemm { biased: true, ..Gemm::PLAIN },
        Gemm { adds: true, ..Gemm::PLAIN },
        Gemm { adds: true, biased: true, ..Gemm::PLAIN },
        Gemm { weight_rows: false, ..Gemm::PLAIN },
        Gemm { weight_rows: false, adds: true, ..Gemm::PLAIN },
        gated,
        Gemm { keeps: true, ..gated },
        Gemm { weight_rows: false, differentiates: true, ..gated },
        Gemm { grouped: true, ..Gemm::PLAIN },
        Gemm { grouped: true, weight_rows: false, ..Gemm::PLAIN },
    ]
}
