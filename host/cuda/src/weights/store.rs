//! Where the layers' frozen weights lie, and how a layer gets its own before it is computed. A store moves bytes, whatever numbers they are.

use super::super::gpu::{Gpu, Memory};
use super::super::nccl::Nccl;
use super::streamed::{self, Streamed};
use dpo_core::error::Result;
use dpo_core::storage::{Place, Storage};

/// The layers' weights on a GPU.
pub(crate) enum LayerStore {
    /// All lie where steps read them.
    Resident,
    /// They come from ranks or from host memory.
    Streamed(Box<Streamed>),
}

impl LayerStore {
    /// Bytes on the GPU, of layers of so many bytes each.
    pub(crate) fn bytes(storage: Storage, each: &[usize]) -> usize {
        match storage.place {
            Place::Resident => each.iter().sum(),
            Place::Sharded(ranks) => streamed::bytes(each, ranks).iter().sum(),
            Place::Host => streamed::bytes(each, 1)[0],
        }
    }

    /// Bytes in host memory.
    pub(crate) fn host_bytes(storage: Storage, each: &[usize]) -> usize {
        if storage.place == Place::Host { streamed::bytes(each, 1)[1] } else { 0 }
    }

    /// Memory for layers of so many bytes each, apart from that of resident ones.
    pub(crate) fn new(gpu: &Gpu, storage: Storage, each: &[usize], rank: usize) -> Result<LayerStore> {
        Ok(match storage.place {
            Place::Resident => LayerStore::Resident,
            Place::Sharded(ranks) => LayerStore::Streamed(Box::new(Streamed::over_ranks(gpu, each, rank, ranks)?)),
            Place::Host => LayerStore::Streamed(Box::new(Streamed::over_host(gpu, each)?)),
        })
    }

    pub(crate) fn is_resident(&self) -> bool {
        matches!(self, LayerStore::Resident)
    }

    pub(crate) fn is_sharded(&self) -> bool {
        matches!(self, LayerStore::Streamed(streamed) if streamed.is_sharded())
    }

    /// Where a layer lies while it is on the GPU, if not among the resident ones.
    pub(crate) fn place(&self, layer: usize) -> Option<&Memory> {
        match self {
            LayerStore::Resident => None,
            LayerStore::Streamed(streamed) => Some(streamed.place(layer)),
        }
    }

    /// Keeps a layer that was loaded into its place.
    pub(crate) fn keep(&self, gpu: &Gpu, layer: usize) -> Result<()> {
        match self {
            LayerStore::Resident => Ok(()),
            LayerStore::Streamed(streamed) => streamed.keep(gpu, layer),
        }
    }

    /// Has a layer's weights on the GPU for what is started from now on, and those of the layer `after` it follow. Whether they
    /// came anew, so that the adapter's are not yet among them.
    pub(crate) fn next(&self, gpu: &Gpu, nccl: Option<&Nccl>, layer: usize, after: Option<usize>) -> Result<bool> {
        let LayerStore::Streamed(streamed) = self else { return Ok(false) };
        streamed.next(gpu, nccl, layer, after)?;
        Ok(true)
    }
}
