//! Which linears an adapter is on, and what a pattern says of some of them, by PEFT's rules: `check_target_module_exists` of
//! `peft/tuners/tuners_utils.py`, `get_pattern_key` of `peft/utils/other.py`.

use fancy_regex::Regex;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// The value of `--target-modules` and `--exclude-modules`, or of those keys in `adapter_config.json`.
#[derive(Clone, Debug)]
pub enum Targets {
    /// Every linear but the output projection.
    AllLinear,
    /// Modules whose name is one of these, or ends in a dot and one of these.
    Names(Vec<String>),
    /// Modules whose whole name a regular expression matches: its text, and the expression.
    Pattern(String, Regex),
}

impl Targets {
    /// From the command line: `all-linear`, names, or one regular expression, which is told by its signs.
    pub fn parse(values: &[String]) -> Result<Targets> {
        match values {
            [one] if one == "all-linear" => Ok(Targets::AllLinear),
            [one] if one.contains(['*', '(', '[', '|', '^', '$', '\\', '+', '?']) => Targets::pattern(one),
            [] => {
                Err(Error::input("no modules are named").help("all-linear, names of modules, or a regular expression"))
            }
            names => Ok(Targets::Names(names.to_vec())),
        }
    }

    fn pattern(text: &str) -> Result<Targets> {
        Ok(Targets::Pattern(text.to_owned(), regex("modules", text, &format!("^(?:{text})$"))?))
    }

    /// From a PEFT config, where a text is a regular expression and a list has names.
    pub fn from_json(key: &str, value: &Value) -> Result<Targets> {
        match value {
            Value::String(text) if text == "all-linear" => Ok(Targets::AllLinear),
            Value::String(text) => Targets::pattern(text),
            Value::Array(list) if list.iter().all(Value::is_string) => {
                Ok(Targets::Names(list.iter().filter_map(Value::as_str).map(str::to_owned).collect()))
            }
            other => Err(Error::input(format!("'{key}' should be a text or a list of names, is {other}"))),
        }
    }

    /// As PEFT writes it; `None` for all linears, which PEFT writes as a list of their names.
    pub(super) fn to_json(&self) -> Option<Value> {
        match self {
            Targets::AllLinear => None,
            Targets::Names(names) => Some(json!(names)),
            Targets::Pattern(text, _) => Some(json!(text)),
        }
    }

    /// Whether a module is named.
    pub fn name(&self, module: &str) -> bool {
        match self {
            Targets::AllLinear => true,
            Targets::Names(names) => names.iter().any(|n| ends_in(module, n)),
            Targets::Pattern(_, pattern) => matches(pattern, module),
        }
    }

    /// A name, or the pattern, that no module has.
    pub fn first_without_match(&self, modules: &[String]) -> Option<String> {
        match self {
            Targets::AllLinear => None,
            Targets::Names(names) => names.iter().find(|n| !modules.iter().any(|m| ends_in(m, n))).cloned(),
            Targets::Pattern(text, _) => Some(text.clone()).filter(|_| !modules.iter().any(|m| self.name(m))),
        }
    }
}

/// Whether a name is another one, or ends in a dot and it.
pub(super) fn ends_in(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|m| m.ends_with('.'))
}

/// One that backtracks without end on a name of a module matches it not.
fn matches(pattern: &Regex, module: &str) -> bool {
    pattern.is_match(module).unwrap_or(false)
}

/// As Python has them, looking ahead and behind included, which ms-swift writes for models of several modalities.
fn regex(what: &str, text: &str, whole: &str) -> Result<Regex> {
    Regex::new(whole).map_err(|e| Error::input(format!("{what} '{text}': {e}")))
}

/// Layers that alone are adapted: `layers_to_transform` and `layers_pattern` of a PEFT config, which go with a list of names.
#[derive(Clone, Debug)]
pub struct Layers {
    indexes: Vec<u64>,
    patterns: Vec<String>,
    matches: Vec<Regex>,
}

