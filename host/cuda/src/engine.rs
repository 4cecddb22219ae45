//! A lowered model on a GPU: its memory, and passes through its blocks.
//!
//! All memory is taken at the start; within a step nothing is allocated.

use dpo_plugin_api::graph::ModelGraph;
use indicatif::ProgressBar;

use super::chunks;
use super::footprint::{Arrangement, Footprint, Place};
use super::gpu::{Address, Gpu, Memory, View};
use super::inputs::{Inputs, Rows};
use super::kernels::Kernels;
use super::launch::{KvCache, Launch, LoadedTable};
use super::loading::{Source, Weights};
use super::lowered::Lowered;
use super::matmul::{self, Matmuls};
use super::nccl::Nccl;
use super::offload::Offload;
use super::ops;
use super::optimizer::{self, Optimizer};
use super::plan::GpuPlan;
use super::program::{Program, Slice, Step};
use super::weights::{BlockWeights, NUMBERS, Stack};
use dpo_core::aux_loss::AuxLoss;
use dpo_core::batch::Batch;
use dpo_core::error::{Error, Result};
use dpo_core::lora::Adapter;
use dpo_core::optimizer::Moments;

/// A model with its adapter on one GPU, in bf16.
pub struct CudaDevice {
    pub(super) nccl: Option<Nccl>,
    pub(super) gpu: Gpu,
    pub(super) matmuls: Matmuls,
    pub(super) kernels: Kernels,
    pub(super) graph: ModelGraph,
    pub(super) lowered: Lowered,
    pub(super) weights: Weights,
    pub(super) plan: GpuPlan,
    pub(super) footprint: Footprint,
    /// Copies of what is on the GPU, as of the last `fetch`.
    pub(super) adapter: Adapter,
    pub(super) moments: Moments,
    pub(super) optimizer: Optimizer,
    /// Whether B is zero, as before the first step: then a forward pass needs no adapter.
    pub(super) plain: bool,
    /// Values of the batch in work.
    pub(super) values: Memory,
    pub(super) arrangement: Arrangement,
    offload: Option<Offload>,
    pub(super) inputs: Inputs,
    tables: Vec<LoadedTable>,
    /// The auxiliary loss of its routers, and the derivatives that backward passes take of it.
    pub(super) aux_loss: Option<AuxLoss>,
    pub(super) router_dprobs: Vec<f32>,
    /// Tokens that routers saw in the last forward pass, over all layers.
    pub(super) routed: f64,
}

/// A program in a pass: where its buffers lie, and what its steps are started with.
pub(super) struct Pass<'a> {
    pub program: &'a Program,
    /// Where its buffers lie, from an address on.
    pub places: Vec<Option<Place>>,
    pub values: Address,
    pub launch: Launch<'a>,
    /// Rows that steps run on at once, at most.
    pub chunk: usize,
}

