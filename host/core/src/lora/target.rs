//! Which linears an adapter names, by PEFT's rules.

use regex::Regex;
use serde_json::Value;

use crate::error::{Error, Result};

/// The value of `--target-modules` or of `target_modules` in `adapter_config.json`.
#[derive(Clone, Debug)]
pub enum Targets {
    /// Every linear but the output projection.
    AllLinear,
    /// Modules whose name is one of these, or ends in a dot and one of these.
    Names(Vec<String>),
    /// Modules whose whole name a regular expression matches.
    Pattern(Regex),
}

impl Targets {
    /// From the command line: `all-linear`, names, or one regular expression.
    pub fn parse(values: &[String]) -> Result<Targets> {
        match values {
            [one] if one == "all-linear" => Ok(Targets::AllLinear),
            [one] if one.contains(['*', '(', '[', '|', '^', '$', '\\', '+', '?']) => Targets::pattern(one),
            [] => Err(Error::input("no target modules").at("--target-modules")),
            names => Ok(Targets::Names(names.to_vec())),
        }
    }

    fn pattern(text: &str) -> Result<Targets> {
        let whole = Regex::new(&format!("^(?:{text})$"));
        Ok(Targets::Pattern(whole.map_err(|e| Error::input(format!("target modules '{text}': {e}")))?))
    }

    /// From a PEFT config, where a text is a regular expression.
    pub fn from_json(value: &Value) -> Result<Targets> {
        match value {
            Value::String(text) if text == "all-linear" => Ok(Targets::AllLinear),
            Value::String(text) => Targets::pattern(text),
            Value::Array(list) => {
                let names = list.iter().filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>();
                Targets::parse(&names)
            }
            other => Err(Error::input(format!("target_modules should be a text or a list, is {other}"))),
        }
    }

    /// Whether a module is named.
    pub fn name(&self, module: &str) -> bool {
        match self {
            Targets::AllLinear => true,
            Targets::Names(names) => {
                names.iter().any(|n| module == n || module.strip_suffix(n.as_str()).is_some_and(|m| m.ends_with('.')))
            }
            Targets::Pattern(pattern) => pattern.is_match(module),
        }
    }

    /// A name, or the pattern, that no module has.
    pub fn first_without_match(&self, modules: &[String]) -> Option<String> {
        let alone = |t: Targets| modules.iter().any(|m| t.name(m));
        match self {
            Targets::AllLinear => None,
            Targets::Names(names) => names.iter().find(|n| !alone(Targets::Names(vec![(*n).clone()]))).cloned(),
            Targets::Pattern(p) => Some(p.as_str().to_owned()).filter(|_| !alone(self.clone())),
        }
    }
}
