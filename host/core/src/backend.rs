//! A kind of device that this program can compute on: it plans, loads a model, and gives what trains or what answers.

use dpo_plugin_api::graph::ModelGraph;

use crate::base::Base;
use crate::collective::ProcessGroup;
use crate::console;
use crate::cpu_decoder::CpuDecoder;
use crate::decoder::{Decoder, Sequences};
use crate::device::{CpuDevice, Device};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::example::Example;
use crate::lora::Adapter;
use crate::memory::size;
use crate::plan::{MemoryOptions, Packing, Plan};
use crate::weights::Checkpoint;

/// What a run will compute, as far as its memory depends on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Tokens of the longest example, as it is laid out.
    pub longest: usize,
    /// The largest share of answer tokens among an example's laid-out tokens.
    pub answers: f64,
}

impl Workload {
    /// Of these examples.
    pub fn of<'a>(examples: impl Iterator<Item = &'a Example>) -> Workload {
        let mut all = Workload::default();
        examples.for_each(|example| all.add(example, false));
        all
    }

    /// Of one more example, in batches with or without the ends of answers.
    pub fn add(&mut self, example: &Example, ends: bool) {
        self.longest = self.longest.max(example.laid_out(ends));
        self.answers = self.answers.max(example.scored_share());
    }
}

impl Default for Workload {
    /// Of no example.
    fn default() -> Workload {
        Workload { longest: 1, answers: 0.0 }
    }
}

/// A kind of device. There is one for the CPU and one for each GPU.
pub trait Backend {
    /// Whether answers cost little whatever the size of the model.
    fn is_gpu(&self) -> bool;

    /// Plans the memory of training, and prints the plan. No weight is read for it.
    ///
    /// # Errors
    /// A model that does not fit, with the numbers; a device that fails; a rank that is lost.
    fn plan(
        &self,
        group: &mut dyn ProcessGroup,
        graph: ModelGraph,
        adapter: Adapter,
        workload: Workload,
        options: MemoryOptions,
    ) -> Result<Box<dyn Planned>>;

    /// Loads a model that answers with any of some adapters, within the memory and with the base as options say.
    ///
    /// # Errors
    /// As [`plan`](Self::plan) and [`Planned::load`].
    fn decoder(
        &self,
        graph: &ModelGraph,
        checkpoint: &Checkpoint,
        adapters: Vec<Adapter>,
        sequences: Sequences,
        options: MemoryOptions,
    ) -> Result<Box<dyn Decoder>>;
}

/// A model that fits: its memory is planned, and its weights come next.
pub trait Planned {
    /// How much it computes at once.
    fn packing(&self) -> Packing;

    /// The adapter, for one whose numbers come from the weights, before it is loaded.
    fn adapter(&mut self) -> &mut Adapter;

    /// Loads the weights.
    ///
    /// # Errors
    /// A checkpoint or a device that fails; a rank that is lost.
    fn load(self: Box<Self>, group: &mut dyn ProcessGroup, checkpoint: &Checkpoint) -> Result<Box<dyn Device>>;
}

/// The CPU, in float32.
pub struct Cpu;

struct PlannedOnCpu {
    graph: ModelGraph,
    adapter: Adapter,
    plan: Plan,
}

impl Planned for PlannedOnCpu {
    fn packing(&self) -> Packing {
        self.plan.packing()
    }

    fn adapter(&mut self) -> &mut Adapter {
        &mut self.adapter
    }

    fn load(self: Box<Self>, group: &mut dyn ProcessGroup, checkpoint: &Checkpoint) -> Result<Box<dyn Device>> {
        let PlannedOnCpu { graph, adapter, plan } = *self;
        let parts = group.shards().filter(|_| plan.parts > 1);
        let base = Base::load_packed(&graph, checkpoint, plan.quantization, parts)?;
        let mut engine = Engine::new(graph, base, adapter)?;
        engine.recompute(plan.recomputed);
        Ok(Box::new(CpuDevice::new(engine, plan.micro_batch_tokens)?))
    }
}

impl Backend for Cpu {
    fn is_gpu(&self) -> bool {
        false
    }

    fn plan(
        &self,
        group: &mut dyn ProcessGroup,
        graph: ModelGraph,
        adapter: Adapter,
        workload: Workload,
        options: MemoryOptions,
    ) -> Result<Box<dyn Planned>> {
        note_offload(options);
        let plan = |parts| Plan::new(&graph, adapter.training_bytes(), workload.longest, parts, options);
        let mut plan = whole_or_sharded(group, options.shard_base, plan, |plan| [plan.weights, plan.whole])?;
        let packing = agree_on_packing(group, plan.packing())?;
        if packing != plan.packing() {
            let options = MemoryOptions { packing: Some(packing), ..options };
            plan = Plan::new(&graph, adapter.training_bytes(), workload.longest, plan.parts, options)?;
        }
        console::line(format!("device      cpu, float32, {} threads\n{plan}", rayon::current_num_threads()));
        Ok(Box::new(PlannedOnCpu { graph, adapter, plan }))
    }

    fn decoder(
        &self,
        graph: &ModelGraph,
        checkpoint: &Checkpoint,
        adapters: Vec<Adapter>,
        sequences: Sequences,
        options: MemoryOptions,
    ) -> Result<Box<dyn Decoder>> {
        note_offload(options);
        Ok(Box::new(CpuDecoder::load(graph, checkpoint, &adapters, sequences, options)?))
    }
}

fn note_offload(options: MemoryOptions) {
    if options.offload_base == Some(true) {
        console::note("--offload-base is ignored: the CPU's memory is the host's");
    }
}

/// One packing for all ranks: what fits on each. So the numbers of a step depend on no rank's memory alone.
///
/// # Errors
/// A rank that is lost.
pub fn agree_on_packing(group: &mut dyn ProcessGroup, own: Packing) -> Result<Packing> {
    let all = group.all_gather(serde_json::to_vec(&own).unwrap_or_default())?;
    let all = all.iter().filter_map(|bytes| serde_json::from_slice::<Packing>(bytes).ok());
    Ok(all.fold(own, Packing::least))
}

/// A plan in which ranks share the frozen weights, or have all of them, where that is asked for; else all of them, if that
/// fits on every rank. `weights` are a plan's, and those of all ranks together.
pub fn whole_or_sharded<P>(
    group: &mut dyn ProcessGroup,
    wish: Option<bool>,
    plan: impl Fn(usize) -> Result<P>,
    weights: fn(&P) -> [usize; 2],
) -> Result<P> {
    let (whole, many) = (plan(1), group.size());
    if many == 1 {
        if wish == Some(true) {
            console::note("--shard-base is ignored: one rank has all weights");
        }
        return whole;
    }
    let any = group.all_reduce_max(u64::from(whole.is_err()))? > 0;
    let shares = wish.unwrap_or(any);
    group.assert_equal("--shard-base", &[u8::from(shares)])?;
    let shared = plan(many);
    if !shares {
        return whole.map_err(|e| match shared {
            Ok(plan) => {
                let shared = size(weights(&plan)[0]);
                Error::input(format!("{}; sharded over {many} ranks, weights take {shared} on each", e.message()))
                    .at("--shard-base")
                    .help("leave it out: what is sharded fits")
            }
            Err(_) => e,
        });
    }
    if wish.is_none()
        && let Ok(plan) = &shared
    {
        let all = size(weights(plan)[1]);
        console::line(format!("base        sharded over {many} ranks: all weights, {all}, do not fit on each"));
    }
    shared
}
