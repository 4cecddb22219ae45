//! The adapter: which linears get a low-rank update, its parameters in one flat f32 buffer, and PEFT's files.

mod config;
mod merge;
mod peft;
mod target;

use std::path::Path;

use candle_core::{Device, Tensor};
use dpo_plugin_api::check::check_linears;
use dpo_plugin_api::graph::{ModelGraph, Node};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::memory::{self, free_memory};
use crate::ops::Lora;
use crate::weights::{BlockId, blocks};

pub use config::{AdapterConfig, MOST_ALPHA};
pub use merge::merge;
pub use peft::{base_model, read_config};
pub use target::{Layers, Patterns, Targets};

/// No linear is as wide; products of a rank and the widths of a model stay far from the end of the numbers.
pub(crate) const MOST_RANK: usize = 1 << 16;

/// A linear that is adapted.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Its module, as PEFT names it: `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Columns of its input.
    pub inputs: usize,
    /// Columns of its output.
    pub outputs: usize,
    /// Rows of A.
    pub rank: usize,
    /// The factor on `B · A`.
    pub scale: f64,
    /// Where its A `[rank, inputs]` begins in the flat buffer; its B `[outputs, rank]` follows.
    pub offset: usize,
    /// The block it is in, and its node there.
    pub node: (BlockId, usize),
}

/// Low-rank updates with their parameters.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Rank, alpha, targets.
    pub config: AdapterConfig,
    /// Adapted linears in the order of the graph.
    pub sites: Vec<Site>,
    /// A and B of every site, one after the other.
    pub params: Vec<f32>,
}

impl Adapter {
    /// The sites of a new adapter without its parameters, for a plan.
    pub fn planned(graph: &ModelGraph, config: AdapterConfig) -> Result<Adapter> {
        config.check()?;
        let sites = sites(graph, &config).map_err(|e| e.at("--target-modules"))?;
        refuse_idle(graph, &config, &sites)?;
        Ok(Adapter { sites, params: Vec::new(), config })
    }

    /// A new adapter as PEFT initialises it: A uniform in `±1/sqrt(inputs)` (Kaiming with `a = sqrt(5)`), B zero.
    pub fn new(graph: &ModelGraph, config: AdapterConfig, seed: u64) -> Result<Adapter> {
        let mut adapter = Adapter::planned(graph, config)?;
        let rank = adapter.config.rank;
        // With its gradient and the two moments of AdamW.
        let bytes = adapter.parameters().saturating_mul(4 * size_of::<f32>());
        if let Some(free) = free_memory().filter(|free| bytes > *free) {
            let (needs, free) = (memory::size(bytes), memory::size(free));
            return Err(Error::input(format!(
                "an adapter of rank {rank} needs {needs} to be trained, there are {free}"
            ))
            .at("--lora-rank")
            .help("lower it: 8 to 64 is usual"));
        }
        adapter.params = vec![0.0; adapter.parameters()];
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for site in &adapter.sites {
            let bound = (site.inputs as f32).powf(-0.5);
            let a = site.offset..site.offset + site.rank * site.inputs;
            adapter.params[a].fill_with(|| rng.random_range(-bound..bound));
        }
        Ok(adapter)
    }

    /// Parameters of all sites. The sizes of a checked graph and [`MOST_RANK`] keep their number far from overflowing.
    pub fn parameters(&self) -> usize {
        self.sites.last().map_or(0, |s| s.offset + s.rank * (s.inputs + s.outputs))
    }

    /// What its parameters mean, in a text: of every site its module, rank and scale.
    pub fn shape(&self) -> String {
        let site = |s: &Site| format!("{} {} {}\n", s.module, s.rank, s.scale);
        self.sites.iter().map(site).collect()
    }

    /// An adapter that changes nothing, for a device that needs one.
    pub fn idle(graph: &ModelGraph) -> Result<Adapter> {
        Adapter::new(graph, AdapterConfig::new(1, 1.0), 0)
    }

