//! Whether the host can run a graph: asked by the host before anything is loaded, and by [`testing`](crate::testing) in an author's
//! tests.

use std::collections::HashMap;

use crate::graph::{Block, MOST_NAME, ModelGraph, renamed};
use crate::{Error, Result, bail, ops};

/// Most bytes of a model's weights in f32: 256 TiB.
const MOST_BYTES: usize = 1 << 48;

/// Features of graphs and manifests that this version has, for plugins that name what they require.
const FEATURES: &[&str] = &[];

/// Refuses what requires a feature that this version lacks, with the feature's name.
pub fn check_features(required: &[String]) -> Result<()> {
    match required.iter().find(|r| !FEATURES.contains(&r.as_str())) {
        Some(unknown) => bail!("requires the feature '{unknown}', which this host lacks"),
        None => Ok(()),
    }
}

/// The name of a plugin's item: of lower-case letters, digits, `-`, `_` and `.`.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
    match !name.is_empty() && name.chars().all(plain) {
        true => Ok(()),
        false => bail!("the name '{name}' should be of lower-case letters, digits, '-', '_' and '.'"),
    }
}

/// Checks a graph: features, ops, attributes, weights, widths, that blocks keep the residual stream and the head alone ends in
/// logits, sizes, names.
///
/// # Errors
/// What is wrong, and in which block and op.
pub fn check_graph(graph: &ModelGraph) -> Result<()> {
    check_features(&graph.requires)?;
    if graph.layers.is_empty() {
        return bail!("the graph has no layers");
    }
    if let Some(layer) = graph.layers.iter().find(|l| l.block >= graph.blocks.len()) {
        return bail!("layer '{}' is of block {}, which is not there", layer.prefix, layer.block);
    }
    let (hidden, vocab) = (graph.hidden_size, graph.vocab_size);
    check_block(&graph.embed, Role::Embedding, 1, hidden)?;
    graph.blocks.iter().try_for_each(|block| check_block(block, Role::Layer, hidden, hidden))?;
    check_block(&graph.head, Role::Head, hidden, vocab)?;
    check_sizes(graph)?;
    check_unused(graph)?;
    check_layouts(graph)?;
    check_assemblies(graph)
}

/// Refuses two linears of one name, of those that are adapted: an adapter's file names parameters by module.
///
/// # Errors
/// The name, and where the two are.
pub fn check_linears(graph: &ModelGraph, adapted: impl Fn(&str) -> bool) -> Result<()> {
    let mut owners: HashMap<String, &str> = HashMap::new();
    for (prefix, block) in graph.parts() {
        let modules = block.nodes.iter().filter(|n| ops::is_module(n)).filter_map(|n| n.module());
        for module in modules.map(|m| format!("{prefix}{m}")).filter(|m| adapted(m)) {
            if owners.insert(module.clone(), &block.name).is_some() {
                let layers = graph.layers.iter().filter(|l| !prefix.is_empty() && l.prefix == prefix).count();
                let help = match layers > 1 {
                    true => format!("{layers} layers have the prefix '{prefix}'"),
                    false => {
                        "a linear that a model uses twice cannot be adapted: leave it out of the target modules".into()
                    }
                };
                let what = format!("the graph has two linears of the name '{module}'");
                return Err(Error::new(what).help(help).within(&format!("block '{}'", block.name)));
            }
        }
    }
    Ok(())
}

/// What a block is for.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Embedding,
    Layer,
    Head,
}

fn check_block(block: &Block, role: Role, input: usize, output: usize) -> Result<()> {
    fits(block, role, input, output).map_err(|e| e.within(&format!("block '{}'", block.name)))
}

