//! Decoders with experts, of many houses: one file for each lineage, in which a family is a row of a table and what it differs in from
//! a Llama.

mod afmoe;
mod deepseek;
mod ernie;
mod glm;
mod gpt_oss;
mod granite;
mod hunyuan;
mod mixtral;
mod olmoe;
mod qwen;
mod sigmoid;

use dpo_plugin_api::prelude::*;

/// Which layers have experts: as `mlp_layer_types` says in files of transformers 5, else as `sparse` says of a layer.
fn sparse_layers(config: &Config, layers: usize, sparse: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    let Some(types) = config.opt_texts("mlp_layer_types")? else { return Ok((0..layers).map(sparse).collect()) };
    if types.len() != layers {
        return bail!("config.json: {} mlp_layer_types for {layers} layers", types.len());
    }
    let is_sparse = |kind: &String| match kind.as_str() {
        "dense" => Ok(false),
        "sparse" => Ok(true),
        other => bail!("config.json: MLP layer type '{other}' is not supported by this family"),
    };
    types.iter().map(is_sparse).collect()
}

/// Leaves the layers unread that files have behind the last one, for predicting several tokens at once.
fn leave_mtp(graph: &mut dpo_plugin_api::builder::GraphBuilder, config: &Config, layers: usize) -> Result<()> {
    let more = config.opt_int("num_nextn_predict_layers")?.or(config.opt_int("num_mtp_layers")?).unwrap_or(1);
    (layers..layers + more.min(8)).for_each(|layer| graph.unused_tensor(&format!("model.layers.{layer}.*")));
    graph.unused_tensor("mtp.*");
    graph.unused_tensor("model.mtp*");
    Ok(())
}

plugin! {
    models: [
        &qwen::QWEN2_MOE, &qwen::QWEN3_MOE,
        &mixtral::MIXTRAL, &mixtral::MINIMAX_M2,
        &olmoe::OLMOE, &olmoe::FLEX_OLMO,
        &glm::GLM4_MOE,
        &deepseek::DEEPSEEK_V2, &deepseek::DEEPSEEK_V3, &deepseek::GLM4_MOE_LITE,
        &ernie::ERNIE4_5_MOE,
        &gpt_oss::GPT_OSS,
        &granite::GRANITEMOE, &granite::GRANITEMOE_SWA,
        &hunyuan::HUNYUAN_MOE, &afmoe::AFMOE,
        &sigmoid::HY_V3, &sigmoid::EXAONE_MOE, &sigmoid::DOTS1, &sigmoid::SOLAR_OPEN
    ]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use dpo_plugin_api::ops::count;
    use dpo_plugin_api::testing::check_model;

    use super::*;

    /// Of every family's published config: layers, layers with experts, experts, experts of a token, billions of weights.
    #[test]
    fn published_configs() {
        let expected: &[(&'static Family, [usize; 5])] = &[
            (&qwen::QWEN2_MOE, [24, 24, 60, 4, 14]),
            (&qwen::QWEN3_MOE, [48, 48, 128, 8, 30]),
            (&mixtral::MIXTRAL, [32, 32, 8, 2, 46]),
            (&mixtral::MINIMAX_M2, [62, 62, 256, 8, 228]),
            (&olmoe::OLMOE, [16, 16, 64, 8, 6]),
            (&olmoe::FLEX_OLMO, [32, 32, 7, 5, 33]),
            (&glm::GLM4_MOE, [46, 45, 128, 8, 106]),
            (&deepseek::DEEPSEEK_V2, [27, 26, 64, 6, 15]),
            (&deepseek::DEEPSEEK_V3, [27, 26, 64, 6, 15]),
            (&deepseek::GLM4_MOE_LITE, [47, 46, 64, 4, 29]),
            (&ernie::ERNIE4_5_MOE, [28, 27, 64, 6, 21]),
            (&gpt_oss::GPT_OSS, [24, 24, 32, 4, 20]),
            (&granite::GRANITEMOE, [32, 32, 40, 8, 3]),
            (&granite::GRANITEMOE_SWA, [32, 32, 40, 8, 3]),
            (&hunyuan::HUNYUAN_MOE, [32, 32, 64, 8, 80]),
            (&afmoe::AFMOE, [32, 30, 128, 8, 26]),
            (&sigmoid::HY_V3, [80, 79, 192, 8, 295]),
            (&sigmoid::EXAONE_MOE, [48, 47, 128, 8, 236]),
            (&sigmoid::DOTS1, [62, 61, 128, 6, 142]),
            (&sigmoid::SOLAR_OPEN, [48, 48, 128, 8, 102]),
        ];
        for (family, numbers) in expected {
            let graph = check_model(family);
            let of = |block: usize| graph.blocks[block].nodes.iter().find(|n| n.op == "experts");
            let sparse = graph.layers.iter().filter_map(|l| of(l.block));
            let experts = sparse.clone().next().unwrap();
            let names: std::collections::BTreeMap<String, usize> = graph
                .weights()
                .map(|(prefix, w)| (format!("{prefix}{}", w.tensor), w.shape.iter().product()))
                .collect();
            let billions = names.values().sum::<usize>() / 1_000_000_000;
            let top_k = count(experts, "top_k");
            let is = [graph.layers.len(), sparse.count(), experts.weights[0].shape[0], top_k, billions];
            assert_eq!(is, *numbers, "{}", family.name);
        }
    }
}
