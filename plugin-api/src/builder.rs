//! Typed construction of a [`ModelGraph`].
//!
//! The builder lives in the plugin and calls nothing of the host. It keeps the first mistake (such as two widths that do
//! not fit) and returns it from [`GraphBuilder::finish`], so that a family reads as a list of its ops.

mod attention;
mod columns;
mod experts;
mod recurrent;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::graph::{Assembly, Block, Layer, ModelGraph, Node, Weight};
use crate::model::Config;
use crate::rope::Rope;
use crate::{Error, Result};

pub use attention::Attention;
pub use experts::{Experts, GroupScore, Groups, Router, Scoring};
pub use recurrent::{GatedDelta, StateSpace};

/// A value inside a block: `[tokens, width]`.
#[derive(Clone, Copy, Debug)]
pub struct Var {
    id: usize,
    width: usize,
}

impl Var {
    /// Its columns.
    pub fn width(self) -> usize {
        self.width
    }
}

/// A kind of block, to be given to [`GraphBuilder::layer`].
#[derive(Clone, Copy, Debug)]
pub struct BlockKind(usize);

/// Which norm, with its numbers; its weights are named where it is used.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Norm {
    op: &'static str,
    /// Added to the mean square, or to the variance.
    pub eps: f64,
    /// What its weight is counted from: 0, or 1 as in Gemma.
    pub offset: f64,
    /// Whether it has a weight.
    pub weight: bool,
    /// Whether it has a bias.
    pub bias: bool,
}

impl Norm {
    /// `x / sqrt(mean(x²) + eps) · w` (Zhang and Sennrich 2019, eq. 4).
    pub fn rms(eps: f64) -> Norm {
        Norm { op: "rms_norm", eps, offset: 0.0, weight: true, bias: false }
    }

    /// `(x - mean(x)) / sqrt(variance(x) + eps) · w + b` (Ba et al. 2016, eq. 4).
    pub fn layer(eps: f64) -> Norm {
        Norm { op: "layer_norm", eps, offset: 0.0, weight: true, bias: true }
    }

    /// A weight that counts from something else than 0.
    pub fn offset(self, offset: f64) -> Norm {
        Norm { offset, ..self }
    }

    /// With a bias or without; an RMS norm has none.
    pub fn bias(self, bias: bool) -> Norm {
        Norm { bias: bias && self.op == "layer_norm", ..self }
    }

    /// Without a weight and a bias.
    pub fn plain(self) -> Norm {
        Norm { weight: false, bias: false, ..self }
    }

    fn attrs(self) -> Vec<(&'static str, Value)> {
        let offset = (self.offset != 0.0).then(|| ("offset", json!(self.offset)));
        [("eps", json!(self.eps))].into_iter().chain(offset).collect()
    }
}

/// Collects the nodes of one block.
#[derive(Debug)]
pub struct BlockBuilder {
    nodes: Vec<Node>,
    error: Option<Error>,
}

impl BlockBuilder {
    fn new() -> BlockBuilder {
        BlockBuilder { nodes: Vec::new(), error: None }
    }

    fn fail(&mut self, message: String) {
        self.error.get_or_insert(Error::new(message));
    }

    /// Any op by name: the way to one that this builder has no method for.
    pub fn op(&mut self, op: &str, inputs: &[Var], weights: Vec<Weight>, attrs: &[(&str, Value)], width: usize) -> Var {
        self.nodes.push(Node {
            op: op.into(),
            inputs: inputs.iter().map(|v| v.id).collect(),
            weights,
            attrs: attrs.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect::<BTreeMap<_, _>>(),
            width,
        });
        Var { id: self.nodes.len(), width }
    }

    /// Rows of the table `[vocab, width]`, one for each token id.
    pub fn embedding(&mut self, tensor: &str, tokens: Var, vocab: usize, width: usize) -> Var {
        self.op("embedding", &[tokens], vec![weight(tensor, &[vocab, width])], &[], width)
    }

    /// `x · Wᵀ` with `module.weight` of shape `[out, in]`. LoRA may be added by the host.
    pub fn linear(&mut self, module: &str, x: Var, out: usize) -> Var {
        self.op("linear", &[x], vec![weight(&format!("{module}.weight"), &[out, x.width])], &[], out)
    }

