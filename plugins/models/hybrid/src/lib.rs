//! Decoders of which layers carry a state from token to token: gated delta nets, short convolutions, Mamba 2, between layers of
//! attention. One file for each lineage, in which a family is a row of a table.

mod bamba;
mod falcon;
mod granite;
mod lfm;
mod nemotron;
mod qwen;

use dpo_plugin_api::prelude::*;

/// Which layers are of attention, by any of the names that transformers has had for kinds of layers; `recurrent` are those of this family's
/// other kind. Where the config says nothing, `attends` does.
fn attention_layers(
    config: &Config,
    layers: usize,
    recurrent: &[&str],
    attends: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let stated = match config.opt_texts("layer_types")? {
        Some(types) => Some(types),
        None => config.opt_texts("layers_block_type")?,
    };
    let Some(types) = stated else { return Ok((0..layers).map(attends).collect()) };
    if types.len() != layers {
        return bail!("config.json: {} layer_types for {layers} layers", types.len());
    }
    let kind = |name: &String| match name.as_str() {
        "full_attention" | "attention" => Ok(true),
        other if recurrent.contains(&other) => Ok(false),
        other => bail!("config.json: layer type '{other}' is not supported by this family"),
    };
    types.iter().map(kind).collect()
}

/// Numbers of layers, where the config lists them.
fn list(config: &Config, key: &str) -> Result<Option<Vec<usize>>> {
    let Some(stated) = config.get(key) else { return Ok(None) };
    let number = |at: &Value| at.as_u64().map(|at| at as usize);
    match stated.as_array().and_then(|list| list.iter().map(number).collect()) {
        Some(list) => Ok(Some(list)),
        None => bail!("config.json: {key} should be a list of layers, is {stated}"),
    }
}

plugin! {
    models: [
        &qwen::QWEN3_5, &qwen::QWEN3_5_MOE, &qwen::QWEN3_NEXT,
        &lfm::LFM2, &lfm::LFM2_MOE, &lfm::LFM3,
        &granite::GRANITE4,
        &nemotron::NEMOTRON_H,
        &falcon::FALCON_H1,
        &bamba::BAMBA
    ]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use dpo_plugin_api::testing::check_model;

    use super::*;

    /// Of every family's published config: layers, those of attention, those with a state, those with experts.
    #[test]
    fn published_configs() {
        let expected: &[(&'static Family, [usize; 4])] = &[
            (&qwen::QWEN3_5, [32, 8, 24, 0]),
            (&qwen::QWEN3_5_MOE, [40, 10, 30, 40]),
            (&qwen::QWEN3_NEXT, [48, 12, 36, 48]),
            (&lfm::LFM2, [16, 6, 10, 0]),
            (&lfm::LFM2_MOE, [24, 6, 18, 22]),
            (&lfm::LFM3, [24, 11, 13, 0]),
            (&granite::GRANITE4, [40, 4, 36, 40]),
            (&nemotron::NEMOTRON_H, [52, 6, 23, 23]),
            (&falcon::FALCON_H1, [36, 36, 36, 0]),
            (&bamba::BAMBA, [32, 3, 29, 0]),
        ];
        for (family, counts) in expected {
            let graph = check_model(family);
            let with = |op: &str| {
                let has: Vec<bool> = graph.blocks.iter().map(|b| b.nodes.iter().any(|n| n.op == op)).collect();
                graph.layers.iter().filter(|l| has[l.block]).count()
            };
            let is = [graph.layers.len(), with("attention"), with("causal_conv"), with("experts")];
            assert_eq!(is, *counts, "{}", family.name);
        }
    }
}
