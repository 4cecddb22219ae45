//! Runs a lowered model on a GPU: forward to log-probs, backward to the adapter's gradient, AdamW's step.
//!
//! All memory is taken at the start; within a step nothing is allocated, and the host waits for the GPU only to read the
//! log-probs that a loss is computed from, and the gradient's norm.

use std::collections::HashMap;
use std::ops::Range;

use dpo_plugin_api::graph::ModelGraph;
use indicatif::ProgressBar;

use super::blas::{Blas, CLASS, Operands, Product};
use super::device::{Address, Args, Gpu, Memory, View};
use super::inputs::{Inputs, RopeTable, rope_tables};
use super::kernels::{AttentionKernels, Heads, Kernels};
use super::launch::{Past, Run};
use super::memory::{Arrangement, Footprint, Lowered};
use super::model::{Source, Weights};
use super::nccl::Nccl;
use super::plan::GpuPlan;
use super::program::{GRADIENT, INPUT, Keep, OUTPUT, Op, Program, Slice};
use crate::batch::{Batch, Layout};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::example::Example;
use crate::logprobs::AnswerLogProbs;
use crate::lora::Adapter;
use crate::ranks::Ranks;
use crate::train::{AdamW, Moments};

/// A model with its adapter on one GPU, in bf16.
pub struct CudaDevice {
    nccl: Option<Nccl>,
    pub(super) gpu: Gpu,
    pub(super) blas: Blas,
    pub(super) kernels: Kernels,
    pub(super) attention: HashMap<Heads, AttentionKernels>,
    graph: ModelGraph,
    lowered: Lowered,
    weights: Weights,
    plan: GpuPlan,
    footprint: Footprint,
    /// Copies of what is on the GPU, as of the last `fetch`.
    adapter: Adapter,
    moments: Moments,
    optimizer: OptimizerMemory,
    /// Whether the flat gradient is that of the stacks.
    collected: bool,
    /// Whether B is zero, as before the first step: then a forward pass needs no adapter.
    plain: bool,
    /// Values of the batch in work.
    values: Memory,
    arrangement: Arrangement,
    pub(super) inputs: Inputs,
    /// Tables of rope: frequencies and scale, and where the batch's table lies.
    pub(super) ropes: Vec<RopeTable>,
}

/// Parameters, gradient and moments in f32, each `[parameters]`, and the parts of the adapter.
struct OptimizerMemory {
    params: Memory,
    gradient: Memory,
    first: Memory,
    second: Memory,
    parts: Memory,
    partial: Memory,
    count: usize,
    parts_count: usize,
    /// Of every layer, its parts.
    layers: Vec<Range<usize>>,
}

impl CudaDevice {
    /// Opens a GPU with a plan that was made for it, on a rank of those that the plan is for.
    pub fn load(
        gpu: Gpu,
        graph: ModelGraph,
        source: &Source<'_>,
        adapter: Adapter,
        (plan, rank): (GpuPlan, usize),
        progress: &ProgressBar,
    ) -> Result<CudaDevice> {
        let kernels = Kernels::load(&gpu)?;
        let blas = Blas::new(&gpu)?;
        let lowered = Lowered::new(&graph, &adapter)?;
        let mut attention = HashMap::new();
        for heads in lowered.programs.iter().flat_map(Program::heads) {
            if let std::collections::hash_map::Entry::Vacant(new) = attention.entry(heads) {
                new.insert(Kernels::attention(&gpu, heads)?);
            }
        }
        let weights = Weights::load(&gpu, &kernels, &graph, &lowered, source, (&plan, rank), progress)?;
        let parts = weights.parts(&lowered, &graph, &adapter)?;
        let count = adapter.params.len();
        let optimizer = OptimizerMemory {
            params: gpu.allocate(count * 4)?,
            gradient: gpu.allocate(count * 4)?,
            first: gpu.allocate(count * 4)?,
            second: gpu.allocate(count * 4)?,
            parts: gpu.allocate(parts.len() * PART)?,
            partial: gpu.allocate(PARTIAL * 8)?,
            count,
            parts_count: parts.len(),
            layers: parts_of_layers(&graph, &adapter),
        };
        gpu.upload(&parts.concat(), optimizer.parts.address)?;
        let footprint = Footprint::new(&graph, &lowered);
        let arrangement = footprint.arrange(1, 1, plan.values, &plan.allowed);
        let arrangement = arrangement.ok_or_else(|| Error::run("the plan has no room for a token"))?;
        let values = gpu.allocate(plan.values)?;
        let inputs = Inputs::new(&gpu, plan.inputs)?;
        let ropes = rope_tables(&gpu, &graph)?;
        let moments = Moments::new(count);
        let mut device = CudaDevice {
            nccl: None,
            gpu,
            blas,
            kernels,
            attention,
            graph,
            lowered,
            weights,
            plan,
            footprint,
            adapter,
            moments,
            optimizer,
            collected: false,
            plain: false,
            values,
            arrangement,
            inputs,
            ropes,
        };
        let (params, moments) = (device.adapter.params.clone(), device.moments.clone());
        device.restore(&params, moments)?;
        device.clear_gradient()?;
        device.gpu.finish()?;
        Ok(device)
    }

