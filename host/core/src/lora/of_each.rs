//! Adapters whose files have an A and a B for every expert's projection, as PEFT wrote them while experts were linears: they are put
//! together to those of the tensors that have all experts. Where gate and up are one matrix, its A has the rows of both, and B those of
//! each beside zeros (as `PeftConcatenate` of `peft/utils/transformers_weight_conversion.py`), so that its rank and alpha are twice
//! theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use dpo_plugin_api::graph::{Assembly, Layout, ModelGraph, Weight, renamed};
use dpo_plugin_api::ops::is_module;

use super::target::{Targets, ends_in};
use super::{Adapter, AdapterConfig, experts_of, peft};
use crate::error::{Error, Result};
use crate::weights::{Values, blocks};

/// Tensors of an adapter by their names.
type Tensors = BTreeMap<String, Values>;

/// Layouts of files that call modules of a layer otherwise, and leave its prefix: Mixtral's experts are `block_sparse_moe` there.
fn of_modules(graph: &ModelGraph) -> impl Iterator<Item = &Layout> {
    let inside = |name: &String| name.starts_with('.') && name.ends_with('.');
    graph.layouts.iter().filter(move |layout| layout.iter().all(|(own, other)| inside(own) && inside(other)))
}

/// The name of a tensor or a module as files have it.
fn in_files(graph: &ModelGraph, own: &str) -> String {
    of_modules(graph)
        .filter_map(|layout| renamed(layout, own))
        .find(|name| name != own)
        .unwrap_or_else(|| own.to_owned())
}

/// Gives tensors that a file calls as its checkpoint does the names that the graph has for them.
fn to_own_names(graph: &ModelGraph, tensors: &mut Tensors) {
    for layout in of_modules(graph) {
        let own =
            |name: &String| layout.iter().rev().fold(name.clone(), |n, (own, other)| n.replace(other.as_str(), own));
        let others: Vec<_> = tensors.keys().map(|name| (name.clone(), own(name))).filter(|(a, b)| a != b).collect();
        for (name, own) in others {
            if let Some(values) = tensors.remove(&name) {
                tensors.insert(own, values);
            }
        }
    }
}

/// Puts the matrices of experts together, and lets the config say so. Files without such tensors stay as they are.
pub(super) fn fuse(graph: &ModelGraph, config: &mut AdapterConfig, tensors: &mut Tensors) -> Result<()> {
    to_own_names(graph, tensors);
    let mut fused: Vec<(&Assembly, usize, f64)> = Vec::new();
    for (_, prefix, nodes) in blocks(graph) {
        for node in nodes.iter().filter(|node| experts_of(node) > 1) {
            let of_weight = |weight: &Weight| -> Option<(String, &Assembly)> {
                let name = format!("{prefix}{}", weight.tensor);
                let own = |a: &&Assembly| first_of(a, &name).is_some_and(|first| tensors.contains_key(&first));
                let assembly = graph.assemblies.iter().find(own)?;
                Some((name, assembly))
            };
            let found: Vec<_> = node.weights.iter().filter_map(|w| Some((w, of_weight(w)?))).collect();
            for (place, (weight, (name, assembly))) in found.iter().enumerate() {
                let module = name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module);
                let inside = ".base_layer".repeat(found.len() - 1 - place);
                let [a, b] = fused_matrices(weight, name, assembly, tensors)?;
                let (rank, part) = (a.0[0] / weight.shape[0], assembly.part(name, 0, 0).unwrap_or_default());
                let scale = config.scale_of(part.strip_suffix(".weight").unwrap_or(&part));
                let [name_a, name_b, _] = peft::names(&format!("{module}{inside}"));
                tensors.extend([(name_a, a), (name_b, b)]);
                if fused.iter().all(|(known, ..)| known != assembly) {
                    fused.push((assembly, rank, scale));
                }
            }
        }
    }
    if fused.is_empty() {
        return Ok(());
    }
    for (assembly, rank, scale) in fused {
        let pattern = format!(r".*\.{}", assembly.tensor.replace('.', r"\."));
        config.parameters.push(assembly.tensor.clone());
        config.rank_pattern.add(&pattern, rank as f64)?;
        config.alpha_pattern.add(&pattern, scale / config.factor(1.0, rank))?;
    }
    rename_targets(graph, config);
    Ok(())
}

