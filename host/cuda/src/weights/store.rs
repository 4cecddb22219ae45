//! Where the layers' frozen weights lie, and how a layer gets its own before it is computed. A storage that is not computed with as
//! it lies is a variant here: its `next` makes a layer's weights in the place where its steps read them.

use super::super::gpu::{Gpu, Memory};
use super::super::nccl::Nccl;
use super::shard::{self, Shard};
use dpo_core::error::Result;
use dpo_core::storage::{Place, Storage};

/// The layers' weights on a GPU.
pub(crate) enum LayerStore {
    /// All lie where steps read them.
    Resident,
    /// A part of every layer.
    Sharded(Shard),
}

impl LayerStore {
    /// Bytes on the GPU, of layers of so many bytes each.
    pub(crate) fn bytes(storage: Storage, each: &[usize]) -> usize {
        match storage.place {
            Place::Sharded(ranks) => shard::bytes(each, ranks),
            Place::Resident | Place::Host => each.iter().sum(),
        }
    }

    /// Memory for layers of so many bytes each, apart from that of resident ones.
    pub(crate) fn new(gpu: &Gpu, storage: Storage, each: &[usize], rank: usize) -> Result<LayerStore> {
        Ok(match storage.place {
            Place::Sharded(ranks) => LayerStore::Sharded(Shard::new(gpu, each, rank, ranks)?),
            Place::Resident | Place::Host => LayerStore::Resident,
        })
    }

    pub(crate) fn is_sharded(&self) -> bool {
        matches!(self, LayerStore::Sharded(_))
    }

    /// Where a layer lies while it is whole, if not among the resident ones.
    pub(crate) fn place(&self, layer: usize) -> Option<&Memory> {
        match self {
            LayerStore::Resident => None,
            LayerStore::Sharded(shard) => Some(shard.place(layer)),
        }
    }

    /// Keeps a layer that was loaded into its place.
    pub(crate) fn keep(&self, gpu: &Gpu, layer: usize) -> Result<()> {
        match self {
            LayerStore::Resident => Ok(()),
            LayerStore::Sharded(shard) => shard.keep(gpu, layer),
        }
    }

    /// Has a layer's weights whole for what is started from now on, and those of the layer `after` it follow. Whether they were
    /// made anew, so that the adapter's are not yet among them.
    pub(crate) fn next(&self, gpu: &Gpu, nccl: Option<&Nccl>, layer: usize, after: Option<usize>) -> Result<bool> {
        let (LayerStore::Sharded(shard), Some(nccl)) = (self, nccl) else { return Ok(false) };
        shard.next(gpu, nccl, layer, after)?;
        Ok(true)
    }
}
