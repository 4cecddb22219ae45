//! Runs a graph on the CPU: forward to log-probs, backward to the adapter's gradient.
//!
//! A block runs, then its VJPs run in reverse. What is kept between is the caller's choice, layer by layer: all values,
//! or only the block's input, from which the rest is computed again. Frozen weights have no gradients anywhere.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};
use dpo_plugin_api::graph::{Block, ModelGraph, Node};

use crate::batch::{Batch, Layout};
use crate::error::{Error, Result};
use crate::lora::{Adapter, Site};
use crate::ops::{self, Call, Gradients, Kernel, Lora, lm_head};
use crate::weights::{Checkpoint, blocks};

/// A model with its adapter, on the CPU in f32.
pub struct Engine {
    graph: ModelGraph,
    /// Of every block in the order of [`blocks`], of every node, its weights.
    weights: Vec<Vec<Vec<Tensor>>>,
    adapter: Adapter,
    /// The adapter's tensors by block and node.
    loras: HashMap<(usize, usize), Lora>,
    /// Layers whose inner values are computed again in the backward pass.
    recomputed: usize,
}

/// What a forward pass leaves.
pub struct Forward {
    /// Log-prob of every answer token, `[answer tokens]`.
    pub logps: Vec<f32>,
    /// `ln Σ_v p[v]²` for every answer token, `[answer tokens]`.
    pub log_sum_sq: Vec<f32>,
    kept: Option<Kept>,
}

/// What the backward pass needs.
struct Kept {
    /// Of every layer: all values, or only its input.
    layers: Vec<Vec<Tensor>>,
    /// Values of the head, at the rows that predict answer tokens.
    head: Vec<Tensor>,
    /// `d logp / d hidden` of every answer token.
    slopes: Tensor,
}

impl Engine {
    /// Loads every weight that the graph names.
    pub fn load(graph: ModelGraph, checkpoint: &Checkpoint, adapter: Adapter) -> Result<Engine> {
        let mut loaded: HashMap<String, Tensor> = HashMap::new();
        let mut weights = Vec::new();
        for (block, prefix) in blocks(&graph) {
            let mut of_block = Vec::new();
            for node in &block.nodes {
                let mut of_node = Vec::new();
                for weight in &node.weights {
                    // A tied projection is the embedding's tensor; it is loaded once.
                    let name = format!("{prefix}{}", weight.tensor);
                    let tensor = match loaded.get(&name) {
                        Some(tensor) => tensor.clone(),
                        None => checkpoint.load(prefix, weight)?,
                    };
                    loaded.insert(name, tensor.clone());
                    of_node.push(tensor);
                }
                of_block.push(of_node);
            }
            weights.push(of_block);
        }
        Engine::of(graph, weights, adapter)
    }

    /// An engine over weights at hand: of every block, of every node, its tensors.
    pub fn of(graph: ModelGraph, weights: Vec<Vec<Vec<Tensor>>>, adapter: Adapter) -> Result<Engine> {
        let mut engine = Engine { graph, weights, adapter, loras: HashMap::new(), recomputed: 0 };
        engine.refresh()?;
        Ok(engine)
    }

    /// Computes the inner values of the first `layers` layers again in the backward pass instead of keeping them.
    pub fn recompute(&mut self, layers: usize) {
        self.recomputed = layers.min(self.graph.layers.len());
    }

    /// The adapter.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The graph.
    pub fn graph(&self) -> &ModelGraph {
        &self.graph
    }

    /// Changes the adapter's parameters.
    pub fn update(&mut self, change: impl FnOnce(&mut [f32])) -> Result<()> {
        change(&mut self.adapter.params);
        self.refresh()
    }

    fn refresh(&mut self) -> Result<()> {
        let tensors = self.adapter.sites.iter().map(|s| Ok((s.node, self.adapter.lora(s)?)));
        self.loras = tensors.collect::<Result<_>>()?;
        Ok(())
    }

    /// Log-probs of a batch's answer tokens. With `keep`, what [`backward`](Self::backward) needs is kept.
    pub fn forward(&self, batch: &Batch, keep: bool) -> Result<Forward> {
        let ids = Tensor::new(batch.ids.as_slice(), &Device::Cpu)?;
        let mut x = self.run(0, &self.graph.embed, ids, &batch.layout)?.1;
        let mut layers = Vec::new();
        for (at, layer) in self.graph.layers.iter().enumerate() {
            let (values, output) = self.run(at + 1, &self.graph.blocks[layer.block], x, &batch.layout)?;
            if keep {
                let wanted = if at < self.recomputed { 1 } else { values.len() };
                layers.push(values.into_iter().take(wanted).collect());
            }
            x = output;
        }
        let rows = Tensor::new(batch.predictors.as_slice(), &Device::Cpu)?;
        let (head, hidden) = self.run_head(x.index_select(&rows, 0)?, &batch.layout)?;
        let projection = &self.weights[self.graph.layers.len() + 1][self.graph.head.nodes.len() - 1][0];
        let out = lm_head::log_probs(&hidden, projection, &batch.targets, keep)?;
        let kept = out.slopes.filter(|_| keep).map(|slopes| Kept { layers, head, slopes });
        let single = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect();
        Ok(Forward { logps: single(out.logps), log_sum_sq: single(out.log_sum_sq), kept })
    }