    /// `x · Wᵀ + b` with `module.weight` and `module.bias`.
    pub fn linear_bias(&mut self, module: &str, x: Var, out: usize) -> Var {
        let bias = tensor("bias", &format!("{module}.bias"), &[out]);
        self.op("linear", &[x], vec![weight(&format!("{module}.weight"), &[out, x.width]), bias], &[], out)
    }

    /// [`linear`](Self::linear) or [`linear_bias`](Self::linear_bias), as the checkpoint's config says.
    pub fn linear_if(&mut self, bias: bool, module: &str, x: Var, out: usize) -> Var {
        if bias { self.linear_bias(module, x, out) } else { self.linear(module, x, out) }
    }

    /// [`linear_if`](Self::linear_if), whose weight is a parameter of a module that is no linear, as a router's is: LoRA is added to
    /// it only where that parameter is named.
    pub fn linear_of_parameter(&mut self, bias: bool, module: &str, x: Var, out: usize) -> Var {
        let y = self.linear_if(bias, module, x, out);
        self.nodes.iter_mut().last().map(|node| node.attrs.insert("parameter".into(), json!(true)));
        y
    }

    /// A norm over the whole row, with `module.weight` and `module.bias` as far as it has them.
    pub fn norm(&mut self, norm: Norm, module: &str, x: Var) -> Var {
        self.norm_of_runs(norm, module, x, x.width, &[x.width])
    }

    /// A norm of all columns whose weight is this tensor, and which has no bias.
    pub fn norm_of(&mut self, norm: Norm, weight: &str, x: Var) -> Var {
        let norm = norm.bias(false);
        self.op(norm.op, &[x], vec![tensor("weight", weight, &[x.width])], &norm.attrs(), x.width)
    }

    /// A norm over each run of `head_dim` columns, with one weight `[head_dim]` for all heads.
    pub fn head_norm(&mut self, norm: Norm, module: &str, x: Var, head_dim: usize) -> Var {
        self.norm_of_runs(norm, module, x, head_dim, &[head_dim])
    }

    /// A norm over each run of `head_dim` columns, with a weight `[heads, head_dim]`.
    pub fn norm_of_each_head(&mut self, norm: Norm, module: &str, x: Var, head_dim: usize) -> Var {
        self.norm_of_runs(norm, module, x, head_dim, &[x.width / head_dim.max(1), head_dim])
    }

    /// [`norm`](Self::norm) with [`Norm::rms`].
    pub fn rms_norm(&mut self, module: &str, x: Var, eps: f64) -> Var {
        self.norm(Norm::rms(eps), module, x)
    }

    /// [`norm`](Self::norm) with [`Norm::layer`].
    pub fn layer_norm(&mut self, module: &str, x: Var, eps: f64) -> Var {
        self.norm(Norm::layer(eps), module, x)
    }

    fn norm_of_runs(&mut self, norm: Norm, module: &str, x: Var, run: usize, shape: &[usize]) -> Var {
        if run == 0 || !x.width.is_multiple_of(run) {
            self.fail(format!("{module}: {} columns are not heads of {run}", x.width));
        }
        let mut weights = Vec::new();
        for (role, there) in [("weight", norm.weight), ("bias", norm.bias)] {
            weights.extend(there.then(|| tensor(role, &format!("{module}.{role}"), shape)));
        }
        let mut attrs = norm.attrs();
        let stated = run != x.width && (!norm.weight || *shape == [x.width]);
        attrs.extend(stated.then(|| ("run", json!(run))));
        self.op(norm.op, &[x], weights, &attrs, x.width)
    }

    /// Rotary embedding of every head by the token's position (Su et al. 2021, eq. 34): of all its columns, or of the first ones
    /// that `rope` has frequencies for.
    pub fn rope(&mut self, x: Var, head_dim: usize, rope: &Rope) -> Var {
        self.rope_from(x, head_dim, 0, rope)
    }

