//! What a graph computes, in the terms in which llama.cpp's metadata say it: heads, norms, windows, frequencies, multipliers. Whatever of a graph
//! has no such term is refused, so that nothing is lost on the way.

use dpo_core::error::{Error, Result};
use dpo_plugin_api::graph::{ModelGraph, Node};
use dpo_plugin_api::ops::{AUX_LOSS_COEF, count, flag, number};
use serde_json::Value;

/// Ops that an architecture of llama.cpp may have, and what attributes of theirs are looked at here.
const UNDERSTOOD: &[(&str, &[&str])] = &[
    ("embedding", &[]),
    ("scale", &["factor"]),
    ("rms_norm", &["eps", "offset"]),
    ("linear", &["parameter"]),
    ("narrow", &["start", "length"]),
    ("rope", &["head_dim", "inv_freq", "scale"]),
    ("attention", &["heads", "kv_heads", "head_dim", "scale", "window", "softcap"]),
    ("add", &[]),
    ("glu", &["activation"]),
    // A loss of training is none of an answer.
    ("route", &["scoring", "top_k", "normalize", AUX_LOSS_COEF]),
    ("experts", &["activation", "top_k", "interleaved", "limit"]),
    ("gather", &[]),
    ("lm_head", &["softcap"]),
];

/// A model's shape and numbers. Lists have an item for each layer.
pub(crate) struct Facts {
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    /// Rows of embedding and output projection.
    pub(crate) vocabulary: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Width inside of an MLP.
    pub(crate) inner: Option<usize>,
    pub(crate) experts: Option<Experts>,
    pub(crate) activations: Vec<String>,
    pub(crate) eps: f64,
    pub(crate) windows: Vec<Option<usize>>,
    pub(crate) ropes: Vec<Option<Frequencies>>,
    pub(crate) attention_scale: f64,
    pub(crate) attention_softcap: Option<f64>,
    pub(crate) logit_softcap: Option<f64>,
    pub(crate) embedding_scale: f64,
    pub(crate) residual_scale: f64,
    pub(crate) logit_scale: f64,
    /// Whether the embedding is the output projection.
    pub(crate) tied: bool,
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Experts {
    pub(crate) count: usize,
    pub(crate) used: usize,
    pub(crate) inner: usize,
    pub(crate) scoring: String,
    /// Whether scores of the chosen are divided by their sum.
    pub(crate) normalize: Option<f64>,
    /// Whether rows of gate and up take turns.
    pub(crate) interleaved: bool,
    /// Bound of what goes into the activation.
    pub(crate) limit: Option<f64>,
}

/// Rotary frequencies: radians per position of every pair of columns, and the factor on cosine and sine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Frequencies {
    pub(crate) inv_freq: Vec<f64>,
    pub(crate) scale: f64,
}

