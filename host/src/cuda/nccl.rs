//! NCCL: sums over the GPUs of a run's ranks, from GPU to GPU. Where it cannot be had, sums go through the hosts.

use std::ffi::c_char;
use std::ptr;

use cudarc::nccl::{result, sys};

use super::device::{Address, Gpu};
use super::libraries;
use crate::console;
use crate::error::{Error, Result};
use crate::ranks::Ranks;

/// This GPU among those of a run.
pub struct Nccl {
    communicator: sys::ncclComm_t,
}

fn failed(what: &str) -> impl FnOnce(result::NcclError) -> Error + '_ {
    move |e| Error::run(format!("NCCL: {what}: {:?}", e.0)).help("NCCL_DEBUG=INFO makes it say more")
}

impl Nccl {
    /// Joins the GPUs of all ranks, before memory is planned, since NCCL takes some of it. `None` where there is one rank,
    /// where a rank has no NCCL, or where two ranks share a GPU, which NCCL refuses.
    pub fn join(gpu: &Gpu, ranks: &mut Ranks) -> Result<Option<Nccl>> {
        if ranks.size() == 1 {
            return Ok(None);
        }
        let there = libraries::require_one("nccl").is_ok();
        let gpus = ranks.gather(if there { gpu.uuid.to_vec() } else { Vec::new() })?;
        let shared = (1..gpus.len()).any(|rank| gpus[..rank].contains(&gpus[rank]));
        let obstacle = match gpus.iter().position(Vec::is_empty) {
            Some(rank) => Some(format!("rank {rank} has no NCCL (see dpo-host doctor)")),
            None => shared.then(|| "ranks share a GPU".into()),
        };
        if let Some(obstacle) = obstacle {
            console::line(format!("gradients   are summed through the hosts: {obstacle}"));
            return Ok(None);
        }
        let id = ranks.first(|| {
            let id = result::get_uniqueid().map_err(failed("starting"))?;
            Ok(id.internal.iter().map(|c| *c as u8).collect::<Vec<u8>>())
        })?;
        let mut unique = sys::ncclUniqueId { internal: [0; 128] };
        unique.internal.iter_mut().zip(&id).for_each(|(to, byte)| *to = *byte as c_char);
        let mut communicator = ptr::null_mut();
        let (size, rank) = (ranks.size() as i32, ranks.rank() as i32);
        // SAFETY: writes one handle; the id is rank 0's, and every rank calls this with its own number.
        unsafe { result::comm_init_rank(&mut communicator, size, unique, rank) }.map_err(failed("joining"))?;
        let nccl = Nccl { communicator };
        // The first sum takes the memory that all later ones use.
        let memory = gpu.allocate(4)?;
        gpu.zero(memory.address, 4)?;
        nccl.sum(gpu, memory.address, 1)?;
        gpu.finish()?;
        console::line(format!("gradients   are summed by NCCL over {size} GPUs"));
        Ok(Some(nccl))
    }

    /// Puts the sum over ranks into every rank's f32 values.
    pub(super) fn sum(&self, gpu: &Gpu, at: Address, count: usize) -> Result<()> {
        let (float, add) = (sys::ncclDataType_t::ncclFloat32, sys::ncclRedOp_t::ncclSum);
        let values = at as *mut std::ffi::c_void;
        // SAFETY: addresses of the device with so many values; in place, which NCCL allows.
        let status = unsafe {
            sys::ncclAllReduce(values, values, count, float, add, self.communicator, gpu.stream().cast()).result()
        };
        status.map(|_| ()).map_err(failed("summing gradients"))
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // SAFETY: made in `join`, ended once. Abort does not wait for ranks that are gone.
        let _ = unsafe { result::comm_abort(self.communicator) };
    }
}
