//! The devices that this program can compute on, and which of them a flag means.

use dpo_core::backend::{Backend, Cpu};
use dpo_core::error::{Error, Result};
use dpo_cuda::{self as cuda, Cuda};

use crate::args::DeviceArg;

/// The backend that `--device` means for a process of this rank on its host, or for the only process.
///
/// # Errors
/// A GPU that is not there, libraries that are missing, more GPUs named than processes, or fewer.
pub(crate) fn open(device: &DeviceArg, local_rank: Option<usize>) -> Result<Box<dyn Backend>> {
    Ok(match gpu(device, local_rank)? {
        Some(index) => Box::new(Cuda(index)),
        None => Box::new(Cpu),
    })
}

/// The index of the GPU that `--device` means; `None` for the CPU.
///
/// # Errors
/// As [`open`].
pub(crate) fn gpu(device: &DeviceArg, local_rank: Option<usize>) -> Result<Option<usize>> {
    let wrong = |text: String, help: &str| Err(Error::input(text).at("--device").help(help));
    match (device, local_rank) {
        (DeviceArg::Cpu, _) => Ok(None),
        (DeviceArg::Cuda(list), None) if list.len() > 1 => {
            wrong(format!("'{device}' names {} GPUs", list.len()), "say --gpus, with their number")
        }
        (DeviceArg::Cuda(list), None) => cuda::require(list.first().copied().unwrap_or(0)).map(Some),
        (DeviceArg::Auto, None) => cuda::first_usable(),
        (DeviceArg::Cuda(list), Some(rank)) if !list.is_empty() => match list.get(rank) {
            Some(index) => cuda::require(*index).map(Some),
            None => wrong(
                format!("'{device}' names no GPU for rank {rank} of this host"),
                "name one for each rank, or say cuda",
            ),
        },
        (_, Some(rank)) => {
            let first = if *device == DeviceArg::Auto { cuda::first_usable()? } else { Some(cuda::require(0)?) };
            let Some(first) = first else { return Ok(None) };
            // A launcher may let each rank see its own GPU only.
            let visible = std::env::var("CUDA_VISIBLE_DEVICES").is_ok_and(|v| !v.is_empty() && !v.contains(','));
            let count = cuda::count()?;
            match rank {
                _ if visible => Ok(Some(first)),
                rank if rank < count => Ok(Some(rank)),
                rank => wrong(format!("rank {rank} of this host has no GPU: there are {count}"), "lower --gpus"),
            }
        }
    }
}
