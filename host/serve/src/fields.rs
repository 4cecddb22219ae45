//! The fields of a request's JSON: taken out one by one, checked, and what is left over is refused by name.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::refusal::Refusal;

/// Fields that are not taken out yet.
pub(super) struct Fields(Map<String, Value>);

/// Fields that change nothing here: what they are about is not there.
const HARMLESS: &[&str] = &[
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
];

/// Fields that would change an answer and are not supported, unless they have a value that changes nothing.
const UNSUPPORTED: &[(&str, &[&str], &str)] = &[
    ("tools", &["[]"], "calls of tools are not taken apart"),
    ("functions", &["[]"], "calls of functions are not taken apart"),
    ("tool_choice", &["\"none\"", "\"auto\""], "calls of tools are not taken apart"),
    ("function_call", &["\"none\"", "\"auto\""], "calls of functions are not taken apart"),
    ("response_format", &["{\"type\":\"text\"}"], "answers are text"),
    ("modalities", &["[\"text\"]"], "answers are text"),
    ("suffix", &["\"\""], "a text is only gone on with"),
    ("min_p", &["0", "0.0"], "it is not computed"),
    ("best_of", &["1"], "answers are not ranked"),
    ("logit_processors", &["[]"], "they are not computed"),
];

impl Fields {
    /// Those of a body.
    pub(super) fn parse(body: &[u8]) -> Result<Fields, Refusal> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Fields(fields.into_iter().filter(|(_, value)| !value.is_null()).collect())),
            Ok(_) => Err(Refusal::new(400, "a request is a JSON object")),
            Err(e) => Err(Refusal::new(400, format!("the request is not JSON: {e}"))),
        }
    }

    /// A field as it is.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name)
    }

    /// A field of a type, which `read` finds in it.
    fn typed<T>(&mut self, name: &str, what: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, Refusal> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| Refusal::of(name, format!("'{name}' is {what}, not {value}")))
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        self.typed(name, "a text", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<bool, Refusal> {
        Ok(self.typed(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub(super) fn number(&mut self, name: &str, from: f64, to: f64) -> Result<Option<f64>, Refusal> {
        self.typed(name, &format!("a number from {from} to {to}"), |value| {
            value.as_f64().filter(|n| (from..=to).contains(n))
        })
    }

    pub(super) fn count(&mut self, name: &str, from: usize, to: usize) -> Result<Option<usize>, Refusal> {
        let what =
            if to == usize::MAX { format!("a number from {from} on") } else { format!("a number from {from} to {to}") };
        self.typed(name, &what, |value| value.as_u64().map(|n| n as usize).filter(|n| (from..=to).contains(n)))
    }

    pub(super) fn whole(&mut self, name: &str, from: i64) -> Result<Option<i64>, Refusal> {
        self.typed(name, &format!("a whole number from {from} on"), |value| value.as_i64().filter(|n| *n >= from))
    }

    /// A text, or several.
    pub(super) fn texts(&mut self, name: &str) -> Result<Vec<String>, Refusal> {
        let read = |value: &Value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(list) => list.iter().map(|one| one.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        Ok(self.typed(name, "a text or a list of texts", read)?.unwrap_or_default())
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, Refusal> {
        self.typed(name, "an object", |value| value.as_object().cloned())
    }

    /// Numbers by token.
    pub(super) fn by_token(&mut self, name: &str) -> Result<BTreeMap<u32, f32>, Refusal> {
        let of = |(id, bias): (&String, &Value)| {
            let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias))?;
            Some((id.parse().ok()?, bias as f32))
        };
        let read = |value: &Value| value.as_object()?.iter().map(of).collect::<Option<BTreeMap<_, _>>>();
        Ok(self.typed(name, "an object of token ids with numbers from -100 to 100", read)?.unwrap_or_default())
    }

    /// Refuses what is left and would change the answer.
    pub(super) fn end(mut self, known: &[&str]) -> Result<(), Refusal> {
        for (name, same, why) in UNSUPPORTED {
            let Some(value) = self.take(name) else { continue };
            if !same.contains(&value.to_string().as_str()) {
                return Err(Refusal::of(name, format!("'{name}' is not supported: {why}")));
            }
        }
        self.0.retain(|name, _| !HARMLESS.contains(&name.as_str()));
        let Some(name) = self.0.keys().next() else { return Ok(()) };
        let near = dpo_core::error::Error::nearest(name, known.iter().copied());
        let near = near.map(|near| format!("; did you mean '{near}'?")).unwrap_or_default();
        Err(Refusal::of(name, format!("there is no parameter '{name}'{near}")))
    }
}
