//! A file of flags, as `--config` names it: TOML, or the `args.json` of a run. Keys are the flags' names.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use toml::Spanned;

use super::flag::Flag;
use dpo_core::error::{Error, Result};
use dpo_train::config::RESOLVED;

/// The flags of a file, in its order, each with its line.
pub(super) fn read(file: &str) -> Result<Vec<Flag>> {
    let path = Path::new(file);
    let text = dpo_core::files::read_text(path)?;
    let keys = if path.extension().is_some_and(|e| e == "json") { json_keys(&text) } else { toml_keys(&text) };
    let at = |line: usize| format!("{file}:{line}");
    let keys = keys.map_err(|(line, cause)| {
        Error::input(cause).at(at(line)).help("a file of flags is TOML, or the args.json of a run")
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

/// Line, key and value; or a line and what is wrong with it.
type Keys = std::result::Result<Vec<(usize, String, Value)>, (usize, String)>;

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
