//! Which kernel of our own computes a matmul on a card; they add a value, add a bias, or compute a gated activation where they end.

use super::super::gpu::{Address, View};
use super::super::kernels::{Kernels, Variant};
use super::{Fp8, Gates, Gemm, Groups, On, Operands, ampere, hopper};
use dpo_core::cache;
use dpo_core::error::Result;

/// A gated activation of a product: the weights are those of gate and of up, `width` rows each.
#[derive(Clone, Copy)]
pub(crate) struct Gated {
    /// As `activations.cuh` counts them.
    pub activation: usize,
    pub limit: f32,
    pub width: usize,
}

impl Gemm {
    /// Every way it is compiled for a card.
    pub(crate) fn variants(self, capability: u32) -> Vec<Variant> {
        if hopper::is_for(capability) { hopper::variants(self) } else { vec![ampere::variant(self)] }
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

impl Groups {
    /// Groups there may be.
    pub(crate) const MOST: usize = 512;

    /// Bytes of shared memory that tell their rows: `struct Groups` of `groups.cuh`.
    pub(super) const SHARED: usize = (2 * (Groups::MOST + 1) + 2) * size_of::<i32>();

    /// Rows of all weights, of which the last group has so many.
    pub(super) fn rows(self, last: usize) -> usize {
        (self.count - 1) * self.apart + last
    }

    pub(crate) fn gemm(weight_rows: bool) -> Gemm {
        Gemm { weight_rows, grouped: true, ..Gemm::PLAIN }
    }

    /// Starts a product of sizes `[m, n, k]` for each group, of at most m rows in all; weights lie as `[n, k]` where `weight_rows` says so,
    /// else as `[k, n]`.
    pub(crate) fn launch(
        self,
        weight_rows: bool,
        on: On<'_>,
        sizes: [usize; 3],
        [x, weights, y]: [View; 3],
    ) -> Result<()> {
        let (gemm, operands) = (Groups::gemm(weight_rows), Operands { a: x, b: weights, c: y, d: y, bias: 0 });
        if hopper::is_for(on.gpu.kernels) {
            hopper::launch_grouped(gemm, on, sizes, operands, self)
        } else {
            ampere::launch_grouped(gemm, on, sizes, operands, self)
        }
    }
}

impl Gated {
    /// Whether a kernel computes it: stores of gate must not reach into up.
    pub(crate) fn is_supported(width: usize) -> bool {
        width.is_multiple_of(32)
    }

    pub(super) fn gemm(self, keeps: bool) -> Gemm {
        Gemm { gate: Some(self.activation), keeps, ..Gemm::PLAIN }
    }

    /// Its kernels on a card, with gate and up stored and without.
    pub(crate) fn variants(self, fp8: bool, capability: u32) -> Vec<Variant> {
        let gemm = |keeps| Gemm { fp8, ..self.gemm(keeps) };
        [false, true].into_iter().flat_map(|keeps| gemm(keeps).variants(capability)).collect()
    }

    /// Whether a kernel computes its VJP.
    pub(crate) fn is_vjp_supported(width: usize) -> bool {
        width.is_multiple_of(64)
    }

    /// The kernels of its VJP.
    pub(crate) fn vjp_variants(self, fp8: bool, capability: u32) -> Vec<Variant> {
        if gates(capability).backward { Gemm { fp8, ..self.vjp() }.variants(capability) } else { Vec::new() }
    }

    pub(super) fn vjp(self) -> Gemm {
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
        let (gemm, width) = (self.gemm(both.is_some()), self.width);
        if hopper::is_for(on.gpu.kernels) {
            return hopper::launch_gated(gemm, on, [m, width, k], [x, weights], both, h, self.limit);
        }
        let operands = Operands { a: x, b: weights, c: h, d: h, bias: 0 };
        ampere::launch(gemm, on, [m, 2 * width, k], operands, both, self.limit)
    }
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
        if !hopper::is_for(on.gpu.kernels) {
            let operands = Operands { a: d, b: d, c, d, bias };
            return ampere::launch_fp8(gemm, on, [m, n, k], self, operands, None, 0.0);
        }
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
        if !hopper::is_for(on.gpu.kernels) {
            let operands = Operands { a: h, b: h, c: h, d: h, bias: 0 };
            return ampere::launch_fp8(gemm, on, [m, 2 * width, k], self, operands, both, gated.limit);
        }
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

/// Whether a card has a kernel for products of e4m3.
pub(crate) fn has_fp8(capability: u32) -> bool {
    ampere::has_fp8(capability)
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
