//! The frozen weights of a model: as they are computed with, quantised, or of every one a part on each rank.
//!
//! A pass streams blocks in an order that it knows beforehand (a [`LayerStream`]). Where the base is quantised or sharded over ranks, a
//! thread makes a block whole while the one before it is computed, so that no more than two are whole at a time: it gathers the parts
//! and dequantises. Ranks that share a base have to stream the same blocks in the same order; one without anything to compute
//! participates.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use candle_core::{Device, Tensor};
use dpo_plugin_api::graph::{ModelGraph, Node, Weight};

use crate::collective::Shards;
use crate::error::{Error, Result};
use crate::storage::{Numbers, Quantization, shards};
use crate::weights::{BlockId, Checkpoint, blocks, is_quantized};

/// Bytes of what ranks exchange.
const WORD: usize = 4;

/// Of every block, of every node, the places of its weights among all.
type Places = HashMap<BlockId, Vec<Vec<usize>>>;

/// The weights of every node of a block.
pub type BlockWeights = Vec<Vec<Tensor>>;

/// The frozen weights of every block of a model.
pub enum Base {
    /// All are here, as they are computed with.
    Resident(HashMap<BlockId, BlockWeights>),
    /// Blocks are made whole when they are streamed.
    Streamed(Streamed),
}

impl Base {
    /// Loads every weight that the graph names, in f32.
    pub fn load(graph: &ModelGraph, checkpoint: &Checkpoint) -> Result<Base> {
        Base::load_packed(graph, checkpoint, None, None)
    }

    /// As [`load`](Self::load), but quantised, where that is asked for, and with this rank's part of every matrix, where ranks share
    /// the base.
    pub fn load_packed(
        graph: &ModelGraph,
        checkpoint: &Checkpoint,
        quantization: Option<Quantization>,
        parts: Option<Box<dyn Shards>>,
    ) -> Result<Base> {
        Base::of_checkpoint(graph, checkpoint, Checkpoint::load, quantization, parts)
    }

    /// As [`load`](Self::load), but matrices in bf16 stay what they are, or are quantised: enough for forward passes.
    pub fn load_kept(graph: &ModelGraph, checkpoint: &Checkpoint, quantization: Option<Quantization>) -> Result<Base> {
        Base::of_checkpoint(graph, checkpoint, Checkpoint::load_kept, quantization, None)
    }

    fn of_checkpoint(
        graph: &ModelGraph,
        checkpoint: &Checkpoint,
        whole: fn(&Checkpoint, &str, &Weight) -> Result<Tensor>,
        quantization: Option<Quantization>,
        parts: Option<Box<dyn Shards>>,
    ) -> Result<Base> {
        let (weights, blocks) = every(graph, quantization, |prefix, weight, quantization| {
            let parts = parts.as_deref().filter(|_| shards(weight));
            if quantization.is_none() && parts.is_none() {
                return Ok(Kept::Whole(whole(checkpoint, prefix, weight)?));
            }
            let own = |words: usize| parts.map_or(0..words, |parts| parts.own(words));
            let shape = weight.shape.clone();
            let words = match quantization {
                None => {
                    let own = own(shape.iter().product());
                    checkpoint.load_range(prefix, weight, &own)?
                }
                Some(kind) => {
                    let words = words(&checkpoint.load_packed(prefix, weight, kind)?);
                    words[own(words.len())].to_vec()
                }
            };
            Ok(Kept::Packed { shape, quantization, words })
        })?;
        if weights.iter().all(|kept| matches!(kept, Kept::Whole(_))) {
            let of = |at: &usize| match &weights[*at] {
                Kept::Whole(tensor) => Some(tensor.clone()),
                Kept::Packed { .. } => None,
            };
            let of_node = |places: &Vec<usize>| places.iter().filter_map(of).collect();
            let resident = blocks.iter().map(|(id, nodes)| (*id, nodes.iter().map(of_node).collect()));
            return Ok(Base::Resident(resident.collect()));
        }
        let shared = parts.is_some();
        let (wanted, orders) = channel();
        let (delivery, made) = channel();
        let make = move || Maker { parts, weights, blocks }.run(&orders, &delivery);
        let thread = thread::Builder::new().name("base".into()).spawn(make);
        thread.map_err(|e| Error::run(format!("cannot make weights whole: {e}")))?;
        Ok(Base::Streamed(Streamed { wanted, made, quantization, shared }))
    }

    /// What the layers' matrices are kept as, where that is smaller than what is computed with.
    pub fn quantization(&self) -> Option<Quantization> {
        match self {
            Base::Resident(_) => None,
            Base::Streamed(streamed) => streamed.quantization,
        }
    }

