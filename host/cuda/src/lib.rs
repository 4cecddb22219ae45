//! CUDA without a toolkit: the same graph, loop and files as on the CPU, on another device.
//!
//! `libraries` finds what the driver and pip bring; `device` and `blas` call it; `kernels` compiles the sources in
//! `host/kernels`; `lowering` turns a block into a `program` of operations; `memory` plans; `model` loads; `inputs` is what a
//! batch brings; `launch` and `engine` run, `decoder` answers; `nccl` sums over GPUs, `shard` is how they share a base.

mod backend;
mod blas;
mod decoder;
mod device;
mod engine;
mod inputs;
pub mod kernels;
mod launch;
pub mod libraries;
mod lowering;
mod memory;
mod model;
mod nccl;
mod plan;
mod program;
mod shard;
#[cfg(test)]
mod tests;

pub use backend::Cuda;
pub use decoder::CudaDecoder;
pub use device::{Gpu, count, driver_version};
pub use engine::CudaDevice;
pub use model::{Given, Source};
pub use nccl::Nccl;
pub use plan::{GpuPlan, Room};

use dpo_core::console::{self, Remark};
use dpo_core::error::Result;

/// The first GPU, if one can be used; where there is one and libraries are missing, that is said.
///
/// # Errors
/// A driver that does not answer.
pub fn first_usable() -> Result<Option<usize>> {
    let driver = libraries::find().iter().any(|f| f.library.name == "cuda" && f.path.is_some());
    if !driver || gpu_count() == 0 {
        return Ok(None);
    }
    match libraries::require() {
        Ok(()) => Ok(Some(0)),
        Err(e) => {
            console::warning(Remark::because("there is a GPU, but the CPU is used", &e));
            Ok(None)
        }
    }
}

fn gpu_count() -> usize {
    device::count().unwrap_or(0)
}

/// A GPU that the user asked for by index.
///
/// # Errors
/// Libraries that are missing, with how to get them.
pub fn require(index: usize) -> Result<usize> {
    libraries::require().map_err(|e| e.at("--device"))?;
    Ok(index)
}

/// Room for this process on a GPU: what is free, or less if the user says so.
pub fn room(gpu: &Gpu, limit: Option<usize>, nccl: Option<&Nccl>) -> Result<Room> {
    let (free, all) = gpu.memory()?;
    let context = plan::CONTEXT + nccl.map_or(0, |n| n.memory);
    // The context and what else is loaded by now is part of a plan.
    let own = context.min(all - free);
    // A little is left for what the driver takes on its own.
    let most = (free + own).saturating_sub(all / 64);
    Ok(Room { available: limit.unwrap_or(usize::MAX).min(most), context })
}
