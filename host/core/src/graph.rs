//! A family's graph: checked against the ops of this host before anything is loaded.

use std::collections::HashMap;

use dpo_plugin_api::graph::{Block, ModelGraph};

use crate::error::{Error, Result};
use crate::logprobs::STATISTICS;
use crate::memory::size;
use crate::ops;
use crate::weights::{MOST_NAME, renamed, weights};

/// Most bytes of a model's weights in f32: 256 TiB.
const MOST_BYTES: usize = 1 << 48;

/// Features of graphs and manifests that this host has, for plugins that name what they require.
const FEATURES: &[&str] = &[];

/// Refuses a statistic that this host does not compute.
pub fn check_statistics(names: &[String]) -> Result<()> {
    match names.iter().find(|n| !STATISTICS.contains(&n.as_str())) {
        Some(unknown) => Err(Error::unknown("statistic", unknown, STATISTICS)),
        None => Ok(()),
    }
}

/// Refuses what requires a feature this host lacks, with the feature's name.
pub fn refuse_unknown_features(required: &[String]) -> Result<()> {
    match required.iter().find(|r| !FEATURES.contains(&r.as_str())) {
        Some(unknown) => Err(Error::input(format!("requires the feature '{unknown}', which this host lacks"))),
        None => Ok(()),
    }
}

/// Checks a graph: features, ops, attributes, widths, and that blocks keep the residual stream.
pub fn check(graph: &ModelGraph) -> Result<()> {
    refuse_unknown_features(&graph.requires)?;
    if graph.layers.is_empty() {
        return Err(Error::input("the graph has no layers"));
    }
    check_block(&graph.embed, 1, graph.hidden_size)?;
    for block in &graph.blocks {
        check_block(block, graph.hidden_size, graph.hidden_size)?;
    }
    if let Some(layer) = graph.layers.iter().find(|l| l.block >= graph.blocks.len()) {
        return Err(Error::input(format!("layer '{}' is of block {}, which is not there", layer.prefix, layer.block)));
    }
    check_block(&graph.head, graph.hidden_size, graph.vocab_size)?;
    check_sizes(graph)?;
    check_layouts(graph)?;
    let ends =
        |block: &Block| block.nodes.last().is_some_and(|n| n.op == "lm_head") && block.output == block.nodes.len();
    let elsewhere = |block: &Block| block.nodes.iter().rev().skip(1).any(|n| n.op == "lm_head");
    if !ends(&graph.head)
        || elsewhere(&graph.head)
        || graph.blocks.iter().any(|b| b.nodes.iter().any(|n| n.op == "lm_head"))
    {
        return Err(Error::input("the head, and nothing else, should end in the op 'lm_head'"));
    }
    // The host runs the head only at rows that predict an answer token, which is right for ops that work row by row.
    for (block, place) in [(&graph.embed, "embedding"), (&graph.head, "head")] {
        for node in &block.nodes {
            if ops::find(&node.op)?.reads_layout {
                return Err(Error::input(format!("the {place} has the op '{}', which needs whole rows", node.op)));
            }
        }
    }
    Ok(())
}

/// Refuses weights of more bytes than any machine has: what is computed from sizes after this does not overflow.
fn check_sizes(graph: &ModelGraph) -> Result<()> {
    let mut total = 0_usize;
    for (prefix, weight) in weights(graph) {
        let bytes = weight.shape.iter().try_fold(size_of::<f32>(), |n, columns| n.checked_mul(*columns));
        total = match bytes.and_then(|bytes| total.checked_add(bytes)).filter(|bytes| *bytes <= MOST_BYTES) {
            Some(total) => total,
            None => {
                let (name, shape) = (format!("{prefix}{}", weight.tensor), &weight.shape);
                let most = size(MOST_BYTES);
                return Err(Error::input(format!("with tensor '{name}' of shape {shape:?} the weights exceed {most}")));
            }
        };
    }
    Ok(())
}