    /// Sums gradients over ranks, and gathers what they share of a base, by NCCL.
    pub fn join(self, nccl: Option<Nccl>) -> CudaDevice {
        CudaDevice { nccl, ..self }
    }

    /// The gradient, laid out as the adapter's parameters.
    pub fn gradient(&mut self) -> Result<Vec<f32>> {
        self.collect()?;
        let mut gradient = vec![0.0; self.optimizer.count];
        self.gpu.download(self.optimizer.gradient.address, &mut gradient)?;
        Ok(gradient)
    }

    /// The plan it was opened with.
    pub fn plan(&self) -> &GpuPlan {
        &self.plan
    }

    /// The GPU, for times and memory.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Places of a layer's buffers in a pass.
    fn places(&self, layer: usize, keep: bool, backward: bool) -> Vec<Address> {
        let kind = self.graph.layers[layer].block;
        self.addresses(self.arrangement.places(&self.lowered, kind, layer, keep, backward))
    }

    /// Places of the head's buffers.
    fn head_places(&self) -> Vec<Address> {
        self.addresses(self.arrangement.head_places(&self.lowered))
    }

    fn addresses(&self, offsets: Vec<Option<usize>>) -> Vec<Address> {
        offsets.into_iter().map(|o| o.map_or(0, |o| self.values.address + o as u64)).collect()
    }

    /// Runs operations of a layer.
    fn layer(&self, layer: usize, ops: &[Op], places: &[Address], adapted: bool, past: Option<Past>) -> Result<()> {
        let kind = self.graph.layers[layer].block;
        let run = Run {
            program: &self.lowered.programs[kind],
            weights: &self.weights.layers[layer],
            nodes: &self.graph.blocks[kind].nodes,
            places,
            rows: self.inputs.at.tokens,
            adapted,
            past,
        };
        ops.iter().try_for_each(|op| self.run(&run, op))
    }

    /// Makes a layer's weights whole where ranks share them, and has the next one's follow.
    fn take(&self, layer: usize, next: Option<usize>) -> Result<()> {
        let (Some(shard), Some(nccl)) = (&self.weights.shard, &self.nccl) else { return Ok(()) };
        shard.take(&self.gpu, nccl, layer, next)?;
        self.spread(self.optimizer.layers[layer].clone())?;
        self.gpu.mark("gather")
    }

    /// Takes all layers, of a forward pass or in reverse, and runs `work` on each.
    fn walk(&self, reverse: bool, work: impl Fn(usize) -> Result<()>) -> Result<()> {
        let count = self.graph.layers.len();
        let at = |step: usize| if reverse { count - 1 - step } else { step };
        (0..count).try_for_each(|step| {
            self.take(at(step), (step + 1 < count).then(|| at(step + 1)))?;
            work(at(step))
        })
    }

    /// The forward pass of a layer.
    fn layer_forward(&self, layer: usize, keep: bool) -> Result<()> {
        let ops = &self.lowered.programs[self.graph.layers[layer].block].forward;
        self.layer(layer, ops, &self.places(layer, keep, false), keep || !self.plain, None)
    }

    /// The backward pass of a layer.
    fn layer_backward(&self, layer: usize) -> Result<()> {
        let kind = self.graph.layers[layer].block;
        let scheduled = &self.lowered.schedules[kind][self.arrangement.keep[layer] as usize];
        self.layer(layer, &scheduled.ops, &self.places(layer, true, true), true, None)
    }

