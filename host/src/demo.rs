//! The built-in demo: a small Qwen2 whose weights come from a seed, and preference rows written for this project.
//!
//! Both are written out as ordinary files and then read like anybody's, so that the demo exercises the ordinary path.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dpo_plugin_api::graph::ModelGraph;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::error::{Error, Result};
use crate::files;
use crate::plugins::Registry;
use crate::weights::blocks;

const FILES: &[(&str, &str)] = &[
    ("model/config.json", include_str!("../../datasets/demo/model/config.json")),
    ("model/tokenizer.json", include_str!("../../datasets/demo/model/tokenizer.json")),
    ("model/tokenizer_config.json", include_str!("../../datasets/demo/model/tokenizer_config.json")),
    ("prefs.jsonl", include_str!("../../datasets/demo/prefs.jsonl")),
    ("val.jsonl", include_str!("../../datasets/demo/val.jsonl")),
];

/// The demo's files.
pub struct Demo {
    /// Model folder.
    pub model: PathBuf,
    /// Rows to train on.
    pub dataset: PathBuf,
    /// Rows to evaluate on.
    pub val_dataset: PathBuf,
}

/// Writes the demo into the cache folder.
pub fn write(registry: &Registry) -> Result<Demo> {
    let folder = files::cache_folder().join("demo");
    for (name, text) in FILES {
        files::write(&folder.join(name), text.as_bytes())?;
    }
    let model = folder.join("model");
    let graph = registry.family("qwen2")?.graph(FILES[0].1)?;
    write_weights(&graph, &model.join("model.safetensors"))?;
    Ok(Demo { model, dataset: folder.join("prefs.jsonl"), val_dataset: folder.join("val.jsonl") })
}

/// Random weights as transformers initialises them: norms 1, biases 0, the rest normal with a deviation of 0.02; the same
/// on every machine.
fn write_weights(graph: &ModelGraph, path: &Path) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(20);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (block, prefix) in blocks(graph) {
        for node in &block.nodes {
            for weight in &node.weights {
                let name = format!("{prefix}{}", weight.tensor);
                if tensors.iter().any(|(n, ..)| *n == name) {
                    continue;
                }
                let mut value = |_| match (node.op.as_str(), weight.role.as_str()) {
                    ("rms_norm", _) => 1.0,
                    (_, "bias") => 0.0,
                    // The sum of twelve uniform numbers has a variance of 1 and is nearly normal.
                    _ => 0.02 * ((0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0),
                };
                let count = weight.shape.iter().product();
                let bytes = (0..count).flat_map(|i: usize| value(i).to_le_bytes()).collect();
                tensors.push((name, weight.shape.clone(), bytes));
            }
        }
    }
    let failed = |e: safetensors::SafeTensorError| Error::run(e.to_string()).at(path.display());
    let views = tensors.iter().map(|(n, shape, b)| Ok((n.as_str(), TensorView::new(Dtype::F32, shape.clone(), b)?)));
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(failed)?;
    let bytes = safetensors::serialize(views, None::<HashMap<String, String>>).map_err(failed)?;
    files::write(path, &bytes)
}
