//! PEFT's files: `adapter_config.json` and `adapter_model.safetensors` with the names PEFT gives.

use std::collections::HashMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

use super::{Adapter, AdapterConfig};
use crate::error::{Error, Result};
use crate::files;
use crate::weights::read_f32;

const CONFIG: &str = "adapter_config.json";
const PARAMS: &str = "adapter_model.safetensors";

/// Reads the config in an adapter folder, refusing kinds of adapter that are not plain LoRA.
pub fn read_config(folder: &Path) -> Result<AdapterConfig> {
    let path = folder.join(CONFIG);
    AdapterConfig::parse(&read(&path)?).map_err(|e| e.at(path.display()))
}

/// The model that an adapter says it was trained on: a folder, or a name on a hub.
pub fn base_model(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(CONFIG);
    let config: Value =
        serde_json::from_str(&read(&path)?).map_err(|e| Error::input(e.to_string()).at(path.display()))?;
    let name = config.get("base_model_name_or_path").and_then(Value::as_str);
    Ok(name.filter(|n| !n.is_empty()).map(str::to_owned))
}

fn read(config: &Path) -> Result<String> {
    files::read_text(config).map_err(|e| {
        let folder = config.parent().unwrap_or(config);
        if config.exists() {
            return e;
        }
        if folder.join("config.json").is_file() {
            return Error::input("is the folder of a model, not of an adapter").at(folder.display()).help(
                "an adapter has adapter_config.json: name the folder of a run, or a checkpoint in it; a model goes to --model",
            );
        }
        let error = Error::input(e.message()).at(config.display());
        match runs_in(folder) {
            Some(runs) => error.help(format!("this folder has several adapters: name one of {runs}")),
            None => error.help(
                "an adapter is a folder with adapter_config.json and adapter_model.safetensors: that of a run, or a checkpoint in it",
            ),
        }
    })
}

/// The folders in a folder that are adapters, such as the runs of `output`.
fn runs_in(folder: &Path) -> Option<String> {
    let entries = std::fs::read_dir(folder).ok()?.filter_map(|e| Some(e.ok()?.path()));
    let mut runs: Vec<String> =
        entries.filter(|path| path.join(CONFIG).is_file()).map(|path| path.display().to_string()).collect();
    runs.sort();
    (!runs.is_empty()).then(|| runs.join(", "))
}

fn names(module: &str) -> [String; 2] {
    ["lora_A", "lora_B"].map(|part| format!("base_model.model.{module}.{part}.weight"))
}

const OTHER_MODEL: &str = "the adapter is of another model, whose name is in its adapter_config.json";

pub(super) fn read_params(adapter: &mut Adapter, folder: &Path) -> Result<()> {
    let path = folder.join(PARAMS);
    let mut tensors = read_f32(&path)?;
    for site in adapter.sites.clone() {
        let shapes = [[site.rank, site.inputs], [site.outputs, site.rank]];
        for (name, shape) in names(&site.module).into_iter().zip(shapes) {
            let Some((is, values)) = tensors.remove(&name) else {
                return Err(Error::input(format!("tensor '{name}' of shape {shape:?} is missing"))
                    .at(path.display())
                    .help(OTHER_MODEL));
            };
            if is != shape {
                let what = format!("tensor '{name}' has shape {is:?}, the model needs {shape:?}");
                return Err(Error::input(what).at(path.display()).help(OTHER_MODEL));
            }
            adapter.params.extend(values);
        }
    }
    match tensors.keys().next() {
        Some(name) => Err(Error::input(format!("tensor '{name}' belongs to no linear of this model"))
            .at(path.display())
            .help(OTHER_MODEL)),
        None => Ok(()),
    }
}

pub(super) fn write(adapter: &Adapter, folder: &Path, base_model: &str) -> Result<()> {
    let config = adapter.config.to_json(&adapter.sites, base_model);
    let text = format!("{:#}\n", config);
    let bytes = |range: std::ops::Range<usize>| adapter.params[range].iter().flat_map(|p| p.to_le_bytes()).collect();
    let mut data: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for site in &adapter.sites {
        let [a, b] = adapter.ranges(site);
        let [name_a, name_b] = names(&site.module);
        data.push((name_a, vec![site.rank, site.inputs], bytes(a)));
        data.push((name_b, vec![site.outputs, site.rank], bytes(b)));
    }
    let failed = |e: safetensors::SafeTensorError| Error::run(format!("adapter: {e}"));
    let views =
        data.iter().map(|(n, shape, bytes)| Ok((n.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(failed)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let params = safetensors::serialize(views, Some(metadata)).map_err(failed)?;
    files::write_into(&folder.join(PARAMS), &params)?;
    files::write_into(&folder.join(CONFIG), text.as_bytes())
}
