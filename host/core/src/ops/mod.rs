//! The ops a graph may name: one table, one file an op with its forward and its vector-Jacobian product (VJP).
//!
//! The forward functions here are the CPU's, written on candle tensors so that the same code runs in f32 for training and
//! in f64 for the gradient tests. candle's autograd is not used: it would keep gradients of frozen weights, and its fused
//! ops silently stop gradients.

mod activation;
mod add;
pub mod answer_mask;
pub mod attention;
mod cat;
mod causal_conv;
mod embedding;
mod expand;
pub mod experts;
mod gated_delta;
mod gather;
mod glu;
mod kv_cache;
mod layer_norm;
mod linear;
mod linear_attention;
pub mod lm_head;
mod narrow;
mod product;
mod real;
pub mod recurrence;
mod rms_norm;
mod rope;
mod route;
mod rows;
mod scale;
mod ssd;
mod xielu;

use std::sync::OnceLock;

use candle_core::Tensor;
use dpo_plugin_api::graph::Node;

use crate::batch::Layout;
use crate::error::{Error, Result};

pub use add::add;
pub use dpo_plugin_api::ops::{count, flag, number, run};
pub use gather::GATHER;
pub use kv_cache::KvCache;
pub use linear::row_norms;
pub use product::product;
pub use route::count_load;

/// How an op is computed. What graphs may say of it is its schema, [`dpo_plugin_api::ops`].
pub struct Op {
    /// What graphs call it.
    pub name: &'static str,
    /// Inputs of which it also reads the rows of the tokens before, where a text is continued.
    pub cached_inputs: &'static [usize],
    /// How it runs.
    pub kernel: Kernel,
}

/// A value, and the state of a recurrence behind the tokens that it is of.
pub type ValueAndState = (Tensor, Tensor);

