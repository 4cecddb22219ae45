//! Linears and experts whose W is kept in nf4. Matmuls of a linear and one row read the codes.

use dpo_core::nf4::{SCALES, VALUES};

use super::activation::Activation;
use super::{Address, Args, Gpu, Kernels, Launch, LoadedNf4, LoadedStack, Source, Variant, View};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    waits: true,
    variants: Some(|_| vec![variant()]),
    ..Source::plain(
        "nf4",
        concat!(include_str!("activations.cuh"), include_str!("dequantize.cuh"), include_str!("nf4.cu")),
        &["nf4_dequantize", "nf4_gemv", "nf4_gemv_gated", "nf4_random"],
    )
};

const THREADS: u32 = 256;

/// Rows that a block of `nf4_gemv` has at once, and of `nf4_gemv_gated`.
const ROWS: [usize; 2] = [16, 8];

/// Blocks of threads that a multiprocessor gets, at most.
const BLOCKS: usize = 8;

/// Its kernels, with what codes stand for.
pub(super) fn variant() -> Variant {
    let list = |values: &[f32]| values.iter().map(|value| format!("{value:?}f")).collect::<Vec<_>>().join(", ");
    let before = format!("#define VALUES {}\n#define SCALES {}\n", list(&VALUES), list(&SCALES));
    Variant { before, ..Variant::plain(&SOURCE) }
}

/// Starts `y = W x + s·B u (+ c) (+ bias)` for one row.
pub(super) fn gemv(
    on: &Launch<'_>,
    (stack, w): (&LoadedStack, &LoadedNf4),
    (outputs, rank): (usize, usize),
    [x, c, y]: [View; 3],
) -> Result<()> {
    let args = w.args().with(stack.sb).with(x.at).with(c.at).with(stack.bias).with(y.at).with(rank as i32);
    let blocks = outputs.div_ceil(ROWS[0]).min(on.gpu.multiprocessors * BLOCKS);
    on.gpu.launch(on.kernels.get("nf4_gemv")?, [blocks, 1, 1], [THREADS, 1, 1], 0, args)
}

/// Starts `h = act(G x) · (U x)` for one row.
pub(super) fn gemv_gated(
    on: &Launch<'_>,
    (stack, w): (&LoadedStack, &LoadedNf4),
    (activation, rank): (Activation, usize),
    [x, h]: [View; 2],
) -> Result<()> {
    let args = w.args().with(stack.sb).with(x.at).with(h.at).with(rank as i32);
    let args = args.with(activation.kind as i32).with(activation.limit);
    let blocks = activation.width.div_ceil(ROWS[1]).min(on.gpu.multiprocessors * BLOCKS);
    on.gpu.launch(on.kernels.get("nf4_gemv_gated")?, [blocks, 1, 1], [THREADS, 1, 1], 0, args)
}

/// Fills codes and scales with random ones.
pub(crate) fn random(gpu: &Gpu, kernels: &Kernels, (at, bytes): (Address, usize), seed: u32) -> Result<()> {
    let args = Args::default().with(at).with((bytes / 4) as i64).with(seed);
    gpu.launch(kernels.get("nf4_random")?, [1024, 1, 1], [THREADS, 1, 1], 0, args)
}
