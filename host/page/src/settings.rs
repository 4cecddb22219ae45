//! Names and values: the settings of a run with what they came to, as the page and the report list them.

use serde_json::{Map, Value};

/// What of `args.json` is no flag: what the flags came to.
const RESOLVED: &str = "resolved";
/// Within it, what resumed runs have to share: the flags again among others.
const SETTINGS: &str = "settings";

/// Every setting with its value. Where a flag left it open, what it came to stands behind an arrow.
pub(super) fn settings(args: &Map<String, Value>) -> Vec<(String, String)> {
    let mut came = Map::new();
    let mut others = Vec::new();
    for (path, value) in args.get(RESOLVED).map(flat).unwrap_or_default() {
        let (name, within) = path.split_last().map_or(("", &[][..]), |(name, within)| (name.as_str(), within));
        let flag = name.trim_start_matches("--").replace('-', "_");
        if args.contains_key(&flag)
            && matches!(within, [] | [_])
            && within.iter().all(|w| OF_FLAGS.contains(&w.as_str()))
        {
            came.insert(flag, Value::String(value));
        } else {
            let shown: Vec<&str> = path.iter().map(String::as_str).filter(|part| *part != SETTINGS).collect();
            others.push((shown.join(" "), value));
        }
    }
    let flag = |(name, value): (&String, &Value)| {
        let was = text(value);
        match came.get(name).and_then(Value::as_str) {
            Some(is) if is != was => (name.clone(), format!("{was} → {is}")),
            _ => (name.clone(), was),
        }
    };
    args.iter().filter(|(name, _)| *name != RESOLVED).map(flag).chain(others).collect()
}

/// Objects in [`RESOLVED`] whose names are flags' names.
const OF_FLAGS: [&str; 2] = [SETTINGS, "packing"];

/// An object's values by the names that lead to them; objects in a list by their `name`.
pub(super) fn flat(value: &Value) -> Vec<(Vec<String>, String)> {
    let mut found = Vec::new();
    walk(value, &mut Vec::new(), &mut found);
    found
}

fn walk(value: &Value, path: &mut Vec<String>, found: &mut Vec<(Vec<String>, String)>) {
    match value {
        Value::Object(object) => {
            for (name, inner) in object {
                path.push(name.clone());
                walk(inner, path, found);
                path.pop();
            }
        }
        Value::Array(list) if list.iter().any(Value::is_object) => {
            for (place, inner) in list.iter().enumerate() {
                let mut inner = inner.clone();
                let name = inner.as_object_mut().and_then(|object| object.remove("name"));
                path.push(name.as_ref().and_then(Value::as_str).map_or_else(|| place.to_string(), str::to_owned));
                walk(&inner, path, found);
                path.pop();
            }
        }
        value => found.push((path.clone(), text(value))),
    }
}

/// A value as it is read; a dash where there is none.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "–".into(),
        Value::String(text) => text.clone(),
        Value::Array(list) if list.is_empty() => "–".into(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(" "),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_told_with_what_it_came_to() {
        let args = serde_json::json!({
            "lora_rank": null, "dataset": ["a", "b"], "val_dataset": [], "beta": 0.1, "device": "auto",
            "resolved": {"device": "cpu", "ranks": 2, "packing": {"logits_rows": 7},
                "settings": {"--lora-rank": 8, "--beta": 0.1},
                "losses": [{"name": "sigmoid", "weight": 1.0, "options": {"beta": 0.3}}]},
        });
        let told: Vec<String> =
            settings(args.as_object().unwrap_or(&Map::new())).into_iter().map(|(n, v)| format!("{n}={v}")).collect();
        let mut all = [
            "lora_rank=– → 8",
            "dataset=a b",
            "val_dataset=–",
            "beta=0.1",
            "device=auto → cpu",
            "ranks=2",
            "packing logits_rows=7",
            "losses sigmoid weight=1.0",
            "losses sigmoid options beta=0.3",
        ];
        let mut told: Vec<&str> = told.iter().map(String::as_str).collect();
        told.sort_unstable();
        all.sort_unstable();
        assert_eq!(told, all);
    }
}
