//! Experts whose W is kept in mxfp4.

use dpo_core::mxfp4::VALUES;

use super::{Address, Args, Gpu, Kernels, Source, Variant};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    waits: true,
    variants: Some(|_| vec![variant()]),
    ..Source::plain(
        "mxfp4",
        concat!(include_str!("dequantize.cuh"), include_str!("mxfp4.cu")),
        &["mxfp4_dequantize", "mxfp4_random"],
    )
};

/// Its kernels, with what codes stand for.
pub(super) fn variant() -> Variant {
    let values = VALUES.map(|value| format!("{value:?}f")).join(", ");
    Variant { before: format!("#define VALUES {values}\n"), ..Variant::plain(&SOURCE) }
}

/// Fills codes with random ones.
pub(crate) fn random(gpu: &Gpu, kernels: &Kernels, (at, bytes): (Address, usize), seed: u32) -> Result<()> {
    let args = Args::default().with(at).with((bytes / 4) as i64).with(seed);
    gpu.launch(kernels.get("mxfp4_random")?, [1024, 1, 1], [256, 1, 1], 0, args)
}
