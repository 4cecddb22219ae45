//! The ops a graph may name: one table, one file an op with its forward, its vector-Jacobian product (VJP) and its rules.
//!
//! The forward functions here are the CPU's, written on candle tensors so that the same code runs in f32 for training and
//! in f64 for the gradient tests. candle's autograd is not used: it would keep gradients of frozen weights, and its fused
//! ops silently stop gradients.

mod activation;
mod add;
pub mod answer_mask;
pub mod attention;
mod cat;
mod embedding;
mod glu;
mod kv_cache;
mod layer_norm;
mod linear;
pub mod lm_head;
mod narrow;
mod product;
mod rms_norm;
mod rope;
mod scale;
mod xielu;

use candle_core::Tensor;
use dpo_plugin_api::graph::Node;
use serde_json::Value;

use crate::batch::Layout;
use crate::error::{Error, Result};

pub use kv_cache::KvCache;
pub use product::product;

/// An op: its contract with plugins, and its arithmetic.
pub struct Op {
    /// What graphs call it.
    pub name: &'static str,
    /// What it computes, for `dpo-host list ops`.
    pub formula: &'static str,
    /// How many values it reads.
    pub inputs: usize,
    /// Weights by role, and whether it can do without.
    pub weights: &'static [(&'static str, Presence)],
    /// Attributes.
    pub attrs: &'static [Attr],
    /// Checks widths and weight shapes of a node; `widths` are those of its inputs. The error says what does not fit.
    pub check: fn(&Node, &[usize]) -> std::result::Result<(), String>,
    /// Whether a row of its value depends on where the row lies: on its position, or on other rows. Such an op runs only in
    /// layers: the embedding may be computed for some rows alone, and the head is, for those that predict an answer token.
    pub reads_layout: bool,
    /// Inputs of which it also reads the rows of the tokens before, where a text is continued.
    pub cached_inputs: &'static [usize],
    /// How it runs.
    pub kernel: Kernel,
}

/// How an op runs on the CPU.
pub enum Kernel {
    /// From values `[tokens, width]` to a value.
    Value {
        /// The value.
        forward: fn(&Call<'_>) -> Result<Tensor>,
        /// Gradients of the inputs from that of the value.
        vjp: fn(&Call<'_>, &Tensor) -> Result<Gradients>,
    },
    /// The end of the head: log-probs instead of logits, by [`lm_head::log_probs`].
    LogProb,
}

/// Whether something may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// A node without it is refused.
    Required,
    /// A node may leave it out.
    Optional,
}

/// An attribute of an op.
pub struct Attr {
    /// Its name.
    pub name: &'static str,
    /// Its kind of value.
    pub kind: AttrKind,
    /// Whether it may be left out.
    pub presence: Presence,
}

/// The kind of an attribute's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttrKind {
    /// A whole number above 0.
    Count,
    /// A whole number.
    Index,
    /// A finite number.
    Number,
    /// Finite numbers.
    Numbers,
    /// One of these texts.
    OneOf(&'static [&'static str]),
}

/// Everything an op reads when it runs.
pub struct Call<'a> {
    /// Its node.
    pub node: &'a Node,
    /// Values it reads, `[tokens, width]`.
    pub inputs: Vec<&'a Tensor>,
    /// Its weights, in the node's order.
    pub weights: &'a [Tensor],
    /// The low-rank update of its weight.
    pub lora: Option<&'a Lora>,
    /// Which token is where.
    pub layout: &'a Layout,
}

/// A low-rank update: `W + scale · B · A` (Hu et al. 2021, eq. 3).
#[derive(Clone, Debug)]
pub struct Lora {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// `alpha / rank`, or `alpha / sqrt(rank)`.
    pub scale: f64,
}

/// What a VJP returns.
pub struct Gradients {
    /// Of each input; `None` for one that takes none.
    pub inputs: Vec<Option<Tensor>>,
    /// Of the low-rank update: by A and by B.
    pub lora: Option<[Tensor; 2]>,
}

impl Gradients {
    fn of(inputs: Vec<Tensor>) -> Gradients {
        Gradients { inputs: inputs.into_iter().map(Some).collect(), lora: None }
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
    activation::OP,
    xielu::OP,
    add::OP,
    scale::OP,
    narrow::OP,
    cat::OP,
    lm_head::OP,
];

/// The op of a name.
pub fn find(name: &str) -> Result<&'static Op> {
    OPS.iter().find(|o| o.name == name).ok_or_else(|| Error::unknown("op", name, OPS.iter().map(|o| o.name)))
}