    fn head_run<'a>(&'a self, places: &'a [Address]) -> Run<'a> {
        Run {
            program: &self.lowered.head,
            weights: &self.weights.head,
            nodes: &self.graph.head.nodes,
            places,
            rows: self.inputs.at.answers,
            adapted: false,
            past: None,
        }
    }

    /// Rows of the embedding's table.
    fn embed(&self) -> Result<()> {
        let (hidden, at) = (self.graph.hidden_size, self.inputs.at);
        let args = Args::default().with(self.weights.embedding).with(at.ids).with(self.edge(0));
        self.wide("gather", at.tokens, hidden, args.with(at.tokens as i32).with(hidden as i32))?;
        self.gpu.mark("embedding")
    }

    /// The head up to its projection, for the rows that predict.
    fn head_forward(&self, places: &[Address]) -> Result<()> {
        let (hidden, at, head) = (self.graph.hidden_size, self.inputs.at, self.head_run(places));
        let input = self.view(&head, Slice { buffer: INPUT, column: 0, width: hidden });
        let args = Args::default().with(self.edge(self.graph.layers.len())).with(at.predictors).with(input);
        self.wide("gather_rows", at.answers, hidden, args.with(at.answers as i32).with(hidden as i32))?;
        self.lowered.head.forward.iter().try_for_each(|op| self.run(&head, op))
    }

    /// Logits of the rows `[first, first + rows)` that predict, in f32 where the arrangement has them.
    fn logits(&self, places: &[Address], first: usize, rows: usize) -> Result<View> {
        let (hidden, vocab) = (self.graph.hidden_size, self.graph.vocab_size);
        let output = self.view(&self.head_run(places), Slice { buffer: OUTPUT, column: 0, width: hidden });
        let a = View { at: output.at + (first as i64 * output.ld * 2) as u64, ld: output.ld };
        let b = View { at: self.weights.projection, ld: hidden as i64 };
        let d = View { at: self.values.address + self.arrangement.logits as u64, ld: vocab as i64 };
        let mut product = Product::new(rows, vocab, hidden);
        (product.b_transposed, product.wide) = (true, true);
        self.blas.run(&self.gpu, product, Operands { a, b, c: d, d, bias: 0 })?;
        self.gpu.mark("logits")?;
        Ok(d)
    }

    /// Logits of the token after `ids`, `[vocab]`, which continue a text of `past` tokens; `remembered` has every layer's
    /// keys and values.
    pub(super) fn continue_text(
        &mut self,
        ids: &[u32],
        past: usize,
        remembered: impl Fn(usize) -> [View; 2],
        adapted: bool,
    ) -> Result<Vec<f32>> {
        let last = ids.len().saturating_sub(1) as u32;
        let layout = Layout::after(past, ids.len());
        let batch = Batch { ids: ids.to_vec(), layout, predictors: vec![last], targets: vec![0], ..Batch::default() };
        self.send(&batch, false)?;
        self.embed()?;
        for layer in 0..self.graph.layers.len() {
            let ops = &self.lowered.programs[self.graph.layers[layer].block].forward;
            let [keys, values] = remembered(layer);
            let past = Some(Past { tokens: past, keys, values });
            self.layer(layer, ops, &self.places(layer, false, false), adapted, past)?;
        }
        let places = self.head_places();
        self.head_forward(&places)?;
        let view = self.logits(&places, 0, 1)?;
        let mut logits = vec![0.0; self.graph.vocab_size];
        self.gpu.download(view.at, &mut logits)?;
        Ok(logits)
    }

    /// Tunes products for continuing texts by so many tokens.
    pub(super) fn warm_up_for(&mut self, tokens: usize) -> Result<()> {
        self.send(&self.filler(tokens)?, false)?;
        self.blas.tune(|| {
            self.once(false)?;
            let places = self.head_places();
            self.head_forward(&places)?;
            self.logits(&places, 0, 1).map(|_| ())
        })?;
        self.gpu.finish()
    }

    fn edge(&self, layer: usize) -> View {
        let bytes = self.lowered.programs[0].edge();
        let at = self.values.address + (layer * bytes * self.arrangement.rows) as u64;
        View { at, ld: (bytes / 2) as i64 }
    }

