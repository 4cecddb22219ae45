//! The ops of a graph on the GPU: one file an op, with its kernels beside it. A file says how its op is lowered, which steps that
//! gives, how they are launched and, for tests, emulated. What else the backend knows of an op it reads from its steps.

mod activation;
mod add;
mod attention;
mod attention_decode;
mod cat;
mod causal_conv;
mod dequantize;
mod embedding;
mod expand;
mod experts;
pub(super) mod fp8;
mod gated_delta;
mod gather;
mod glu;
mod heads;
mod linear;
mod linear_attention;
pub(super) mod lm_head;
mod lora;
pub(super) mod mxfp4;
mod narrow;
pub(super) mod nf4;
mod norms;
mod rope;
mod route;
mod scale;
mod ssd;
mod xielu;

// What files of ops are written with.
use super::gpu::{Address, Args, Argument, Gpu, TensorMap, View};
use super::kernels::{Kernels, Source, Variant};
use super::launch::{BatchTable, Launch};
use super::lowering::{BackwardReads, CudaOp, Epilogue, Lowering, multiple_of_8, whole};
use super::matmul::{Fp8, Gated, Gemm, Groups, Matmul, Operands, SKINNY_ROWS, WORKSPACE};
use super::program::{Cost, Execute, Recompute, Slice, Step};
#[cfg(test)]
use super::tests::Emulation;
use super::weights::{LoadedFp8, LoadedNf4, LoadedStack, Matrix, Member, NUMBERS, Stack, transposed_ld};
use dpo_core::error::{Error, Result};
use dpo_core::ops::{count, number, run};

/// All ops.
pub(super) const OPS: &[CudaOp] = &[
    embedding::OP,
    linear::OP,
    norms::RMS,
    norms::LAYER,
    rope::OP,
    attention::OP,
    glu::OP,
    route::OP,
    experts::OP,
    activation::OP,
    xielu::OP,
    add::OP,
    scale::OP,
    narrow::OP,
    cat::OP,
    expand::OP,
    causal_conv::OP,
    gated_delta::OP,
    ssd::OP,
    lm_head::OP,
];

/// Those that no graph names.
pub(super) const INTERNAL: &[CudaOp] = &[gather::OP];

/// Their sources.
pub(super) const SOURCES: &[&Source] = &[
    &super::sum::SOURCE,
    &activation::SOURCE,
    &attention::SOURCE,
    &attention_decode::SOURCE,
    &causal_conv::SOURCE,
    &embedding::SOURCE,
    &experts::SOURCE,
    &gather::SOURCE,
    &glu::SOURCE,
    &heads::SOURCE,
    &linear_attention::SOURCE,
    &lm_head::SOURCE,
    &fp8::SOURCE,
    &lora::SOURCE,
    &mxfp4::SOURCE,
    &narrow::SOURCE,
    &nf4::SOURCE,
    &norms::SOURCE,
    &rope::SOURCE,
    &route::SOURCE,
    &scale::SOURCE,
    &xielu::SOURCE,
];

/// The op of a name.
pub(super) fn find(name: &str) -> Result<&'static CudaOp> {
    let none = || Error::input(format!("op '{name}' has no CUDA kernel")).help("train with --device cpu");
    OPS.iter().chain(INTERNAL).find(|o| o.name == name).ok_or_else(none)
}