    /// Adds the adapter's gradient to `gradient` (laid out as its parameters), given `d loss / d logp` of every answer
    /// token.
    pub fn backward(&self, batch: &Batch, forward: Forward, dlogps: &[f32], gradient: &mut [f32]) -> Result<()> {
        let Some(Kept { mut layers, head, slopes }) = forward.kept else {
            return Err(Error::run("the backward pass needs a forward pass that kept its values"));
        };
        let layout = &batch.layout;
        let at = self.graph.layers.len() + 1;
        let nodes = &self.graph.head.nodes;
        let last = nodes.len() - 1;
        let mut dvalues = vec![None; last + 1];
        dvalues[nodes[last].inputs[0]] = Some(lm_head::vjp(&slopes, dlogps)?);
        let rows = self.pull(at, &nodes[..last], &head, dvalues, layout, gradient)?;
        let rows = rows.ok_or_else(|| Error::run("the head has no gradient"))?;
        let zero = Tensor::zeros((batch.tokens(), rows.dim(D::Minus1)?), rows.dtype(), &Device::Cpu)?;
        let mut dx = zero.index_add(&Tensor::new(batch.predictors.as_slice(), &Device::Cpu)?, &rows, 0)?;
        for (at, layer) in self.graph.layers.iter().enumerate().rev() {
            let block = &self.graph.blocks[layer.block];
            let mut values = layers.pop().unwrap_or_default();
            if at < self.recomputed {
                let input = values.remove(0);
                values = self.run(at + 1, block, input, layout)?.0;
            }
            let mut dvalues = vec![None; block.nodes.len() + 1];
            dvalues[block.output] = Some(dx);
            let input = self.pull(at + 1, &block.nodes, &values, dvalues, layout, gradient)?;
            dx = input.ok_or_else(|| Error::run(format!("layer {at} passes no gradient on")))?;
        }
        Ok(())
    }

    /// All values of a block (its input first), and the one that leaves it.
    fn run(&self, at: usize, block: &Block, input: Tensor, layout: &Layout) -> Result<(Vec<Tensor>, Tensor)> {
        let mut values = vec![input];
        for (index, node) in block.nodes.iter().enumerate() {
            let value = self.run_node(at, index, node, &values, layout)?;
            values.push(value);
        }
        let output = values[block.output].clone();
        Ok((values, output))
    }

    /// The head without its last node: its values, and the hidden rows that the projection reads.
    fn run_head(&self, input: Tensor, layout: &Layout) -> Result<(Vec<Tensor>, Tensor)> {
        let nodes = &self.graph.head.nodes;
        let mut values = vec![input];
        for (index, node) in nodes[..nodes.len() - 1].iter().enumerate() {
            let value = self.run_node(self.graph.layers.len() + 1, index, node, &values, layout)?;
            values.push(value);
        }
        let hidden = values[nodes[nodes.len() - 1].inputs[0]].clone();
        Ok((values, hidden))
    }

    fn run_node(&self, at: usize, index: usize, node: &Node, values: &[Tensor], layout: &Layout) -> Result<Tensor> {
        let call = self.call(at, index, node, values, layout);
        match ops::find(&node.op)?.kernel {
            Kernel::Value { forward, .. } => forward(&call),
            Kernel::LogProb => Err(Error::run("lm_head runs outside of the head")),
        }
    }

    fn call<'a>(
        &'a self,
        at: usize,
        index: usize,
        node: &'a Node,
        values: &'a [Tensor],
        layout: &'a Layout,
    ) -> Call<'a> {
        Call {
            node,
            inputs: node.inputs.iter().map(|v| &values[*v]).collect(),
            weights: &self.weights[at][index],
            lora: self.loras.get(&(at, index)),
            layout,
        }
    }

    /// Pulls gradients of values back through nodes: adds those of the adapter to `gradient`, returns that of value 0.
    fn pull(
        &self,
        at: usize,
        nodes: &[Node],
        values: &[Tensor],
        mut dvalues: Vec<Option<Tensor>>,
        layout: &Layout,
        gradient: &mut [f32],
    ) -> Result<Option<Tensor>> {
        for (index, node) in nodes.iter().enumerate().rev() {
            // A value that nothing reads has no gradient, and neither has what made it.
            let Some(dy) = dvalues[index + 1].take() else { continue };
            let Kernel::Value { vjp, .. } = ops::find(&node.op)?.kernel else { continue };
            let Gradients { inputs, lora } = vjp(&self.call(at, index, node, values, layout), &dy)?;
            if let Some(parts) = lora
                && let Some(site) = self.adapter.sites.iter().find(|s| s.node == (at, index))
            {
                self.accumulate(site, &parts, gradient)?;
            }
            for (value, dx) in node.inputs.iter().zip(inputs) {
                let Some(dx) = dx else { continue };
                let sum = match dvalues[*value].take() {
                    Some(before) => (before + dx)?,
                    None => dx,
                };
                dvalues[*value] = Some(sum);
            }
        }
        Ok(dvalues.swap_remove(0))
    }

    fn accumulate(&self, site: &Site, parts: &[Tensor; 2], gradient: &mut [f32]) -> Result<()> {
        for (range, part) in self.adapter.ranges(site).into_iter().zip(parts) {
            let values: Vec<f32> = part.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            gradient[range].iter_mut().zip(values).for_each(|(g, v)| *g += v);
        }
        Ok(())
    }
}
