//! Linears whose W is kept in nf4: `[[W, s·B], [A, 0]]` is made in bf16 before a matmul reads it. The workspace it is made in is that of
//! all stacks, since everything runs in order.

use dpo_core::nf4::{SCALES, VALUES};

use super::{Address, Args, Gpu, Kernels, Launch, LoadedNf4, LoadedStack, Source, Variant, View};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    waits: true,
    variants: Some(|_| vec![variant()]),
    ..Source::plain("nf4", include_str!("nf4.cu"), &["nf4_dequantize", "nf4_random"])
};

const THREADS: u32 = 256;

/// Blocks of threads that a multiprocessor has at once.
const RESIDENT: usize = 8;

/// Its kernels, with what codes stand for.
pub(super) fn variant() -> Variant {
    let list = |values: &[f32]| values.iter().map(|value| format!("{value:?}f")).collect::<Vec<_>>().join(", ");
    let before = format!("#define VALUES {}\n#define SCALES {}\n", list(&VALUES), list(&SCALES));
    Variant { before, ..Variant::plain(&SOURCE) }
}

/// A stack of so many rows and LoRA columns, with W in nf4, as matmuls read it, in a workspace; without an adapter W alone.
pub(super) fn dequantized(
    on: &Launch<'_>,
    (stack, w): (&LoadedStack, &LoadedNf4),
    (outputs, inputs, rank): (usize, usize, usize),
    ld: usize,
) -> Result<View> {
    let to = View { at: on.dequantized, ld: ld as i64 };
    let eights = (outputs + rank) * (inputs + rank) / 8;
    let blocks = eights.div_ceil(THREADS as usize).min(on.gpu.multiprocessors * RESIDENT);
    let args = w.args().with(stack.a).with(stack.sb).with(to).with(rank as i32);
    on.gpu.launch(on.kernels.get("nf4_dequantize")?, [blocks, 1, 1], [THREADS, 1, 1], 0, args)?;
    on.gpu.mark("dequantize")?;
    Ok(to)
}

/// Fills codes and scales with random ones.
pub(crate) fn random(gpu: &Gpu, kernels: &Kernels, (at, bytes): (Address, usize), seed: u32) -> Result<()> {
    let args = Args::default().with(at).with((bytes / 4) as i64).with(seed);
    gpu.launch(kernels.get("nf4_random")?, [1024, 1, 1], [THREADS, 1, 1], 0, args)
}