    /// Sends a batch's arrays in one copy and makes rope's tables.
    fn send(&mut self, batch: &Batch, keep: bool) -> Result<()> {
        let (tokens, answers) = (batch.tokens(), batch.targets.len());
        let allowed = if keep { self.plan.allowed.as_slice() } else { &[Keep::Input] };
        let arrangement = self.footprint.arrange(tokens, answers, self.plan.values, allowed);
        self.arrangement = arrangement.ok_or_else(|| {
            let (planned, most) = (self.plan.most_tokens, self.plan.most_answers());
            Error::run(format!("a batch of {tokens} tokens, {answers} of answers: planned for {planned} and {most}"))
        })?;
        self.inputs.send(&self.gpu, batch, &self.ropes)?;
        let at = self.inputs.at;
        for table in &self.ropes {
            let half = table.inv_freq.len();
            let to = at.ropes + (table.offset * tokens) as u64;
            let args = Args::default().with(at.positions).with(table.frequencies.address).with(to);
            let args = args.with(tokens as i32).with(half as i32).with(table.scale);
            let grid = [(tokens * half).div_ceil(256), 1, 1];
            self.gpu.launch(self.kernels.get("rope_table")?, grid, [256, 1, 1], 0, args)?;
        }
        self.gpu.mark("send")
    }

