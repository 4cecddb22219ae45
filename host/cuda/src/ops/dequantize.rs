//! Stacks whose W is kept in fewer bits than matmuls read: `[[W, s·B], [A, 0]]` is made in bf16 before one reads it, for experts one below the
//! other. The workspace it is made in is that of all stacks, since everything runs in order.

use super::{Launch, LoadedStack, Matrix, Variant, View, fp8, mxfp4, nf4};
use dpo_core::error::Result;
use dpo_core::storage::Numbers;

const THREADS: u32 = 256;

/// Blocks of threads that a multiprocessor gets, at most.
const BLOCKS: usize = 32;

/// A stack of so many rows and LoRA columns, in so many groups, as matmuls read it; without an adapter W alone. One that is made is there
/// until the next is asked for.
pub(super) fn dequantized(
    on: &Launch<'_>,
    stack: &LoadedStack,
    (outputs, rank, groups): (usize, usize, usize),
    ld: usize,
) -> Result<View> {
    let (kernel, args) = match &stack.w {
        Matrix::Bf16(whole) => return Ok(*whole),
        Matrix::Nf4(w) => ("nf4_dequantize", w.args()),
        Matrix::Mxfp4(w) => ("mxfp4_dequantize", w.args()),
        Matrix::Fp8(w) => ("dequantize_fp8", w.args()),
    };
    let to = View { at: on.dequantized, ld: ld as i64 };
    let blocks = (outputs + groups * rank).min(on.gpu.multiprocessors * BLOCKS);
    let args = args.with(stack.a).with(stack.sb).with(to).with(rank as i32).with((outputs / groups) as i32);
    on.gpu.launch(on.kernels.get(kernel)?, [blocks, 1, 1], [THREADS, 1, 1], 0, args)?;
    on.gpu.mark("dequantize")?;
    Ok(to)
}

/// Kernels that make stacks whose W is kept as such numbers.
pub(super) fn variant(numbers: Numbers) -> Option<Variant> {
    match numbers {
        Numbers::F32 | Numbers::Bf16 => None,
        Numbers::Nf4 => Some(nf4::variant()),
        Numbers::Mxfp4 => Some(mxfp4::variant()),
        Numbers::Fp8 => Some(Variant::plain(&fp8::SOURCE)),
    }
}
