//! The adapter: which linears get a low-rank update, its parameters in one flat f32 buffer, and PEFT's files.

mod config;
mod init;
mod merge;
mod of_each;
mod peft;
mod shared;
mod target;

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::{Device, Tensor};
use dpo_plugin_api::check::check_linears;
use dpo_plugin_api::graph::{ModelGraph, Node, Weight};
use dpo_plugin_api::ops::is_module;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::memory::{self, free_memory};
use crate::ops::Lora;
use crate::optimizer::Group;
use crate::weights::{BlockId, blocks};

pub use config::{AdapterConfig, MOST_ALPHA};
pub use init::Init;
pub use merge::{Merged, MergedWeight, merge};
pub use peft::{base_model, read_config};
pub use shared::in_one_shape;
use target::ends_in;
pub use target::{Layers, Patterns, Targets};

/// No linear is as wide; products of a rank and the widths of a model stay far from the end of the numbers.
pub(crate) const MOST_RANK: usize = 1 << 16;

/// A linear that is adapted, or the matrices of a layer's experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Its module, as PEFT's files name it: `model.layers.0.self_attn.q_proj`. Of a parameter it is what wraps the parameter's module:
    /// `model.layers.0.mlp.experts`, and where two of its parameters are adapted, of the first one `….experts.base_layer`.
    pub module: String,
    /// Where `target_parameters` names it: `model.layers.0.mlp.experts.gate_up_proj`.
    pub parameter: Option<String>,
    /// How many matrices it has, each with an A and a B: one, or as many as there are experts.
    pub experts: usize,
    /// Columns of its input.
    pub inputs: usize,
    /// Columns of its output.
    pub outputs: usize,
    /// Its LoRA rank r.
    pub rank: usize,
    /// The factor on `B · A`.
    pub scale: f64,
    /// Numbers of its magnitude vector: as many as outputs where the adapter is DoRA, else none.
    pub magnitudes: usize,
    /// Where its A `[experts, rank, inputs]` begins in the flat buffer; its B `[experts, outputs, rank]` follows, then the magnitude
    /// vector.
    pub offset: usize,
    /// The block it is in, and its node there.
    pub node: (BlockId, usize),
    /// Which of the node's weights it is.
    pub weight: usize,
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
    /// A and B of the start in the places that they have in `params`, where the update is their difference (see [`Init`]); else empty.
    pub subtracted: Vec<f32>,
}

impl Site {
    /// Numbers of its A, B and magnitude vector. The sizes of a checked graph and [`MOST_RANK`] keep their number far from
    /// overflowing.
    fn numbers(&self) -> usize {
        self.experts * self.rank * (self.inputs + self.outputs) + self.magnitudes
    }
}

impl Adapter {
    /// The sites of a new adapter without its parameters, for a plan.
    pub fn planned(graph: &ModelGraph, config: AdapterConfig) -> Result<Adapter> {
        config.check()?;
        let sites = sites(graph, &config, Source::Flags).map_err(|e| e.at("--target-modules"))?;
        refuse_idle(graph, &config, &sites)?;
        Ok(Adapter { sites, params: Vec::new(), subtracted: Vec::new(), config })
    }

    /// A new adapter as PEFT initialises it. One that [starts from weights](Self::starts_from_weights) gets its numbers there.
    pub fn new(graph: &ModelGraph, config: AdapterConfig, seed: u64) -> Result<Adapter> {
        let mut adapter = Adapter::planned(graph, config)?;
        let rank = adapter.config.rank;
        let bytes = adapter.training_bytes();
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
        for site in adapter.sites.clone() {
            init::plain(&mut adapter, &site, &mut rng);
        }
        Ok(adapter)
    }

    /// Parameters of all sites.
    pub fn parameters(&self) -> usize {
        self.sites.last().map_or(0, |s| s.offset + s.numbers())
    }

