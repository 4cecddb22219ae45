//! Matmuls of one row: `gemv.cu`. Such a matmul takes the time in which its weights are read, on every card; there is nothing to tune.

use super::super::gpu::{Args, View};
use super::super::kernels::Source;
use super::{Gated, Matmul, On, Operands};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    waits: true,
    ..Source::plain(
        "gemv",
        concat!(include_str!("../ops/activations.cuh"), include_str!("weights.cuh"), include_str!("gemv.cu")),
        &["gemv", "gemv_wide", "gemv_gated"],
    )
};

/// Threads of a block, and rows of the weights that it has, as `gemv.cu` has them.
const THREADS: u32 = 256;
const ROWS: usize = 2;

impl Matmul {
    /// Whether it is the product of one row with weights `[n, k]` that are read in pieces of 16 bytes.
    pub(super) fn is_gemv(&self) -> bool {
        let weights = !self.a_transposed && self.b_transposed && self.lds[1] % 8 == 0;
        self.m == 1 && weights && self.alignments[0] >= 16 && self.alignments[1] >= 16 && !(self.wide && self.add)
    }

    /// Starts it, where it [is one](Self::is_gemv).
    pub(super) fn start_gemv(&self, on: On<'_>, Operands { a, b, c, d, bias }: Operands) -> Result<()> {
        let [c, bias] = [(self.add, c.at), (self.bias, bias)].map(|(given, at)| if given { at } else { 0 });
        let args = Args::default().with(a.at).with(b).with(c).with(bias).with(d.at);
        let args = args.with(self.n as i32).with(self.k as i32);
        let kernel = on.kernels.get(if self.wide { "gemv_wide" } else { "gemv" })?;
        on.gpu.launch(kernel, [self.n.div_ceil(ROWS), 1, 1], [THREADS, 1, 1], 0, args)
    }
}

impl Gated {
    /// Starts `h = act(G · x) · (U · x)` for one row of `k` columns.
    pub(crate) fn start_gemv(self, on: On<'_>, k: usize, [x, weights]: [View; 2], h: View) -> Result<()> {
        let args = Args::default().with(x.at).with(weights).with(h.at).with(self.width as i32).with(k as i32);
        let args = args.with(self.activation as i32).with(self.limit);
        on.gpu.launch(on.kernels.get("gemv_gated")?, [self.width, 1, 1], [THREADS, 1, 1], 0, args)
    }
}
