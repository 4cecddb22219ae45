//! CUDA without a toolkit: the same graph, loop and files as on the CPU, on another device.
//!
//! `libraries` finds what the driver and pip bring, `api` has its functions; `gpu` and `matmul` call them; `kernels` compiles the sources that lie beside the
//! files of `ops`. `lowering` turns a block into a `program` of steps, each op as its file says; `saved`, `liveness`, `footprint`
//! and `plan` say what is saved and where everything lies. `weights` holds the frozen ones, `optimizer` the adapter, `inputs` what
//! a batch brings. `engine` runs the layers and `head` what follows them; `device` trains, `decoder` answers, `nccl` sums over GPUs.

mod api;
mod arena;
mod backend;
mod chunks;
mod decoder;
mod device;
mod engine;
mod footprint;
mod gpu;
mod head;
mod inputs;
pub mod kernels;
mod launch;
pub mod libraries;
mod liveness;
mod loading;
mod lowered;
mod lowering;
mod matmul;
mod nccl;
mod offload;
mod ops;
mod optimizer;
mod plan;
mod program;
mod saved;
mod segments;
mod sum;
#[cfg(test)]
mod tests;
mod warm_up;
mod weights;

pub use backend::Cuda;
pub use decoder::CudaDecoder;
pub use engine::CudaDevice;
pub use gpu::{Gpu, count};
pub use loading::{Given, Source};
pub use matmul::Gates;
pub use nccl::Nccl;
pub use plan::{GpuPlan, Room};

use dpo_core::console::{self, Remark};
use dpo_core::error::Result;
use dpo_core::memory::free_memory;

/// The first GPU, if one can be used; where there is one and libraries are missing, that is said.
///
/// # Errors
/// A driver that does not answer.
pub fn first_usable() -> Result<Option<usize>> {
    if libraries::driver_version().is_none() || gpu_count() == 0 {
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
    gpu::count().unwrap_or(0)
}

/// A GPU that the user asked for by index.
///
/// # Errors
/// Libraries that are missing, with how to get them.
pub fn require(index: usize) -> Result<usize> {
    libraries::require().map_err(|e| e.at("--device"))?;
    Ok(index)
}

/// Compiles every kernel for a card, and returns what the assembler says of each file: registers, spills.
pub fn check_kernels(capability: u32) -> Result<Vec<(String, String)>> {
    kernels::check(engine::sources(), capability)
}

/// Room for this process on a GPU: what is free, or less if the user says so.
pub fn room(gpu: &Gpu, limit: Option<usize>, nccl: Option<&Nccl>) -> Result<Room> {
    let (free, all) = gpu.memory()?;
    let context = plan::CONTEXT + nccl.map_or(0, |n| n.memory);
    // The context and what else is loaded by now is part of a plan.
    let own = context.min(all - free);
    // A little is left for what the driver takes on its own.
    let most = (free + own).saturating_sub(all / 64);
    Ok(Room {
        available: limit.unwrap_or(usize::MAX).min(most),
        context,
        gates: matmul::gates(gpu.kernels),
        fp8: matmul::has_fp8(gpu.kernels),
        host: free_memory(),
    })
}