impl Layers {
    /// From the two keys; `None` where all layers are meant.
    pub(super) fn from_json(indexes: &Value, patterns: &Value) -> Result<Option<Layers>> {
        let wrong = |key: &str, value: &Value| Err(Error::input(format!("'{key}': {value} is not understood")));
        let indexes = match indexes {
            Value::Null => return Ok(None),
            Value::Number(n) if n.is_u64() => n.as_u64().into_iter().collect(),
            Value::Array(list) if list.is_empty() => return Ok(None),
            Value::Array(list) if list.iter().all(Value::is_u64) => list.iter().filter_map(Value::as_u64).collect(),
            other => return wrong("layers_to_transform", other),
        };
        let patterns: Vec<String> = match patterns {
            Value::Null => Vec::new(),
            Value::String(one) if one.is_empty() => Vec::new(),
            Value::String(one) => vec![one.clone()],
            Value::Array(list) if list.iter().all(Value::is_string) => {
                list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
            }
            other => return wrong("layers_pattern", other),
        };
        let named = patterns.iter().map(|p| regex("layers_pattern", p, &format!(r"^(?:|.*?\.)(?:{p})\.(?P<at>\d+)\.")));
        let any = || regex("layers_pattern", "", r"^.*?\.[^.]*\.(?P<at>\d+)\.");
        let matches = if patterns.is_empty() { vec![any()?] } else { named.collect::<Result<_>>()? };
        Ok(Some(Layers { indexes, patterns, matches }))
    }

    pub(super) fn to_json(&self) -> (Value, Value) {
        (json!(self.indexes), if self.patterns.is_empty() { Value::Null } else { json!(self.patterns) })
    }

    /// Whether a module is in one of them.
    pub(super) fn have(&self, module: &str) -> bool {
        let found = self.matches.iter().find_map(|pattern| pattern.captures(module).ok()?);
        let at = found.and_then(|found| found.name("at")?.as_str().parse::<u64>().ok());
        at.is_some_and(|at| self.indexes.contains(&at))
    }
}

/// Numbers that some modules have in place of the adapter's: `rank_pattern` and `alpha_pattern`. The first pattern that a module's
/// name ends with counts.
#[derive(Clone, Debug, Default)]
pub struct Patterns(Vec<(String, Regex, f64)>);

impl Patterns {
    /// From the command line: a JSON object of patterns and numbers.
    pub fn parse(text: &str) -> Result<Patterns> {
        let object = "should be a JSON object such as {\"down_proj\": 4}";
        let map: Map<String, Value> = serde_json::from_str(text).map_err(|e| Error::input(format!("{object}: {e}")))?;
        Patterns::from_json(&map)
    }

    /// From a PEFT config.
    pub(super) fn from_json(map: &Map<String, Value>) -> Result<Patterns> {
        let number = |(key, value): (&String, &Value)| match value.as_f64() {
            Some(number) => Ok((key.clone(), regex("pattern", key, &format!(r"^(?:.*\.)?(?:{key})$"))?, number)),
            None => Err(Error::input(format!("'{key}': {value} should be a number"))),
        };
        Ok(Patterns(map.iter().map(number).collect::<Result<_>>()?))
    }

    /// Leaves those alone that are for one of some modules.
    pub(super) fn keep(&mut self, modules: &[&str]) {
        self.0.retain(|(_, pattern, _)| modules.iter().any(|module| matches(pattern, module)));
    }

    /// Adds a pattern behind the others.
    pub(super) fn add(&mut self, key: &str, number: f64) -> Result<()> {
        let more = Patterns::from_json(&Map::from_iter([(key.to_owned(), json!(number))]))?;
        self.0.extend(more.0);
        Ok(())
    }

    /// As PEFT writes them, `times` as large.
    pub fn to_json(&self, times: f64) -> Value {
        let number = |value: f64| if value.fract() == 0.0 { json!(value as u64) } else { json!(value) };
        Value::Object(self.0.iter().map(|(key, _, value)| (key.clone(), number(value * times))).collect())
    }

