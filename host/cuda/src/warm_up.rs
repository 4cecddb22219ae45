//! Before the first step: every matmul once in every class of sizes, so that the fastest algorithms are known and nothing is loaded
//! within a step.

use super::engine::CudaDevice;
use super::matmul::{self, class_of};
use super::optimizer::random;
use dpo_core::batch::{Batch, Layout};
use dpo_core::decoder::CHUNK;
use dpo_core::device::Device;
use dpo_core::error::Result;
use dpo_core::example::Example;

impl CudaDevice {
    /// For training and scoring. Leaves the gradient zero.
    pub fn warm_up(&mut self) -> Result<()> {
        let rows = self.values.bytes / 8192;
        random(&self.gpu, &self.kernels, self.values.address, (rows, 4096, 4096), 0.5, 1)?;
        let most = self.plan.micro_batch_tokens;
        let classes = std::iter::successors(Some(class_of(1)), |class| Some(class_of(class + 1)));
        for class in classes.take_while(|class| *class < class_of(most)).chain([most]) {
            self.send(&self.filler(class)?, true)?;
            self.matmuls.tune(|| self.once(true))?;
            // The next batch is staged where this one was sent from.
            self.gpu.finish()?;
        }
        // Scoring fills its micro-batches, so that one class is enough.
        self.send(&self.filler(self.plan.scoring_tokens)?, false)?;
        self.matmuls.tune(|| self.once(false))?;
        self.clear_gradient()?;
        self.gpu.finish()
    }

    /// For continuing sequences: one by as many tokens as are taken in at once, or at most so many by one each.
    pub(super) fn warm_up_for_sequences(&mut self, sequences: usize) -> Result<()> {
        let prompt = self.filler(CHUNK)?;
        let step = |count: usize| {
            let layout = Layout::beside(&vec![Layout::after(0, 1); count]);
            Batch { ids: vec![0; count], layout, targets: vec![0; count], ..Batch::default() }
        };
        let steps = matmul::skinny_classes(sequences).map(|count| (step(count), count));
        for (batch, rows) in [(prompt, 1)].into_iter().chain(steps) {
            self.send(&batch, false)?;
            self.matmuls.tune(|| {
                self.once(false)?;
                let head = self.head();
                self.head_forward(&head)?;
                self.products(&head, 0, rows.min(self.arrangement.logits_rows)).map(|_| ())
            })?;
            self.gpu.finish()?;
        }
        Ok(())
    }

    /// A batch of one pair with as many answer tokens as planned.
    fn filler(&self, tokens: usize) -> Result<Batch> {
        let answer = ((tokens as f64 * self.plan.answers / 2.0) as usize).clamp(1, tokens.div_ceil(2));
        let ids = |n: usize| vec![0; n];
        let prompt = ids(tokens + 2 - 2 * answer);
        Ok(Batch::of(&[Example::pair(prompt, ids(answer), ids(answer), "")?]))
    }

    /// The first layer of every kind of block, and the head; with `save`, both passes. Whatever lies in a layer's place will do.
    fn once(&self, save: bool) -> Result<()> {
        for kind in 0..self.graph.blocks.len() {
            let Some(layer) = self.graph.layers.iter().position(|l| l.block == kind) else { continue };
            self.layer_forward(layer, save)?;
            if save {
                self.layer_backward(layer)?;
            }
        }
        if !save {
            return Ok(());
        }
        let head = self.head();
        head.run(&self.lowered.head.forward)?;
        self.log_probs(&head, true)?;
        head.run(&self.lowered.head_schedule.steps)
    }
}