    /// Log-probs of the batch's answer tokens from the head's output, in chunks of rows; leaves their slopes where the head's
    /// gradient lies.
    fn log_probs(&self, places: &[Address], slopes: bool) -> Result<()> {
        let head = self.head_run(places);
        let (hidden, vocab, at) = (self.graph.hidden_size, self.graph.vocab_size, self.inputs.at);
        let row = |view: View, r: usize| View { at: view.at + (r as i64 * view.ld * 2) as u64, ld: view.ld };
        let whole = |buffer| self.view(&head, Slice { buffer, column: 0, width: hidden });
        let table = View { at: self.weights.projection, ld: hidden as i64 };
        for first in (0..at.answers).step_by(self.arrangement.logits_rows) {
            let rows = self.arrangement.logits_rows.min(at.answers - first);
            let logits = self.logits(places, first, rows)?;
            let after = |base: Address| base + (first * 4) as u64;
            let args = Args::default().with(logits.at).with(after(at.targets)).with(after(at.results));
            let args =
                args.with(after(at.results + (at.answers * 4) as u64)).with(vocab as i32).with(i32::from(slopes));
            self.gpu.launch(self.kernels.get("log_prob")?, [rows, 1, 1], [512, 1, 1], 0, args)?;
            self.gpu.mark("log-probs")?;
            if slopes {
                let p = View { at: logits.at, ld: 2 * vocab as i64 };
                let d = row(whole(GRADIENT), first);
                let product = Product::new(rows, hidden, vocab);
                self.blas.run(&self.gpu, product, Operands { a: p, b: table, c: d, d, bias: 0 })?;
                self.gpu.mark("slopes")?;
            }
        }
        Ok(())
    }
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        format!("{} bfloat16", self.gpu.name)
    }

    fn micro_batch_tokens(&self, keep: bool) -> usize {
        if keep { self.plan.micro_batch_tokens } else { self.plan.scoring_tokens }
    }

    fn graph(&self) -> &ModelGraph {
        &self.graph
    }

    fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    fn moments(&self) -> &Moments {
        &self.moments
    }

    fn forward(&mut self, batch: &Batch, keep: bool) -> Result<AnswerLogProbs> {
        if batch.tokens() == 0 {
            self.walk(false, |_| Ok(()))?;
            return Ok(AnswerLogProbs::default());
        }
        self.send(batch, keep)?;
        self.embed()?;
        self.walk(false, |layer| self.layer_forward(layer, keep))?;
        let (places, at) = (self.head_places(), self.inputs.at);
        self.head_forward(&places)?;
        self.log_probs(&places, keep)?;
        let mut results = vec![0.0_f32; at.answers * 2];
        self.gpu.download(at.results, &mut results)?;
        let log_sum_sq = results.split_off(at.answers);
        Ok(AnswerLogProbs::new(batch.answers.clone(), results, [log_sum_sq]))
    }

    fn backward(&mut self, batch: &Batch, dlogps: &[f32]) -> Result<()> {
        if batch.tokens() == 0 {
            return self.walk(true, |_| Ok(()));
        }
        let (hidden, at) = (self.graph.hidden_size, self.inputs.at);
        if dlogps.len() != at.answers {
            return Err(Error::run("the backward pass needs the batch of the forward pass before it"));
        }
        self.collected = false;
        self.gpu.upload(dlogps, at.slopes)?;
        let places = self.head_places();
        let head = self.head_run(&places);
        let gradient = self.view(&head, Slice { buffer: GRADIENT, column: 0, width: hidden });
        let args = Args::default().with(gradient).with(at.slopes).with(at.answers as i32).with(hidden as i32);
        self.wide("scale_rows", at.answers, hidden, args)?;
        self.lowered.head_schedule.ops.iter().try_for_each(|op| self.run(&head, op))?;
        let to = View { at: self.values.address + self.arrangement.gradient as u64, ld: self.edge(0).ld };
        let args = Args::default().with(gradient).with(at.taken).with(at.next_taken).with(to).with(at.tokens as i32);
        let args = args.with(hidden as i32);
        self.wide("scatter_rows", at.tokens, hidden, args)?;
        self.gpu.mark("head vjp")?;
        self.walk(true, |layer| self.layer_backward(layer))
    }

    fn shares_base(&self) -> bool {
        self.weights.shard.is_some()
    }

    fn clear_gradient(&mut self) -> Result<()> {
        self.collected = false;
        self.gpu.zero(self.weights.gradients.address, self.weights.gradients.bytes)
    }

    fn sum_gradient(&mut self, ranks: &mut Ranks) -> Result<()> {
        if ranks.size() == 1 {
            return Ok(());
        }
        self.collect()?;
        if let Some(nccl) = &self.nccl {
            nccl.sum(&self.gpu, self.optimizer.gradient.address, self.optimizer.count)?;
            return self.gpu.mark("all-reduce");
        }
        let mut gradient = self.gradient()?;
        ranks.sum(&mut gradient)?;
        self.gpu.upload(&gradient, self.optimizer.gradient.address)
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        self.collect()?;
        let o = &self.optimizer;
        let args = Args::default().with(o.gradient.address).with(o.partial.address).with(o.count as i64);
        self.gpu.launch(self.kernels.get("sum_squares")?, [PARTIAL, 1, 1], [256, 1, 1], 0, args)?;
        self.gpu.mark("optimizer")?;
        let mut partial = vec![0.0_f64; PARTIAL];
        self.gpu.download(o.partial.address, &mut partial)?;
        Ok(partial.iter().sum::<f64>().sqrt())
    }

    fn update(&mut self, optimizer: &AdamW, clip: f64, learning_rate: f64) -> Result<()> {
        self.collect()?;
        self.moments.steps += 1;
        let rates = optimizer.rates(self.moments.steps, learning_rate);
        let o = &self.optimizer;
        let args = Args::default().with(o.params.address).with(o.gradient.address).with(o.first.address);
        let args = args.with(o.second.address).with(o.count as i64).with(clip as f32).with(rates.keep).with(rates.size);
        let args = args.with(rates.root).with(rates.b1).with(rates.r1).with(rates.b2).with(rates.r2).with(rates.eps);
        self.plain = false;
        self.gpu.launch(self.kernels.get("adamw")?, [o.count.div_ceil(256), 1, 1], [256, 1, 1], 0, args)?;
        self.spread_all()
    }

    fn fetch(&mut self) -> Result<()> {
        self.gpu.download(self.optimizer.params.address, &mut self.adapter.params)?;
        self.gpu.download(self.optimizer.first.address, &mut self.moments.first)?;
        self.gpu.download(self.optimizer.second.address, &mut self.moments.second)
    }

    fn restore(&mut self, params: &[f32], moments: Moments) -> Result<()> {
        self.adapter.params.copy_from_slice(params);
        self.moments = moments;
        self.plain = self.adapter.changes_nothing();
        self.gpu.upload(&self.adapter.params, self.optimizer.params.address)?;
        self.gpu.upload(&self.moments.first, self.optimizer.first.address)?;
        self.gpu.upload(&self.moments.second, self.optimizer.second.address)?;
        self.spread_all()?;
        self.gpu.finish()
    }

    fn memory_gib(&self) -> f64 {
        // Nothing is allocated after the start, so what is in use now is the most.
        self.gpu.memory().map_or(0.0, |(free, all)| (all - free) as f64 / (1_u64 << 30) as f64)
    }
}

