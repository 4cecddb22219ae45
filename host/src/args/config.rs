//! A file of flags, as `--config` names it: TOML, YAML, or JSON such as the `args.json` of a run. Keys are the flags' names, or those
//! of another tool's arguments.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use toml::Spanned;

use super::flag::Flag;
use super::yaml::{self, Keys};
use dpo_core::error::{Error, Result};
use dpo_train::config::RESOLVED;

/// The flags of a file, in its order, each with its line.
pub(super) fn read(file: &str) -> Result<Vec<Flag>> {
    let path = Path::new(file);
    let text = dpo_core::files::read_text(path)?;
    let (keys, nested) = match path.extension().and_then(|e| e.to_str()) {
        Some("json") => (json_keys(&text), true),
        Some("yaml" | "yml") => (yaml::keys(&text), true),
        _ => (toml_keys(&text), false),
    };
    let at = |line: usize| format!("{file}:{line}");
    let keys = keys.map_err(|(line, cause)| {
        Error::input(cause)
            .at(at(line))
            .help("a file of flags is TOML, YAML (.yaml), or JSON such as the args.json of a run")
    })?;
    let mut flags = Vec::new();
    for (line, key, value) in keys {
        let values = match value {
            // args.json says so of what was not given.
            Value::Null => continue,
            // What the flags came to, which is no flag: it is for runs that resume.
            _ if key == RESOLVED => continue,
            Value::Array(list) if list.is_empty() => continue,
            Value::Array(list) => list.into_iter().map(plain).collect(),
            // A flag reads it as JSON. In TOML it would be a section.
            Value::Object(map) if nested => Some(vec![Value::Object(map).to_string()]),
            value => plain(value).map(|v| vec![v]),
        };
        let values = values.ok_or_else(|| {
            Error::input(format!("'{key}' should be a number, a text, true, false or a list of them"))
                .at(at(line))
                .help("keys stand alone, without [sections]")
        })?;
        flags.push(Flag { name: format!("--{key}"), values, place: Some(at(line)) });
    }
    Ok(flags)
}

fn toml_keys(text: &str) -> Keys {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|b| *b == b'\n').count();
    let table: BTreeMap<String, Spanned<toml::Value>> =
        toml::from_str(text).map_err(|e| (line(e.span().map_or(0, |s| s.start)), e.message().to_owned()))?;
    let mut keys: Vec<_> =
        table.into_iter().map(|(key, value)| (line(value.span().start), key, json!(value.into_inner()))).collect();
    keys.sort_by_key(|(line, ..)| *line);
    Ok(keys)
}

fn json_keys(text: &str) -> Keys {
    let table: Map<String, Value> = serde_json::from_str(text).map_err(|e| (e.line().max(1), e.to_string()))?;
    let line = |key: &str| {
        let quoted = json!(key).to_string();
        let is_key = |at: &usize| text[at + quoted.len()..].trim_start().starts_with(':');
        let at = text.match_indices(&quoted).map(|(at, _)| at).find(is_key).unwrap_or(0);
        text[..at].matches('\n').count() + 1
    };
    Ok(table.into_iter().map(|(key, value)| (line(&key), key, value)).collect())
}

fn plain(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

/// Whether a file that is named without a flag is one of flags: what ms-swift and LLaMA-Factory name first of all.
pub(super) fn is_one(file: &str) -> bool {
    match Path::new(file).extension().and_then(|e| e.to_str()) {
        Some("yaml" | "yml" | "toml") => true,
        // Rows are JSON, too, as a list or as one object a line.
        Some("json") => dpo_core::files::read_text(Path::new(file)).is_ok_and(|text| json_keys(&text).is_ok()),
        _ => false,
    }
}
