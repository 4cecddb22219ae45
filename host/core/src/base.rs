//! The frozen weights of a model: all of them here, or of every one a part on each rank.
//!
//! A pass streams blocks in an order that it knows beforehand (a [`LayerStream`]). Where the base is sharded over ranks, a thread
//! gathers a block from their parts while the one before it is computed, so that no more than two are whole at a time. All ranks
//! have to stream the same blocks in the same order; one without anything to compute participates.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use candle_core::{Device, Tensor};
use dpo_plugin_api::graph::{ModelGraph, Node, Weight};

use crate::collective::Shards;
use crate::error::{Error, Result};
use crate::storage::shards;
use crate::weights::{BlockId, Checkpoint, blocks};

/// Of every block, of every node, the places of its weights among all.
type Places = HashMap<BlockId, Vec<Vec<usize>>>;

/// The weights of every node of a block.
pub type BlockWeights = Vec<Vec<Tensor>>;

/// The frozen weights of every block of a model.
pub enum Base {
    /// All are here.
    Resident(HashMap<BlockId, BlockWeights>),
    /// Each rank keeps a part.
    Sharded(Sharded),
}

impl Base {
    /// Loads every weight that the graph names, in f32.
    pub fn load(graph: &ModelGraph, checkpoint: &Checkpoint) -> Result<Base> {
        Base::whole(graph, |prefix, weight| checkpoint.load(prefix, weight))
    }

    /// As [`load`](Self::load), but matrices in bf16 stay what they are: enough for forward passes.
    pub fn load_kept(graph: &ModelGraph, checkpoint: &Checkpoint) -> Result<Base> {
        Base::whole(graph, |prefix, weight| checkpoint.load_kept(prefix, weight))
    }

    fn whole(graph: &ModelGraph, load: impl FnMut(&str, &Weight) -> Result<Tensor>) -> Result<Base> {
        let (weights, blocks) = every(graph, load)?;
        let of_node = |places: &Vec<usize>| places.iter().map(|w| weights[*w].clone()).collect();
        let resident = blocks.iter().map(|(id, nodes)| (*id, nodes.iter().map(of_node).collect()));
        Ok(Base::Resident(resident.collect()))
    }

    /// Loads this rank's part of them.
    pub fn load_part(graph: &ModelGraph, checkpoint: &Checkpoint, parts: Box<dyn Shards>) -> Result<Base> {
        let (weights, blocks) = every(graph, |prefix, weight| {
            if !shards(weight) {
                return Ok(Kept::Whole(checkpoint.load(prefix, weight)?));
            }
            let own = parts.own(weight.shape.iter().product());
            Ok(Kept::Part { shape: weight.shape.clone(), values: checkpoint.load_range(prefix, weight, &own)?, own })
        })?;
        let (wanted, orders) = channel();
        let (delivery, gathered) = channel();
        let gather = move || Gatherer { parts, weights, blocks }.run(&orders, &delivery);
        let thread = thread::Builder::new().name("base".into()).spawn(gather);
        thread.map_err(|e| Error::run(format!("cannot gather weights: {e}")))?;
        Ok(Base::Sharded(Sharded { wanted, gathered }))
    }

    /// Weights at hand, in the order of [`blocks`].
    pub fn of(graph: &ModelGraph, weights: Vec<BlockWeights>) -> Base {
        Base::Resident(blocks(graph).map(|(id, ..)| id).zip(weights).collect())
    }