impl CudaDevice {
    /// Runs every product once in every class of sizes, so that the fastest algorithms are known and nothing is loaded within
    /// a step. Leaves the gradient zero.
    pub fn warm_up(&mut self) -> Result<()> {
        let args = Args::default().with(View { at: self.values.address, ld: 4096 });
        let rows = self.values.bytes as i64 / 8192;
        let args = args.with(rows).with(4096_i32).with(0.5_f32).with(1_u32);
        self.gpu.launch(self.kernels.get("random")?, [1024, 1, 1], [256, 1, 1], 0, args)?;
        let most = self.plan.micro_batch_tokens.next_multiple_of(CLASS);
        for tokens in (CLASS..=most).step_by(CLASS) {
            self.send(&self.filler(tokens.min(self.plan.micro_batch_tokens))?, true)?;
            self.blas.tune(|| self.once(true))?;
        }
        // Scoring fills its micro-batches, so that one class is enough.
        self.send(&self.filler(self.plan.scoring_tokens)?, false)?;
        self.blas.tune(|| self.once(false))?;
        self.clear_gradient()?;
        self.gpu.finish()
    }

    /// A batch of one pair with as many answer tokens as planned.
    fn filler(&self, tokens: usize) -> Result<Batch> {
        let answer = ((tokens as f64 * self.plan.answers / 2.0) as usize).clamp(1, tokens.div_ceil(2));
        let ids = |n: usize| vec![0; n];
        let prompt = ids(tokens + 2 - 2 * answer);
        Ok(Batch::of(&[Example::pair(prompt, ids(answer), ids(answer), "")?]))
    }

    /// The first layer of every kind of block, and the head; with `keep`, both passes. Whatever lies in a layer's place will do.
    fn once(&self, keep: bool) -> Result<()> {
        for kind in 0..self.graph.blocks.len() {
            let Some(layer) = self.graph.layers.iter().position(|l| l.block == kind) else { continue };
            self.layer_forward(layer, keep)?;
            if keep {
                self.layer_backward(layer)?;
            }
        }
        if !keep {
            return Ok(());
        }
        let places = self.head_places();
        let head = self.head_run(&places);
        self.lowered.head.forward.iter().try_for_each(|op| self.run(&head, op))?;
        self.log_probs(&places, true)?;
        self.lowered.head_schedule.ops.iter().try_for_each(|op| self.run(&head, op))
    }

    /// Gradients of the stacks to the flat buffer.
    fn collect(&mut self) -> Result<()> {
        if !self.collected {
            let o = &self.optimizer;
            let args = Args::default().with(o.parts.address).with(o.gradient.address);
            self.gpu.launch(self.kernels.get("collect")?, [32, o.parts_count, 1], [256, 1, 1], 0, args)?;
            self.collected = true;
        }
        Ok(())
    }

    /// Parameters to the stacked weights of all layers; to those that ranks share, whenever one is taken.
    fn spread_all(&self) -> Result<()> {
        if self.weights.shard.is_none() {
            self.spread(0..self.optimizer.parts_count)?;
        }
        self.gpu.mark("optimizer")
    }

    /// Parameters of some parts of the adapter to the stacked weights.
    fn spread(&self, parts: Range<usize>) -> Result<()> {
        let o = &self.optimizer;
        let first = o.parts.address + (parts.start * PART) as u64;
        let args = Args::default().with(first).with(o.params.address);
        self.gpu.launch(self.kernels.get("spread")?, [32, parts.len(), 1], [256, 1, 1], 0, args)
    }
}

/// Two parts a site; sites come in the order of layers.
fn parts_of_layers(graph: &ModelGraph, adapter: &Adapter) -> Vec<Range<usize>> {
    let before = |layer: usize| 2 * adapter.sites.partition_point(|s| s.node.0 <= layer);
    (0..graph.layers.len()).map(|layer| before(layer)..before(layer + 1)).collect()
}

/// Bytes of `struct Part` of `adamw.cu`.
const PART: usize = 64;

/// Partial sums of the gradient's norm.
const PARTIAL: usize = 1024;