/// The A of an assembly's first part of the first expert.
fn first_of(assembly: &Assembly, name: &str) -> Option<String> {
    let part = assembly.part(name, 0, 0).filter(|_| assembly.is_of_each(0))?;
    let [a, ..] = peft::names(part.strip_suffix(".weight")?);
    Some(a)
}

/// A `[experts · rank, inputs]` and B `[outputs, rank · experts]` of all experts, which are taken out of the file's tensors.
fn fused_matrices(weight: &Weight, name: &str, assembly: &Assembly, tensors: &mut Tensors) -> Result<[Values; 2]> {
    let &[experts, rows, inputs] = weight.shape.as_slice() else {
        return Err(Error::run(format!("experts in a tensor of shape {:?}", weight.shape)));
    };
    let (count, share) = (assembly.parts.len(), rows / assembly.parts.len());
    let (mut all_a, mut all_b, mut rank) = (Vec::new(), Vec::new(), None);
    for expert in 0..experts {
        for part in 0..count {
            let own = assembly.part(name, part, expert).unwrap_or_default();
            let [name_a, name_b, _] = peft::names(own.strip_suffix(".weight").unwrap_or(&own));
            let mut take = |name: &str, outer: Option<usize>, inner: Option<usize>| match tensors.remove(name) {
                Some((shape, values))
                    if shape.len() == 2
                        && outer.is_none_or(|n| n == shape[0])
                        && inner.is_none_or(|n| n == shape[1]) =>
                {
                    Ok((shape, values))
                }
                Some((shape, _)) => {
                    Err(Error::input(format!("tensor '{name}' has shape {shape:?}, which is not the other experts'")))
                }
                None => Err(Error::input(format!("tensor '{name}' is missing, other experts have theirs"))),
            };
            let (shape, a) = take(&name_a, rank, Some(inputs))?;
            rank = Some(shape[0]);
            let (_, b) = take(&name_b, Some(share), rank)?;
            all_a.extend(a);
            all_b.push(b);
        }
    }
    let rank = rank.unwrap_or(1);
    let mut b = vec![0.0; rows * rank * count * experts];
    for (at, own) in all_b.iter().enumerate() {
        let (expert, part) = (at / count, at % count);
        for (row, values) in own.chunks(rank.max(1)).enumerate() {
            for (column, value) in values.iter().enumerate() {
                let (row, column) = (part * share + row, part * rank + column);
                b[(row * rank * count + column) * experts + expert] = *value;
            }
        }
    }
    Ok([(vec![experts * rank * count, inputs], all_a), (vec![rows, rank * count * experts], b)])
}

