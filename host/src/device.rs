//! Where a model runs: forward, backward, update. One training loop serves every device.

use dpo_plugin_api::graph::ModelGraph;
use rayon::ThreadPool;

use crate::base::Base;
use crate::batch::Batch;
use crate::console;
use crate::cuda::{self, CudaDevice, Gpu, GpuPlan, Nccl, Source};
use crate::engine::{Engine, Forward};
use crate::error::{Error, Result};
use crate::example::Example;
use crate::logprobs::AnswerLogProbs;
use crate::lora::Adapter;
use crate::plan::{Plan, Wishes, size};
use crate::ranks::Ranks;
use crate::train::{AdamW, Moments, peak_memory_gib};
use crate::weights::Checkpoint;

/// A device with a model, its adapter, the adapter's gradient and its optimizer state.
pub trait Device {
    /// What it is and how it computes, such as `cpu float32`: log-probs of devices with other names are not mixed.
    fn name(&self) -> String;

    /// Tokens that a micro-batch is filled up to, with a backward pass or without.
    fn micro_batch_tokens(&self, keep: bool) -> usize;

    /// The model's graph.
    fn graph(&self) -> &ModelGraph;

    /// The adapter as of the last [`fetch`](Self::fetch).
    fn adapter(&self) -> &Adapter;

    /// The optimizer's moments as of the last [`fetch`](Self::fetch).
    fn moments(&self) -> &Moments;

    /// Log-probs of a batch's answer tokens. With `keep`, [`backward`](Self::backward) may follow for the same batch.
    fn forward(&mut self, batch: &Batch, keep: bool) -> Result<AnswerLogProbs>;

    /// Adds a batch's part to the gradient, given `d loss / d logp` of every answer token.
    fn backward(&mut self, batch: &Batch, dlogps: &[f32]) -> Result<()>;

    /// Whether ranks share the frozen weights, so that all have to run the same passes; one without examples left runs
    /// them over empty batches.
    fn shares_base(&self) -> bool {
        false
    }

    /// Sets the gradient to zero.
    fn clear_gradient(&mut self) -> Result<()>;

    /// Adds up the gradients of all ranks.
    fn sum_gradient(&mut self, ranks: &mut Ranks) -> Result<()>;

    /// The gradient's norm.
    fn gradient_norm(&mut self) -> Result<f64>;

    /// A step of the optimizer with `clip` times the gradient.
    fn update(&mut self, optimizer: &AdamW, clip: f64, learning_rate: f64) -> Result<()>;

    /// Brings adapter and moments up to date.
    fn fetch(&mut self) -> Result<()>;

    /// Sets parameters and moments.
    fn restore(&mut self, params: &[f32], moments: Moments) -> Result<()>;

    /// Most memory that was in use on the device, in GiB.
    fn memory_gib(&self) -> f64;
}

/// The GPU that `--device` means, or `None` for the CPU. With several ranks on a host each has its own: `cuda` counts
/// them by local rank, `cuda:2,3` names them.
pub fn choose(device: &str, local_rank: Option<usize>) -> Result<Option<usize>> {
    let list: Option<Vec<&str>> = device.strip_prefix("cuda:").map(|list| list.split(',').collect());
    let wrong = |text: String, help: &str| Err(Error::input(text).at("--device").help(help));
    match (list, local_rank) {
        (Some(list), None) if list.len() > 1 => {
            wrong(format!("'{device}' names {} GPUs", list.len()), "say --gpus, with their number")
        }
        (Some(list), Some(rank)) => match list.get(rank) {
            Some(index) => cuda::choose(&format!("cuda:{index}")),
            None => wrong(
                format!("'{device}' names no GPU for rank {rank} of this host"),
                "name one for each rank, or say cuda",
            ),
        },
        (None, Some(rank)) => {
            let Some(first) = cuda::choose(device)? else { return Ok(None) };
            // A launcher may let each rank see its own GPU only.
            let visible = std::env::var("CUDA_VISIBLE_DEVICES").is_ok_and(|v| !v.is_empty() && !v.contains(','));
            let count = cuda::count()?;
            match rank {
                _ if visible => Ok(Some(first)),
                rank if rank < count => Ok(Some(rank)),
                rank => wrong(format!("rank {rank} of this host has no GPU: there are {count}"), "lower --gpus"),
            }
        }
        (_, None) => cuda::choose(device),
    }
}

/// Opens the device of an index among the GPUs, or the CPU, with a plan for these examples, which it prints.
pub fn open<'a>(
    ranks: &mut Ranks,
    gpu: Option<usize>,
    graph: ModelGraph,
    checkpoint: &Checkpoint,
    adapter: Adapter,
    examples: impl Iterator<Item = &'a Example> + Clone,
    wishes: Wishes,
) -> Result<Box<dyn Device>> {
    let longest = examples.clone().map(Example::packed_tokens).max().unwrap_or(1);
    let Some(index) = gpu else {
        let plan = |parts| Plan::new(&graph, adapter.params.len(), longest, parts, wishes);
        let plan = agree(ranks, wishes.shard_base, plan, |plan| [plan.weights, plan.whole])?;
        console::line(&plan);
        let base = match ranks.parts().filter(|_| plan.parts > 1) {
            Some(parts) => Base::load_part(&graph, checkpoint, parts)?,
            None => Base::load(&graph, checkpoint)?,
        };
        let mut engine = Engine::new(graph, base, adapter)?;
        engine.recompute(plan.recomputed);
        return Ok(Box::new(CpuDevice::new(engine, plan.micro_batch_tokens)?));
    };
    let gpu = Gpu::open(index)?;
    let nccl = Nccl::join(&gpu, ranks)?;
    let answers = examples.map(Example::answer_share).fold(0.0, f64::max);
    let room = cuda::room(&gpu, wishes.memory, nccl.as_ref())?;
    let whole_or_shared = |parts| GpuPlan::new(&graph, &adapter, longest, answers, room, parts, wishes);
    let plan = |parts: usize| match &nccl {
        None if parts > 1 => Err(whole_or_shared(1).err().unwrap_or_else(|| {
            Error::input("GPUs share frozen weights through NCCL, which these ranks do not have")
                .at("--shard-base")
                .help("leave it out: the weights fit on each")
        })),
        _ => whole_or_shared(parts),
    };
    let plan = agree(ranks, wishes.shard_base, plan, |plan| [plan.weights, plan.whole])?;
    console::line(format!("device      {}, compute capability {}\n{plan}", gpu.name, gpu.capability));
    let bar = console::bar(checkpoint.bytes() as u64, "weights     {bar:30} {bytes}/{total_bytes} {bytes_per_sec}");
    let mut device =
        CudaDevice::load(gpu, graph, &Source::Checkpoint(checkpoint), adapter, (plan, ranks.rank()), &bar)?;
    bar.finish_and_clear();
    device.warm_up()?;
    Ok(Box::new(device.join(nccl)))
}

