//! Typed construction of a [`ModelGraph`].
//!
//! The builder lives in the plugin and calls nothing of the host. It keeps the first mistake (such as two widths that do
//! not fit) and returns it from [`GraphBuilder::finish`], so that a family reads as a list of its ops.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::graph::{Block, Layer, ModelGraph, Node, Weight};
use crate::model::Config;
use crate::rope::Rope;
use crate::{Error, Result};

/// A value inside a block: `[tokens, width]`.
#[derive(Clone, Copy, Debug)]
pub struct Var {
    id: usize,
    width: usize,
}

/// A kind of block, to be given to [`GraphBuilder::layer`].
#[derive(Clone, Copy, Debug)]
pub struct BlockKind(usize);

/// Numbers of a grouped-query attention.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor on the scores before the softmax.
    pub scale: f64,
    /// A token sees itself and this many minus one before it; `None` sees all before it.
    pub window: Option<usize>,
    /// Scores `s` become `softcap · tanh(s / softcap)` before the softmax (Gemma 2, section 2); `None` leaves them.
    pub softcap: Option<f64>,
}

impl Attention {
    /// Full causal attention with the usual scale of `1 / sqrt(head_dim)`.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
        let scale = (head_dim as f64).powf(-0.5);
        Attention { heads, kv_heads, head_dim, scale, window: None, softcap: None }
    }

    /// Another factor on the scores.
    pub fn scale(self, scale: f64) -> Attention {
        Attention { scale, ..self }
    }

    /// A sliding window, where there is one.
    pub fn window(self, window: Option<usize>) -> Attention {
        Attention { window, ..self }
    }

    /// A soft cap, where there is one.
    pub fn softcap(self, softcap: Option<f64>) -> Attention {
        Attention { softcap, ..self }
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
        let bias = vector("bias", &format!("{module}.bias"), out);
        self.op("linear", &[x], vec![weight(&format!("{module}.weight"), &[out, x.width]), bias], &[], out)
    }

    /// [`linear`](Self::linear) or [`linear_bias`](Self::linear_bias), as the checkpoint's config says.
    pub fn linear_if(&mut self, bias: bool, module: &str, x: Var, out: usize) -> Var {
        if bias { self.linear_bias(module, x, out) } else { self.linear(module, x, out) }
    }

    /// `x / sqrt(mean(x²) + eps) · w` over the whole row (Zhang and Sennrich 2019, eq. 4).
    pub fn rms_norm(&mut self, module: &str, x: Var, eps: f64) -> Var {
        self.head_norm(module, x, x.width, eps)
    }

    /// [`rms_norm`](Self::rms_norm) over each run of `head_dim` columns, with one weight `[head_dim]` for all heads.
    pub fn head_norm(&mut self, module: &str, x: Var, head_dim: usize, eps: f64) -> Var {
        if head_dim == 0 || !x.width.is_multiple_of(head_dim) {
            self.fail(format!("{module}: {} columns are not heads of {head_dim}", x.width));
        }
        self.op(
            "rms_norm",
            &[x],
            vec![weight(&format!("{module}.weight"), &[head_dim])],
            &[("eps", json!(eps))],
            x.width,
        )
    }

    /// `(x - mean(x)) / sqrt(variance(x) + eps) · w + b` over the whole row (Ba et al. 2016, eq. 4), with `module.weight` and
    /// `module.bias`.
    pub fn layer_norm(&mut self, module: &str, x: Var, eps: f64) -> Var {
        self.layer_norm_if(true, module, x, eps)
    }

    /// [`layer_norm`](Self::layer_norm), with `module.bias` only where `bias` says so.
    pub fn layer_norm_if(&mut self, bias: bool, module: &str, x: Var, eps: f64) -> Var {
        let mut weights = vec![weight(&format!("{module}.weight"), &[x.width])];
        weights.extend(bias.then(|| vector("bias", &format!("{module}.bias"), x.width)));
        self.op("layer_norm", &[x], weights, &[("eps", json!(eps))], x.width)
    }

    /// Rotary embedding of every head by the token's position (Su et al. 2021, eq. 34, in the half-split layout of
    /// transformers): column `j` of a head turns with column `j + head_dim/2`.
    pub fn rope(&mut self, x: Var, head_dim: usize, rope: &Rope) -> Var {
        if rope.inv_freq.len() * 2 != head_dim || !x.width.is_multiple_of(head_dim.max(1)) {
            self.fail(format!(
                "rope: {} frequencies for heads of {head_dim} in {} columns",
                rope.inv_freq.len(),
                x.width
            ));
        }
        let attrs =
            [("head_dim", json!(head_dim)), ("inv_freq", json!(rope.inv_freq)), ("scale", json!(rope.attention_scale))];
        self.op("rope", &[x], vec![], &attrs, x.width)
    }

    /// Causal attention; the host adds the rule that a rejected answer does not see the chosen one.
    pub fn attention(&mut self, q: Var, k: Var, v: Var, a: Attention) -> Var {
        let (wide, narrow) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        if q.width != wide || k.width != narrow || v.width != narrow {
            self.fail(format!(
                "attention: q, k, v have {}, {}, {} columns; {} and {} heads of {} need {wide}, {narrow}, {narrow}",
                q.width, k.width, v.width, a.heads, a.kv_heads, a.head_dim
            ));
        }
        if a.kv_heads == 0 || !a.heads.is_multiple_of(a.kv_heads) {
            self.fail(format!("attention: {} heads cannot share {} key heads", a.heads, a.kv_heads));
        }
        let mut attrs = vec![
            ("heads", json!(a.heads)),
            ("kv_heads", json!(a.kv_heads)),
            ("head_dim", json!(a.head_dim)),
            ("scale", json!(a.scale)),
        ];
        attrs.extend(a.window.map(|w| ("window", json!(w))));
        attrs.extend(a.softcap.map(|c| ("softcap", json!(c))));
        self.op("attention", &[q, k, v], vec![], &attrs, wide)
    }

    /// `activation(gate) · up`; activations are `silu`, `gelu` (exact) and `gelu_tanh`.
    pub fn glu(&mut self, activation: &str, gate: Var, up: Var) -> Var {
        self.same_width("glu", gate, up);
        self.op("glu", &[gate, up], vec![], &[("activation", json!(activation))], gate.width)
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

    /// `x · Wᵀ` to the vocabulary; ends the head. The host computes log-probs from it and never keeps logits.
    pub fn lm_head(&mut self, tensor: &str, x: Var, vocab: usize) -> Var {
        self.op("lm_head", &[x], vec![weight(tensor, &[vocab, x.width])], &[], vocab)
    }

    fn same_width(&mut self, op: &str, a: Var, b: Var) {
        if a.width != b.width {
            self.fail(format!("{op}: {} and {} columns", a.width, b.width));
        }
    }
}

fn weight(tensor: &str, shape: &[usize]) -> Weight {
    Weight { role: "weight".into(), tensor: tensor.into(), shape: shape.to_vec() }
}

fn vector(role: &str, tensor: &str, width: usize) -> Weight {
    Weight { role: role.into(), tensor: tensor.into(), shape: vec![width] }
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
