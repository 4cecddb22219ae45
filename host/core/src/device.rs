//! Where a model runs: forward, backward, update. One training loop serves every device.

use dpo_plugin_api::graph::ModelGraph;
use rayon::ThreadPool;

use crate::aux_loss::RouterLoad;
use crate::batch::Batch;
use crate::collective::ProcessGroup;
use crate::engine::{Engine, Forward};
use crate::error::{Error, Result};
use crate::logprobs::AnswerLogProbs;
use crate::lora::Adapter;
use crate::memory::peak_memory_gib;
use crate::optimizer::{AdamW, Moments};
use crate::plan::Packing;

/// A device with a model, its adapter, the adapter's gradient and its optimizer state.
pub trait Device {
    /// What it is and how it computes, such as `cpu float32`: log-probs of devices with other names are not mixed.
    fn name(&self) -> String;

    /// How much it computes at once, which is saved with a run.
    fn packing(&self) -> Packing;

    /// Tokens that a micro-batch is filled up to, with a backward pass or without.
    fn micro_batch_tokens(&self, keep: bool) -> usize {
        let Packing { micro_batch_tokens, scoring_tokens, .. } = self.packing();
        if keep { micro_batch_tokens } else { scoring_tokens }
    }

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

    /// What routers did in the last forward pass, where they have an auxiliary loss.
    fn router_load(&mut self) -> Result<RouterLoad>;

    /// From here on backward passes add the gradient of the auxiliary loss, given its derivative by the probability that a token gives each
    /// expert.
    fn set_router_dprobs(&mut self, dprobs: Vec<f64>);

    /// Whether ranks share the frozen weights, so that all have to run the same passes; one without examples left runs
    /// them over empty batches.
    fn shares_base(&self) -> bool {
        false
    }

    /// From here on numbers that A reads are dropped, by a key; `None` ends that. A device without dropout refuses adapters that
    /// have it.
    fn set_dropout(&mut self, _key: Option<u64>) {}

    /// Sets the gradient to zero.
    fn clear_gradient(&mut self) -> Result<()>;

    /// Adds up the gradients of all ranks.
    fn sum_gradient(&mut self, group: &mut dyn ProcessGroup) -> Result<()>;

    /// The gradient's norm.
    fn gradient_norm(&mut self) -> Result<f64>;

    /// A step of the optimizer with `clip` times the gradient. One after which a parameter or a moment would not be finite is
    /// not taken: then nothing changes, and the answer is false.
    fn update(&mut self, optimizer: &AdamW, clip: f64, learning_rate: f64) -> Result<bool>;

    /// Brings adapter and moments up to date.
    fn fetch(&mut self) -> Result<()>;

    /// Sets parameters and moments.
    fn restore(&mut self, params: &[f32], moments: Moments) -> Result<()>;

    /// Most memory that was in use on the device, in GiB.
    fn memory_gib(&self) -> f64;
}

/// The CPU.
pub struct CpuDevice {
    engine: Engine,
    threads: ThreadPool,
    micro_batch_tokens: usize,
    moments: Moments,
    gradient: Vec<f32>,
    forward: Option<Forward>,
    load: RouterLoad,
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
            load: RouterLoad::default(),
        })
    }

    /// The gradient, laid out as the adapter's parameters.
    pub fn gradient(&self) -> &[f32] {
        &self.gradient
    }
}

impl Device for CpuDevice {
    fn name(&self) -> String {
        self.engine.name()
    }

    fn packing(&self) -> Packing {
        let tokens = self.micro_batch_tokens;
        Packing { micro_batch_tokens: tokens, scoring_tokens: tokens, logits_rows: None, chunk_rows: None }
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
        self.load = std::mem::take(&mut forward.load);
        self.forward = keep.then_some(forward);
        Ok(logps)
    }

    fn backward(&mut self, batch: &Batch, dlogps: &[f32]) -> Result<()> {
        let forward = self.forward.take().ok_or_else(|| Error::run("a backward pass without its forward pass"))?;
        let (engine, gradient) = (&mut self.engine, &mut self.gradient);
        self.threads.install(move || engine.backward(batch, forward, dlogps, gradient))
    }

    fn router_load(&mut self) -> Result<RouterLoad> {
        Ok(self.load.clone())
    }

    fn set_router_dprobs(&mut self, dprobs: Vec<f64>) {
        self.engine.set_router_dprobs(dprobs);
    }

    fn shares_base(&self) -> bool {
        self.engine.shares_base()
    }

    fn set_dropout(&mut self, key: Option<u64>) {
        self.engine.set_dropout(key);
    }

    fn clear_gradient(&mut self) -> Result<()> {
        self.gradient.fill(0.0);
        Ok(())
    }

    fn sum_gradient(&mut self, group: &mut dyn ProcessGroup) -> Result<()> {
        group.all_reduce(&mut self.gradient)
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        Ok(self.gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt())
    }

    fn update(&mut self, optimizer: &AdamW, clip: f64, learning_rate: f64) -> Result<bool> {
        if clip < 1.0 {
            self.gradient.iter_mut().for_each(|g| *g *= clip as f32);
        }
        let groups = self.engine.adapter().groups(optimizer.loraplus_lr_ratio);
        let (gradient, moments) = (&self.gradient, &mut self.moments);
        self.engine.update(|params| optimizer.step(&groups, params, gradient, moments, learning_rate))
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
