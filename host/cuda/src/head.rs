//! The head on the GPU: rows that predict, logits in chunks of rows, log-probs and their gradient.

use super::blas::{Matmul, Operands};
use super::engine::{CudaDevice, Pass};
use super::gpu::View;
use super::launch::KvCache;
use super::ops::{embedding, lm_head};
use super::program::{GRADIENT, INPUT, OUTPUT, Slice};
use dpo_core::batch::{Batch, Layout};
use dpo_core::error::Result;

impl CudaDevice {
    /// The head's program for the batch's answer tokens.
    pub(super) fn head(&self) -> Pass<'_> {
        let places = self.addresses(self.arrangement.head_places(&self.lowered));
        let launch = self.launch(&self.weights.head, self.inputs.at.answers, false);
        Pass { program: &self.lowered.head, places, launch }
    }

    fn of_head(&self, head: &Pass<'_>, buffer: usize) -> View {
        head.view(Slice::whole(buffer, self.graph.hidden_size))
    }

    /// The head up to its projection, for the rows that predict.
    pub(super) fn head_forward(&self, head: &Pass<'_>) -> Result<()> {
        let (last, input) = (self.edge(self.graph.layers.len()), self.of_head(head, INPUT));
        embedding::gather_rows(&head.launch, self.graph.hidden_size, last, input)?;
        head.run(&self.lowered.head.forward)
    }

    /// The head's backward pass, from the gradient of its output as [`log_probs`](Self::log_probs) left it, and the loss's by
    /// log-probs, to that of the last layer's output.
    pub(super) fn head_backward(&self, head: &Pass<'_>) -> Result<()> {
        let (hidden, gradient) = (self.graph.hidden_size, self.of_head(head, GRADIENT));
        lm_head::scale_rows(&head.launch, hidden, gradient)?;
        head.run(&self.lowered.head_schedule.steps)?;
        let to = View { at: self.values.address + self.arrangement.gradient as u64, ld: self.edge(0).ld };
        embedding::scatter_rows(&head.launch, hidden, gradient, to)?;
        self.gpu.mark("head vjp")
    }

    /// Logits of the rows `[first, first + rows)` that predict, in f32 where the arrangement has them.
    pub(super) fn logits(&self, head: &Pass<'_>, first: usize, rows: usize) -> Result<View> {
        let (hidden, vocab) = (self.graph.hidden_size, self.graph.vocab_size);
        let a = self.of_head(head, OUTPUT).row(first);
        let b = View { at: self.weights.projection, ld: hidden as i64 };
        let d = View { at: self.values.address + self.arrangement.logits as u64, ld: vocab as i64 };
        let mut matmul = Matmul::new(rows, vocab, hidden);
        (matmul.b_transposed, matmul.wide) = (true, true);
        self.blas.run(&self.gpu, matmul, Operands { a, b, c: d, d, bias: 0 })?;
        self.gpu.mark("logits")?;
        Ok(d)
    }

    /// Log-probs of the batch's answer tokens from the head's output, in chunks of rows; with `grad`, leaves their gradient where
    /// that of the head's output lies.
    pub(super) fn log_probs(&self, head: &Pass<'_>, grad: bool) -> Result<()> {
        let (hidden, vocab, answers) = (self.graph.hidden_size, self.graph.vocab_size, self.inputs.at.answers);
        let table = View { at: self.weights.projection, ld: hidden as i64 };
        for first in (0..answers).step_by(self.arrangement.logits_rows) {
            let rows = self.arrangement.logits_rows.min(answers - first);
            let logits = self.logits(head, first, rows)?;
            lm_head::log_probs(&head.launch, logits.at, vocab, first, rows, grad)?;
            self.gpu.mark("log-probs")?;
            if grad {
                let dlogits = View { at: logits.at, ld: 2 * vocab as i64 };
                let d = self.of_head(head, GRADIENT).row(first);
                let matmul = Matmul::new(rows, hidden, vocab);
                self.blas.run(&self.gpu, matmul, Operands { a: dlogits, b: table, c: d, d, bias: 0 })?;
                self.gpu.mark("logits vjp")?;
            }
        }
        Ok(())
    }

    /// Logits of the token after `ids`, `[vocab]`, which continue a text of `cached` tokens; `cache` has every layer's keys and
    /// values.
    pub(super) fn continue_text(
        &mut self,
        ids: &[u32],
        cached: usize,
        cache: impl Fn(usize) -> [View; 2],
        adapted: bool,
    ) -> Result<Vec<f32>> {
        let last = ids.len().saturating_sub(1) as u32;
        let layout = Layout::after(cached, ids.len());
        let batch = Batch { ids: ids.to_vec(), layout, predictors: vec![last], targets: vec![0], ..Batch::default() };
        self.send(&batch, false)?;
        self.embed()?;
        for layer in 0..self.graph.layers.len() {
            let [keys, values] = cache(layer);
            self.layer_after(layer, KvCache { tokens: cached, keys, values }, adapted)?;
        }
        let head = self.head();
        self.head_forward(&head)?;
        let view = self.logits(&head, 0, 1)?;
        let mut logits = vec![0.0; self.graph.vocab_size];
        self.gpu.download(view.at, &mut logits)?;
        Ok(logits)
    }
}