impl Facts {
    /// Reads a checked graph.
    ///
    /// # Errors
    /// An op, or an attribute of one, that has no term; layers that differ in what llama.cpp has one number for.
    pub(crate) fn of(graph: &ModelGraph) -> Result<Facts> {
        graph.parts().flat_map(|(_, block)| &block.nodes).try_for_each(understood)?;
        let layers: Vec<&[Node]> =
            graph.layers.iter().map(|layer| graph.blocks[layer.block].nodes.as_slice()).collect();
        let every = |op: &'static str| layers.iter().flat_map(move |nodes| nodes.iter().filter(move |n| n.op == op));
        let attentions: Vec<&Node> = every("attention").collect();
        let of_attention = |name: &str| one(name, attentions.iter().map(|node| count(node, name)));
        let optional = |node: &Node, name: &str| node.attrs.contains_key(name).then(|| number(node, name));
        let scale_in = |nodes: &mut dyn Iterator<Item = &Node>| {
            let factors: Vec<f64> = nodes.filter(|n| n.op == "scale").map(|n| number(n, "factor")).collect();
            if factors.is_empty() { Ok(1.0) } else { one("factor", factors.into_iter()) }
        };
        let norms = graph.parts().flat_map(|(_, block)| &block.nodes).filter(|n| n.op == "rms_norm");
        let text =
            |node: &Node, name: &str| node.attrs.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut activations: Vec<String> =
            every("glu").chain(every("experts")).map(|node| text(node, "activation")).collect();
        activations.sort();
        activations.dedup();
        let inner: Vec<usize> = every("glu").map(|node| node.width).collect();
        let head = graph.head.nodes.last();
        let tensor = |node: Option<&Node>| node.and_then(|n| n.weight("weight")).map(|w| w.tensor.clone());
        Ok(Facts {
            layers: layers.len(),
            hidden: graph.hidden_size,
            vocabulary: graph.vocab_size,
            heads: of_attention("heads")?,
            kv_heads: of_attention("kv_heads")?,
            head_dim: of_attention("head_dim")?,
            inner: if inner.is_empty() { None } else { Some(one("width of an MLP", inner.into_iter())?) },
            experts: experts(&layers)?,
            activations,
            eps: one("eps", norms.map(|node| number(node, "eps")))?,
            windows: attentions
                .iter()
                .map(|node| node.attrs.contains_key("window").then(|| count(node, "window")))
                .collect(),
            ropes: layers.iter().map(|nodes| frequencies(nodes)).collect::<Result<_>>()?,
            attention_scale: one("scale", attentions.iter().map(|node| number(node, "scale")))?,
            attention_softcap: one("softcap", attentions.iter().map(|node| optional(node, "softcap")))?,
            logit_softcap: head.and_then(|node| optional(node, "softcap")),
            embedding_scale: scale_in(&mut graph.embed.nodes.iter())?,
            residual_scale: scale_in(&mut layers.iter().copied().flatten())?,
            logit_scale: scale_in(&mut graph.head.nodes.iter())?,
            tied: tensor(head) == tensor(graph.embed.nodes.first()),
        })
    }
}

fn understood(node: &Node) -> Result<()> {
    let refused = |what: String| Err(Error::input(format!("llama.cpp has no term for {what}")).at("--format gguf"));
    let Some((_, attrs)) = UNDERSTOOD.iter().find(|(op, _)| *op == node.op) else {
        return refused(format!("the op '{}'", node.op));
    };
    let is_default = |name: &str, value: &Value| name == "layout" && value == "half";
    match node.attrs.iter().find(|(name, value)| !attrs.contains(&name.as_str()) && !is_default(name, value)) {
        Some((name, value)) => refused(format!("{name} {value} of the op '{}'", node.op)),
        None => Ok(()),
    }
}

/// What all of them are.
fn one<T: PartialEq>(what: &str, mut values: impl Iterator<Item = T>) -> Result<T> {
    let Some(first) = values.next() else {
        return Err(Error::input(format!("the model has no {what}")).at("--format gguf"));
    };
    match values.all(|other| other == first) {
        true => Ok(first),
        false => {
            Err(Error::input(format!("layers differ in {what}, for which llama.cpp has one value for all of them"))
                .at("--format gguf"))
        }
    }
}

fn experts(layers: &[&[Node]]) -> Result<Option<Experts>> {
    let of = |nodes: &&[Node]| {
        let (route, experts) = (nodes.iter().find(|n| n.op == "route")?, nodes.iter().find(|n| n.op == "experts")?);
        let shape = |role: &str| experts.weight(role).map(|w| w.shape.clone()).unwrap_or_default();
        Some(Experts {
            count: route.width,
            used: count(route, "top_k"),
            inner: shape("down").last().copied().unwrap_or(0),
            scoring: route.attrs.get("scoring").and_then(Value::as_str).unwrap_or_default().to_owned(),
            normalize: route.attrs.contains_key("normalize").then(|| number(route, "normalize")),
            interleaved: flag(experts, "interleaved"),
            limit: experts.attrs.contains_key("limit").then(|| number(experts, "limit")),
        })
    };
    one("experts", layers.iter().map(of))
}

/// The frequencies of a layer, the same for queries and keys.
fn frequencies(nodes: &[Node]) -> Result<Option<Frequencies>> {
    let of = |node: &Node| Frequencies {
        inv_freq: node
            .attrs
            .get("inv_freq")
            .and_then(Value::as_array)
            .map_or(Vec::new(), |list| list.iter().filter_map(Value::as_f64).collect()),
        scale: number(node, "scale"),
    };
    let ropes: Vec<Frequencies> = nodes.iter().filter(|node| node.op == "rope").map(of).collect();
    if ropes.is_empty() { Ok(None) } else { one("rotary frequencies", ropes.into_iter()).map(Some) }
}
