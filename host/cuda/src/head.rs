//! The head on the GPU: rows that predict, logits in chunks of rows, log-probs and their gradient.

use super::engine::{CudaDevice, Pass};
use super::gpu::{Pinned, View};
use super::inputs::Rows;
use super::launch::KvCache;
use super::matmul::{Matmul, Operands};
use super::ops::lm_head::{self, LmHead};
use super::program::{GRADIENT, OUTPUT, Slice};
use super::sum::copy_rows;
use dpo_core::batch::Batch;
use dpo_core::error::Result;
use rayon::prelude::*;

impl CudaDevice {
    /// The head's program for the batch's answer tokens.
    pub(super) fn head(&self) -> Pass<'_> {
        let places = self.arrangement.head_places(&self.lowered);
        let launch = self.launch(&self.weights.head, Rows::Predictors, false);
        self.whole(&self.lowered.head, places, launch)
    }

    fn of_head(&self, head: &Pass<'_>, buffer: usize) -> View {
        head.view(Slice::whole(buffer, self.lowered.projection.inputs), 0)
    }

    /// The head up to its projection.
    pub(super) fn head_forward(&self, head: &Pass<'_>) -> Result<()> {
        head.run(&self.lowered.head.forward)
    }

    /// The head's backward pass, from the gradient of its output as [`log_probs`](Self::log_probs) left it, and the loss's by
    /// log-probs, to that of the last layer's output.
    pub(super) fn head_backward(&self, head: &Pass<'_>) -> Result<()> {
        let gradient = self.of_head(head, GRADIENT);
        lm_head::scale_rows(&head.launch, self.lowered.projection.inputs, gradient)?;
        head.run(&self.lowered.head_schedule.steps)?;
        copy_rows(&head.launch, self.graph.hidden_size, gradient, self.gradient_edge())?;
        self.gpu.mark("head vjp")
    }

    /// Products with the projection of the rows `[first, first + count)` that predict, in f32 where the arrangement has logits.
    pub(super) fn products(&self, head: &Pass<'_>, first: usize, count: usize) -> Result<View> {
        let LmHead { inputs, rows, .. } = self.lowered.projection;
        let a = self.of_head(head, OUTPUT).row(first);
        let b = View { at: self.weights.projection, ld: inputs as i64 };
        let d = View { at: self.values.address + self.arrangement.logits as u64, ld: rows as i64 };
        let mut matmul = Matmul::new(count, rows, inputs);
        (matmul.b_transposed, matmul.wide) = (true, true);
        head.launch.matmul(matmul, Operands { a, b, c: d, d, bias: 0 })?;
        self.gpu.mark("logits")?;
        Ok(d)
    }

    /// Log-probs of the batch's answer tokens from the head's output, in chunks of rows; with `grad`, leaves their gradient where
    /// that of the head's output lies.
    pub(super) fn log_probs(&self, head: &Pass<'_>, grad: bool) -> Result<()> {
        let (own, answers) = (self.lowered.projection, self.inputs.at.answers);
        let table = View { at: self.weights.projection, ld: own.inputs as i64 };
        for first in (0..answers).step_by(self.arrangement.logits_rows) {
            let count = self.arrangement.logits_rows.min(answers - first);
            let products = self.products(head, first, count)?;
            own.log_probs(&head.launch, (products.at, self.weights.projection_bias), first, count, grad)?;
            self.gpu.mark("log-probs")?;
            if grad {
                let dproducts = View { at: products.at, ld: 2 * products.ld };
                let d = self.of_head(head, GRADIENT).row(first);
                let matmul = Matmul::new(count, own.inputs, own.rows);
                head.launch.matmul(matmul, Operands { a: dproducts, b: table, c: d, d, bias: 0 })?;
                self.gpu.mark("logits vjp")?;
            }
        }
        Ok(())
    }

    /// For each row that predicts of a batch that continues sequences, the logits of the next token, `[vocab]`; `cache` has every layer's
    /// keys and values. They come by way of `staged`, which has room for them: copies to pinned memory are direct.
    pub(super) fn continue_sequences(
        &mut self,
        staged: &mut Pinned,
        batch: &Batch,
        cache: impl Fn(usize) -> KvCache,
        adapted: bool,
    ) -> Result<Vec<Vec<f32>>> {
        self.send(batch, false)?;
        self.embed()?;
        self.stream(false, |layer| self.layer_after(layer, cache(layer), adapted))?;
        let head = self.head();
        self.head_forward(&head)?;
        let (rows, LmHead { rows: columns, vocab, .. }) = (batch.targets.len(), self.lowered.projection);
        let mut logits = Vec::with_capacity(rows);
        for first in (0..rows).step_by(self.arrangement.logits_rows) {
            let count = self.arrangement.logits_rows.min(rows - first);
            let view = self.products(&head, first, count)?;
            for row in 0..count {
                let at = view.at + (row * columns * 4) as u64;
                self.lowered.projection.to_logits(&head.launch, at, self.weights.projection_bias)?;
            }
            let bytes = &mut staged.bytes_mut()[..count * columns * 4];
            self.gpu.download(view.at, bytes)?;
            let number = |b: &[u8]| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]);
            let of_row = |row: &[u8]| row[..vocab * 4].chunks_exact(4).map(number).collect();
            logits.par_extend(bytes.par_chunks_exact(columns * 4).map(of_row));
        }
        Ok(logits)
    }
}
