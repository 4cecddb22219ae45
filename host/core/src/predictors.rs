//! A graph as devices run it: what is read only at rows that predict scored tokens is computed at those alone.
//!
//! The head reads the residual stream where it predicts, not at every token. So does the last layer, but for the values on which an op
//! depends that reads other rows or positions: its attention needs keys of all tokens, its MLP does not. The last layer gets a block of
//! its own in which those values come first, then what is read of them goes through [`gather`](crate::ops::GATHER), and all that
//! follows has as many rows as there are predictors. Weights keep their names and their order.
//!
//! It is done once, before an adapter finds its linears in the graph.

use dpo_plugin_api::graph::{Block, ModelGraph, Node};

use crate::aux_loss::is_balanced;
use crate::error::{Error, Result};
use crate::ops::GATHER;

/// The graph with the gather in its last layer.
///
/// # Errors
/// A graph without layers, or with an op that is not known.
pub fn gather_predictors(mut graph: ModelGraph) -> Result<ModelGraph> {
    let Some(last) = graph.layers.len().checked_sub(1) else { return Err(Error::input("the graph has no layers")) };
    let kind = graph.layers[last].block;
    let block = gathered(&graph.blocks[kind], graph.hidden_size)?;
    if graph.layers.iter().filter(|layer| layer.block == kind).count() == 1 {
        graph.blocks[kind] = block;
    } else {
        graph.layers[last].block = graph.blocks.len();
        graph.blocks.push(Block { name: format!("{}, last", block.name), ..block });
    }
    Ok(graph)
}

/// Refuses a graph whose last layer does not gather.
///
/// # Errors
/// One that was not given to [`gather_predictors`].
pub fn check(graph: &ModelGraph) -> Result<()> {
    let last = graph.layers.last().map(|layer| &graph.blocks[layer.block]);
    match last.is_some_and(|block| first_after(&block.nodes) > 0) {
        true => Ok(()),
        false => Err(Error::run("the graph's last layer does not gather the rows that predict")),
    }
}

/// The first node of a block behind those that gather: it and all that follow run on rows that predict. 0 where none gathers.
pub fn first_after(nodes: &[Node]) -> usize {
    nodes.iter().rposition(|node| node.op == GATHER).map_or(0, |at| at + 1)
}

