//! Layers whose frozen weights come to the GPU one after the other: from ranks, each of which keeps a part of every layer, or from
//! pinned host memory. A layer comes while the one before it is computed, so that two are here at a time.
//!
//! Layers follow each other up and down, so that those with even numbers have one place and those with odd numbers the
//! other. All ranks ask for the same layers in the same order; one without anything to compute does so, too.

use std::cell::Cell;

use super::super::arena::aligned;
use super::super::gpu::{Address, Gpu, Memory, SideStream};
use super::super::nccl::Nccl;
use dpo_core::error::{Error, Result};

/// The layers' weights on a rank.
pub(crate) struct Streamed {
    /// Bytes of what this rank keeps of every layer, and where.
    kept: Vec<(usize, Address)>,
    /// Which of the ranks' parts that is; `None` where it is whole, in host memory.
    part: Option<usize>,
    places: [Memory; 2],
    /// Which layer each place has.
    held: [Cell<Option<usize>>; 2],
    side: SideStream,
    _memory: Vec<Memory>,
}

fn part(layer: usize, ranks: usize) -> usize {
    aligned(layer.div_ceil(ranks))
}

fn place(layers: &[usize], ranks: usize) -> usize {
    layers.iter().map(|l| part(*l, ranks) * ranks).max().unwrap_or(0)
}

/// Bytes of the places of two layers, of layers of so many bytes, and of what every rank keeps of all.
pub(super) fn bytes(layers: &[usize], ranks: usize) -> [usize; 2] {
    [2 * place(layers, ranks), layers.iter().map(|l| part(*l, ranks)).sum()]
}

impl Streamed {
    /// Layers of so many bytes, of which this rank keeps a part on the GPU.
    pub(crate) fn over_ranks(gpu: &Gpu, layers: &[usize], rank: usize, ranks: usize) -> Result<Streamed> {
        let [_, all] = bytes(layers, ranks);
        let own = gpu.allocate(all)?;
        let mut at = own.address;
        let next = |layer: &usize| {
            let bytes = part(*layer, ranks);
            at += bytes as u64;
            (bytes, at - bytes as u64)
        };
        let kept = layers.iter().map(next).collect();
        Streamed::new(gpu, kept, Some(rank), vec![own], place(layers, ranks))
    }

    /// Layers of so many bytes in host memory.
    pub(crate) fn over_host(gpu: &Gpu, layers: &[usize]) -> Result<Streamed> {
        let memory = layers.iter().map(|layer| gpu.allocate_on_host(*layer)).collect::<Result<Vec<_>>>()?;
        let kept = layers.iter().zip(&memory).map(|(bytes, memory)| (*bytes, memory.address)).collect();
        Streamed::new(gpu, kept, None, memory, place(layers, 1))
    }

    fn new(
        gpu: &Gpu,
        kept: Vec<(usize, Address)>,
        part: Option<usize>,
        memory: Vec<Memory>,
        place: usize,
    ) -> Result<Streamed> {
        let places = [gpu.allocate(place)?, gpu.allocate(place)?];
        Ok(Streamed { kept, part, places, held: Default::default(), side: gpu.side_stream()?, _memory: memory })
    }

    /// Whether ranks keep parts.
    pub(crate) fn is_sharded(&self) -> bool {
        self.part.is_some()
    }

    /// Where a layer lies while it is on the GPU.
    pub(crate) fn place(&self, layer: usize) -> &Memory {
        &self.places[layer % 2]
    }

    /// Keeps what this rank has of a layer that was loaded into its place.
    pub(crate) fn keep(&self, gpu: &Gpu, layer: usize) -> Result<()> {
        let (bytes, own) = self.kept[layer];
        gpu.copy(self.place(layer).address + (self.part.unwrap_or(0) * bytes) as u64, own, bytes)
    }

    /// Has a layer in its place for what is started from now on, and lets the one `after` it follow.
    pub(crate) fn next(&self, gpu: &Gpu, nccl: Option<&Nccl>, layer: usize, after: Option<usize>) -> Result<()> {
        self.fetch(gpu, nccl, layer)?;
        gpu.wait_for_side(&self.side)?;
        after.map_or(Ok(()), |after| self.fetch(gpu, nccl, after))
    }

    /// Fetches a layer unless it is there. The one that had its place has been started by now, and is waited for.
    fn fetch(&self, gpu: &Gpu, nccl: Option<&Nccl>, layer: usize) -> Result<()> {
        let held = &self.held[layer % 2];
        if held.replace(Some(layer)) == Some(layer) {
            return Ok(());
        }
        let ((bytes, own), to) = (self.kept[layer], self.place(layer).address);
        gpu.wait_for_main(&self.side)?;
        match (self.part, nccl) {
            (None, _) => gpu.copy_beside(&self.side, own, to, bytes),
            (Some(_), Some(nccl)) => nccl.gather(&self.side, own, to, bytes),
            (Some(_), None) => Err(Error::run("layers that ranks share are gathered by NCCL")),
        }
    }
}
