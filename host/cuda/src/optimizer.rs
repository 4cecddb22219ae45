//! The adapter on the GPU: parameters, gradient and moments in f32, AdamW's step, and the ways between the flat buffers and the
//! stacked matrices.

use std::ops::Range;

use dpo_plugin_api::graph::ModelGraph;

use super::gpu::{Address, Args, Gpu, Memory, View};
use super::kernels::{Kernels, Source};
use dpo_core::error::Result;
use dpo_core::lora::Adapter;
use dpo_core::optimizer::{Moments, Rates};
use dpo_core::weights::BlockId;

pub(super) static SOURCE: Source = Source::plain(
    "adamw",
    include_str!("adamw.cu"),
    &["adamw", "adamw_overflows", "sum_squares", "spread", "collect", "random"],
);

/// A LoRA matrix in the flat buffer and in a stack, or those of experts: `struct Part` of `adamw.cu`.
pub(super) type Part = [u64; 11];

/// Which learning rate a matrix has: `group` of a part.
#[derive(Clone, Copy)]
pub(super) enum Group {
    A,
    B,
    /// None: it stays what it is.
    Subtracted,
}

/// Bytes of a part.
const PART: usize = size_of::<Part>();

/// Blocks that a sum over all parameters is made of.
const PARTIAL: usize = 1024;

/// Parameters, gradient and moments in f32, each `[parameters]`, and the parts of the adapter.
pub(super) struct Optimizer {
    params: Memory,
    pub(super) gradient: Memory,
    first: Memory,
    second: Memory,
    parts: Memory,
    partial: Memory,
    pub(super) count: usize,
    parts_count: usize,
    /// Of every layer, its parts.
    layers: Vec<Range<usize>>,
    /// Whether the flat gradient is that of the stacks.
    collected: bool,
}

impl Optimizer {
    pub(super) fn new(gpu: &Gpu, graph: &ModelGraph, adapter: &Adapter, parts: &[Part]) -> Result<Optimizer> {
        let count = adapter.params.len();
        let optimizer = Optimizer {
            // What is subtracted lies behind the parameters.
            params: gpu.allocate((count + adapter.subtracted.len()) * 4)?,
            gradient: gpu.allocate(count * 4)?,
            first: gpu.allocate(count * 4)?,
            second: gpu.allocate(count * 4)?,
            parts: gpu.allocate(parts.len() * PART)?,
            partial: gpu.allocate(PARTIAL * 8)?,
            count,
            parts_count: parts.len(),
            layers: parts_of_layers(graph, adapter),
            collected: false,
        };
        gpu.upload(parts.as_flattened(), optimizer.parts.address)?;
        gpu.upload(&adapter.subtracted, optimizer.params.address + (count * 4) as u64)?;
        Ok(optimizer)
    }

    /// The stacks' gradients have changed.
    pub(super) fn forget_gradient(&mut self) {
        self.collected = false;
    }

    /// Gradients of the stacks to the flat buffer.
    pub(super) fn collect(&mut self, gpu: &Gpu, kernels: &Kernels) -> Result<()> {
        if !self.collected {
            let args = Args::default().with(self.parts.address).with(self.gradient.address);
            gpu.launch(kernels.get("collect")?, [32, self.parts_count, 1], [256, 1, 1], 0, args)?;
            self.collected = true;
        }
        Ok(())
    }

    /// Parameters of all layers, or of one, to the stacked weights.
    pub(super) fn spread(&self, gpu: &Gpu, kernels: &Kernels, layer: Option<usize>) -> Result<()> {
        let parts = layer.map_or(0..self.parts_count, |layer| self.layers[layer].clone());
        let first = self.parts.address + (parts.start * PART) as u64;
        let args = Args::default().with(first).with(self.params.address);
        gpu.launch(kernels.get("spread")?, [32, parts.len(), 1], [256, 1, 1], 0, args)
    }

    /// The flat gradient's norm.
    pub(super) fn norm(&self, gpu: &Gpu, kernels: &Kernels) -> Result<f64> {
        let args = Args::default().with(self.gradient.address).with(self.partial.address).with(self.count as i64);
        gpu.launch(kernels.get("sum_squares")?, [PARTIAL, 1, 1], [256, 1, 1], 0, args)?;
        gpu.mark("optimizer")?;
        Ok(self.partial_sum(gpu)?.sqrt())
    }

    /// A step with the gradient scaled by `clip`, of A and of B at their rates. One after which a number would not be finite is not
    /// taken: then the answer is false.
    pub(super) fn step(&self, gpu: &Gpu, kernels: &Kernels, [a, b]: [Rates; 2], clip: f64) -> Result<bool> {
        let args = || {
            let args = Args::default().with(self.parts.address).with(self.params.address).with(self.gradient.address);
            let args = args.with(self.first.address).with(self.second.address).with(clip as f32);
            let (args, rates) = (args.with(a.keep).with(a.size).with(b.keep).with(b.size), a);
            args.with(rates.root).with(rates.b1).with(rates.r1).with(rates.b2).with(rates.r2).with(rates.eps)
        };
        let checked = args().with(self.parts_count as i32).with(self.partial.address);
        gpu.launch(kernels.get("adamw_overflows")?, [PARTIAL, 1, 1], [256, 1, 1], 0, checked)?;
        if self.partial_sum(gpu)? > 0.0 {
            return Ok(false);
        }
        gpu.launch(kernels.get("adamw")?, [32, self.parts_count, 1], [256, 1, 1], 0, args())?;
        Ok(true)
    }

    fn partial_sum(&self, gpu: &Gpu) -> Result<f64> {
        let mut partial = vec![0.0_f64; PARTIAL];
        gpu.download(self.partial.address, &mut partial)?;
        Ok(partial.iter().sum())
    }

    /// Parameters and moments from the GPU.
    pub(super) fn fetch(&self, gpu: &Gpu, params: &mut [f32], moments: &mut Moments) -> Result<()> {
        gpu.download(self.params.address, params)?;
        gpu.download(self.first.address, &mut moments.first)?;
        gpu.download(self.second.address, &mut moments.second)
    }

    /// Parameters from another place of the GPU.
    pub(super) fn copy_params(&self, gpu: &Gpu, from: Address) -> Result<()> {
        gpu.copy(from, self.params.address, self.count * 4)
    }

    /// Parameters and moments to the GPU.
    pub(super) fn restore(&self, gpu: &Gpu, params: &[f32], moments: &Moments) -> Result<()> {
        gpu.upload(params, self.params.address)?;
        gpu.upload(&moments.first, self.first.address)?;
        gpu.upload(&moments.second, self.second.address)
    }
}

/// Two parts a site, and two more of what is subtracted; sites come in the order of layers.
fn parts_of_layers(graph: &ModelGraph, adapter: &Adapter) -> Vec<Range<usize>> {
    let each = if adapter.subtracted.is_empty() { 2 } else { 4 };
    let before = |layer: usize| each * adapter.sites.partition_point(|s| s.node.0 < BlockId::Layer(layer));
    (0..graph.layers.len()).map(|layer| before(layer)..before(layer + 1)).collect()
}

/// Fills rows with random numbers.
pub(super) fn random(
    gpu: &Gpu,
    kernels: &Kernels,
    at: Address,
    (rows, width, ld): (usize, usize, usize),
    deviation: f32,
    seed: u32,
) -> Result<()> {
    let args = Args::default().with(View { at, ld: ld as i64 }).with(rows as i64).with(width as i32);
    gpu.launch(kernels.get("random")?, [1024, 1, 1], [256, 1, 1], 0, args.with(deviation).with(seed))
}
