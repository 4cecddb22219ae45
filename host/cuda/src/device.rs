//! A GPU as what the training loop asks of a device. The host waits for it only to read the log-probs that a loss is computed from,
//! and the gradient's norm.

use dpo_plugin_api::graph::ModelGraph;

use super::engine::CudaDevice;
use super::inputs::LOAD_BYTES;
use dpo_core::aux_loss::{AuxLoss, RouterLoad, is_balanced};
use dpo_core::batch::Batch;
use dpo_core::collective::ProcessGroup;
use dpo_core::device::Device;
use dpo_core::error::{Error, Result};
use dpo_core::logprobs::AnswerLogProbs;
use dpo_core::lora::Adapter;
use dpo_core::optimizer::{AdamW, Moments};
use dpo_core::plan::Packing;

impl CudaDevice {
    /// The gradient, laid out as the adapter's parameters.
    pub fn gradient(&mut self) -> Result<Vec<f32>> {
        self.optimizer.collect(&self.gpu, &self.kernels)?;
        let mut gradient = vec![0.0; self.optimizer.count];
        self.gpu.download(self.optimizer.gradient.address, &mut gradient)?;
        Ok(gradient)
    }

    /// Sets the load of routers to zero before a forward pass.
    fn clear_load(&mut self, batch: &Batch) -> Result<()> {
        let Some(AuxLoss { experts, .. }) = self.aux_loss else { return Ok(()) };
        let nodes = self.graph.layers.iter().flat_map(|layer| &self.graph.blocks[layer.block].nodes);
        let routers = nodes.filter(|node| is_balanced(node)).count();
        self.routed = routers as f64 * batch.layout.texts.iter().map(|texts| f64::from(*texts)).sum::<f64>();
        self.gpu.zero(self.inputs.at.router_load, experts * LOAD_BYTES)
    }

    /// Sends what the backward pass adds of the auxiliary loss.
    fn send_dprobs(&mut self) -> Result<()> {
        match self.aux_loss {
            Some(loss) if self.router_dprobs.len() == loss.experts => {
                self.gpu.upload(&self.router_dprobs, self.inputs.at.router_dprobs)
            }
            _ => {
                self.inputs.at.router_dprobs = 0;
                Ok(())
            }
        }
    }
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        format!("{} bfloat16", self.gpu.name)
    }

    fn packing(&self) -> Packing {
        self.plan.packing()
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
            self.participate(false)?;
            self.routed = 0.0;
            return Ok(AnswerLogProbs::default());
        }
        self.send(batch, keep)?;
        self.clear_load(batch)?;
        self.embed()?;
        self.stream(false, |layer| self.layer_forward(layer, keep))?;
        let (head, at) = (self.head(), self.inputs.at);
        self.head_forward(&head)?;
        self.log_probs(&head, keep)?;
        let mut results = vec![0.0_f32; at.answers * 2];
        self.gpu.download(at.results, &mut results)?;
        let log_sum_sq = results.split_off(at.answers);
        Ok(AnswerLogProbs::new(batch.answers.clone(), results, [log_sum_sq]))
    }

    fn backward(&mut self, batch: &Batch, dlogps: &[f32]) -> Result<()> {
        if batch.tokens() == 0 {
            return self.participate(true);
        }
        if dlogps.len() != self.inputs.at.answers {
            return Err(Error::run("the backward pass needs the batch of the forward pass before it"));
        }
        self.optimizer.forget_gradient();
        self.gpu.upload(dlogps, self.inputs.at.dlogps)?;
        self.send_dprobs()?;
        self.head_backward(&self.head())?;
        self.stream(true, |layer| self.layer_backward(layer))
    }

    fn router_load(&mut self) -> Result<RouterLoad> {
        let Some(AuxLoss { experts, .. }) = self.aux_loss.filter(|_| self.routed > 0.0) else {
            return Ok(RouterLoad::default());
        };
        let mut counts = vec![0.0_f64; 2 * experts];
        self.gpu.download(self.inputs.at.router_load, &mut counts)?;
        let probs = counts.split_off(experts);
        Ok(RouterLoad { tokens: self.routed, counts, probs })
    }

    fn set_router_dprobs(&mut self, dprobs: Vec<f64>) {
        self.router_dprobs = dprobs.into_iter().map(|dprob| dprob as f32).collect();
    }

    fn shares_base(&self) -> bool {
        self.weights.store.is_sharded()
    }

    fn clear_gradient(&mut self) -> Result<()> {
        self.optimizer.forget_gradient();
        self.gpu.zero(self.weights.gradients.address, self.weights.gradients.bytes)
    }

    fn sum_gradient(&mut self, group: &mut dyn ProcessGroup) -> Result<()> {
        if group.size() == 1 {
            return Ok(());
        }
        self.optimizer.collect(&self.gpu, &self.kernels)?;
        if let Some(nccl) = &self.nccl {
            nccl.sum(&self.gpu, self.optimizer.gradient.address, self.optimizer.count)?;
            return self.gpu.mark("all-reduce");
        }
        let mut gradient = self.gradient()?;
        group.all_reduce(&mut gradient)?;
        self.gpu.upload(&gradient, self.optimizer.gradient.address)
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        self.optimizer.collect(&self.gpu, &self.kernels)?;
        self.optimizer.norm(&self.gpu, &self.kernels)
    }

    fn update(&mut self, optimizer: &AdamW, clip: f64, learning_rate: f64) -> Result<bool> {
        self.optimizer.collect(&self.gpu, &self.kernels)?;
        let of = |ratio: f64| optimizer.rates(self.moments.steps + 1, learning_rate * ratio);
        let rates = [of(1.0), of(optimizer.loraplus_lr_ratio)];
        if !self.optimizer.step(&self.gpu, &self.kernels, rates, clip)? {
            return Ok(false);
        }
        self.moments.steps += 1;
        self.plain = false;
        self.spread()?;
        Ok(true)
    }

    fn fetch(&mut self) -> Result<()> {
        self.optimizer.fetch(&self.gpu, &mut self.adapter.params, &mut self.moments)
    }

    fn restore(&mut self, params: &[f32], moments: Moments) -> Result<()> {
        self.adapter.params.copy_from_slice(params);
        self.moments = moments;
        self.plain = self.adapter.changes_nothing();
        self.send_adapter()
    }

    fn memory_gib(&self) -> f64 {
        // Nothing is allocated after the start, so what is in use now is the most.
        self.gpu.memory().map_or(0.0, |(free, all)| (all - free) as f64 / (1_u64 << 30) as f64)
    }
}
