//! Matmuls in kernels of our own, which add a value, add a bias, or compute a gated activation where they end: what they are compiled for,
//! and which kernel computes them on a card.

use super::super::gpu::View;
use super::super::kernels::{Kernels, Variant};
use super::super::launch::Launch;
use super::{Matmul, Operands, ampere, hopper};
use dpo_core::cache;
use dpo_core::error::Result;

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
}

/// A gated activation of a product: the weights are those of gate and of up, `width` rows each.
#[derive(Clone, Copy)]
pub(crate) struct Gated {
    /// As `activations.cuh` counts them.
    pub activation: usize,
    pub limit: f32,
    pub width: usize,
}

impl Gemm {
    /// What computes a matmul.
    pub(super) fn of(matmul: &Matmul) -> Gemm {
        Gemm { weight_rows: matmul.b_transposed, adds: matmul.add, biased: matmul.bias, gate: None, keeps: false }
    }

    /// Every way it is compiled for a card.
    pub(crate) fn variants(self, capability: u32) -> Vec<Variant> {
        if hopper::is_for(capability) { hopper::variants(self) } else { vec![ampere::variant(self)] }
    }

    /// What tells its kernels from others.
    pub(super) fn key(self) -> usize {
        self.epilogue() * 32 + usize::from(self.weight_rows) * 16 + self.gate.unwrap_or(0)
    }

    /// The sum of 1, where a value is added, 2 with a bias, 4 with a gated activation, 8 where that leaves gate and up.
    pub(super) fn epilogue(self) -> usize {
        [self.adds, self.biased, self.gate.is_some(), self.keeps]
            .iter()
            .rev()
            .fold(0, |all, on| all * 2 + usize::from(*on))
    }

    /// Whether its kernels were compiled.
    pub(super) fn is_loaded(self, kernels: &Kernels, capability: u32) -> bool {
        self.variants(capability).iter().all(|v| kernels.variant(v.source.kernels[0], v.key).is_ok())
    }

    /// Starts a product of sizes `[m, n, k]`.
    pub(super) fn launch(self, on: &Launch<'_>, [m, n, k]: [usize; 3], operands: Operands) -> Result<()> {
        if hopper::is_for(on.gpu.kernels) {
            hopper::launch(self, on, [m, n, k], operands)
        } else {
            ampere::launch(self, on, [m, n, k], operands, None, 0.0)
        }
    }
}

impl Gated {
    /// Whether a kernel computes it: stores of gate must not reach into up.
    pub(crate) fn is_supported(width: usize) -> bool {
        width.is_multiple_of(32)
    }

    fn gemm(self, keeps: bool) -> Gemm {
        Gemm { weight_rows: true, adds: false, biased: false, gate: Some(self.activation), keeps }
    }

    /// Its kernels on a card, with gate and up stored and without.
    pub(crate) fn variants(self, capability: u32) -> Vec<Variant> {
        [false, true].iter().flat_map(|keeps| self.gemm(*keeps).variants(capability)).collect()
    }

    /// Starts `h = act(x · Gᵀ) · (x · Uᵀ)` for the rows of `k` columns; with `both`, leaves gate and up there too, side by side.
    pub(crate) fn launch(
        self,
        on: &Launch<'_>,
        k: usize,
        [x, weights]: [View; 2],
        both: Option<View>,
        h: View,
    ) -> Result<()> {
        if on.rows == 1 && both.is_none() {
            return self.start_gemv(on, k, [x, weights], h);
        }
        let (gemm, width) = (self.gemm(both.is_some()), self.width);
        if hopper::is_for(on.gpu.kernels) {
            return hopper::launch_gated(gemm, on, [on.rows, width, k], [x, weights], both, h, self.limit);
        }
        let operands = Operands { a: x, b: weights, c: h, d: h, bias: 0 };
        ampere::launch(gemm, on, [on.rows, 2 * width, k], operands, both, self.limit)
    }
}

/// Whether a card's matmuls compute gated activations. On the Blackwell of data centres, whose tensor cores have instructions that no kernel of
/// ours uses, the library's matmul and a kernel behind it are faster.
pub(crate) fn computes_gates(capability: u32) -> bool {
    !matches!(capability, 100..120)
}

/// Tells kernels of one build from those of another, as far as they round otherwise.
pub(super) fn version() -> String {
    cache::name(&[hopper::SOURCE.text.as_bytes(), ampere::SOURCE.text.as_bytes()])
}

/// Those that most models need.
pub(super) fn usual(capability: u32, source: &'static str) -> Vec<Variant> {
    let plain = Gemm { weight_rows: true, adds: false, biased: false, gate: None, keeps: false };
    let gated = Gated { activation: 0, limit: 0.0, width: 0 };
    let all = [
        plain,
        Gemm { biased: true, ..plain },
        Gemm { adds: true, ..plain },
        Gemm { adds: true, biased: true, ..plain },
        Gemm { weight_rows: false, ..plain },
        Gemm { weight_rows: false, adds: true, ..plain },
    ];
    let all = all.iter().flat_map(|gemm| gemm.variants(capability)).chain(gated.variants(capability));
    let mut usual: Vec<Variant> = Vec::new();
    for variant in all.filter(|v| v.source.file == source) {
        if usual.iter().all(|v| v.key != variant.key) {
            usual.push(variant);
        }
    }
    usual
}
