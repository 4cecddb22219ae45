//! The state space of Mamba 2: linear attention with queries C, keys B times the time step, values x.

use super::linear_attention::{Kind, LinearAttention, backward, forward};
use super::{BackwardReads, CudaOp, Lowering, count, number};
use dpo_core::error::Result;

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    ..CudaOp::new("ssd", |l, index| forward(l, index, of), |l, index| backward(l, index, of))
};

fn of(l: &mut Lowering<'_>, index: usize) -> Result<LinearAttention> {
    let node = &l.nodes[index];
    let most = if node.attrs.contains_key("dt_max") { number(node, "dt_max") as f32 } else { f32::INFINITY };
    Ok(LinearAttention {
        kind: Kind::of(node, ["state", "head_dim"], false)?,
        heads: count(node, "heads"),
        key_heads: count(node, "groups"),
        order: &[2, 1, 0, 3],
        eps: 0.0,
        limit: [number(node, "dt_min") as f32, most],
        vectors: [l.wide_vector(index, "A_log")?, l.wide_vector(index, "dt_bias")?, l.wide_vector(index, "D")?],
        state: 0,
    })
}
