//! Matmuls in kernels of our own, which add a value, add a bias, or compute a gated activation where they end: what they are compiled for,
//! and which kernel computes them on a card.

use super::super::gpu::View;
use super::super::kernels::{Kernels, Variant};
use super::{Matmul, On, Operands, ampere, hopper};
use dpo_core::cache;
use dpo_core::error::Result;
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
}

/// Gated activations that a card's matmuls compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Gates {
    /// Of what a matmul makes.
    pub forward: bool,
    /// The VJP of one, whose gradient a matmul makes.
    pub backward: bool,
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
    /// The product of a linear's input and its weights.
    pub(crate) const PLAIN: Gemm =
        Gemm { weight_rows: true, adds: false, biased: false, gate: None, keeps: false, differentiates: false };

    /// What computes a matmul.
    pub(super) fn of(matmul: &Matmul) -> Gemm {
        Gemm { weight_rows: matmul.b_transposed, adds: matmul.add, biased: matmul.bias, ..Gemm::PLAIN }
    }

    /// Every way it is compiled for a card.
    pub(crate) fn variants(self, capability: u32) -> Vec<Variant> {
        if hopper::is_for(capability) { hopper::variants(self) } else { vec![ampere::variant(self)] }
    }

    /// What tells its kernels from others.
    pub(super) fn key(self) -> usize {
        self.epilogue() * 64 + usize::from(self.weight_rows) * 16 + self.gate.unwrap_or(0)
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

    /// Whether its kernels were compiled.
    pub(super) fn is_loaded(self, kernels: &Kernels, capability: u32) -> bool {
        self.variants(capability).iter().all(|v| kernels.variant(v.source.kernels[0], v.key).is_ok())
    }

    /// Starts a product of sizes `[m, n, k]`.
    pub(super) fn launch(self, on: On<'_>, [m, n, k]: [usize; 3], operands: Operands) -> Result<()> {
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
        Gemm { gate: Some(self.activation), keeps, ..Gemm::PLAIN }
    }

    /// Its kernels on a card, with gate and up stored and without.
    pub(crate) fn variants(self, capability: u32) -> Vec<Variant> {
        [false, true].iter().flat_map(|keeps| self.gemm(*keeps).variants(capability)).collect()
    }

    /// Whether a kernel computes its VJP.
    pub(crate) fn is_vjp_supported(width: usize) -> bool {
        width.is_multiple_of(64)
    }

    /// The kernels of its VJP.
    pub(crate) fn vjp_variants(self, capability: u32) -> Vec<Variant> {
        if gates(capability).backward { self.vjp().variants(capability) } else { Vec::new() }
    }

    fn vjp(self) -> Gemm {
        Gemm { weight_rows: false, gate: Some(self.activation), differentiates: true, ..Gemm::PLAIN }
    }

    /// Starts the VJP of `h = act(gate) · up`, whose gradient is the product of `dy` `[m, k]` and weights `[k, width]`: `both` has gate
    /// and up, side by side, and `gradients` receives theirs; the two may be one.
    pub(crate) fn launch_vjp(
        self,
        on: On<'_>,
        [m, k]: [usize; 2],
        [dy, weights]: [View; 2],
        [both, gradients]: [View; 2],
    ) -> Result<()> {
        hopper::launch_vjp(self.vjp(), on, [m, self.width, k], [dy, weights], [both, gradients], self.limit)
    }

    /// Starts `h = act(x · Gᵀ) · (x · Uᵀ)` for `m` rows of `k` columns; with `both`, leaves gate and up there too, side by side.
    pub(crate) fn launch(
        self,
        on: On<'_>,
        [m, k]: [usize; 2],
        [x, weights]: [View; 2],
        both: Option<View>,
        h: View,
    ) -> Result<()> {
        if m == 1 && both.is_none() {
            return self.start_gemv(on, k, [x, weights], h);
        }
        let (gemm, width) = (self.gemm(both.is_some()), self.width);
        if hopper::is_for(on.gpu.kernels) {
            return hopper::launch_gated(gemm, on, [m, width, k], [x, weights], both, h, self.limit);
        }
        let operands = Operands { a: x, b: weights, c: h, d: h, bias: 0 };
        ampere::launch(gemm, on, [m, 2 * width, k], operands, both, self.limit)
    }
}

/// The gated activations that a card's matmuls compute. On the Blackwell of data centres, whose tensor cores have instructions that no kernel of
/// ours uses, the library's matmul and a kernel behind it are faster.
pub(crate) fn gates(capability: u32) -> Gates {
    Gates { forward: !matches!(capability, 100..120), backward: hopper::is_for(capability) }
}

/// Tells kernels of one build from those of another, as far as they round otherwise.
pub(super) fn version() -> String {
    cache::name(&[hopper::SOURCE.text.as_bytes(), ampere::SOURCE.text.as_bytes()])
}

/// Those that most models need.
pub(super) fn usual(capability: u32, source: &'static str) -> Vec<Variant> {
    let plain = Gemm::PLAIN;
    let gated = Gated { activation: 0, limit: 0.0, width: 0 };
    let all = [
        plain,
        Gemm { biased: true, ..plain },
        Gemm { adds: true, ..plain },
        Gemm { adds: true, biased: true, ..plain },
        Gemm { weight_rows: false, ..plain },
        Gemm { weight_rows: false, adds: true, ..plain },
    ];
    let gates = gated.variants(capability).into_iter().chain(gated.vjp_variants(capability));
    let all = all.iter().flat_map(|gemm| gemm.variants(capability)).chain(gates);
    let mut usual: Vec<Variant> = Vec::new();
    for variant in all.filter(|v| v.source.file == source) {
        if usual.iter().all(|v| v.key != variant.key) {
            usual.push(variant);
        }
    }
    usual
}
