//! The end of the head: from products with the projection to logits, log-probs, and the gradient by the products. Not a step of a program: the projection is
//! walked in chunks of rows, and its gradient waits for the loss.

use super::{Address, Args, CudaOp, Launch, Source, View, multiple_of_8, number};
use dpo_core::error::{Error, Result};
use dpo_plugin_api::graph::Node;

pub(super) static SOURCE: Source =
    Source::plain("lm_head", include_str!("lm_head.cu"), &["log_prob", "to_logits", "scale_rows"]);

pub(super) const OP: CudaOp = CudaOp::new(
    "lm_head",
    |_, _| Err(Error::input("'lm_head' is not at the head's end")),
    |_, _| Err(Error::input("'lm_head' is not at the head's end")),
);

/// The projection as it lies on the GPU: zeros fill its rows up to a multiple of 8, and so a row of products with it.
#[derive(Clone, Copy, Default)]
pub(crate) struct LmHead {
    /// Columns of a hidden state.
    pub inputs: usize,
    pub vocab: usize,
    /// Rows of the matrix.
    pub rows: usize,
    pub bias: bool,
    /// 0 is none.
    softcap: f32,
}

impl LmHead {
    /// That of the head's last node.
    pub(crate) fn of(node: &Node) -> Result<LmHead> {
        let Some([vocab, inputs]) = node.weight("weight").map(|w| w.shape.as_slice()) else {
            return Err(Error::run("a projection without its matrix"));
        };
        let inputs = multiple_of_8(node, "hidden states of", *inputs)?;
        let (bias, softcap) = (node.weight("bias").is_some(), number(node, "softcap") as f32);
        Ok(LmHead { inputs, vocab: *vocab, rows: vocab.next_multiple_of(8), bias, softcap })
    }

    /// Of `count` rows of products, those of the answer row `first` and on, log-probs of their targets and `ln Σ p²` to the batch's
    /// results. With `grad`, the products become their gradient in bf16.
    pub(crate) fn log_probs(
        &self,
        on: &Launch<'_>,
        (products, bias): (Address, Address),
        first: usize,
        count: usize,
        grad: bool,
    ) -> Result<()> {
        let after = |base: Address| base + (first * 4) as u64;
        let at = on.batch;
        let args = Args::default().with(products).with(after(at.targets)).with(after(at.results));
        let args =
            args.with(after(at.results + (at.answers * 4) as u64)).with(self.vocab as i32).with(self.rows as i32);
        let args = args.with(bias).with(self.softcap).with(i32::from(grad));
        on.gpu.launch(on.kernels.get("log_prob")?, [count, 1, 1], [512, 1, 1], 0, args)
    }

    /// A row of products becomes logits.
    pub(crate) fn to_logits(self, on: &Launch<'_>, products: Address, bias: Address) -> Result<()> {
        if !self.bias && self.softcap == 0.0 {
            return Ok(());
        }
        let args = Args::default().with(products).with(self.vocab as i32).with(bias).with(self.softcap);
        on.gpu.launch(on.kernels.get("to_logits")?, [self.vocab.div_ceil(256), 1, 1], [256, 1, 1], 0, args)
    }

    /// Logits of products in f32.
    #[cfg(test)]
    pub(crate) fn bend(&self, products: &mut [f32], bias: Option<&[f32]>) {
        for (i, z) in products.iter_mut().enumerate() {
            *z += bias.map_or(0.0, |b| b[i]);
            if self.softcap > 0.0 {
                *z = self.softcap * (*z / self.softcap).tanh();
            }
        }
    }

    /// The derivative of a logit by its product.
    #[cfg(test)]
    pub(crate) fn slope(&self, logit: f32) -> f32 {
        if self.softcap > 0.0 { 1.0 - (logit / self.softcap).powi(2) } else { 1.0 }
    }
}

/// Rows of `d logp / d hidden` times `d loss / d logp`, in place.
pub(crate) fn scale_rows(on: &Launch<'_>, width: usize, x: View) -> Result<()> {
    let args = Args::default().with(x).with(on.batch.dlogps).with(on.rows as i32).with(width as i32);
    on.by_columns("scale_rows", on.rows, width, args)
}