    /// The adapter in a folder of PEFT's.
    pub fn load(graph: &ModelGraph, folder: &Path) -> Result<Adapter> {
        let config = read_config(folder)?;
        let sites = sites(graph, &config).map_err(|e| e.at(folder.join("adapter_config.json").display()))?;
        // Nothing is allocated on the word of a config: parameters come as the file's tensors turn out to be those.
        let mut adapter = Adapter { params: Vec::new(), sites, config };
        peft::read_params(&mut adapter, folder)?;
        Ok(adapter)
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors`.
    pub fn save(&self, folder: &Path, base_model: &str) -> Result<()> {
        peft::write(self, folder, base_model)
    }

    /// A and B of a site as tensors.
    pub fn lora(&self, site: &Site) -> Result<Lora> {
        let [a, b] = self.ranges(site);
        Ok(Lora {
            a: Tensor::from_slice(&self.params[a], (site.rank, site.inputs), &Device::Cpu)?,
            b: Tensor::from_slice(&self.params[b], (site.outputs, site.rank), &Device::Cpu)?,
            scale: site.scale,
        })
    }

    /// Whether every B is zero, as in a new adapter: then its update is zero, whatever A is.
    pub fn changes_nothing(&self) -> bool {
        self.sites.iter().all(|s| self.params[self.ranges(s)[1].clone()].iter().all(|v| *v == 0.0))
    }

    /// Where A and B of a site lie in the flat buffer.
    pub fn ranges(&self, site: &Site) -> [std::ops::Range<usize>; 2] {
        let middle = site.offset + site.rank * site.inputs;
        [site.offset..middle, middle..middle + site.rank * site.outputs]
    }
}

/// The linears of a graph that the targets name.
fn sites(graph: &ModelGraph, config: &AdapterConfig) -> Result<Vec<Site>> {
    check_linears(graph, |module| config.adapts(module))?;
    let mut sites = Vec::new();
    let mut offset = 0;
    let mut modules = Vec::new();
    for (block, prefix, nodes) in blocks(graph) {
        for (index, node) in nodes.iter().enumerate().filter(|(_, n)| n.op == "linear") {
            let Some(module) = node.module().map(|m| format!("{prefix}{m}")) else { continue };
            let Some([_, inputs]) = node.weight("weight").map(|w| w.shape.as_slice()) else { continue };
            if config.adapts(&module) {
                let (inputs, outputs) = (*inputs, node.width);
                let (rank, scale) = (config.rank_of(&module), config.scale_of(&module));
                sites.push(Site { module: module.clone(), inputs, outputs, rank, scale, offset, node: (block, index) });
                offset += rank * (inputs + outputs);
            }
            modules.push(module);
        }
    }
    if let Some(unused) = config.targets.first_without_match(&modules) {
        return Err(Error::unknown("target module", &unused, last_names(&modules)));
    }
    if sites.is_empty() {
        return Err(Error::input("no linear is left to adapt").help("exclude fewer, or name other target modules"));
    }
    Ok(sites)
}

/// Refuses what a user says of modules that there are none of.
fn refuse_idle(graph: &ModelGraph, config: &AdapterConfig, sites: &[Site]) -> Result<()> {
    let whole = |(_, prefix, nodes): (BlockId, &str, &[Node])| -> Vec<String> {
        nodes.iter().filter_map(|node| Some(format!("{prefix}{}", node.module()?))).collect()
    };
    let modules: Vec<String> = blocks(graph).flat_map(whole).collect();
    if let Some(unused) = config.exclude.as_ref().and_then(|exclude| exclude.first_without_match(&modules)) {
        return Err(Error::unknown("module", &unused, last_names(&modules)).at("--exclude-modules"));
    }
    let adapted = sites.iter().map(|s| s.module.as_str());
    for (flag, patterns) in [("--rank-pattern", &config.rank_pattern), ("--alpha-pattern", &config.alpha_pattern)] {
        if let Some(unused) = patterns.first_without_match(adapted.clone()) {
            let modules: Vec<String> = adapted.map(str::to_owned).collect();
            return Err(Error::unknown("adapted module", unused, last_names(&modules)).at(flag));
        }
    }
    Ok(())
}

/// The last names of modules, each once.
fn last_names(modules: &[String]) -> Vec<&str> {
    let mut last: Vec<&str> = modules.iter().filter_map(|m| m.rsplit('.').next()).collect();
    last.sort_unstable();
    last.dedup();
    last
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use dpo_plugin_api::builder::GraphBuilder;
    use dpo_plugin_api::model::Config;

    use super::*;

    /// A model that reads one matrix at two places, such as a shared MLP.
    #[test]
    fn a_linear_that_is_used_twice_is_not_adapted() {
        let mut graph = GraphBuilder::decoder(8, 16);
        graph.embed(|b, tokens| b.embedding("embed", tokens, 16, 8));
        let block = graph.block("block", |b, x| {
            let (h, other) = (b.linear("shared", x, 8), b.linear("own", x, 8));
            let h = b.linear("shared", h, 8);
            b.add(h, other)
        });
        graph.layer(block, "0.");
        graph.head(|b, x| b.lm_head("head", x, 16));
        let graph = graph.finish(&Config::parse("{}").unwrap()).unwrap();
        let adapter = |targets| {
            let config = AdapterConfig { targets, ..AdapterConfig::new(2, 4.0) };
            Adapter::new(&graph, config, 0).map(|a| a.sites.len()).map_err(|e| e.to_string())
        };
        assert!(adapter(Targets::AllLinear).unwrap_err().contains("two linears of the name '0.shared'"));
        assert_eq!(adapter(Targets::Names(vec!["own".into()])), Ok(1));
    }
}
