//! `dpo-host describe NAME`: a family's graph, a format's rows, a loss's formula and options.

use std::path::PathBuf;

use clap::Args;
use dpo_plugin_api::graph::{Block, ModelGraph};

use crate::args::model::ConfigArgs;
use dpo_core::error::{Error, Result};
use dpo_hub::model::understood;
use dpo_plugins::{Family, Format, Loss, Registry};

#[derive(Args)]
pub(crate) struct DescribeOptions {
    /// Name of a family, a format or a loss
    name: String,
    /// A config.json, or the folder of a checkpoint, whose graph to print; by default the family's example
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    reading: ConfigArgs,
    /// Print the graph as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn describe(registry: &Registry, options: &DescribeOptions) -> Result<()> {
    if let Ok(family) = registry.family(&options.name) {
        return describe_family(family, options);
    }
    if let Ok(loss) = registry.loss(&options.name) {
        describe_loss(loss);
        return Ok(());
    }
    let known = registry.rows.iter().map(|r| r.name.as_str());
    let unknown = || Error::unknown("plugin", &options.name, known);
    describe_format(registry.format(&options.name).map_err(|_| unknown())?);
    Ok(())
}

fn describe_family(family: &Family, options: &DescribeOptions) -> Result<()> {
    let (text, place) = match &options.config {
        Some(path) => {
            let path = if path.is_dir() { path.join("config.json") } else { path.clone() };
            (dpo_core::files::read_text(&path)?, path.display().to_string())
        }
        None => (family.example_config.clone(), "its example config".to_owned()),
    };
    let (graph, remarks) = understood(family, &text, &options.reading.ignore_config_key).map_err(|e| e.at(&place))?;
    remarks.tell();
    if options.json {
        let text = serde_json::to_string_pretty(&graph).map_err(|e| Error::run(e.to_string()))?;
        println!("{text}");
        return Ok(());
    }
    println!("{}: {}\nanswers for {}", family.name, family.summary, family.claims.join(", "));
    family.checkpoints.iter().for_each(|name| println!("reads {name}"));
    println!();
    println!("graph of {place}: {} wide, {} tokens in the vocabulary", graph.hidden_size, graph.vocab_size);
    if let Some(most) = graph.max_positions {
        println!("rows of up to {most} tokens");
    }
    print_graph(&graph);
    Ok(())
}

fn print_graph(graph: &ModelGraph) {
    print_block(&graph.embed, "");
    for (at, block) in graph.blocks.iter().enumerate() {
        let layers: Vec<&str> = graph.layers.iter().filter(|l| l.block == at).map(|l| l.prefix.as_str()).collect();
        let (first, last) = (layers.first().unwrap_or(&""), layers.last().unwrap_or(&""));
        print_block(block, &format!(", {} layers, the first {first}*, the last {last}*", layers.len()));
    }
    print_block(&graph.head, "");
}

fn print_block(block: &Block, note: &str) {
    println!("\n{}{note}", block.name);
    for (i, node) in block.nodes.iter().enumerate() {
        let inputs: Vec<String> = node.inputs.iter().map(|v| format!("%{v}")).collect();
        let weights = node.weights.iter().map(|w| format!("{} {:?}", w.tensor, w.shape));
        let attrs = node.attrs.iter().map(|(name, value)| match value.as_array() {
            Some(list) => match (list.first(), list.last()) {
                (Some(first), Some(last)) => format!("{name}=[{} numbers, {first} to {last}]", list.len()),
                _ => format!("{name}=[]"),
            },
            None => format!("{name}={value}"),
        });
        let details: Vec<String> = weights.chain(attrs).collect();
        println!(
            "  %{:<3} [{:>6}]  {:<10} {:<12} {}",
            i + 1,
            node.width,
            node.op,
            inputs.join(" "),
            details.join(", ")
        );
    }
    println!("  returns %{}", block.output);
}

fn describe_format(format: &Format) {
    println!("{}: {}\n\nrows:\n{}", format.name, format.summary, format.examples.trim_end());
}

fn describe_loss(loss: &Loss) {
    println!("{}: {}\n\n  {}\n", loss.name, loss.summary, loss.formula);
    println!("answers     to a prompt: {}", loss.needs.answers.describe());
    println!("reference   {}", if loss.needs.reference { "needed" } else { "not needed" });
    println!(
        "called      {}",
        if loss.needs.whole_batch { "once a step, with all examples" } else { "for every micro-batch" }
    );
    if !loss.needs.statistics.is_empty() {
        println!("statistics  {}", loss.needs.statistics.join(", "));
    }
    if loss.needs.prompt {
        println!("prompt      its tokens are scored as well");
    }
    if loss.needs.mismatched {
        println!("mismatched  an answer to another prompt is scored beside each");
    }
    for option in &loss.options {
        println!("option      {} = {}: {}", option.name, option.default, option.help);
    }
    if !loss.peers.is_empty() {
        println!("elsewhere   {}", loss.peers);
    }
}