/// How an op runs on the CPU.
pub enum Kernel {
    /// From values `[tokens, width]` to a value.
    Value {
        /// The value.
        forward: fn(&Call<'_>) -> Result<Tensor>,
        /// Gradients of the inputs from that of the value.
        vjp: fn(&Call<'_>, &Tensor) -> Result<Gradients>,
    },
    /// From values `[tokens, width]` to a value, with a state that runs through a text.
    Recurrence {
        /// The value, where a text is continued from the state behind the tokens before, and the state behind these.
        forward: fn(&Call<'_>, Option<&Tensor>) -> Result<ValueAndState>,
        /// Gradients of the inputs from that of the value.
        vjp: fn(&Call<'_>, &Tensor) -> Result<Gradients>,
    },
    /// The end of the head: log-probs instead of logits, by [`lm_head::log_probs`].
    LogProb,
}

impl Kernel {
    /// The value of a whole text.
    ///
    /// # Errors
    /// An op that has no value.
    pub fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        match self {
            Kernel::Value { forward, .. } => forward(call),
            Kernel::Recurrence { forward, .. } => Ok(forward(call, None)?.0),
            Kernel::LogProb => Err(misplaced_head()),
        }
    }

    /// Gradients of the inputs from that of the value.
    ///
    /// # Errors
    /// An op that has no value.
    pub fn vjp(&self, call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
        match self {
            Kernel::Value { vjp, .. } | Kernel::Recurrence { vjp, .. } => vjp(call, dy),
            Kernel::LogProb => Err(misplaced_head()),
        }
    }
}

fn misplaced_head() -> Error {
    Error::run("lm_head runs outside of the head")
}

/// Everything an op reads when it runs.
pub struct Call<'a> {
    /// Its node.
    pub node: &'a Node,
    /// Values it reads, `[tokens, width]`.
    pub inputs: Vec<&'a Tensor>,
    /// Its weights, in the node's order.
    pub weights: &'a [Tensor],
    /// The low-rank updates of its weights.
    pub loras: &'a [Lora],
    /// Which token is where.
    pub layout: &'a Layout,
    /// Whether a VJP has to give gradients of the inputs: not where nothing trainable lies before them.
    pub input_gradients: bool,
    /// Of every expert the derivative of the auxiliary loss by the probability that a token gives it; none where it is not computed.
    pub router_dprobs: &'a [f64],
}

/// A low-rank update: `W + scale · B · A` (Hu et al. 2021, eq. 3).
#[derive(Clone, Debug)]
pub struct Lora {
    /// Which of the node's weights it is of.
    pub weight: usize,
    /// `[rank, in]`; of experts one below the other.
    pub a: Tensor,
    /// `[out, rank]`; of experts one below the other.
    pub b: Tensor,
    /// `alpha / rank`, or `alpha / sqrt(rank)`.
    pub scale: f64,
    /// A and B of the start, whose product is taken off again (PiSSA, OLoRA).
    pub subtracted: Option<[Tensor; 2]>,
    /// The lengths that rows of the sum have, `[out]` (DoRA, Liu et al. 2024, eq. 5).
    pub magnitude: Option<Tensor>,
    /// Which of the numbers that A reads are zero.
    pub dropout: Option<Dropout>,
    /// Lengths of the rows of `W + scale · B · A`, `[out]`, once they are known.
    norms: OnceLock<Tensor>,
}

/// Numbers that are zero with a probability, the others as much larger (Srivastava et al. 2014). Which they are follows from a key, the
/// text up to a token, and the column: not from what else is in a batch, nor from the rank that computes it.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// The probability.
    pub p: f64,
    /// Of the run, its step and the linear.
    pub key: u64,
}

impl Lora {
    /// A plain one.
    pub fn new(a: Tensor, b: Tensor, scale: f64) -> Lora {
        Lora { weight: 0, a, b, scale, subtracted: None, magnitude: None, dropout: None, norms: OnceLock::new() }
    }
}

/// What a VJP returns.
pub struct Gradients {
    /// Of each input; `None` for one that takes none.
    pub inputs: Vec<Option<Tensor>>,
    /// Of every low-rank update of the call: by A, by B, and by the magnitude vector where it has one.
    pub loras: Vec<Vec<Tensor>>,
}

impl Gradients {
    fn of(inputs: Vec<Tensor>) -> Gradients {
        Gradients { inputs: inputs.into_iter().map(Some).collect(), loras: Vec::new() }
    }
}

/// All ops.
pub const OPS: &[Op] = &[
    embedding::OP,
    linear::OP,
    rms_norm::OP,
    layer_norm::OP,
    rope::OP,
    attention::OP,
    glu::OP,
    route::OP,
    experts::OP,
    activation::OP,
    xielu::OP,
    add::OP,
    scale::OP,
    narrow::OP,
    cat::OP,
    causal_conv::OP,
    gated_delta::OP,
    ssd::OP,
    expand::OP,
    lm_head::OP,
];

/// Ops that no graph names: the host adds them.
pub const INTERNAL: &[Op] = &[gather::OP];

/// The op of a name.
pub fn find(name: &str) -> Result<&'static Op> {
    OPS.iter()
        .chain(INTERNAL)
        .find(|o| o.name == name)
        .ok_or_else(|| Error::unknown("op", name, OPS.iter().map(|o| o.name)))
}

/// The weight of a role, of a call whose node was checked.
fn weight<'a>(call: &'a Call<'_>, role: &str) -> Option<&'a Tensor> {
    call.node.weights.iter().position(|w| w.role == role).and_then(|at| call.weights.get(at))
}

/// The low-rank update of the weight of a role.
fn lora<'a>(call: &'a Call<'_>, role: &str) -> Option<&'a Lora> {
    let at = call.node.weights.iter().position(|w| w.role == role)?;
    call.loras.iter().find(|lora| lora.weight == at)
}

/// The weight of role `weight`.
fn main_weight<'a>(call: &'a Call<'_>) -> Result<&'a Tensor> {
    weight(call, "weight").ok_or_else(|| Error::run(format!("op '{}' runs without its weight", call.node.op)))
}

/// A norm's rows times its factor, `offset + weight`; rows without a weight as they are.
fn factor(call: &Call<'_>, rows: Tensor) -> Result<Tensor> {
    let Some(weight) = weight(call, "weight") else { return Ok(rows) };
    let offset = number(call.node, "offset");
    Ok(if offset == 0.0 { rows.broadcast_mul(weight)? } else { rows.broadcast_mul(&(weight + offset)?)? })
}

#[cfg(test)]
mod tests {
    use super::OPS;

    #[test]
    fn every_op_that_graphs_may_name_is_computed() {
        let schemas = dpo_plugin_api::ops::OPS.iter().map(|schema| schema.name);
        assert!(schemas.eq(OPS.iter().map(|op| op.name)));
    }
}