    /// How many are subtracted again, and stay what they are.
    pub fn subtracted_parameters(&self) -> usize {
        if self.config.init.subtracts() { self.parameters() } else { 0 }
    }

    /// Bytes that training it takes on the CPU: parameters, gradient and the two moments of AdamW; what is subtracted, as it is and as
    /// tensors; of DoRA the sum of which the lengths are taken.
    pub fn training_bytes(&self) -> usize {
        let sum = |s: &Site| if s.magnitudes > 0 { 3 * s.inputs * s.outputs } else { 0 };
        let sums = self.sites.iter().map(sum).max().unwrap_or(0);
        (4 * self.parameters() + 2 * self.subtracted_parameters() + sums).saturating_mul(size_of::<f32>())
    }

    /// Rows of all matrices that are added up as the A of a site.
    pub fn columns(&self, site: &Site) -> usize {
        if self.config.init.subtracts() { 2 * site.rank } else { site.rank }
    }

    /// What its parameters mean, in a text: of every site its module, rank and scale, and whether it is DoRA.
    pub fn shape(&self) -> String {
        let site = |s: &Site| format!("{} {} {} {}\n", s.module, s.rank, s.scale, s.magnitudes);
        self.sites.iter().map(site).collect()
    }

    /// An adapter that changes nothing, for a device that needs one.
    pub fn idle(graph: &ModelGraph) -> Result<Adapter> {
        Adapter::new(graph, AdapterConfig::new(1, 1.0), 0)
    }

    /// The adapter in a folder of PEFT's.
    pub fn load(graph: &ModelGraph, folder: &Path) -> Result<Adapter> {
        let (mut config, mut tensors) = (read_config(folder)?, peft::read_tensors(folder)?);
        of_each::fuse(graph, &mut config, &mut tensors).map_err(|e| e.at(folder.display()))?;
        let file = folder.join("adapter_config.json").display().to_string();
        let sites = sites(graph, &config, Source::File).map_err(|e| e.at(&file))?;
        // Nothing is allocated on the word of a config: parameters come as the file's tensors turn out to be those.
        let mut adapter = Adapter { params: Vec::new(), subtracted: Vec::new(), sites, config };
        [adapter.params, adapter.subtracted] = peft::params(&adapter, tensors, folder)?;
        Ok(adapter)
    }

