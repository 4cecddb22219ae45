//! What tensors a file has, and of which rows of a graph's weights each of them is made.

use dpo_core::error::{Error, Result};
use dpo_plugin_api::graph::{ModelGraph, Node, Weight};
use dpo_plugin_api::ops::number;

use crate::architecture::{Architecture, Rows};
use crate::facts::Facts;
use crate::file::TensorInfo;
use crate::mixture::{Mixture, Place};
use crate::quantize::TensorType;

/// A tensor of a file, and where it comes from.
pub(crate) struct Planned {
    pub(crate) info: TensorInfo,
    pub(crate) source: Source,
}

/// Where a tensor comes from.
pub(crate) enum Source {
    /// A weight of the graph.
    Weight {
        prefix: String,
        weight: Weight,
        order: Order,
        /// Added to every value: weights of some norms count from 1 here, from 0 there.
        offset: f32,
    },
    /// No checkpoint.
    Values(Vec<f32>),
}

/// Which row of a weight is a row of a tensor.
#[derive(Clone, Copy)]
pub(crate) enum Order {
    /// The same.
    Same,
    /// Halves of heads of so many rows take turns.
    Turned { head: usize },
    /// The gate's rows (0) or up's (1) of every expert, of which either has so many.
    Part { part: usize, rows: usize, interleaved: bool },
}

impl Order {
    /// The weight's row.
    pub(crate) fn row(self, row: usize) -> usize {
        match self {
            Order::Same => row,
            Order::Turned { head } => {
                let within = row % head;
                row - within + within % 2 * (head / 2) + within / 2
            }
            Order::Part { part, rows, interleaved } => {
                let (expert, within) = (row / rows, row % rows);
                let within = if interleaved { 2 * within + part } else { part * rows + within };
                expert * 2 * rows + within
            }
        }
    }
}

/// All tensors of a file.
///
/// # Errors
/// A weight that the architecture has no tensor for.
pub(crate) fn planned(
    architecture: &Architecture,
    graph: &ModelGraph,
    facts: &Facts,
    mixture: Mixture,
    values: Vec<(&'static str, Vec<f32>)>,
) -> Result<Vec<Planned>> {
    let mut all = Vec::new();
    for (name, values) in values {
        let info = TensorInfo { name: name.into(), shape: vec![values.len()], kind: TensorType::F32 };
        all.push(Planned { info, source: Source::Values(values) });
    }
    let mut add = |layer: Option<usize>, name: String, shape: Vec<usize>, source: Source| {
        let kind = mixture.kind_of(&name, &shape, &Place { architecture, facts, layer });
        all.push(Planned { info: TensorInfo { name, shape, kind }, source });
    };
    for (name, node, weight) in around(graph, facts)? {
        let source = of(String::new(), node, weight, Order::Same);
        add(None, name.into(), weight.shape.clone(), source);
    }
    for (at, layer) in graph.layers.iter().enumerate() {
        for node in &graph.blocks[layer.block].nodes {
            for weight in &node.weights {
                let counterpart = architecture.counterpart(&weight.tensor)?;
                let name = |own: &str| format!("blk.{at}.{own}");
                let of = |order: Order| of(layer.prefix.clone(), node, weight, order);
                match counterpart.rows {
                    Rows::Same => add(Some(at), name(counterpart.there), weight.shape.clone(), of(Order::Same)),
                    Rows::Turned => {
                        let order = Order::Turned { head: facts.head_dim };
                        add(Some(at), name(counterpart.there), weight.shape.clone(), of(order));
                    }
                    Rows::GateAndUp => {
                        let interleaved = facts.experts.as_ref().is_some_and(|experts| experts.interleaved);
                        let mut shape = weight.shape.clone();
                        let Some(rows) = shape.get_mut(1) else { continue };
                        *rows /= 2;
                        let rows = *rows;
                        for (part, own) in ["gate", "up"].into_iter().enumerate() {
                            let order = Order::Part { part, rows, interleaved };
                            add(Some(at), name(&counterpart.there.replace("{}", own)), shape.clone(), of(order));
                        }
                    }
                }
            }
        }
    }
    Ok(all)
}

fn of(prefix: String, node: &Node, weight: &Weight, order: Order) -> Source {
    let counts_from_one = node.op == "rms_norm" && weight.role == "weight";
    let offset = if counts_from_one { number(node, "offset") as f32 } else { 0.0 };
    Source::Weight { prefix, weight: weight.clone(), order, offset }
}

/// Weights of embedding and head by their names in a file.
fn around<'g>(graph: &'g ModelGraph, facts: &Facts) -> Result<Vec<(&'static str, &'g Node, &'g Weight)>> {
    let mut all = Vec::new();
    for node in graph.embed.nodes.iter().chain(&graph.head.nodes) {
        for weight in &node.weights {
            let name = match (node.op.as_str(), weight.role.as_str()) {
                ("embedding", "weight") => "token_embd.weight",
                ("rms_norm", "weight") if graph.head.nodes.contains(node) => "output_norm.weight",
                ("lm_head", "weight") if facts.tied => continue,
                ("lm_head", "weight") => "output.weight",
                _ => {
                    let what = format!("llama.cpp has no counterpart of tensor '{}'", weight.tensor);
                    return Err(Error::input(what).at("--format gguf"));
                }
            };
            all.push((name, node, weight));
        }
    }
    Ok(all)
}