    /// The number of a module, if a pattern is for it.
    pub(super) fn of(&self, module: &str) -> Option<f64> {
        self.0.iter().find(|(_, pattern, _)| matches(pattern, module)).map(|(.., number)| *number)
    }

    /// All numbers with their patterns.
    pub(super) fn numbers(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(key, _, number)| (key.as_str(), *number))
    }

    /// A pattern that is for none of the modules.
    pub(super) fn first_without_match<'a>(&self, modules: impl Iterator<Item = &'a str> + Clone) -> Option<&str> {
        let unused = self.0.iter().find(|(_, pattern, _)| !modules.clone().any(|m| matches(pattern, m)));
        unused.map(|(key, ..)| key.as_str())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    const Q: &str = "model.layers.1.self_attn.q_proj";

    /// What PEFT 0.21 answers to the same questions.
    #[test]
    fn modules_are_named_as_in_peft() {
        let named = |value: Value| Targets::from_json("target_modules", &value).unwrap().name(Q);
        assert!(named(json!(["q_proj"])) && named(json!(["self_attn.q_proj"])) && named(json!([Q])));
        assert!(!named(json!(["proj"])) && !named(json!(["all-linear"])) && !named(json!([])));
        assert!(named(json!("all-linear")) && named(json!(r".*\.q_proj")) && named(json!(r"model\.layers\.[13]\..*")));
        assert!(named(json!(r"^(model(?=\.).*\.(q_proj|v_proj))$")) && !named(json!(r"model(?!\.layers).*")));
        // A text is matched as a whole.
        assert!(!named(json!("q_proj")) && !named(json!(r"model\.layers\.1")));
        for wrong in [json!(3), json!(["q_proj", 3]), json!("(")] {
            Targets::from_json("target_modules", &wrong).unwrap_err();
        }
    }

    #[test]
    fn layers_are_chosen_as_in_peft() {
        let have = |indexes: Value, patterns: Value, module: &str| {
            Layers::from_json(&indexes, &patterns).unwrap().map(|layers| layers.have(module))
        };
        assert_eq!(have(json!(1), Value::Null, Q), Some(true));
        assert_eq!(have(json!([0, 2]), Value::Null, Q), Some(false));
        assert_eq!(have(json!([1]), json!("layers"), Q), Some(true));
        assert_eq!(have(json!([1]), json!(["h", "layers"]), Q), Some(true));
        assert_eq!(have(json!([1]), json!(["h"]), Q), Some(false));
        // The first number counts: that of an expert is no layer's.
        assert_eq!(have(json!([1]), Value::Null, "model.layers.0.mlp.experts.1.up_proj"), Some(false));
        assert_eq!(have(json!([]), json!("layers"), Q), None);
        assert_eq!(have(Value::Null, Value::Null, Q), None);
    }

    #[test]
    fn the_first_pattern_that_ends_a_name_counts() {
        let of = |text: &str| Patterns::parse(text).unwrap().of(Q);
        assert_eq!(of(r#"{"q_proj": 4}"#), Some(4.0));
        assert_eq!(of(r#"{"proj": 4, "layers.1.self_attn.q_proj": 6, "q_proj": 8}"#), Some(6.0));
        assert_eq!(of(r#"{"q_proj": 8, "layers.1.self_attn.q_proj": 6}"#), Some(8.0));
        assert_eq!(of(r#"{"layers\\.\\d+\\.self_attn\\..*": 2}"#), Some(2.0));
        assert_eq!(of(r#"{"^model.layers.1.self_attn.q_proj": 2}"#), Some(2.0));
        assert_eq!(of(r#"{"^layers.1.self_attn.q_proj": 2}"#), None);
        assert_eq!(of("{}"), None);
        for wrong in ["[1]", "4", r#"{"q_proj": "4"}"#, r#"{"(": 4}"#, "{q_proj: 4}"] {
            Patterns::parse(wrong).unwrap_err();
        }
    }
}
