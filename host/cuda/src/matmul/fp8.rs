//! Products of e4m3: `D = (X8 · W8ᵀ) · scales by row and by feature + U · op(L)`, whose last term, LoRA's, is of bf16.

use super::super::gpu::{Address, View};
use super::{Gated, Gemm, On, hopper};
use dpo_core::error::Result;

/// What a product is of.
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

/// Whether a card has a kernel for them.
pub(crate) fn has_fp8(capability: u32) -> bool {
    hopper::is_for(capability)
}

impl Fp8 {
    /// Starts a product of sizes `[m, n, k]`, with what `gemm` adds.
    pub(crate) fn launch(
        self,
        gemm: Gemm,
        on: On<'_>,
        [m, n, k]: [usize; 3],
        [c, d]: [View; 2],
        bias: Address,
    ) -> Result<()> {
        let c = if gemm.adds { c } else { d };
        hopper::launch_fp8(gemm, on, [m, n, k], self, [(c, n), (d, n)], (bias, 0.0))
    }

    /// As [`Gated::launch`].
    pub(crate) fn launch_gated(
        self,
        gated: Gated,
        on: On<'_>,
        [m, k]: [usize; 2],
        both: Option<View>,
        h: View,
    ) -> Result<()> {
        let (gemm, width) = (Gemm { fp8: true, ..gated.gemm(both.is_some()) }, gated.width);
        let stored = [both.map_or((h, width), |both| (both, 2 * width)), (h, width)];
        hopper::launch_fp8(gemm, on, [m, width, k], self, stored, (0, gated.limit))
    }

    /// As [`Gated::launch_vjp`].
    pub(crate) fn launch_gated_vjp(
        self,
        gated: Gated,
        on: On<'_>,
        [m, k]: [usize; 2],
        [both, gradients]: [View; 2],
    ) -> Result<()> {
        let (gemm, width) = (Gemm { fp8: true, ..gated.vjp() }, gated.width);
        let stored = [(both, 2 * width), (gradients, 2 * width)];
        hopper::launch_fp8(gemm, on, [m, width, k], self, stored, (0, gated.limit))
    }
}
