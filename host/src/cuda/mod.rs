//! CUDA without a toolkit: the same graph, loop and files as on the CPU, on another device.
//!
//! `libraries` finds what the driver and pip bring; `gpu` and `blas` call it; `kernels` compiles the sources that lie beside the
//! files of `ops`. `lowering` turns a block into a `program` of steps, each op as its file says; `saved`, `liveness`, `footprint`
//! and `plan` say what is saved and where everything lies. `weights` holds the frozen ones, `optimizer` the adapter, `inputs` what
//! a batch brings. `engine` runs the layers and `head` what follows them; `device` trains, `decoder` answers, `nccl` sums over GPUs.

mod arena;
mod blas;
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
mod lowered;
mod lowering;
mod nccl;
mod ops;
mod optimizer;
mod plan;
mod program;
mod saved;
#[cfg(test)]
mod tests;
mod warm_up;
mod weights;

pub use decoder::CudaDecoder;
pub use engine::CudaDevice;
pub use gpu::{Gpu, count, driver_version};
pub use nccl::Nccl;
pub use plan::{GpuPlan, Room};
pub use weights::loading::{Given, Source};

use crate::console;
use crate::error::{Error, Result};

/// The GPU that `--device` means: `None` for the CPU. `auto` takes the first GPU if one can be used.
pub fn choose(device: &str) -> Result<Option<usize>> {
    match device {
        "cpu" => Ok(None),
        "auto" => {
            let driver = libraries::find().iter().any(|f| f.library.name == "cuda" && f.path.is_some());
            if !driver || gpu::count().unwrap_or(0) == 0 {
                return Ok(None);
            }
            match libraries::require() {
                Ok(()) => Ok(Some(0)),
                Err(e) => {
                    console::warning(format!("there is a GPU, but the CPU is used: {e}"));
                    Ok(None)
                }
            }
        }
        _ => {
            let index = match device.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
                None => None,
            };
            let index = index.ok_or_else(|| {
                Error::input(format!("'{device}' should be auto, cpu, cuda or cuda:N")).at("--device")
            })?;
            libraries::require().map_err(|e| e.at("--device"))?;
            Ok(Some(index))
        }
    }
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
    Ok(Room { available: limit.unwrap_or(usize::MAX).min(most), context })
}