    /// Streams blocks in this order, to the end.
    pub fn stream(&self, order: impl Iterator<Item = BlockId> + 'static) -> Result<LayerStream<'_>> {
        let mut stream = LayerStream { base: self, order: Box::new(order), wanted: None };
        stream.want_next()?;
        Ok(stream)
    }
}

/// Every weight of a graph, tied ones once, and where blocks find theirs.
fn every<T>(graph: &ModelGraph, mut load: impl FnMut(&str, &Weight) -> Result<T>) -> Result<(Vec<T>, Places)> {
    let (mut weights, mut known) = (Vec::new(), HashMap::new());
    let mut place = |prefix: &str, weight: &Weight| {
        let name = format!("{prefix}{}", weight.tensor);
        if let Some(at) = known.get(&name) {
            return Ok(*at);
        }
        weights.push(load(prefix, weight)?);
        known.insert(name, weights.len() - 1);
        Ok(weights.len() - 1)
    };
    let mut all = HashMap::new();
    for (id, prefix, nodes) in blocks(graph) {
        let of_node = |n: &Node| n.weights.iter().map(|w| place(prefix, w)).collect::<Result<Vec<usize>>>();
        all.insert(id, nodes.iter().map(of_node).collect::<Result<Vec<_>>>()?);
    }
    Ok((weights, all))
}

/// Blocks of a base in the order of a pass.
pub struct LayerStream<'b> {
    base: &'b Base,
    order: Box<dyn Iterator<Item = BlockId>>,
    /// The next block.
    wanted: Option<BlockId>,
}

impl<'b> LayerStream<'b> {
    /// The next block's weights. They should be gone before the one after it is asked for.
    ///
    /// # Errors
    /// A rank that is lost; a pass that takes more blocks than it said.
    #[allow(clippy::should_implement_trait)] // An iterator would hide that a pass may ask for too much.
    pub fn next(&mut self) -> Result<Cow<'b, [Vec<Tensor>]>> {
        let at = self.wanted.ok_or_else(|| Error::run("a pass goes beyond its last block"))?;
        let block = match self.base {
            Base::Resident(blocks) => Cow::Borrowed(blocks.get(&at).map_or(&[][..], Vec::as_slice)),
            Base::Sharded(sharded) => Cow::Owned(sharded.gathered.recv().map_err(|_| ended())??),
        };
        self.want_next()?;
        Ok(block)
    }

    /// Gathers all that is left with the other ranks, and computes nothing.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn participate(mut self) -> Result<()> {
        while self.wanted.is_some() {
            self.next()?;
        }
        Ok(())
    }

    fn want_next(&mut self) -> Result<()> {
        self.wanted = self.order.next();
        match (self.base, self.wanted) {
            (Base::Sharded(sharded), Some(at)) => sharded.wanted.send(at).map_err(|_| ended()),
            _ => Ok(()),
        }
    }
}

fn ended() -> Error {
    Error::run("weights are no longer gathered")
}

/// A base of which this rank keeps a part.
pub struct Sharded {
    wanted: Sender<BlockId>,
    gathered: Receiver<Result<BlockWeights>>,
}

/// A weight as a rank keeps it.
enum Kept {
    Whole(Tensor),
    Part { shape: Vec<usize>, own: Range<usize>, values: Vec<f32> },
}

/// Makes blocks whole, in a thread of its own.
struct Gatherer {
    parts: Box<dyn Shards>,
    weights: Vec<Kept>,
    blocks: Places,
}

impl Gatherer {
    /// Until nobody asks any more, or a rank is lost.
    fn run(mut self, orders: &Receiver<BlockId>, delivery: &Sender<Result<BlockWeights>>) {
        for at in orders {
            let block = self.gather(at);
            let failed = block.is_err();
            if delivery.send(block).is_err() || failed {
                return;
            }
        }
    }

    fn gather(&mut self, at: BlockId) -> Result<BlockWeights> {
        let (parts, weights) = (&mut self.parts, &self.weights);
        let mut whole = |at: &usize| match &weights[*at] {
            Kept::Whole(tensor) => Ok(tensor.clone()),
            Kept::Part { shape, own, values } => {
                let mut all = vec![0.0; shape.iter().product()];
                all[own.clone()].copy_from_slice(values);
                parts.fill(&mut all)?;
                Ok(Tensor::from_vec(all, shape.as_slice(), &Device::Cpu)?)
            }
        };
        self.blocks[&at].iter().map(|node| node.iter().map(&mut whole).collect()).collect()
    }
}