/// A plan in which ranks share the frozen weights, or have all of them, where that is wished; else all of them, if that
/// fits on every rank. `weights` are a plan's, and those of all ranks together.
fn agree<P>(
    ranks: &mut Ranks,
    wish: Option<bool>,
    plan: impl Fn(usize) -> Result<P>,
    weights: fn(&P) -> [usize; 2],
) -> Result<P> {
    let (whole, many) = (plan(1), ranks.size());
    if many == 1 {
        if wish == Some(true) {
            console::note("--shard-base is ignored: one rank has all weights");
        }
        return whole;
    }
    let any = ranks.most(u64::from(whole.is_err()))? > 0;
    let shares = wish.unwrap_or(any);
    ranks.same("--shard-base", &[u8::from(shares)])?;
    let shared = plan(many);
    if !shares {
        return whole.map_err(|e| match shared {
            Ok(plan) => {
                let shared = size(weights(&plan)[0]);
                Error::input(format!("{}; shared by {many} ranks, weights take {shared} on each", e.message()))
                    .at("--shard-base")
                    .help("leave it out: what is shared fits")
            }
            Err(_) => e,
        });
    }
    if wish.is_none()
        && let Ok(plan) = &shared
    {
        let all = size(weights(plan)[1]);
        console::line(format!("base        shared by {many} ranks: all weights, {all}, do not fit on each"));
    }
    shared
}

/// The CPU.
pub struct CpuDevice {
    engine: Engine,
    threads: ThreadPool,
    micro_batch_tokens: usize,
    moments: Moments,
    gradient: Vec<f32>,
    forward: Option<Forward>,
}

impl CpuDevice {
    /// Runs an engine with so many tokens at once.
    ///
    /// # Errors
    /// Threads that the system does not give.
    pub fn new(engine: Engine, micro_batch_tokens: usize) -> Result<CpuDevice> {
        let count = engine.adapter().params.len();
        Ok(CpuDevice {
            threads: engine.threads()?,
            engine,
            micro_batch_tokens,
            moments: Moments::new(count),
            gradient: vec![0.0; count],
            forward: None,
        })
    }

    /// The gradient, laid out as the adapter's parameters.
    pub fn gradient(&self) -> &[f32] {
        &self.gradient
    }
}

impl Device for CpuDevice {
    fn name(&self) -> String {
        "cpu float32".into()
    }

    fn micro_batch_tokens(&self, _keep: bool) -> usize {
        self.micro_batch_tokens
    }

    fn graph(&self) -> &ModelGraph {
        self.engine.graph()
    }

    fn adapter(&self) -> &Adapter {
        self.engine.adapter()
    }

    fn moments(&self) -> &Moments {
        &self.moments
    }

    fn forward(&mut self, batch: &Batch, keep: bool) -> Result<AnswerLogProbs> {
        let engine = &mut self.engine;
        let mut forward = self.threads.install(move || engine.forward(batch, keep))?;
        let logps = std::mem::take(&mut forward.logps);
        self.forward = keep.then_some(forward);
        Ok(logps)
    }

    fn backward(&mut self, batch: &Batch, dlogps: &[f32]) -> Result<()> {
        let forward = self.forward.take().ok_or_else(|| Error::run("a backward pass without its forward pass"))?;
        let (engine, gradient) = (&mut self.engine, &mut self.gradient);
        self.threads.install(move || engine.backward(batch, forward, dlogps, gradient))
    }

    fn shares_base(&self) -> bool {
        self.engine.shares_base()
    }

    fn clear_gradient(&mut self) -> Result<()> {
        self.gradient.fill(0.0);
        Ok(())
    }

    fn sum_gradient(&mut self, ranks: &mut Ranks) -> Result<()> {
        ranks.sum(&mut self.gradient)
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        Ok(self.gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt())
    }

    fn update(&mut self, optimizer: &AdamW, clip: f64, learning_rate: f64) -> Result<()> {
        if clip < 1.0 {
            self.gradient.iter_mut().for_each(|g| *g *= clip as f32);
        }
        let (gradient, moments) = (&self.gradient, &mut self.moments);
        self.engine.update(|params| optimizer.step(params, gradient, moments, learning_rate))
    }

    fn fetch(&mut self) -> Result<()> {
        Ok(())
    }

    fn restore(&mut self, params: &[f32], moments: Moments) -> Result<()> {
        self.moments = moments;
        self.engine.update(|own| own.copy_from_slice(params))
    }

    fn memory_gib(&self) -> f64 {
        peak_memory_gib()
    }
}
