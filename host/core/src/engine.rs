//! Runs a graph on the CPU: forward to log-probs, backward to the adapter's gradient.
//!
//! A block runs, then its VJPs run in reverse. What is kept between is the caller's choice, layer by layer: all values,
//! or only the block's input, from which the rest is computed again. Frozen weights have no gradients anywhere.

use std::borrow::Cow;
use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::{ModelGraph, Node};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::aux_loss::{RouterLoad, is_balanced};
use crate::base::{Base, BlockWeights};
use crate::batch::{Batch, Layout, mix};
use crate::error::{Error, Result};
use crate::logprobs::AnswerLogProbs;
use crate::lora::{Adapter, Site};
use crate::ops::lm_head::{self, Projection};
use crate::ops::{self, Call, Dropout, Gradients, Kernel, KvCache, Lora};
use crate::predictors;
use crate::progress;
use crate::storage::Quantization;
use crate::weights::BlockId;

/// Columns of a model that keep a thread busy: on 16 cores a model of 192 takes twice as long with all of them as with 4.
const COLUMNS_A_THREAD: usize = 48;

/// A model with its adapter, on the CPU in f32.
pub struct Engine {
    graph: ModelGraph,
    base: Base,
    adapter: Adapter,
    loras: Loras,
    /// The first layer that is adapted. Nothing before it has a gradient; behind the last one there is none.
    first_adapted: usize,
    /// Whether the adapter changes nothing, as before the first step: a pass without a gradient does without it.
    plain: bool,
    /// Layers whose inner values are computed again in the backward pass.
    recomputed: usize,
    /// The derivatives that backward passes take of the auxiliary loss of its routers.
    router_dprobs: Vec<f64>,
}

/// An adapter's matrices as tensors, by block and node.
#[derive(Default)]
pub struct Loras(HashMap<(BlockId, usize), Vec<Lora>>);

impl Loras {
    /// Those of an adapter.
    ///
    /// # Errors
    /// Tensors that there is no memory for.
    pub fn of(adapter: &Adapter) -> Result<Loras> {
        let mut all = Loras::default();
        for site in &adapter.sites {
            all.0.entry(site.node).or_default().push(adapter.lora(site)?);
        }
        Ok(all)
    }
}

/// What a forward pass leaves.
pub struct Forward {
    /// Log-probs of every answer token.
    pub logps: AnswerLogProbs,
    /// What routers did, where they have an auxiliary loss.
    pub load: RouterLoad,
    kept: Option<Kept>,
}

/// What the backward pass needs.
struct Kept {
    /// Of every layer: all values, or only its input.
    layers: Vec<Vec<Tensor>>,
    /// Values of the head, at the rows that predict answer tokens.
    head: Vec<Tensor>,
    /// `d logp / d hidden` of every answer token.
    grads: Tensor,
}

/// Where the tokens of a pass are, and the rows that predict.
struct Rows<'a> {
    all: &'a Layout,
    predictors: Layout,
}

impl Rows<'_> {
    fn of(all: &Layout) -> Rows<'_> {
        Rows { all, predictors: all.of_predictors() }
    }
}

/// A block that is run: which one, its nodes and their weights, and where its tokens are.
struct Work<'a> {
    at: BlockId,
    nodes: &'a [Node],
    weights: Cow<'a, [Vec<Tensor>]>,
    rows: &'a Rows<'a>,
    /// The adapter's, where it takes part.
    loras: Option<&'a Loras>,
}

impl Work<'_> {
    /// Where the rows are that a node's value has; of one that gathers, those that it gathers from.
    fn layout(&self, index: usize) -> &Layout {
        let after = predictors::first_after(self.nodes);
        let predicts = matches!(self.at, BlockId::Head) || (after > 0 && index >= after);
        if predicts { &self.rows.predictors } else { self.rows.all }
    }
}