/// Refuses a layout that gives two tensors one name, or one a name that no file has.
fn check_layouts(graph: &ModelGraph) -> Result<()> {
    for (at, layout) in graph.layouts.iter().enumerate() {
        let wrong = |what: String| Err(Error::input(what).at(format!("layout {at}")));
        if layout.iter().any(|(from, to)| from.is_empty() || from.len().max(to.len()) > MOST_NAME) {
            return wrong(format!("replaces a text that is empty, or of more than {MOST_NAME} bytes"));
        }
        let mut owners = HashMap::new();
        for (prefix, weight) in weights(graph) {
            let own = format!("{prefix}{}", weight.tensor);
            let Some(name) = renamed(layout, &own) else {
                return wrong(format!("makes a name of more than {MOST_NAME} bytes of '{own}'"));
            };
            match owners.insert(name, own.clone()) {
                Some(other) if other != own => {
                    return wrong(format!("gives the tensors '{other}' and '{own}' the same name"));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn check_block(block: &Block, input: usize, output: usize) -> Result<()> {
    let place = || format!("block '{}'", block.name);
    let mut widths = vec![input];
    for node in &block.nodes {
        let read: Option<Vec<usize>> = node.inputs.iter().map(|v| widths.get(*v).copied()).collect();
        let Some(read) = read else {
            return Err(Error::input(format!("op '{}' reads a value that is not made yet", node.op)).at(place()));
        };
        ops::check_node(node, &read).map_err(|e| e.at(place()))?;
        widths.push(node.width);
    }
    match widths.get(block.output) {
        Some(width) if *width == output => Ok(()),
        width => Err(Error::input(format!("returns {width:?} columns, needs {output}")).at(place())),
    }
}

/// How many tokens a model has: rows of its embedding, or of its projection where these are fewer.
pub fn vocabulary(graph: &ModelGraph) -> usize {
    let tables = graph.embed.nodes.iter().filter(|n| n.op == "embedding").flat_map(|n| &n.weights);
    tables.filter_map(|w| w.shape.first().copied()).fold(graph.vocab_size, usize::min)
}

/// Refuses token ids that a model of so many tokens does not have: a device would read other memory's rows for them.
pub fn refuse_foreign_tokens<'a>(ids: impl IntoIterator<Item = &'a u32>, vocabulary: usize) -> Result<()> {
    match ids.into_iter().find(|id| **id as usize >= vocabulary) {
        Some(id) => Err(Error::input(format!("token id {id} is beyond the model's vocabulary of {vocabulary}"))
            .help("the tokenizer is not this model's, or has tokens that were added to it and not to the model")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use dpo_plugin_api::builder::{BlockBuilder, GraphBuilder, Var};
    use dpo_plugin_api::model::Config;
    use dpo_plugin_api::rope::Rope;

    type Build<'a> = &'a dyn Fn(&mut BlockBuilder, Var) -> Var;

    /// A graph whose embedding or head has one op more.
    fn checked(more: [Build<'_>; 2]) -> Result<(), String> {
        let mut graph = GraphBuilder::decoder(8, 16);
        graph.embed(|b, tokens| {
            let x = b.embedding("embed", tokens, 16, 8);
            more[0](b, x)
        });
        let block = graph.block("block", |b, x| b.linear("a", x, 8));
        graph.layer(block, "0.");
        graph.head(|b, x| {
            let h = more[1](b, x);
            b.lm_head("head", h, 16)
        });
        super::check(&graph.finish(&Config::parse("{}").unwrap()).unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn ops_that_need_whole_rows_run_in_layers_alone() {
        let nothing = |_: &mut BlockBuilder, x: Var| x;
        let scale = |b: &mut BlockBuilder, x: Var| b.scale(x, 2.0);
        let rope = Rope::of(vec![1.0, 0.5]);
        let turn = |b: &mut BlockBuilder, x: Var| b.rope(x, 4, &rope);
        assert_eq!(checked([&scale, &scale]), Ok(()));
        assert!(checked([&turn, &nothing]).unwrap_err().contains("the embedding has the op 'rope'"));
        assert!(checked([&nothing, &turn]).unwrap_err().contains("the head has the op 'rope'"));
    }

    #[test]
    fn a_layout_gives_every_tensor_a_name_of_its_own() {
        let laid_out = |layout: &[(&str, &str)]| {
            let mut graph = GraphBuilder::decoder(8, 16);
            graph.embed(|b, tokens| b.embedding("embed", tokens, 16, 8));
            let block = graph.block("block", |b, x| b.linear("a", x, 8));
            graph.layer(block, "0.");
            graph.layer(block, "1.");
            graph.head(|b, x| b.lm_head("embed", x, 16));
            graph.layout(layout);
            super::check(&graph.finish(&Config::parse("{}").unwrap()).unwrap()).map_err(|e| e.to_string())
        };
        assert_eq!(laid_out(&[("0.", "h.0."), ("a.", "c.")]), Ok(()));
        assert!(laid_out(&[("0.", "1.")]).unwrap_err().contains("'0.a.weight' and '1.a.weight' the same name"));
        assert!(laid_out(&[("", "x")]).unwrap_err().contains("empty"));
        assert!(laid_out(&[("e", "ee"); 64]).unwrap_err().contains("more than 4096 bytes"));
    }
}