/// Writes an adapter with a module for every expert's projection, as vLLM reads it, and PEFT too: gate and up, which share an A here, have
/// it each. Both engines multiply all of them by `lora_alpha / r`; what differs from that is put into B. Modules are called as in the
/// checkpoint's files, which vLLM's are called after: it passes over names that it does not know, without a word.
///
/// # Errors
/// An adapter without experts, or on experts that a checkpoint has in one tensor.
pub(super) fn write(graph: &ModelGraph, adapter: &Adapter, folder: &Path, base_model: &str) -> Result<()> {
    let AdapterConfig { rank, .. } = adapter.config;
    let mut config = AdapterConfig { parameters: Vec::new(), ..adapter.config.clone() };
    let linears: Vec<&str> = adapter.sites.iter().filter(|s| s.experts == 1).map(|s| s.module.as_str()).collect();
    config.rank_pattern.keep(&linears);
    config.alpha_pattern.keep(&linears);
    let unit = config.factor(config.alpha, rank);
    let (mut tensors, mut targets) = (Vec::new(), BTreeSet::new());
    for site in &adapter.sites {
        let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
        let Some(name) = site.parameter.as_ref().filter(|_| site.experts > 1) else {
            targets.insert(last(&site.module));
            tensors.extend(
                peft::tensors(adapter, site).into_iter().map(|(name, values)| (in_files(graph, &name), values)),
            );
            continue;
        };
        let of_each = |a: &&Assembly| a.part(name, 0, 0).is_some() && a.is_of_each(0);
        let Some(assembly) = graph.assemblies.iter().find(of_each) else {
            return Err(Error::input(format!("'{name}' has all experts in one tensor: the adapter is read as it is")));
        };
        let [a, b] = adapter.ranges(site).map(|range| &adapter.params[range]);
        let (factor, share) = ((site.scale / unit) as f32, site.outputs / assembly.parts.len());
        let experts = a.chunks(site.rank * site.inputs).zip(b.chunks(site.outputs * site.rank)).enumerate();
        for (expert, (a, b)) in experts {
            for (part, b) in b.chunks(share * site.rank).enumerate() {
                let own = assembly.part(name, part, expert).unwrap_or_default();
                let [name_a, name_b, _] =
                    peft::names(own.strip_suffix(".weight").unwrap_or(&own)).map(|name| in_files(graph, &name));
                tensors.push((name_a, (vec![site.rank, site.inputs], a.to_vec())));
                tensors.push((name_b, (vec![share, site.rank], b.iter().map(|v| v * factor).collect())));
            }
        }
        for part in &assembly.parts {
            // PEFT asks for the name without a number, and layers without experts may have linears of the last name. What experts are
            // in is called otherwise in files.
            let module = part.split_once('.').map_or(part.as_str(), |(_, inside)| inside);
            let module = module.strip_suffix(".weight").unwrap_or(module).replace('.', r"\.");
            targets.insert(module.replace(r"*\.", r"(\d+\.)?"));
            if site.rank == rank {
                continue;
            }
            let pattern = format!(r".*\.{}", module.replace('*', r"\d+"));
            if config.rank_pattern.numbers().all(|(known, _)| *known != pattern) {
                config.rank_pattern.add(&pattern, site.rank as f64)?;
                config.alpha_pattern.add(&pattern, unit / config.factor(1.0, site.rank))?;
            }
        }
    }
    if adapter.sites.iter().all(|site| site.experts == 1) {
        return Err(Error::input("it is on no experts: the adapter is read as it is"));
    }
    let targets: Vec<String> = targets.into_iter().collect();
    config.targets = Targets::parse(&[format!(r".*\.({})", targets.join("|"))])?;
    peft::write_files(folder, &config.to_json(&adapter.sites, base_model), &tensors)
}

/// Takes names out of the targets that no linear has: those of experts' projections, and of routers, which become parameters.
fn rename_targets(graph: &ModelGraph, config: &mut AdapterConfig) {
    let (mut modules, mut routers) = (Vec::new(), Vec::new());
    for (_, prefix, nodes) in blocks(graph) {
        for node in nodes.iter().filter(|node| node.op == "linear") {
            let list = if is_module(node) { &mut modules } else { &mut routers };
            list.extend(node.module().map(|module| format!("{prefix}{module}")));
        }
    }
    let Targets::Names(names) = &mut config.targets else {
        let named = routers.iter().filter(|module| config.targets.name(module));
        config.parameters.extend(named.map(|module| format!("{module}.weight")));
        return;
    };
    names.retain(|name| {
        let of_linear = modules.iter().any(|module| ends_in(module, name));
        if routers.iter().any(|module| ends_in(module, name)) {
            config.parameters.push(format!("{name}.weight"));
        }
        of_linear
    });
}
