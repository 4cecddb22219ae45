//! The end of the head: from logits to log-probs, and to the gradient by the logits. Not a step of a program: the projection is
//! walked in chunks of rows, and its gradient waits for the loss.

use super::{Address, Args, CudaOp, Launch, Source, View};
use crate::error::{Error, Result};

pub(super) static SOURCE: Source = Source::plain("lm_head", include_str!("lm_head.cu"), &["log_prob", "scale_rows"]);

pub(super) const OP: CudaOp = CudaOp::new(
    "lm_head",
    |_, _| Err(Error::input("'lm_head' is not at the head's end")),
    |_, _| Err(Error::input("'lm_head' is not at the head's end")),
);

/// Of rows of f32 logits `[rows, vocab]` from the answer row `first` on, log-probs of their targets and `ln Σ p²` to the batch's
/// results. With `grad`, the logits become their gradient in bf16.
pub(crate) fn log_probs(
    on: &Launch<'_>,
    logits: Address,
    vocab: usize,
    first: usize,
    rows: usize,
    grad: bool,
) -> Result<()> {
    let after = |base: Address| base + (first * 4) as u64;
    let at = on.batch;
    let args = Args::default().with(logits).with(after(at.targets)).with(after(at.results));
    let args = args.with(after(at.results + (at.answers * 4) as u64)).with(vocab as i32).with(i32::from(grad));
    on.gpu.launch(on.kernels.get("log_prob")?, [rows, 1, 1], [512, 1, 1], 0, args)
}

/// Rows of `d logp / d hidden` times `d loss / d logp`, in place.
pub(crate) fn scale_rows(on: &Launch<'_>, width: usize, x: View) -> Result<()> {
    let args = Args::default().with(x).with(on.batch.dlogps).with(on.rows as i32).with(width as i32);
    on.by_columns("scale_rows", on.rows, width, args)
}