    /// Whether ranks share it, so that all have to stream the same blocks.
    pub fn is_shared(&self) -> bool {
        matches!(self, Base::Streamed(Streamed { shared: true, .. }))
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

/// Every weight of a graph, tied ones once, and where blocks find theirs. `load` is told the quantisation of those that it is for.
fn every<T>(
    graph: &ModelGraph,
    quantization: Option<Quantization>,
    mut load: impl FnMut(&str, &Weight, Option<Quantization>) -> Result<T>,
) -> Result<(Vec<T>, Places)> {
    let (mut weights, mut known) = (Vec::new(), HashMap::new());
    let mut place = |prefix: &str, weight: &Weight, quantization: Option<Quantization>| {
        let name = format!("{prefix}{}", weight.tensor);
        if let Some(at) = known.get(&name) {
            return Ok(*at);
        }
        weights.push(load(prefix, weight, quantization)?);
        known.insert(name, weights.len() - 1);
        Ok(weights.len() - 1)
    };
    let mut all = HashMap::new();
    for (id, prefix, nodes) in blocks(graph) {
        let of_node = |n: &Node| {
            let own = |w: &Weight| quantization.filter(|kind| is_quantized(kind.numbers(), id, n, w));
            n.weights.iter().map(|w| place(prefix, w, own(w))).collect::<Result<Vec<usize>>>()
        };
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
            Base::Streamed(streamed) => Cow::Owned(streamed.next(at)?),
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
            (Base::Streamed(streamed), Some(at)) => streamed.wanted.send(at).map_err(|_| ended()),
            _ => Ok(()),
        }
    }
}

fn ended() -> Error {
    Error::run("weights are no longer made whole")
}

/// A base whose blocks are made whole in a thread of its own.
pub struct Streamed {
    wanted: Sender<BlockId>,
    made: Receiver<Made>,
    quantization: Option<Quantization>,
    /// Whether ranks share it.
    shared: bool,
}

/// A block, made whole.
type Made = (BlockId, Result<BlockWeights>);

impl Streamed {
    /// The block that was wanted. A pass that ended early has left others.
    fn next(&self, at: BlockId) -> Result<BlockWeights> {
        loop {
            let (made, block) = self.made.recv().map_err(|_| ended())?;
            if made == at || block.is_err() {
                return block;
            }
        }
    }
}

/// A weight as a rank keeps it.
enum Kept {
    /// As it is computed with.
    Whole(Tensor),
    /// In words of four bytes, which ranks exchange: f32, or what a quantisation has packed. Where ranks share the base, of a matrix
    /// only this rank's part.
    Packed { shape: Vec<usize>, quantization: Option<Quantization>, words: Vec<f32> },
}

/// Bytes in words, filled up with zeros. They are moved and never computed with.
fn words(bytes: &[u8]) -> Vec<f32> {
    let (whole, rest) = bytes.as_chunks();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    let last = (!rest.is_empty()).then_some(last);
    whole.iter().copied().chain(last).map(f32::from_le_bytes).collect()
}

/// Makes blocks whole.
struct Maker {
    parts: Option<Box<dyn Shards>>,
    weights: Vec<Kept>,
    blocks: Places,
}

impl Maker {
    /// Until nobody asks any more, or a rank is lost.
    fn run(mut self, orders: &Receiver<BlockId>, delivery: &Sender<Made>) {
        for at in orders {
            let block = self.make(at);
            let failed = block.is_err();
            if delivery.send((at, block)).is_err() || failed {
                return;
            }
        }
    }

    fn make(&mut self, at: BlockId) -> Result<BlockWeights> {
        let (parts, weights) = (&mut self.parts, &self.weights);
        let mut whole = |at: &usize| match &weights[*at] {
            Kept::Whole(tensor) => Ok(tensor.clone()),
            Kept::Packed { shape, quantization, words } => {
                let numbers = quantization.map_or(Numbers::F32, Quantization::numbers);
                let mut all = Cow::Borrowed(words);
                if let Some(parts) = parts.as_mut().filter(|_| shape.len() > 1) {
                    let own = parts.own(numbers.bytes_of(shape).div_ceil(WORD));
                    let mut gathered = vec![0.0; numbers.bytes_of(shape).div_ceil(WORD)];
                    gathered[own].copy_from_slice(words);
                    parts.fill(&mut gathered)?;
                    all = Cow::Owned(gathered);
                }
                let values = match quantization {
                    None => all.into_owned(),
                    Some(kind) => {
                        let bytes: Vec<u8> = all.iter().flat_map(|word| word.to_le_bytes()).collect();
                        kind.unpack(shape, &bytes)
                    }
                };
                Ok(Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?)
            }
        };
        self.blocks[&at].iter().map(|node| node.iter().map(&mut whole).collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pass_has_left_is_not_the_next_ones() {
        let ((wanted, _), (delivery, made)) = (channel(), channel());
        let streamed = Streamed { wanted, made, quantization: None, shared: false };
        let block = |value: f32| vec![vec![Tensor::new(value, &Device::Cpu).unwrap()]];
        delivery.send((BlockId::Layer(3), Ok(block(3.0)))).unwrap();
        delivery.send((BlockId::Embed, Ok(block(0.0)))).unwrap();
        let next = streamed.next(BlockId::Embed).unwrap();
        assert_eq!(next[0][0].to_scalar::<f32>().unwrap(), 0.0);
        delivery.send((BlockId::Layer(0), Err(Error::run("lost")))).unwrap();
        assert!(streamed.next(BlockId::Embed).is_err());
    }
}