impl Pass<'_> {
    /// A slice of a buffer from a row of the batch on.
    pub(super) fn view(&self, slice: Slice, row: usize) -> View {
        let ld = self.program.buffers[slice.buffer].columns() as i64;
        let Some(place) = self.places[slice.buffer] else { return View { at: 0, ld } };
        View { at: self.values + place.at as u64, ld }.row(if place.of_chunk { 0 } else { row }).column(slice.column)
    }

    /// Runs steps one after the other.
    pub(super) fn run(&self, steps: &[Step]) -> Result<()> {
        chunks::run(
            steps,
            |rows| self.launch.batch.rows(rows),
            self.chunk,
            |step, first, rows| {
                let views = |slices: &[Slice]| slices.iter().map(|s| self.view(*s, first)).collect::<Vec<View>>();
                let launch = Launch { rows, first, ..self.launch };
                step.run.launch(&launch, &views(&step.reads), &views(&step.writes))?;
                self.launch.gpu.mark(step.label)
            },
        )
    }
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
        let lowered = Lowered::new(&graph, &adapter, plan.layers.numbers, plan.gates)?;
        let steps = lowered.all().flat_map(|p| p.forward.iter().chain(&p.backward));
        let variants = steps.flat_map(|s| s.run.variants(gpu.kernels));
        let kernels = Kernels::load(&gpu, sources(), variants)?;
        let matmuls = Matmuls::new(&gpu)?;
        let weights = Weights::load(&gpu, &kernels, &graph, &lowered, source, (&plan, rank), progress)?;
        let parts = weights.parts(&lowered, &graph, &adapter)?;
        let optimizer = Optimizer::new(&gpu, &graph, &adapter, &parts)?;
        let footprint = Footprint::new(&graph, &lowered);
        let arrangement = footprint.arrange(1, 1, plan.values, &plan.allowed, plan.mode());
        let arrangement = arrangement.ok_or_else(|| Error::run("the plan has no room for a token"))?;
        let values = gpu.allocate(plan.values)?;
        let offload = plan.offloads().then(|| Offload::new(&gpu, plan.host_inputs)).transpose()?;
        let inputs = Inputs::new(&gpu, plan.inputs)?;
        let tables = LoadedTable::load(&gpu, lowered.tables.clone())?;
        let device = CudaDevice {
            nccl: None,
            plain: adapter.changes_nothing(),
            moments: Moments::new(optimizer.count),
            aux_loss: AuxLoss::of(&graph),
            router_dprobs: Vec::new(),
            routed: 0.0,
            gpu,
            matmuls,
            kernels,
            graph,
            lowered,
            weights,
            plan,
            footprint,
            adapter,
            optimizer,
            values,
            arrangement,
            offload,
            inputs,
            tables,
        };
        device.send_adapter()?;
        device.gpu.zero(device.weights.gradients.address, device.weights.gradients.bytes)?;
        device.gpu.finish()?;
        Ok(device)
    }

    /// Sums gradients over ranks, and gathers what they share of a base, by NCCL.
    pub fn join(self, nccl: Option<Nccl>) -> CudaDevice {
        CudaDevice { nccl, ..self }
    }

    /// The plan it was opened with.
    pub fn plan(&self) -> &GpuPlan {
        &self.plan
    }

    /// The GPU, for times and memory.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Parameters and moments as the host has them to the GPU, and into the stacks.
    pub(super) fn send_adapter(&self) -> Result<()> {
        self.optimizer.restore(&self.gpu, &self.adapter.params, &self.moments)?;
        self.spread()?;
        self.gpu.finish()
    }

    /// Has other parameters in the adapter's place, which lie on the GPU.
    pub(super) fn exchange_adapter(&self, params: &Memory) -> Result<()> {
        self.optimizer.copy_params(&self.gpu, params.address)?;
        self.spread()
    }

    /// Whether any of the adapter's matrices lie in layers that come and go.
    fn spreads_by_layer(&self) -> bool {
        let lies_in = |stack: &Stack| stack.rank > 0 && stack.numbers == NUMBERS;
        !self.weights.store.is_resident() && self.lowered.programs.iter().any(|p| p.stacks.iter().any(lies_in))
    }

    /// Parameters to where steps read them; to layers that come and go, whenever one comes.
    pub(super) fn spread(&self) -> Result<()> {
        if !self.spreads_by_layer() {
            self.optimizer.spread(&self.gpu, &self.kernels, None)?;
        }
        self.gpu.mark("optimizer")
    }

    /// What steps are started with that run on the weights of a block.
    pub(super) fn launch<'a>(&'a self, weights: &'a BlockWeights, rows: Rows, adapted: bool) -> Launch<'a> {
        Launch {
            gpu: &self.gpu,
            matmuls: &self.matmuls,
            kernels: &self.kernels,
            batch: &self.inputs.at,
            tables: &self.tables,
            weights,
            dequantized: self.values.address + self.arrangement.work as u64,
            rows: self.inputs.at.rows(rows),
            first: 0,
            adapted,
            cache: None,
        }
    }

    /// Runs steps of a layer.
    fn layer(
        &self,
        layer: usize,
        (steps, places): (&[Step], Vec<Option<Place>>),
        adapted: bool,
        cache: Option<KvCache>,
    ) -> Result<()> {
        let program = &self.lowered.programs[self.graph.layers[layer].block];
        let launch = self.launch(&self.weights.layers[layer], Rows::Tokens, adapted);
        let (values, chunk) = (self.values.address, self.arrangement.chunk);
        Pass { program, places, values, launch: Launch { cache, ..launch }, chunk }.run(steps)
    }

    /// Has a layer's weights on the GPU where they come and go, and those of the layer `after` it follow.
    fn next(&self, layer: usize, after: Option<usize>) -> Result<()> {
        if !self.weights.store.next(&self.gpu, self.nccl.as_ref(), layer, after)? {
            return Ok(());
        }
        if self.spreads_by_layer() {
            self.optimizer.spread(&self.gpu, &self.kernels, Some(layer))?;
        }
        self.gpu.mark("wait for weights")
    }

    /// Runs `work` on the layers, of a forward pass or in reverse, each with its weights whole.
    pub(super) fn stream(&self, reverse: bool, work: impl Fn(usize) -> Result<()>) -> Result<()> {
        let count = self.graph.layers.len();
        let at = |step: usize| if reverse { count - 1 - step } else { step };
        (0..count).try_for_each(|step| {
            self.next(at(step), (step + 1 < count).then(|| at(step + 1)))?;
            work(at(step))
        })
    }

    /// Gathers the layers with the other ranks without computing anything.
    pub(super) fn participate(&self, reverse: bool) -> Result<()> {
        self.stream(reverse, |_| Ok(()))
    }

    /// The forward pass of a layer; with `save`, for a backward pass.
    pub(super) fn layer_forward(&self, layer: usize, save: bool) -> Result<()> {
        if let (Some(offload), true) = (&self.offload, save) {
            match self.arrangement.travels(layer, false) {
                Some([here, there, bytes]) => {
                    offload.keep(&self.gpu, self.values.address + here as u64, there, bytes)?;
                }
                None => offload.follow(&self.gpu)?,
            }
        }
        self.layer(layer, self.forward_steps(layer, save), save || !self.plain, None)
    }

    /// The forward pass of a layer where sequences are continued.
    pub(super) fn layer_after(&self, layer: usize, cache: KvCache, adapted: bool) -> Result<()> {
        self.layer(layer, self.forward_steps(layer, false), adapted, Some(cache))
    }

    fn forward_steps(&self, layer: usize, save: bool) -> (&[Step], Vec<Option<Place>>) {
        let kind = self.graph.layers[layer].block;
        let places = self.arrangement.places(&self.lowered, kind, layer, save, false);
        (&self.lowered.programs[kind].forward, places)
    }

    /// The backward pass of a layer.
    pub(super) fn layer_backward(&self, layer: usize) -> Result<()> {
        if let Some(offload) = &self.offload {
            match self.arrangement.travels(layer, true) {
                Some([here, there, bytes]) => {
                    offload.fetch(&self.gpu, there, self.values.address + here as u64, bytes)?;
                }
                None => offload.follow(&self.gpu)?,
            }
        }
        let kind = self.graph.layers[layer].block;
        let scheduled = &self.lowered.schedules[kind][self.arrangement.saved[layer] as usize];
        let places = self.arrangement.places(&self.lowered, kind, layer, true, true);
        self.layer(layer, (&scheduled.steps, places), true, None)
    }

    /// Token ids to the first layer's input.
    pub(super) fn embed(&self) -> Result<()> {
        let places = self.arrangement.embed_places(&self.lowered);
        let launch = self.launch(&self.weights.embed, Rows::Tokens, false);
        self.whole(&self.lowered.embed, places, launch).run(&self.lowered.embed.forward)
    }

    /// A program in a pass on all rows at once.
    pub(super) fn whole<'a>(&self, program: &'a Program, places: Vec<Option<Place>>, launch: Launch<'a>) -> Pass<'a> {
        Pass { program, places, values: self.values.address, launch, chunk: usize::MAX }
    }

    /// Where the gradient between layers lies.
    pub(super) fn gradient_edge(&self) -> View {
        let at = self.values.address + self.arrangement.gradient() as u64;
        View { at, ld: (self.lowered.programs[0].edge() / 2) as i64 }
    }

    /// Sends a batch's arrays in one copy and makes its tables.
    pub(super) fn send(&mut self, batch: &Batch, save: bool) -> Result<()> {
        let (tokens, answers) = (batch.tokens(), batch.targets.len());
        let (bytes, mode) = (self.plan.values, self.plan.mode());
        let arrangement = match save {
            true => self.footprint.arrange(tokens, answers, bytes, &self.plan.allowed, mode),
            false => self.footprint.arrange_forward(tokens, answers, bytes, mode),
        };
        self.arrangement = arrangement.ok_or_else(|| {
            let (planned, most) = (self.plan.most_tokens, self.plan.most_answers());
            Error::run(format!("a batch of {tokens} tokens, {answers} of answers: planned for {planned} and {most}"))
        })?;
        let experts = self.aux_loss.map_or(0, |loss| loss.experts);
        self.inputs.send(&self.gpu, batch, self.tables.iter().map(LoadedTable::bytes).sum(), experts)?;
        self.launch(&self.weights.embed, Rows::Tokens, false).fill_tables()?;
        self.gpu.mark("send")
    }
}

/// Every source there is.
pub(super) fn sources() -> impl Iterator<Item = &'static super::kernels::Source> {
    ops::SOURCES.iter().copied().chain(matmul::SOURCES).chain([&optimizer::SOURCE])
}