impl Engine {
    /// An engine over frozen weights.
    pub fn new(graph: ModelGraph, base: Base, adapter: Adapter) -> Result<Engine> {
        predictors::check(&graph)?;
        let layers = adapter.sites.iter().filter_map(|site| match site.node.0 {
            BlockId::Layer(layer) => Some(layer),
            _ => None,
        });
        let first_adapted = layers.min().unwrap_or(graph.layers.len());
        let (loras, router_dprobs, plain, recomputed) = (Loras::default(), Vec::new(), false, 0);
        let mut engine = Engine { graph, base, adapter, loras, first_adapted, plain, recomputed, router_dprobs };
        engine.refresh()?;
        Ok(engine)
    }

    /// An engine over weights at hand: of every block of [`blocks`](crate::weights::blocks), of every node, its tensors.
    pub fn of(graph: ModelGraph, weights: Vec<BlockWeights>, adapter: Adapter) -> Result<Engine> {
        let base = Base::of(&graph, weights);
        Engine::new(graph, base, adapter)
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

    /// Threads that are worth their while: products of a small model are over before many have met.
    pub fn threads(&self) -> Result<ThreadPool> {
        let most = self.graph.hidden_size.div_ceil(COLUMNS_A_THREAD).min(rayon::current_num_threads());
        let pool = ThreadPoolBuilder::new().num_threads(most).thread_name(|n| format!("engine-{n}")).build();
        pool.map_err(|e| Error::run(format!("no threads to compute with: {e}")))
    }

    /// Changes the adapter's parameters.
    pub fn update<T>(&mut self, change: impl FnOnce(&mut [f32]) -> T) -> Result<T> {
        let answer = change(&mut self.adapter.params);
        self.refresh()?;
        Ok(answer)
    }

    /// Sets the key of dropout, or ends it. It is for the steps of training alone.
    pub fn set_dropout(&mut self, key: Option<u64>) {
        let p = self.adapter.config.dropout;
        for (at, site) in self.adapter.sites.iter().enumerate() {
            let loras = self.loras.0.get_mut(&site.node).into_iter().flatten();
            for lora in loras.filter(|lora| lora.weight == site.weight) {
                lora.dropout = key.filter(|_| p > 0.0).map(|key| Dropout { p, key: mix(key, at as u64) });
            }
        }
    }

    /// Sets what backward passes add of the auxiliary loss: its derivative by the probability that a token gives each expert.
    pub fn set_router_dprobs(&mut self, dprobs: Vec<f64>) {
        self.router_dprobs = dprobs;
    }

    fn refresh(&mut self) -> Result<()> {
        self.loras = Loras::of(&self.adapter)?;
        self.plain = self.adapter.changes_nothing();
        Ok(())
    }

    /// How it computes, as [`Device::name`](crate::device::Device::name) has it.
    pub fn name(&self) -> String {
        // Of mxfp4 a checkpoint may have the very values; then it is no other arithmetic.
        let rounded = self.base.quantization().filter(|kind| *kind != Quantization::Mxfp4);
        let quantization = rounded.map(|kind| format!(", base in {}", kind.name()));
        format!("cpu float32{}", quantization.unwrap_or_default())
    }

    /// Whether ranks share the base, so that all have to run the same passes.
    pub fn shares_base(&self) -> bool {
        self.base.is_shared()
    }

    /// The blocks of a forward pass: the embedding, layers, the head, its projection.
    fn forwards(&self) -> impl Iterator<Item = BlockId> + use<> {
        let layers = (0..self.graph.layers.len()).map(BlockId::Layer);
        std::iter::once(BlockId::Embed).chain(layers).chain([BlockId::Head, BlockId::Projection])
    }

    /// Those of a backward pass. Slopes took the projection's place; what lies before the first adapted layer has no gradient.
    fn backwards(&self) -> impl Iterator<Item = BlockId> + use<> {
        std::iter::once(BlockId::Head).chain((self.first_adapted..self.graph.layers.len()).rev().map(BlockId::Layer))
    }

    /// Log-probs of a batch's answer tokens. With `keep`, what [`backward`](Self::backward) needs is kept. An empty batch
    /// computes nothing, here and there, but gathers weights with the ranks that do.
    pub fn forward(&self, batch: &Batch, keep: bool) -> Result<Forward> {
        let (graph, rows) = (&self.graph, &Rows::of(&batch.layout));
        let loras = (keep || !self.plain).then_some(&self.loras);
        let mut base = self.base.stream(self.forwards())?;
        if batch.answers.is_empty() {
            base.participate()?;
            return Ok(Forward { logps: AnswerLogProbs::default(), load: RouterLoad::default(), kept: None });
        }
        let mut work = |at, nodes| Ok::<_, Error>(Work { at, nodes, weights: base.next()?, rows, loras });
        let ids = Tensor::new(batch.ids.as_slice(), &Device::Cpu)?;
        let mut x = self.run(&work(BlockId::Embed, &graph.embed.nodes)?, ids)?.swap_remove(graph.embed.output);
        let mut layers = Vec::new();
        let mut load = RouterLoad::of(graph);
        for (at, layer) in graph.layers.iter().enumerate() {
            let block = &graph.blocks[layer.block];
            let mut values = self.run(&work(BlockId::Layer(at), &block.nodes)?, x)?;
            x = values[block.output].clone();
            for node in block.nodes.iter().filter(|node| is_balanced(node)) {
                ops::count_load(node, &values[node.inputs[0]], &batch.layout.texts, &mut load)?;
            }
            if keep {
                values.truncate(if at < self.recomputed { 1 } else { values.len() });
                layers.push(values);
            }
        }
        let [head @ .., projection] = graph.head.nodes.as_slice() else { return Err(no_head()) };
        let head = self.run(&work(BlockId::Head, head)?, x)?;
        let hidden = &head[projection.inputs[0]];
        let weights = base.next()?;
        let out = lm_head::log_probs(hidden, &Projection::of(projection, &weights[0])?, &batch.targets, keep)?;
        let kept = out.grads.filter(|_| keep).map(|grads| Kept { layers, head, grads });
        let single = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect();
        let logps = AnswerLogProbs::new(batch.answers.clone(), single(out.logps), out.statistics.map(single));
        Ok(Forward { logps, load, kept })
    }

    /// Adds the adapter's gradient to `gradient` (laid out as its parameters), given `d loss / d logp` of every answer
    /// token.
    pub fn backward(&self, batch: &Batch, forward: Forward, dlogps: &[f32], gradient: &mut [f32]) -> Result<()> {
        let (graph, rows) = (&self.graph, &Rows::of(&batch.layout));
        let mut base = self.base.stream(self.backwards())?;
        if batch.answers.is_empty() {
            return base.participate();
        }
        let Some(Kept { mut layers, head, grads }) = forward.kept else {
            return Err(Error::run("the backward pass needs a forward pass that kept its values"));
        };
        let mut work =
            |at, nodes| Ok::<_, Error>(Work { at, nodes, weights: base.next()?, rows, loras: Some(&self.loras) });
        let [nodes @ .., projection] = graph.head.nodes.as_slice() else { return Err(no_head()) };
        let mut dvalues = vec![None; nodes.len() + 1];
        dvalues[projection.inputs[0]] = Some(lm_head::vjp(&grads, dlogps)?);
        let mut dx = self.pull(&work(BlockId::Head, nodes)?, &head, dvalues, gradient)?;
        for (at, layer) in graph.layers.iter().enumerate().skip(self.first_adapted).rev() {
            let block = &graph.blocks[layer.block];
            let work = work(BlockId::Layer(at), &block.nodes)?;
            let mut values = layers.pop().unwrap_or_default();
            if at < self.recomputed {
                values = self.run(&work, values.remove(0))?;
            }
            let mut dvalues = vec![None; block.nodes.len() + 1];
            dvalues[block.output] = dx;
            dx = self.pull(&work, &values, dvalues, gradient)?;
        }
        Ok(())
    }

    /// For each of some sequences the logits of the token after its new ones, `[vocab]`, which follow the tokens of its cache and are
    /// added to them; with an adapter or without. All tokens of one cache have to be computed alike.
    ///
    /// # Errors
    /// A sequence without new tokens; tensors that there is no memory for.
    pub fn logits(&self, new: &mut [(&[u32], &mut KvCache)], loras: Option<&Loras>) -> Result<Vec<Vec<f32>>> {
        if new.iter().any(|(ids, _)| ids.is_empty()) {
            return Err(Error::run("no token to go on from"));
        }
        new.iter_mut().for_each(|(ids, cache)| cache.begin(ids.len()));
        let own: Vec<Layout> = new.iter().map(|(ids, cache)| Layout::after(cache.tokens(), ids.len())).collect();
        let all = Layout::beside(&own);
        let (graph, rows) = (&self.graph, &Rows::of(&all));
        let mut base = self.base.stream(self.forwards())?;
        let mut work = |at, nodes| Ok::<_, Error>(Work { at, nodes, weights: base.next()?, rows, loras });
        let ids: Vec<u32> = new.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
        let mut x = Tensor::new(ids.as_slice(), &Device::Cpu)?;
        let embedded = self.go_on(&work(BlockId::Embed, &graph.embed.nodes)?, x, &own, new)?;
        x = embedded[graph.embed.output].clone();
        for (at, layer) in graph.layers.iter().enumerate() {
            let block = &graph.blocks[layer.block];
            x = self.go_on(&work(BlockId::Layer(at), &block.nodes)?, x, &own, new)?.swap_remove(block.output);
        }
        let [head @ .., projection] = graph.head.nodes.as_slice() else { return Err(no_head()) };
        let head = self.run(&work(BlockId::Head, head)?, x)?;
        let weights = base.next()?;
        let of_head = Projection::of(projection, &weights[0])?;
        let logits = of_head.logits(ops::product(&head[projection.inputs[0]], of_head.weight)?)?;
        new.iter_mut().for_each(|(ids, cache)| cache.advance(ids.len()));
        Ok(logits.to_vec2()?)
    }

    /// As [`run`](Self::run), for tokens that follow others: ops that read other rows run on each sequence by itself.
    fn go_on(
        &self,
        work: &Work<'_>,
        input: Tensor,
        own: &[Layout],
        new: &mut [(&[u32], &mut KvCache)],
    ) -> Result<Vec<Tensor>> {
        let mut values = vec![input];
        for (index, node) in work.nodes.iter().enumerate() {
            let op = ops::find(&node.op)?;
            let call = self.call(work, index, &values);
            let mixes_rows = !op.cached_inputs.is_empty() || matches!(op.kernel, Kernel::Recurrence { .. });
            let value = if mixes_rows {
                let mut first = 0;
                let mut of_each = Vec::new();
                for (layout, (ids, cache)) in own.iter().zip(new.iter_mut()) {
                    let rows = |input: &&Tensor| input.narrow(0, first, ids.len());
                    let inputs = call.inputs.iter().map(rows).collect::<candle_core::Result<Vec<_>>>()?;
                    let call = Call { inputs: inputs.iter().collect(), layout, ..call };
                    of_each.push(after(op, call, (work.at, index), cache)?);
                    first += ids.len();
                }
                if of_each.len() == 1 { of_each.swap_remove(0) } else { Tensor::cat(&of_each, 0)? }
            } else {
                op.kernel.forward(&call)?
            };
            values.push(value);
        }
        Ok(values)
    }

    /// All values of a block, its input first.
    fn run(&self, work: &Work<'_>, input: Tensor) -> Result<Vec<Tensor>> {
        let mut values = vec![input];
        for (index, node) in work.nodes.iter().enumerate() {
            values.push(ops::find(&node.op)?.kernel.forward(&self.call(work, index, &values))?);
        }
        Ok(values)
    }

    fn call<'a>(&'a self, work: &'a Work<'_>, index: usize, values: &'a [Tensor]) -> Call<'a> {
        progress::advance();
        let node = &work.nodes[index];
        Call {
            node,
            inputs: node.inputs.iter().map(|v| &values[*v]).collect(),
            weights: &work.weights[index],
            loras: work.loras.and_then(|loras| loras.0.get(&(work.at, index))).map_or(&[], Vec::as_slice),
            layout: work.layout(index),
            input_gradients: true,
            router_dprobs: &self.router_dprobs,
        }
    }

    /// Which values of a block depend on parameters, so that their gradients are wanted.
    fn trainable(&self, work: &Work<'_>) -> Vec<bool> {
        let mut trainable = vec![match work.at {
            BlockId::Layer(layer) => layer > self.first_adapted,
            _ => self.first_adapted < self.graph.layers.len(),
        }];
        for (index, node) in work.nodes.iter().enumerate() {
            let own = self.loras.0.contains_key(&(work.at, index));
            trainable.push(own || node.inputs.iter().any(|value| trainable[*value]));
        }
        trainable
    }

    /// Pulls gradients of values back through nodes: adds those of the adapter to `gradient`, returns that of value 0, where it depends on
    /// parameters.
    fn pull(
        &self,
        work: &Work<'_>,
        values: &[Tensor],
        mut dvalues: Vec<Option<Tensor>>,
        gradient: &mut [f32],
    ) -> Result<Option<Tensor>> {
        let trainable = self.trainable(work);
        for (index, node) in work.nodes.iter().enumerate().rev() {
            // A value that nothing reads has no gradient, and neither has what made it.
            let Some(dy) = dvalues[index + 1].take().filter(|_| trainable[index + 1]) else { continue };
            let kernel = &ops::find(&node.op)?.kernel;
            let input_gradients = node.inputs.iter().any(|value| trainable[*value]);
            let call = Call { input_gradients, ..self.call(work, index, values) };
            let Gradients { inputs, loras } = kernel.vjp(&call, &dy)?;
            let sites = self.adapter.sites.iter().filter(|s| s.node == (work.at, index));
            for (site, parts) in sites.zip(loras) {
                self.accumulate(site, &parts, gradient)?;
            }
            for (value, dx) in node.inputs.iter().zip(inputs) {
                let Some(dx) = dx.filter(|_| trainable[*value]) else { continue };
                let sum = match dvalues[*value].take() {
                    Some(before) => ops::add(&before, &dx)?,
                    None => dx,
                };
                dvalues[*value] = Some(sum);
            }
        }
        Ok(dvalues.swap_remove(0))
    }

    fn accumulate(&self, site: &Site, parts: &[Tensor], gradient: &mut [f32]) -> Result<()> {
        let ranges = self.adapter.ranges(site).into_iter().chain(self.adapter.magnitude(site));
        for (range, part) in ranges.zip(parts) {
            let values: Vec<f32> = part.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            gradient[range].iter_mut().zip(values).for_each(|(g, v)| *g += v);
        }
        Ok(())
    }
}

/// The value of an op that reads other rows, of tokens that follow those of a cache.
fn after(op: &ops::Op, call: Call<'_>, holder: (BlockId, usize), cache: &mut KvCache) -> Result<Tensor> {
    let all = op.cached_inputs.iter().map(|input| cache.extend((holder.0, holder.1, *input), call.inputs[*input]));
    let all = all.collect::<Result<Vec<Tensor>>>()?;
    let mut inputs: Vec<&Tensor> = call.inputs.clone();
    op.cached_inputs.iter().zip(&all).for_each(|(input, rows)| inputs[*input] = rows);
    let call = Call { inputs, ..call };
    match op.kernel {
        Kernel::Recurrence { forward, .. } => {
            let (value, state) = forward(&call, cache.state(holder))?;
            cache.set_state(holder, state);
            Ok(value)
        }
        _ => op.kernel.forward(&call),
    }
}

fn no_head() -> Error {
    Error::run("the graph has no projection")
}
