//! A model as plain data: what a family plugin hands to the host.
//!
//! Ops and attributes are names, not enum variants: a host that does not know one refuses the graph with that name, and a
//! plugin that was built before an op existed goes on loading. Every value is a matrix `[tokens, width]`; the host owns
//! tensors, LoRA, memory and gradients, so none of them appears here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A decoder: `embed`, then every layer in order, then `head`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelGraph {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the output projection.
    pub vocab_size: usize,
    /// Token ids `[tokens]` to the residual stream `[tokens, hidden_size]`. Its input value is the token ids.
    pub embed: Block,
    /// The kinds of block that layers are made of.
    pub blocks: Vec<Block>,
    /// Layers from first to last.
    pub layers: Vec<Layer>,
    /// The residual stream to logits; its last node is the op `lm_head`.
    pub head: Block,
    /// Longest row for which this graph's arithmetic holds, where the family has such a bound.
    #[serde(default)]
    pub max_positions: Option<usize>,
    /// Tensors that published checkpoints carry and this graph does not need, as files name them; `*` stands for any text.
    #[serde(default)]
    pub unused_tensors: Vec<String>,
    /// Other names under which published checkpoints carry these tensors, such as those of a text model in a wrapper of several
    /// modalities. The graph's own names are tried first, then every layout in turn.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layouts: Vec<Layout>,
    /// Tensors that published checkpoints may have in parts, such as a matrix for each expert.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub assemblies: Vec<Assembly>,
    /// Keys of `config.json` that the plugin did not read. The host refuses those that may change the arithmetic.
    #[serde(default)]
    pub unread_config: Vec<String>,
    /// Features the host must have; an unknown one refuses the graph.
    #[serde(default)]
    pub requires: Vec<String>,
}

/// From a graph's names of tensors to those in a checkpoint's files: pairs of a text and what stands in its place, applied to the
/// whole name (its layer's prefix included), every pair to what the pairs before it have made.
pub type Layout = Vec<(String, String)>;

/// Of what parts a checkpoint may have a tensor `[experts, rows, columns]`. Where the first part is in the files, all of them are
/// read, and the tensor's own name is not looked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assembly {
    /// What the graph's names of such tensors end in, as in `mlp.experts.gate_up_proj`.
    pub tensor: String,
    /// What stands there in the names of the parts, of which each has as many of the rows: `mlp.experts.*.gate_proj.weight` and
    /// `mlp.experts.*.up_proj.weight`. With a `*`, the number of an expert, a part is a matrix for each expert; without, it is all
    /// of theirs. A layout renames them as it does the graph's names.
    pub parts: Vec<String>,
    /// Whether matrices lie there with rows and columns exchanged.
    #[serde(default)]
    pub transposed: bool,
}

impl Assembly {
    /// The name of a part of an expert, where the assembly is for the tensor of this name.
    pub fn part(&self, tensor: &str, part: usize, expert: usize) -> Option<String> {
        let front = tensor.strip_suffix(self.tensor.as_str())?;
        Some(format!("{front}{}", self.parts.get(part)?.replace('*', &expert.to_string())))
    }

    /// Whether a part is a tensor for each expert.
    pub fn is_of_each(&self, part: usize) -> bool {
        self.parts.get(part).is_some_and(|name| name.contains('*'))
    }
}

/// Most bytes of a tensor's name.
pub const MOST_NAME: usize = 4096;

/// A graph's name of a tensor as a layout has it; none if that is longer than any file's.
pub fn renamed(layout: &Layout, own: &str) -> Option<String> {
    let mut pairs = layout.iter();
    pairs.try_fold(own.to_owned(), |name, (from, to)| Some(name.replace(from, to)).filter(|n| n.len() <= MOST_NAME))
}

/// One layer: a kind of block, and where its weights are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Index into [`ModelGraph::blocks`].
    pub block: usize,
    /// Put before every tensor name of the block, such as `model.layers.3.`.
    pub prefix: String,
}

/// A run of nodes. Value 0 is the block's input; node `i` makes value `i + 1`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// What `describe` calls it.
    pub name: String,
    /// Nodes in the order they run.
    pub nodes: Vec<Node>,
    /// The value that leaves the block.
    pub output: usize,
}

/// One op.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Name of the op, as `dpo-host list ops` prints it.
    pub op: String,
    /// Values it reads.
    pub inputs: Vec<usize>,
    /// Frozen tensors it reads.
    #[serde(default)]
    pub weights: Vec<Weight>,
    /// Attributes by name.
    #[serde(default)]
    pub attrs: BTreeMap<String, Value>,
    /// Columns of the value it makes.
    pub width: usize,
}

/// A tensor of the checkpoint. A scalar has the shape `[]` or `[1]`, whichever of them the file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weight {
    /// What the op uses it for: `weight` or `bias`.
    pub role: String,
    /// Its name as transformers gives it, by which PEFT names the module; a layer's prefix is put before it. Files may have
    /// another, which [`ModelGraph::layouts`] says.
    pub tensor: String,
    /// Its shape there.
    pub shape: Vec<usize>,
}

impl ModelGraph {
    /// Every block in the order it runs, with the prefix of its tensors: the embedding, the layers, the head.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &Block)> {
        let layers = self.layers.iter().filter_map(|l| Some((l.prefix.as_str(), self.blocks.get(l.block)?)));
        std::iter::once(("", &self.embed)).chain(layers).chain([("", &self.head)])
    }

    /// Every weight with its layer's prefix, in the order in which blocks run; a tied one as often as it is read.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.parts().flat_map(|(prefix, block)| block.nodes.iter().flat_map(|n| &n.weights).map(move |w| (prefix, w)))
    }
}

impl Node {
    /// The module this node's weights belong to, as PEFT names it: `self_attn.q_proj` for `self_attn.q_proj.weight`.
    pub fn module(&self) -> Option<&str> {
        self.weight("weight")?.tensor.strip_suffix(".weight")
    }

    /// The weight of a role. Weights may be listed in any order.
    pub fn weight(&self, role: &str) -> Option<&Weight> {
        self.weights.iter().find(|w| w.role == role)
    }
}
