//! Layers whose frozen weights ranks share: each keeps a part of every layer, and a layer is gathered from all of them while
//! the one before it is computed, so that two are whole at a time.
//!
//! Layers follow each other up and down, so that those with even numbers have one place and those with odd numbers the
//! other. All ranks ask for the same layers in the same order; one without anything to compute does so, too.

use std::cell::Cell;

use super::super::arena::aligned;
use super::super::gpu::{Address, Gpu, Memory, SideStream};
use super::super::nccl::Nccl;
use dpo_core::error::Result;

/// The layers' weights on a rank.
pub(crate) struct Shard {
    rank: usize,
    /// Bytes of a rank's part of every layer, and where this rank's lies.
    parts: Vec<(usize, Address)>,
    places: [Memory; 2],
    /// Which layer each place has.
    held: [Cell<Option<usize>>; 2],
    side: SideStream,
    _own: Memory,
}

fn part(layer: usize, ranks: usize) -> usize {
    aligned(layer.div_ceil(ranks))
}

fn place(layers: &[usize], ranks: usize) -> usize {
    layers.iter().map(|l| part(*l, ranks) * ranks).max().unwrap_or(0)
}

/// Bytes on every rank, of layers of so many bytes.
pub(crate) fn bytes(layers: &[usize], ranks: usize) -> usize {
    layers.iter().map(|l| part(*l, ranks)).sum::<usize>() + 2 * place(layers, ranks)
}

impl Shard {
    /// Memory for layers of so many bytes.
    pub(crate) fn new(gpu: &Gpu, layers: &[usize], rank: usize, ranks: usize) -> Result<Shard> {
        let own = gpu.allocate(layers.iter().map(|l| part(*l, ranks)).sum())?;
        let mut at = own.address;
        let next = |layer: &usize| {
            let bytes = part(*layer, ranks);
            at += bytes as u64;
            (bytes, at - bytes as u64)
        };
        let parts = layers.iter().map(next).collect();
        let bytes = place(layers, ranks);
        let places = [gpu.allocate(bytes)?, gpu.allocate(bytes)?];
        Ok(Shard { rank, parts, places, held: Default::default(), side: gpu.side_stream()?, _own: own })
    }

    /// Where a layer lies while it is whole.
    pub(crate) fn place(&self, layer: usize) -> &Memory {
        &self.places[layer % 2]
    }

    /// Keeps this rank's part of a layer that was loaded into its place.
    pub(crate) fn keep(&self, gpu: &Gpu, layer: usize) -> Result<()> {
        let (bytes, own) = self.parts[layer];
        gpu.copy(self.place(layer).address + (self.rank * bytes) as u64, own, bytes)
    }

    /// Makes a layer whole for what is started from now on, and lets the one `after` it follow.
    pub(crate) fn next(&self, gpu: &Gpu, nccl: &Nccl, layer: usize, after: Option<usize>) -> Result<()> {
        self.gather(gpu, nccl, layer)?;
        gpu.wait_for_side(&self.side)?;
        after.map_or(Ok(()), |after| self.gather(gpu, nccl, after))
    }

    /// Gathers a layer unless it is there. The one that had its place has been started by now, and is waited for.
    fn gather(&self, gpu: &Gpu, nccl: &Nccl, layer: usize) -> Result<()> {
        let held = &self.held[layer % 2];
        if held.replace(Some(layer)) == Some(layer) {
            return Ok(());
        }
        let (bytes, own) = self.parts[layer];
        gpu.wait_for_main(&self.side)?;
        nccl.gather(&self.side, own, self.place(layer).address, bytes)
    }
}