    /// Parameters, and what is subtracted, of an adapter of this shape that was saved.
    ///
    /// # Errors
    /// A folder whose tensors have other shapes.
    pub fn read(&self, folder: &Path) -> Result<[Vec<f32>; 2]> {
        peft::params(self, peft::read_tensors(folder)?, folder)
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors`.
    pub fn save(&self, folder: &Path, base_model: &str) -> Result<()> {
        peft::write(self, folder, base_model)
    }

    /// The same with a module for each expert's projection, as vLLM reads it.
    ///
    /// # Errors
    /// An adapter without experts, or on experts that a checkpoint has in one tensor.
    pub fn save_of_each(&self, graph: &ModelGraph, folder: &Path, base_model: &str) -> Result<()> {
        of_each::write(graph, self, folder, base_model)
    }

    /// A and B of a site as tensors.
    pub fn lora(&self, site: &Site) -> Result<Lora> {
        let [a, b] = self.ranges(site);
        let matrices = |of: &[f32]| -> Result<[Tensor; 2]> {
            Ok([
                Tensor::from_slice(&of[a.clone()], (site.experts * site.rank, site.inputs), &Device::Cpu)?,
                Tensor::from_slice(&of[b.clone()], (site.experts * site.outputs, site.rank), &Device::Cpu)?,
            ])
        };
        let magnitude = self.magnitude(site).map(|range| Tensor::new(&self.params[range], &Device::Cpu)).transpose()?;
        let [own_a, own_b] = matrices(&self.params)?;
        let subtracted = if self.subtracted.is_empty() { None } else { Some(matrices(&self.subtracted)?) };
        let mut lora = Lora::new(own_a, own_b, site.scale);
        (lora.weight, lora.subtracted, lora.magnitude) = (site.weight, subtracted, magnitude);
        Ok(lora)
    }

    /// What it adapts, as a person counts it.
    pub fn places(&self) -> String {
        let experts = self.sites.iter().filter(|s| s.experts > 1).count();
        let linears = self.sites.len() - experts;
        match experts {
            0 => format!("{linears} linears"),
            _ => format!("{linears} linears and {experts} tensors of experts"),
        }
    }

    /// The ends of the names of experts' tensors, where a model has experts and this adapts none of them.
    pub fn frozen_experts(&self, graph: &ModelGraph) -> Option<String> {
        let nodes = graph.parts().flat_map(|(_, block)| &block.nodes).filter(|node| node.op == "experts");
        let matrices = nodes.flat_map(|node| node.weights.iter().filter(|w| is_parameter(node, w)));
        let names: BTreeSet<&str> = matrices.map(|w| w.tensor.as_str()).collect();
        let frozen = !names.is_empty() && self.sites.iter().all(|s| s.experts == 1);
        frozen.then(|| names.into_iter().collect::<Vec<_>>().join(" "))
    }

    /// Whether its update is zero, as that of a new adapter: every B is, whatever A is, or A and B are what is subtracted. Of DoRA
    /// only the weights know it.
    pub fn changes_nothing(&self) -> bool {
        if self.config.dora {
            return self.params.is_empty();
        }
        if self.config.init.subtracts() {
            return self.params == self.subtracted;
        }
        self.sites.iter().all(|s| self.params[self.ranges(s)[1].clone()].iter().all(|v| *v == 0.0))
    }

    /// Where the magnitude vector of a site lies in the flat buffer, if it has one.
    pub fn magnitude(&self, site: &Site) -> Option<std::ops::Range<usize>> {
        let start = self.ranges(site)[1].end;
        (site.magnitudes > 0).then(|| start..start + site.magnitudes)
    }

    /// Groups of parameters where B has `ratio` times the learning rate: as in PEFT, the magnitude vector is with B.
    pub fn groups(&self, ratio: f64) -> Vec<Group> {
        if ratio == 1.0 {
            return vec![Group { range: 0..self.params.len(), ratio }];
        }
        let of_site = |site: &Site| {
            let [a, b] = self.ranges(site);
            [Group { range: a, ratio: 1.0 }, Group { range: b.start..b.end + site.magnitudes, ratio }]
        };
        self.sites.iter().flat_map(of_site).collect()
    }

    /// Where A and B of a site lie in the flat buffer.
    pub fn ranges(&self, site: &Site) -> [std::ops::Range<usize>; 2] {
        let (rows, middle) = (site.experts * site.rank, site.offset + site.experts * site.rank * site.inputs);
        [site.offset..middle, middle..middle + rows * site.outputs]
    }
}

/// Where a config comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Flags,
    File,
}

/// The linears of a graph that the targets name, and the parameters, in the order of the graph.
fn sites(graph: &ModelGraph, config: &AdapterConfig, source: Source) -> Result<Vec<Site>> {
    check_linears(graph, |module| config.adapts(module))?;
    let mut sites: Vec<Site> = Vec::new();
    let (mut modules, mut parameters) = (Vec::new(), Vec::new());
    for (block, prefix, nodes) in blocks(graph) {
        for (index, node) in nodes.iter().enumerate() {
            let node_at = (block, index);
            let mut add = |module: String, parameter: Option<String>, weight: usize| {
                let (&[.., outputs, inputs], experts) = (node.weights[weight].shape.as_slice(), experts_of(node))
                else {
                    return;
                };
                let name = parameter.as_deref().unwrap_or(&module);
                let (rank, scale) = (config.rank_of(name), config.scale_of(name));
                let magnitudes = if config.dora { outputs } else { 0 };
                let offset = sites.last().map_or(0, |s| s.offset + s.numbers());
                let node = node_at;
                sites.push(Site {
                    module,
                    parameter,
                    experts,
                    inputs,
                    outputs,
                    rank,
                    scale,
                    magnitudes,
                    offset,
                    node,
                    weight,
                });
            };
            let full = |weight: &Weight| format!("{prefix}{}", weight.tensor);
            if is_module(node) {
                let Some(module) = node.module().map(|m| format!("{prefix}{m}")) else { continue };
                let of_experts = matches!(config.targets, Targets::AllLinear) && names_experts(graph, &module);
                let at = node.weights.iter().position(|w| w.role == "weight").unwrap_or(0);
                // PEFT takes a linear's weight as a parameter, too.
                let weight = node.weights.get(at).map(full).filter(|name| config.adapts_parameter(name));
                if config.adapts(&module) && !of_experts {
                    add(module.clone(), None, at);
                } else if weight.is_some() {
                    add(module.clone(), weight, at);
                }
                modules.push(module);
                continue;
            }
            let matrices = node.weights.iter().enumerate().filter(|(_, w)| is_parameter(node, w));
            let named: Vec<(usize, String)> = matrices.map(|(at, w)| (at, full(w))).collect();
            parameters.extend(named.iter().map(|(_, name)| name.clone()));
            let adapted: Vec<_> = named.into_iter().filter(|(_, name)| config.adapts_parameter(name)).collect();
            for (place, (at, name)) in adapted.iter().enumerate() {
                let module = name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module);
                // PEFT wraps a module once for each of its parameters, the first one innermost.
                let inside = ".base_layer".repeat(adapted.len() - 1 - place);
                add(format!("{module}{inside}"), Some(name.clone()), *at);
            }
        }
    }
    if let Some(unused) = config.targets.first_without_match(&modules) {
        return Err(Error::unknown("target module", &unused, last_names(&modules)));
    }
    let weights: Vec<String> = modules.iter().map(|module| format!("{module}.weight")).collect();
    let known = |name: &str| parameters.iter().chain(&weights).any(|own| ends_in(own, name));
    // Of a file, names without a match are what PEFT made of names of modules; its tensors tell what it adapts.
    if let Some(unused) = config.parameters.iter().find(|name| source == Source::Flags && !known(name)) {
        return Err(Error::unknown("target parameter", unused, last_names(&parameters)).at("--target-parameters"));
    }
    if sites.is_empty() {
        return Err(Error::input("no linear is left to adapt").help("exclude fewer, or name other target modules"));
    }
    if let Some(site) = sites.iter().find(|s| s.experts > 1) {
        config.refuse_for_experts(site)?;
    }
    Ok(sites)
}

/// Whether a linear has the name of a projection of experts: PEFT takes such names in `target_modules` for the experts' own, so that
/// it could not read an adapter on this one.
fn names_experts(graph: &ModelGraph, module: &str) -> bool {
    let mut of_each = graph.assemblies.iter().flat_map(|a| &a.parts).filter(|part| part.contains('*'));
    let last = module.rsplit('.').next();
    of_each.any(|part| part.strip_suffix(".weight").and_then(|name| name.rsplit('.').next()) == last)
}

/// How many matrices each weight of a node has.
fn experts_of(node: &Node) -> usize {
    match node.op.as_str() {
        "experts" => node.weights.first().map_or(1, |w| w.shape[0]),
        _ => 1,
    }
}

/// Whether PEFT's `target_parameters` can name a weight that is no module's of its own: matrices of experts, a router's.
pub(crate) fn is_parameter(node: &Node, weight: &Weight) -> bool {
    match node.op.as_str() {
        "experts" => weight.shape.len() == 3,
        "linear" => weight.role == "weight",
        _ => false,
    }
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
    let adapted = sites.iter().map(|s| s.parameter.as_deref().unwrap_or(&s.module));
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
