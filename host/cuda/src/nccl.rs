//! NCCL: sums over the GPUs of a run's ranks, from GPU to GPU. Where it cannot be had, sums go through the hosts.

use std::ffi::{c_char, c_void};
use std::ptr;

use super::api::{self, Handle, NcclTable, Status, UniqueId};
use super::gpu::{Address, Gpu, SideStream};
use super::libraries;
use dpo_core::collective::ProcessGroup;
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_core::progress;

/// This GPU among those of a run.
pub struct Nccl {
    communicator: Handle,
    /// Bytes that it took on the GPU.
    pub memory: usize,
    library: &'static NcclTable,
}

/// Values of the first sum, which takes the memory that all later ones use.
const FIRST: usize = 16 << 20;

/// What a function of NCCL returned, as a result.
fn done(library: &NcclTable, what: &str, status: Status) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: NCCL returns a text that it keeps.
    let said = unsafe { api::text((library.ncclGetErrorString)(status)) };
    Err(Error::run(format!("NCCL: {what}: {said}")).help("NCCL_DEBUG=INFO makes it say more"))
}

impl Nccl {
    /// Joins the GPUs of all ranks, before memory is planned, since NCCL takes some of it. `None` where there is one rank,
    /// where a rank has no NCCL, or where two ranks share a GPU, which NCCL refuses.
    pub fn join(gpu: &Gpu, group: &mut dyn ProcessGroup) -> Result<Option<Nccl>> {
        if group.size() == 1 {
            return Ok(None);
        }
        let there = libraries::require_one("nccl").is_ok();
        let gpus = group.all_gather(if there { gpu.uuid.to_vec() } else { Vec::new() })?;
        let shared = (1..gpus.len()).any(|rank| gpus[..rank].contains(&gpus[rank]));
        let obstacle = match gpus.iter().position(Vec::is_empty) {
            Some(rank) => Some(format!("rank {rank} has no NCCL (see dpo-host doctor)")),
            None => shared.then(|| "ranks share a GPU".into()),
        };
        if let Some(obstacle) = obstacle {
            console::line(format!("gradients   are summed through the hosts: {obstacle}"));
            return Ok(None);
        }
        let library = libraries::table::<NcclTable>()?;
        let mut unique = UniqueId { internal: [0; 128] };
        let id = group.broadcast_from_first(|| {
            // SAFETY: writes one id.
            done(library, "starting", unsafe { (library.ncclGetUniqueId)(&mut unique) })?;
            Ok(unique.internal.map(|c| c as u8).to_vec())
        })?;
        unique.internal.iter_mut().zip(&id).for_each(|(to, byte)| *to = *byte as c_char);
        let (free, _) = gpu.memory()?;
        let mut communicator = ptr::null_mut();
        let (size, rank) = (group.size() as i32, group.rank() as i32);
        // SAFETY: writes one handle; the id is rank 0's, and every rank calls this with its own number.
        done(library, "joining", unsafe { (library.ncclCommInitRank)(&mut communicator, size, unique, rank) })?;
        let mut nccl = Nccl { communicator, memory: 0, library };
        nccl.first_rounds(gpu, group.size())?;
        nccl.memory = free.saturating_sub(gpu.memory()?.0);
        console::line(format!("gradients   are summed by NCCL over {size} GPUs"));
        Ok(Some(nccl))
    }

    /// Small and large ones: NCCL takes memory for a way of doing it when it first goes that way.
    fn first_rounds(&self, gpu: &Gpu, ranks: usize) -> Result<()> {
        let side = gpu.side_stream()?;
        let memory = gpu.allocate(FIRST * 4)?;
        gpu.zero(memory.address, memory.bytes)?;
        for count in [1, FIRST] {
            self.sum(gpu, memory.address, count)?;
        }
        gpu.wait_for_main(&side)?;
        let part = memory.bytes / ranks;
        self.gather(&side, memory.address, memory.address, part)?;
        gpu.wait_for_side(&side)?;
        gpu.finish()
    }

    /// Puts every rank's `part` bytes, in the order of ranks, at `to`, in a side stream.
    pub(super) fn gather(&self, side: &SideStream, own: Address, to: Address, part: usize) -> Result<()> {
        progress::enter_collective();
        let (own, to) = (own as *const c_void, to as *mut c_void);
        // SAFETY: addresses of the device, `to` with room for every rank's part.
        let status =
            unsafe { (self.library.ncclAllGather)(own, to, part, api::NCCL_UINT8, self.communicator, side.stream) };
        done(self.library, "gathering weights", status)
    }

    /// Sums and gathers `count` values of every rank both here and through the hosts; returns how far the sums are apart,
    /// as a share of the largest, and whether a second sum and the gathered bytes are the same bit for bit.
    pub fn compare(&self, gpu: &Gpu, group: &mut dyn ProcessGroup, count: usize) -> Result<(f64, bool)> {
        let mut state = group.rank() as u32 + 1;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let own: Vec<f32> = (0..count).map(|_| random()).collect();
        let memory = gpu.allocate(count * 4 * group.size())?;
        let mut sums = [vec![0.0_f32; count], vec![0.0_f32; count]];
        for sum in &mut sums {
            gpu.upload(&own, memory.address)?;
            self.sum(gpu, memory.address, count)?;
            gpu.download(memory.address, sum)?;
        }
        let mut expected = own.clone();
        group.all_reduce(&mut expected)?;
        let largest = expected.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs()));
        let apart = sums[0].iter().zip(&expected).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs())) / largest;

        let part = gpu.allocate(count * 4)?;
        let side = gpu.side_stream()?;
        gpu.upload(&own, part.address)?;
        gpu.wait_for_main(&side)?;
        self.gather(&side, part.address, memory.address, count * 4)?;
        gpu.wait_for_side(&side)?;
        let mut gathered = vec![0.0_f32; count * group.size()];
        gpu.download(memory.address, &mut gathered)?;
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let same = sums[0] == sums[1] && group.all_gather(bytes(&own))?.concat() == bytes(&gathered);
        Ok((f64::from(apart), same))
    }

    /// Puts the sum over ranks into every rank's f32 values.
    pub(super) fn sum(&self, gpu: &Gpu, at: Address, count: usize) -> Result<()> {
        progress::enter_collective();
        let (float, add) = (api::NCCL_FLOAT32, api::NCCL_SUM);
        let values = at as *mut c_void;
        // SAFETY: addresses of the device with so many values; in place, which NCCL allows.
        let status =
            unsafe { (self.library.ncclAllReduce)(values, values, count, float, add, self.communicator, gpu.stream()) };
        done(self.library, "summing gradients", status)
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // SAFETY: made in `join`, ended once. Abort does not wait for ranks that are gone.
        let _ = unsafe { (self.library.ncclCommAbort)(self.communicator) };
    }
}
