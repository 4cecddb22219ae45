//! What `config.json` says of compressed-tensors: a format, and of groups of modules how their weights are quantised.

use serde_json::Value;

use super::{Found, Method, Stated, integers, scaled};

/// What reads the weights of a group of modules.
type Reader = fn(&Value) -> Found<Method>;

/// Its formats that are read.
const FORMATS: &[(&str, Reader)] = &[
    ("float-quantized", scaled::compressed),
    ("int-quantized", scaled::compressed),
    ("naive-quantized", scaled::compressed),
    ("pack-quantized", integers::packed),
];

pub(super) fn method(how: &Stated) -> Found<Method> {
    let format = how.get("format").and_then(Value::as_str).unwrap_or("not there");
    let Some((_, reader)) = FORMATS.iter().find(|(name, _)| *name == format) else {
        let names: Vec<&str> = FORMATS.iter().map(|(name, _)| *name).collect();
        return Err(format!("its format is {format}; {} are read", names.join(", ")));
    };
    let sparse = how.get("sparsity_config").and_then(|s| s.get("format")).and_then(Value::as_str);
    if let Some(format) = sparse.filter(|format| *format != "dense") {
        return Err(format!("its sparsity is {format}; dense matrices are read"));
    }
    let groups = how.get("config_groups").and_then(Value::as_object).into_iter().flat_map(|groups| groups.values());
    let weights = groups.filter_map(|group| group.get("weights").filter(|weights| weights.is_object()));
    let methods: Vec<Method> = weights.map(reader).collect::<Found<_>>()?;
    match methods.split_first() {
        Some((first, others)) if others.iter().all(|other| other == first) => Ok(*first),
        Some(_) => Err("modules are quantised in several ways; one is read".into()),
        None => Err("no weights are said to be quantised".into()),
    }
}
