//! Skinny matmuls, of as many rows as sequences are answered at once: `skinny.cu`. They take the time in which their weights are read; there
//! is nothing to tune.

use super::super::gpu::{Args, View};
use super::super::kernels::Source;
use super::{Gated, Matmul, On, Operands};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    waits: true,
    ..Source::plain(
        "skinny",
        concat!(
            include_str!("../ops/activations.cuh"),
            include_str!("../ops/mma.cuh"),
            include_str!("weights.cuh"),
            include_str!("skinny.cu")
        ),
        &[
            "skinny_8",
            "skinny_16",
            "skinny_32",
            "skinny_wide_8",
            "skinny_wide_16",
            "skinny_wide_32",
            "skinny_gated_8",
            "skinny_gated_16",
            "skinny_gated_32",
        ],
    )
};

/// Threads of a block, as `skinny.cu` has them.
const THREADS: u32 = 256;

/// Rows of the kernels' tiles, of which those of the last are the most that there may be, and rows of the weights that a block then has.
const TILES: [usize; 3] = [8, 16, 32];
const ROWS: [usize; 3] = [16, 16, 32];

/// Columns of a product for which there are blocks enough to read its weights: with less, cuBLASLt cuts the sums.
const LEAST_COLUMNS: usize = 512;

/// The most rows that a skinny matmul has.
pub(crate) const MOST_ROWS: usize = TILES[TILES.len() - 1];

/// Which of the kernels of a name.
fn tile(rows: usize) -> usize {
    TILES.iter().position(|tile| rows <= *tile).unwrap_or(TILES.len() - 1)
}

impl Matmul {
    /// Whether it is the product of a few rows with weights `[n, k]` that are read in pieces of 16 bytes.
    pub(super) fn is_skinny(&self) -> bool {
        let weights = !self.a_transposed && self.b_transposed && self.lds[..2].iter().all(|ld| ld % 8 == 0);
        (2..=MOST_ROWS).contains(&self.m)
            && self.n >= LEAST_COLUMNS
            && weights
            && self.alignments[..2].iter().all(|a| *a >= 16)
    }

    /// Starts it, where it [is one](Self::is_skinny).
    pub(super) fn start_skinny(&self, on: On<'_>, Operands { a, b, c, d, bias }: Operands) -> Result<()> {
        let c = if self.add { c } else { View { at: 0, ld: 0 } };
        let bias = if self.bias { bias } else { 0 };
        let args = Args::default().with(a).with(b).with(c).with(bias).with(d.at).with(d.ld);
        let args = args.with(self.m as i32).with(self.n as i32).with(self.k as i32);
        let names = if self.wide {
            ["skinny_wide_8", "skinny_wide_16", "skinny_wide_32"]
        } else {
            ["skinny_8", "skinny_16", "skinny_32"]
        };
        let kernel = on.kernels.get(names[tile(self.m)])?;
        on.gpu.launch(kernel, [self.n.div_ceil(ROWS[tile(self.m)]), 1, 1], [THREADS, 1, 1], 0, args)
    }
}

impl Gated {
    /// Starts `h = act(x · Gᵀ) · (x · Uᵀ)` for `m` rows of `k` columns, [`MOST_ROWS`] at most.
    pub(crate) fn start_skinny(self, on: On<'_>, [m, k]: [usize; 2], [x, weights]: [View; 2], h: View) -> Result<()> {
        let args = Args::default().with(x).with(weights).with(h).with(m as i32).with(self.width as i32);
        let args = args.with(k as i32).with(self.activation as i32).with(self.limit);
        let kernel = on.kernels.get(["skinny_gated_8", "skinny_gated_16", "skinny_gated_32"][tile(m)])?;
        on.gpu.launch(kernel, [self.width.div_ceil(ROWS[tile(m)] / 2), 1, 1], [THREADS, 1, 1], 0, args)
    }
}