    /// [`rope`](Self::rope) of the columns of every head from `start` on.
    pub fn rope_from(&mut self, x: Var, head_dim: usize, start: usize, rope: &Rope) -> Var {
        if start + rope.inv_freq.len() * 2 > head_dim || !x.width.is_multiple_of(head_dim.max(1)) {
            self.fail(format!(
                "rope: {} frequencies for heads of {head_dim} in {} columns",
                rope.inv_freq.len(),
                x.width
            ));
        }
        let mut attrs = vec![
            ("head_dim", json!(head_dim)),
            ("inv_freq", json!(rope.inv_freq)),
            ("scale", json!(rope.attention_scale)),
        ];
        attrs.extend((start > 0).then(|| ("start", json!(start))));
        attrs.extend(rope.interleaved.then(|| ("layout", json!("interleaved"))));
        if let Some((beta, period)) = rope.position_factor {
            attrs.extend([("position_beta", json!(beta)), ("position_period", json!(period))]);
        }
        self.op("rope", &[x], vec![], &attrs, x.width)
    }

    /// `activation(gate) · up`; activations are `silu`, `gelu` (exact), `gelu_tanh`, `relu2`, `sigmoid` and `identity`. A gate may have fewer
    /// columns than `up`: each then carries a run of them.
    pub fn glu(&mut self, activation: &str, gate: Var, up: Var) -> Var {
        if gate.width == 0 || !up.width.is_multiple_of(gate.width) {
            self.fail(format!("glu: {} and {} columns", gate.width, up.width));
        }
        self.op("glu", &[gate, up], vec![], &[("activation", json!(activation))], up.width)
    }

    /// `activation(x)`; activations are those of [`glu`](Self::glu).
    pub fn activation(&mut self, activation: &str, x: Var) -> Var {
        self.op("activation", &[x], vec![], &[("activation", json!(activation))], x.width)
    }

    /// `min(max(x, -limit), limit)`.
    pub fn clamp(&mut self, x: Var, limit: f64) -> Var {
        self.op("activation", &[x], vec![], &[("activation", json!("clamp")), ("limit", json!(limit))], x.width)
    }

    /// The activation xIELU (Huang and Schlag 2024, eq. 8) with the numbers `module.alpha_p`, `alpha_n`, `beta` and `eps`, of
    /// these shapes.
    pub fn xielu(&mut self, module: &str, x: Var, shapes: [&[usize]; 4]) -> Var {
        let roles = ["alpha_p", "alpha_n", "beta", "eps"].into_iter().zip(shapes);
        let weights = roles.map(|(role, shape)| tensor(role, &format!("{module}.{role}"), shape)).collect();
        self.op("xielu", &[x], weights, &[], x.width)
    }

    /// `a + b`.
    pub fn add(&mut self, a: Var, b: Var) -> Var {
        self.same_width("add", a, b);
        self.op("add", &[a, b], vec![], &[], a.width)
    }

    /// `factor · x`.
    pub fn scale(&mut self, x: Var, factor: f64) -> Var {
        self.op("scale", &[x], vec![], &[("factor", json!(factor))], x.width)
    }

    /// `factor · x`, the factor a tensor `[1]` of the checkpoint.
    pub fn scale_by(&mut self, tensor_name: &str, x: Var) -> Var {
        self.op("scale", &[x], vec![tensor("factor", tensor_name, &[1])], &[], x.width)
    }

    /// `x · Wᵀ` to the vocabulary; ends the head. The host computes log-probs from it and never keeps logits.
    pub fn lm_head(&mut self, tensor: &str, x: Var, vocab: usize) -> Var {
        self.lm_head_with(tensor, x, vocab, None, None)
    }

    /// [`lm_head`](Self::lm_head) with a bias, and with logits `z` that become `softcap · tanh(z / softcap)` (Gemma 2, section 2).
    pub fn lm_head_with(
        &mut self,
        tensor_name: &str,
        x: Var,
        vocab: usize,
        bias: Option<&str>,
        softcap: Option<f64>,
    ) -> Var {
        let mut weights = vec![weight(tensor_name, &[vocab, x.width])];
        weights.extend(bias.map(|name| tensor("bias", name, &[vocab])));
        let attrs: Vec<_> = softcap.map(|cap| ("softcap", json!(cap))).into_iter().collect();
        self.op("lm_head", &[x], weights, &attrs, vocab)
    }

    fn same_width(&mut self, op: &str, a: Var, b: Var) {
        if a.width != b.width {
            self.fail(format!("{op}: {} and {} columns", a.width, b.width));
        }
    }
}

fn weight(name: &str, shape: &[usize]) -> Weight {
    tensor("weight", name, shape)
}

fn tensor(role: &str, name: &str, shape: &[usize]) -> Weight {
    Weight { role: role.into(), tensor: name.into(), shape: shape.to_vec() }
}