fn gathered(block: &Block, hidden: usize) -> Result<Block> {
    let count = block.nodes.len();
    // Values on which an op depends that reads other rows, or that counts all tokens.
    let mut whole = vec![false; count + 1];
    for (index, node) in block.nodes.iter().enumerate().rev() {
        let of_all = dpo_plugin_api::ops::find(&node.op)?.reads_layout || is_balanced(node);
        if of_all || whole[index + 1] {
            whole[index + 1] = true;
            node.inputs.iter().for_each(|value| whole[*value] = true);
        }
    }
    let (before, after): (Vec<usize>, Vec<usize>) = (0..count).partition(|index| whole[index + 1]);
    let mut nodes = Vec::new();
    // Where every value lies: with all rows, and with those that predict.
    let (mut all, mut rows) = (vec![0; count + 1], vec![0; count + 1]);
    let moved = |index: usize, places: &[usize]| {
        let node = &block.nodes[index];
        Node { inputs: node.inputs.iter().map(|value| places[*value]).collect(), ..node.clone() }
    };
    for index in &before {
        nodes.push(moved(*index, &all));
        all[index + 1] = nodes.len();
    }
    let is_read =
        |value: &usize| *value == block.output || after.iter().any(|index| block.nodes[*index].inputs.contains(value));
    for value in std::iter::once(0).chain(before.iter().map(|index| index + 1)).filter(is_read) {
        let width = value.checked_sub(1).map_or(hidden, |maker| block.nodes[maker].width);
        let (inputs, op) = (vec![all[value]], GATHER.into());
        nodes.push(Node { op, inputs, weights: Vec::new(), attrs: Default::default(), width });
        rows[value] = nodes.len();
    }
    for index in &after {
        nodes.push(moved(*index, &rows));
        rows[index + 1] = nodes.len();
    }
    Ok(Block { name: block.name.clone(), nodes, output: rows[block.output] })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use dpo_plugin_api::builder::{Attention, BlockBuilder, Experts, GraphBuilder, Router, Scoring, Var};
    use dpo_plugin_api::model::Config;

    use super::*;

    fn graph(layers: usize, body: impl Fn(&mut BlockBuilder, Var) -> Var) -> ModelGraph {
        let mut graph = GraphBuilder::decoder(8, 16);
        graph.embed(|b, tokens| b.embedding("embed", tokens, 16, 8));
        let block = graph.block("block", body);
        (0..layers).for_each(|layer| graph.layer(block, format!("{layer}.")));
        graph.head(|b, x| b.lm_head("head", x, 16));
        gather_predictors(graph.finish(&Config::parse("{}").unwrap()).unwrap()).unwrap()
    }

    /// Op and inputs of every node of the last layer, and its output.
    fn last(graph: &ModelGraph) -> (Vec<(&str, Vec<usize>)>, usize) {
        let block = &graph.blocks[graph.layers.last().unwrap().block];
        (block.nodes.iter().map(|n| (n.op.as_str(), n.inputs.clone())).collect(), block.output)
    }

    /// The MLP comes before attention in the graph, and reads the same norm.
    #[test]
    fn the_last_layer_computes_all_rows_for_attention_alone() {
        let graph = graph(2, |b, x| {
            let h = b.rms_norm("n", x, 1e-6);
            let up = b.linear("up", h, 8);
            let (q, k, v) = (b.linear("q", h, 8), b.linear("k", h, 8), b.linear("v", h, 8));
            let attended = b.attention(q, k, v, Attention::new(1, 1, 8));
            let (out, up) = (b.linear("o", attended, 8), b.activation("silu", up));
            let sum = b.add(x, out);
            b.add(sum, up)
        });
        let expected = [
            ("rms_norm", vec![0]),
            ("linear", vec![1]),
            ("linear", vec![1]),
            ("linear", vec![1]),
            ("attention", vec![2, 3, 4]),
            ("gather", vec![0]),
            ("gather", vec![1]),
            ("gather", vec![5]),
            ("linear", vec![7]),
            ("linear", vec![8]),
            ("activation", vec![9]),
            ("add", vec![6, 10]),
            ("add", vec![12, 11]),
        ];
        assert_eq!(last(&graph), (expected.to_vec(), 13));
        assert_eq!(graph.blocks[1].nodes.iter().map(|n| n.width).collect::<Vec<_>>(), [8; 13]);
        assert!(graph.blocks[0].nodes.iter().all(|n| n.op != GATHER) && check(&graph).is_ok());
        assert_eq!(graph.layers.iter().map(|l| l.block).collect::<Vec<_>>(), [0, 1]);
    }

    /// A router with an auxiliary loss counts all tokens; what its experts make of them is read at those that predict.
    #[test]
    fn routers_that_count_tokens_run_on_all_rows() {
        let experts = |coefficient: f64| {
            let graph = graph(1, |b, x| {
                let logits = b.linear("gate", x, 4);
                let mut router = Router::new(Scoring::Softmax, 2);
                router.aux_loss_coef = Some(coefficient);
                let routing = b.route(logits, &router);
                b.experts(x, routing, &Experts::new("experts", 4, 2, 8, "silu"))
            });
            last(&graph).0.into_iter().map(|(op, inputs)| (op.to_owned(), inputs)).collect::<Vec<_>>()
        };
        let own = |nodes: &[(&str, Vec<usize>)]| {
            nodes.iter().map(|(op, inputs)| ((*op).to_owned(), inputs.clone())).collect::<Vec<_>>()
        };
        let all = [
            ("linear", vec![0]),
            ("route", vec![1]),
            ("gather", vec![0]),
            ("gather", vec![2]),
            ("experts", vec![3, 4]),
        ];
        assert_eq!(experts(0.1), own(&all));
        let some = [("gather", vec![0]), ("linear", vec![1]), ("route", vec![2]), ("experts", vec![1, 3])];
        assert_eq!(experts(0.0), own(&some));
    }

    #[test]
    fn a_block_that_mixes_no_rows_gathers_first_and_one_that_ends_so_last() {
        let mlp = graph(1, |b, x| b.linear("a", x, 8));
        assert_eq!(last(&mlp), (vec![("gather", vec![0]), ("linear", vec![1])], 2));
        assert_eq!(mlp.blocks.len(), 1);
        let attention = graph(1, |b, x| b.attention(x, x, x, Attention::new(1, 1, 8)));
        assert_eq!(last(&attention), (vec![("attention", vec![0, 0, 0]), ("gather", vec![1])], 2));
    }
}