fn fits(block: &Block, role: Role, input: usize, output: usize) -> Result<()> {
    let mut widths = vec![input];
    let mut is_read = vec![false; block.nodes.len() + 1];
    for (at, node) in block.nodes.iter().enumerate() {
        let op = &node.op;
        let read: Option<Vec<usize>> = node.inputs.iter().map(|v| widths.get(*v).copied()).collect();
        let Some(read) = read else { return bail!("op '{op}' reads a value that is not made yet") };
        node.inputs.iter().for_each(|v| is_read[*v] = true);
        ops::check_node(node, &read)?;
        let schema = ops::find(op)?;
        // The host runs embedding and head only at rows that it needs, which is right for ops that work row by row.
        if schema.reads_layout && role != Role::Layer {
            let place = if role == Role::Head { "head" } else { "embedding" };
            return bail!("the {place} has the op '{op}', which needs whole rows: it runs in layers alone");
        }
        let ends_head = role == Role::Head && at + 1 == block.nodes.len();
        if op == "lm_head" && !ends_head {
            return bail!("op 'lm_head' should end the head, and be nowhere else");
        }
        widths.push(node.width);
    }
    if role == Role::Head {
        let ends = block.nodes.last().is_some_and(|n| n.op == "lm_head") && block.output == block.nodes.len();
        if !ends {
            let last = block.nodes.last().map_or("nothing".into(), |n| format!("'{}'", n.op));
            return bail!("the head should end in the op 'lm_head', ends in {last}");
        }
    }
    let columns = if role == Role::Head { "vocabulary" } else { "residual stream" };
    match widths.get(block.output) {
        Some(width) if *width == output => {}
        Some(width) => return bail!("returns {width} columns, needs the {output} of the {columns}"),
        None => return bail!("returns value {}, of which there are {}", block.output, widths.len()),
    }
    is_read[block.output] = true;
    match is_read.iter().position(|read| !read) {
        None => Ok(()),
        Some(0) => bail!("does not read its input"),
        Some(at) => {
            let node = &block.nodes[at - 1];
            let tensor = node.weights.first().map(|w| format!(" ({})", w.tensor)).unwrap_or_default();
            bail!("op '{}'{tensor}: its value should be read, is by no op", node.op)
        }
    }
}

/// Refuses weights of more bytes than any machine has: what is computed from sizes after this does not overflow.
fn check_sizes(graph: &ModelGraph) -> Result<()> {
    let mut total = 0_usize;
    for (prefix, weight) in graph.weights() {
        let bytes = weight.shape.iter().try_fold(size_of::<f32>(), |n, columns| n.checked_mul(*columns));
        total = match bytes.and_then(|bytes| total.checked_add(bytes)).filter(|bytes| *bytes <= MOST_BYTES) {
            Some(total) => total,
            None => {
                let (name, shape) = (format!("{prefix}{}", weight.tensor), &weight.shape);
                return bail!("with tensor '{name}' of shape {shape:?} the weights exceed 256 TiB");
            }
        };
    }
    Ok(())
}

/// Refuses a pattern of unused tensors that no name has, or that every name has.
fn check_unused(graph: &ModelGraph) -> Result<()> {
    match graph.unused_tensors.iter().find(|pattern| pattern.chars().all(|c| c == '*')) {
        Some(all) => bail!("unused tensors '{all}' should name a part of the tensors that files have"),
        None => Ok(()),
    }
}

/// Refuses a layout that gives two tensors one name, or one a name that no file has.
fn check_layouts(graph: &ModelGraph) -> Result<()> {
    for (at, layout) in graph.layouts.iter().enumerate() {
        if layout.iter().any(|(from, to)| from.is_empty() || from.len().max(to.len()) > MOST_NAME) {
            return bail!("layout {at} replaces a text that is empty, or of more than {MOST_NAME} bytes");
        }
        let mut owners = HashMap::new();
        for (prefix, weight) in graph.weights() {
            let own = format!("{prefix}{}", weight.tensor);
            let Some(name) = renamed(layout, &own) else {
                return bail!("layout {at} makes a name of more than {MOST_NAME} bytes of '{own}'");
            };
            match owners.insert(name, own.clone()) {
                Some(other) if other != own => {
                    return bail!("layout {at} gives the tensors '{other}' and '{own}' the same name");
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Refuses an assembly of no parts, or of names that no file has.
fn check_assemblies(graph: &ModelGraph) -> Result<()> {
    let named = |name: &String| !name.is_empty() && name.len() <= MOST_NAME && name.matches('*').count() <= 1;
    match graph.assemblies.iter().find(|a| a.parts.is_empty() || !a.parts.iter().chain([&a.tensor]).all(named)) {
        Some(wrong) => {
            bail!("the tensor '{}' is assembled of parts that no file names: {:?}", wrong.tensor, wrong.parts)
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use crate::builder::{BlockBuilder, GraphBuilder, Var};
    use crate::model::Config;
    use crate::rope::Rope;

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
        super::check_graph(&graph.finish(&Config::parse("{}").unwrap()).unwrap()).map_err(|e| e.to_string())
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
            super::check_graph(&graph.finish(&Config::parse("{}").unwrap()).unwrap()).map_err(|e| e.to_string())
        };
        assert_eq!(laid_out(&[("0.", "h.0."), ("a.", "c.")]), Ok(()));
        assert!(laid_out(&[("0.", "1.")]).unwrap_err().contains("'0.a.weight' and '1.a.weight' the same name"));
        assert!(laid_out(&[("", "x")]).unwrap_err().contains("empty"));
        assert!(laid_out(&[("e", "ee"); 64]).unwrap_err().contains("more than 4096 bytes"));
    }
}
