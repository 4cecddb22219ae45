//! `--config run.toml`: keys of the file are flags, put before those of the command line, which therefore win.

use std::path::Path;

use toml::Value;

use crate::error::{Error, IoContext, Result};

/// Replaces `--config FILE` by the flags in the file.
pub(super) fn expand(mut args: Vec<String>) -> Result<Vec<String>> {
    let Some(at) = args.iter().position(|a| a == "--config" || a.starts_with("--config=")) else { return Ok(args) };
    let flag = args.remove(at);
    let file = match flag.strip_prefix("--config=") {
        Some(file) => file.to_owned(),
        None if at < args.len() => args.remove(at),
        None => return Err(Error::input("needs a file").at("--config")),
    };
    let path = Path::new(&file);
    let text = std::fs::read_to_string(path).reading(path)?;
    let table: toml::Table = toml::from_str(&text).map_err(|e| {
        let line = e.span().map_or(1, |s| text[..s.start.min(text.len())].lines().count().max(1));
        Error::input(e.message().to_owned()).at(format!("{file}:{line}"))
    })?;
    let mut flags = Vec::new();
    for (key, value) in &table {
        let flag = format!("--{}", key.replace('_', "-"));
        match value {
            Value::Array(list) => {
                flags.push(flag);
                flags.extend(list.iter().map(plain));
            }
            Value::Table(_) | Value::Datetime(_) => {
                return Err(Error::input(format!("'{key}' should be a number, a text or a list")).at(&file));
            }
            value => flags.extend([flag, plain(value)]),
        }
    }
    // After the program's and the subcommand's name.
    args.splice(2..2, flags);
    Ok(args)
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