/// Collects blocks and layers of a decoder.
#[derive(Debug)]
pub struct GraphBuilder {
    graph: ModelGraph,
    error: Option<Error>,
}

impl GraphBuilder {
    /// A decoder whose residual stream has `hidden_size` columns and whose output has `vocab_size` rows.
    pub fn decoder(hidden_size: usize, vocab_size: usize) -> GraphBuilder {
        let empty = || Block { name: String::new(), nodes: Vec::new(), output: 0 };
        let graph = ModelGraph {
            hidden_size,
            vocab_size,
            embed: empty(),
            blocks: Vec::new(),
            layers: Vec::new(),
            head: empty(),
            max_positions: None,
            unused_tensors: Vec::new(),
            layouts: Vec::new(),
            assemblies: Vec::new(),
            unread_config: Vec::new(),
            requires: Vec::new(),
        };
        GraphBuilder { graph, error: None }
    }

    /// How token ids become the residual stream.
    pub fn embed(&mut self, build: impl FnOnce(&mut BlockBuilder, Var) -> Var) {
        self.graph.embed = self.build("embed", 1, build);
    }

    /// A kind of block from the residual stream to itself.
    pub fn block(&mut self, name: &str, build: impl FnOnce(&mut BlockBuilder, Var) -> Var) -> BlockKind {
        let width = self.graph.hidden_size;
        let block = self.build(name, width, build);
        self.graph.blocks.push(block);
        BlockKind(self.graph.blocks.len() - 1)
    }

    /// [`block`](Self::block), built only if there is none of this name yet: for families whose layers alternate between
    /// a few kinds.
    pub fn block_once(&mut self, name: &str, build: impl FnOnce(&mut BlockBuilder, Var) -> Var) -> BlockKind {
        match self.graph.blocks.iter().position(|b| b.name == name) {
            Some(known) => BlockKind(known),
            None => self.block(name, build),
        }
    }

    /// The next layer: a kind of block, its tensors under `prefix`.
    pub fn layer(&mut self, kind: BlockKind, prefix: impl Into<String>) {
        self.graph.layers.push(Layer { block: kind.0, prefix: prefix.into() });
    }

    /// How the residual stream becomes logits; ends with [`BlockBuilder::lm_head`].
    pub fn head(&mut self, build: impl FnOnce(&mut BlockBuilder, Var) -> Var) {
        let width = self.graph.hidden_size;
        self.graph.head = self.build("head", width, build);
    }

    /// Rows longer than the table of frequencies holds for are outside of what the graph computes.
    pub fn rope_limit(&mut self, rope: &Rope) {
        self.graph.max_positions = rope.max_positions;
    }

    /// Names a tensor that published files carry in vain; `*` stands for any text.
    pub fn unused_tensor(&mut self, pattern: &str) {
        self.graph.unused_tensors.push(pattern.into());
    }

    /// Names another layout of published files: each of these texts of a tensor's name is replaced by its partner, in this order,
    /// as in `&[("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")]`.
    pub fn layout(&mut self, replacements: &[(&str, &str)]) {
        self.graph.layouts.push(replacements.iter().map(|(from, to)| ((*from).into(), (*to).into())).collect());
    }

    /// Names the parts that published files may have of a tensor of experts: see [`Assembly`].
    pub fn assembly(&mut self, tensor: &str, parts: &[&str], transposed: bool) {
        let parts = parts.iter().map(|part| (*part).to_owned()).collect();
        let assembly = Assembly { tensor: tensor.into(), parts, transposed };
        if !self.graph.assemblies.contains(&assembly) {
            self.graph.assemblies.push(assembly);
        }
    }

    /// The graph, or the first mistake.
    pub fn finish(mut self, config: &Config) -> Result<ModelGraph> {
        self.graph.unread_config = config.unread();
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.graph),
        }
    }

    fn build(&mut self, name: &str, width: usize, build: impl FnOnce(&mut BlockBuilder, Var) -> Var) -> Block {
        let mut b = BlockBuilder::new();
        let output = build(&mut b, Var { id: 0, width });
        if let Some(mut error) = b.error {
            error.message = format!("block '{name}': {}", error.message);
            self.error.get_or_insert(error);
        }
        Block { name: name.into(), nodes: b.nodes, output: output.id }
    }
}
