//! Inputs of layers that wait in host memory from the forward to the backward pass (PyTorch's `save_on_cpu`, activation offloading): the
//! GPU has room for those of a few layers, copies run beside the layers that are computed.

use super::gpu::{Address, Gpu, Memory, SideStream};
use dpo_core::error::Result;

/// The layers' inputs in pinned host memory.
pub(super) struct Offload {
    memory: Memory,
    side: SideStream,
}

impl Offload {
    pub(super) fn new(gpu: &Gpu, bytes: usize) -> Result<Offload> {
        Ok(Offload { memory: gpu.allocate_on_host(bytes)?, side: gpu.side_stream()? })
    }

    /// Copies so many bytes that were written by what was started before, at a place among those of all layers. What is started from
    /// now on may overwrite what copies before this one read.
    pub(super) fn keep(&self, gpu: &Gpu, from: Address, at: usize, bytes: usize) -> Result<()> {
        self.follow(gpu)?;
        gpu.copy_beside(&self.side, from, self.memory.address + at as u64, bytes)
    }

    /// Copies them back, over what is read by nothing that is started from now on. What copies before this one brought may be read
    /// from now on.
    pub(super) fn fetch(&self, gpu: &Gpu, at: usize, to: Address, bytes: usize) -> Result<()> {
        self.follow(gpu)?;
        gpu.copy_beside(&self.side, self.memory.address + at as u64, to, bytes)
    }

    /// Lets the main stream wait for the copies so far, and those that come for the main stream so far.
    pub(super) fn follow(&self, gpu: &Gpu) -> Result<()> {
        gpu.wait_for_side(&self.side)?;
        gpu.wait_for_main(&self.side)
    }
}