/// Checks a node against its op: inputs, weights, attributes, widths.
pub fn check_node(node: &Node, widths: &[usize]) -> Result<()> {
    let op = find(&node.op)?;
    let wrong = |what: String| Err(Error::input(format!("op '{}': {what}", op.name)));
    if node.inputs.len() != op.inputs {
        return wrong(format!("{} inputs, needs {}", node.inputs.len(), op.inputs));
    }
    for (name, value) in &node.attrs {
        match op.attrs.iter().find(|a| a.name == name) {
            None => return wrong(format!("unknown attribute '{name}'")),
            Some(attr) if !attr.kind.holds(value) => {
                return wrong(format!("attribute '{name}' should be {}, is {value}", attr.kind.describe()));
            }
            Some(_) => {}
        }
    }
    if let Some(attr) = op.attrs.iter().find(|a| a.presence == Presence::Required && !node.attrs.contains_key(a.name)) {
        return wrong(format!("attribute '{}' is missing", attr.name));
    }
    for weight in &node.weights {
        if !op.weights.iter().any(|(role, _)| *role == weight.role) {
            return wrong(format!("unknown weight role '{}'", weight.role));
        }
    }
    for (role, presence) in op.weights {
        let count = node.weights.iter().filter(|w| w.role == *role).count();
        if count > 1 || (count == 0 && *presence == Presence::Required) {
            return wrong(format!("{count} weights of role '{role}'"));
        }
    }
    (op.check)(node, widths).or_else(wrong)
}

impl AttrKind {
    fn holds(self, value: &Value) -> bool {
        match self {
            AttrKind::Count => value.as_u64().is_some_and(|n| n > 0),
            AttrKind::Index => value.as_u64().is_some(),
            AttrKind::Number => value.as_f64().is_some_and(f64::is_finite),
            AttrKind::Numbers => {
                value.as_array().is_some_and(|l| l.iter().all(|v| v.as_f64().is_some_and(f64::is_finite)))
            }
            AttrKind::OneOf(texts) => value.as_str().is_some_and(|t| texts.contains(&t)),
        }
    }

    fn describe(self) -> String {
        match self {
            AttrKind::Count => "a whole number above 0".into(),
            AttrKind::Index => "a whole number".into(),
            AttrKind::Number => "a finite number".into(),
            AttrKind::Numbers => "a list of finite numbers".into(),
            AttrKind::OneOf(texts) => format!("one of {}", texts.join(", ")),
        }
    }
}

/// A whole-number attribute of a checked node; 0 where it is left out.
pub fn count(node: &Node, name: &str) -> usize {
    node.attrs.get(name).and_then(Value::as_u64).unwrap_or(0) as usize
}

/// A number attribute of a checked node.
pub fn number(node: &Node, name: &str) -> f64 {
    node.attrs.get(name).and_then(Value::as_f64).unwrap_or(0.0)
}

/// The weight of a role, of a call whose node was checked.
fn weight<'a>(call: &'a Call<'_>, role: &str) -> Option<&'a Tensor> {
    call.node.weights.iter().position(|w| w.role == role).and_then(|at| call.weights.get(at))
}

/// The weight of role `weight`.
fn main_weight<'a>(call: &'a Call<'_>) -> Result<&'a Tensor> {
    weight(call, "weight").ok_or_else(|| Error::run(format!("op '{}' runs without its weight", call.node.op)))
}

/// Columns of a run that a norm is taken over: as many as its weight has, as `run` says, or all.
pub fn run(node: &Node) -> usize {
    let of_weight = node.weight("weight").and_then(|w| w.shape.last().copied());
    of_weight.unwrap_or_else(|| node.attrs.get("run").map_or(node.width, |_| count(node, "run")))
}

/// A norm's rows times its factor, `offset + weight`; rows without a weight as they are.
fn factor(call: &Call<'_>, rows: Tensor) -> Result<Tensor> {
    let Some(weight) = weight(call, "weight") else { return Ok(rows) };
    let offset = number(call.node, "offset");
    Ok(if offset == 0.0 { rows.broadcast_mul(weight)? } else { rows.broadcast_mul(&(weight + offset)?)? })
}

/// Checks the shape of the weight of a role, where the node has it.
fn weight_shape(node: &Node, role: &str, shape: &[usize]) -> std::result::Result<(), String> {
    match node.weights.iter().find(|w| w.role == role) {
        Some(w) if w.shape != shape => Err(format!("{role} '{}' is {:?}, needs {shape:?}", w.tensor, w.shape)),
        _ => Ok(()),
    }
}

/// Checks that a width is what it has to be.
fn same(what: &str, is: usize, needs: usize) -> std::result::Result<(), String> {
    if is == needs { Ok(()) } else { Err(format!("{what} has {is} columns, needs {needs}")) }
}
