//! The gated delta rule: linear attention that takes away what a key wrote before it writes.

use super::linear_attention::{Kind, LinearAttention, backward, forward};
use super::{BackwardReads, CudaOp, Lowering, count, number};
use dpo_core::error::Result;

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    ..CudaOp::new("gated_delta", |l, index| forward(l, index, of), |l, index| backward(l, index, of))
};

fn of(l: &mut Lowering<'_>, index: usize) -> Result<LinearAttention> {
    let node = &l.nodes[index];
    Ok(LinearAttention {
        kind: Kind::of(node, ["key_dim", "value_dim"], true)?,
        heads: count(node, "heads"),
        key_heads: count(node, "key_heads"),
        order: &[0, 1, 2, 3, 4],
        eps: number(node, "eps") as f32,
        limit: [0.0, f32::INFINITY],
        vectors: [l.wide_vector(index, "A_log")?, l.wide_vector(index, "dt_bias")?, None],
        state: 0,
    })
}
