//! PEFT's files: `adapter_config.json` and `adapter_model.safetensors` with the names PEFT gives.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

use super::{Adapter, AdapterConfig, Site};
use crate::error::{Error, Result};
use crate::files;
use crate::weights::{Values, read_f32};

const CONFIG: &str = "adapter_config.json";
const PARAMS: &str = "adapter_model.safetensors";
/// Where PEFT wrote the tensors before, as Python objects.
const PICKLED: &str = "adapter_model.bin";
/// LLaMA-Factory's folders of adapters that begin with a part of the weights. Their configs call them plain ones.
const UNCONVERTED: &[&str] = &["pissa_init", "pissa_backup"];

/// Reads the config in an adapter folder, refusing kinds of adapter that are not plain LoRA.
pub fn read_config(folder: &Path) -> Result<AdapterConfig> {
    let path = folder.join(CONFIG);
    if let Some(name) = UNCONVERTED.iter().find(|name| folder.ends_with(name)) {
        return Err(Error::input(format!("{name} of LLaMA-Factory is right on a changed model alone"))
            .at(folder.display())
            .help("take the folder pissa_converted, which pissa_convert: true writes beside it"));
    }
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

/// What PEFT names the tensors of a module.
pub(super) fn names(module: &str) -> [String; 3] {
    ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"].map(|part| format!("base_model.model.{module}.{part}"))
}

const OTHER_MODEL: &str = "the adapter is of another model, whose name is in its adapter_config.json";

/// All tensors in an adapter folder.
pub(super) fn read_tensors(folder: &Path) -> Result<BTreeMap<String, Values>> {
    let path = folder.join(PARAMS);
    if !path.exists() && folder.join(PICKLED).is_file() {
        return Err(Error::input("is a file of Python objects, which are not read")
            .at(folder.join(PICKLED).display())
            .help("PEFT writes adapter_model.safetensors: PeftModel.from_pretrained(…).save_pretrained(folder)"));
    }
    read_f32(&path)
}

/// Parameters and what is subtracted, which is the second half of A's rows and of B's columns.
pub(super) fn params(adapter: &Adapter, mut tensors: BTreeMap<String, Values>, folder: &Path) -> Result<[Vec<f32>; 2]> {
    let path = folder.join(PARAMS);
    let (mut params, mut subtracted) = (Vec::new(), Vec::new());
    for site in &adapter.sites {
        let (rank, columns) = (site.rank, adapter.columns(site));
        let mut take = |name: &str, shape: &[usize]| match tensors.remove(name) {
            None => Err(Error::input(format!("tensor '{name}' of shape {shape:?} is missing"))
                .at(path.display())
                .help(OTHER_MODEL)),
            Some((is, _)) if is != shape => {
                let what = format!("tensor '{name}' has shape {is:?}, the model needs {shape:?}");
                Err(Error::input(what).at(path.display()).help(OTHER_MODEL))
            }
            Some((_, values)) => Ok(values),
        };
        let [name_a, name_b, name_magnitude] = names(&site.module);
        let mut a = take(&name_a, &[site.experts * columns, site.inputs])?;
        let b = take(&name_b, &[site.outputs, columns * site.experts])?;
        if site.experts > 1 {
            params.extend(a);
            params.extend(by_expert(site, &b));
            continue;
        }
        let other = a.split_off(rank * site.inputs);
        params.extend(a);
        params.extend(b.chunks(columns).flat_map(|row| &row[..rank]));
        if site.magnitudes > 0 {
            params.extend(take(&name_magnitude, &[site.magnitudes])?);
        }
        if columns > rank {
            subtracted.extend(other);
            subtracted.extend(b.chunks(columns).flat_map(|row| &row[rank..]).map(|value| -value));
        }
    }
    match tensors.keys().next() {
        Some(name) if !name.contains("lora_") => {
            let what = format!("tensor '{name}' is a whole weight, of modules_to_save or of a resized embedding");
            Err(Error::input(what)
                .at(path.display())
                .help("only LoRA matrices of linear modules are read: merge it with PEFT"))
        }
        Some(name) => Err(Error::input(format!("tensor '{name}' belongs to no adapted linear of this model"))
            .at(path.display())
            .help(OTHER_MODEL)),
        None => Ok([params, subtracted]),
    }
}

/// B of experts from PEFT's order, `[outputs, rank, experts]`, to `[experts, outputs, rank]` (`ParamWrapper` of
/// `peft/tuners/lora/layer.py`).
fn by_expert(site: &Site, b: &[f32]) -> Vec<f32> {
    let Site { experts, outputs, rank, .. } = *site;
    let of_expert = |expert: usize| (0..outputs * rank).map(move |at| b[at * experts + expert]);
    (0..experts).flat_map(of_expert).collect()
}

/// The other way round.
fn by_output(site: &Site, b: &[f32]) -> Vec<f32> {
    let Site { experts, outputs, rank, .. } = *site;
    (0..outputs * rank).flat_map(|at| (0..experts).map(move |expert| b[expert * outputs * rank + at])).collect()
}

/// A tensor of a file.
pub(super) type Named = (String, Values);

pub(super) fn write(adapter: &Adapter, folder: &Path, base_model: &str) -> Result<()> {
    let tensors: Vec<Named> = adapter.sites.iter().flat_map(|site| tensors(adapter, site)).collect();
    write_files(folder, &adapter.config.to_json(&adapter.sites, base_model), &tensors)
}

/// A site's tensors, as PEFT has them.
pub(super) fn tensors(adapter: &Adapter, site: &Site) -> Vec<Named> {
    let ([a, b], columns) = (adapter.ranges(site), adapter.columns(site));
    let [name_a, name_b, name_magnitude] = names(&site.module);
    let (mut values_a, mut values_b) = (adapter.params[a.clone()].to_vec(), adapter.params[b.clone()].to_vec());
    if site.experts > 1 {
        values_b = by_output(site, &values_b);
    }
    if columns > site.rank {
        values_a.extend(&adapter.subtracted[a]);
        let rows = values_b.chunks(site.rank).zip(adapter.subtracted[b].chunks(site.rank));
        values_b = rows.flat_map(|(own, start)| own.iter().copied().chain(start.iter().map(|v| -v))).collect();
    }
    let mut tensors = vec![
        (name_a, (vec![site.experts * columns, site.inputs], values_a)),
        (name_b, (vec![site.outputs, columns * site.experts], values_b)),
    ];
    let magnitude = adapter.magnitude(site).map(|range| adapter.params[range].to_vec());
    tensors.extend(magnitude.map(|values| (name_magnitude, (vec![site.magnitudes], values))));
    tensors
}

pub(super) fn write_files(folder: &Path, config: &Value, tensors: &[Named]) -> Result<()> {
    let text = format!("{config:#}\n");
    let bytes = |values: &[f32]| values.iter().flat_map(|p| p.to_le_bytes()).collect::<Vec<u8>>();
    let data: Vec<_> = tensors.iter().map(|(name, (shape, values))| (name, shape, bytes(values))).collect();
    let failed = |e: safetensors::SafeTensorError| Error::run(format!("adapter: {e}"));
    let views =
        data.iter().map(|(n, shape, bytes)| Ok((n.as_str(), TensorView::new(Dtype::F32, shape.to_vec(), bytes)?)));
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(failed)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let params = safetensors::serialize(views, Some(metadata)).map_err(failed)?;
    files::write_into(&folder.join(PARAMS), &params)?;
    files::write_into(&folder.join(CONFIG), text.as_bytes())
}
