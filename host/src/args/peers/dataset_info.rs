//! LLaMA-Factory's `dataset_info.json`: which rows a name means, and how they are written.

use std::collections::BTreeMap;
use std::path::Path;

use dpo_core::error::{Error, Result};
use serde_json::{Map, Value, json};

use super::combine::{exists, is_id};
use super::translation::Translation;
use crate::args::flag::Flag;

/// The file.
const INFO: &str = "dataset_info.json";

/// Columns of a ranking, theirs by their names, and those that the format `pairs` reads.
const RANKING: &[(&str, &str)] = &[
    ("prompt", "instruction"),
    ("query", "input"),
    ("history", "history"),
    ("messages", "conversations"),
    ("system", "system"),
    ("tools", "tools"),
    ("chosen", "chosen"),
    ("rejected", "rejected"),
];

/// Columns of single answers, and those that the formats `sft` and `kto` read.
const SINGLE: &[(&str, &str)] = &[
    ("prompt", "instruction"),
    ("query", "input"),
    ("response", "output"),
    ("history", "history"),
    ("messages", "messages"),
    ("system", "system"),
    ("tools", "tools"),
    ("kto_tag", "label"),
];

/// Tags of conversations, with the names that are read.
const TAGS: &[(&str, &[&str])] = &[
    ("role_tag", &["from", "role"]),
    ("content_tag", &["value", "content"]),
    ("user_tag", &["human", "user"]),
    ("assistant_tag", &["gpt", "assistant"]),
    ("observation_tag", &["observation", "tool"]),
    ("function_tag", &["function_call"]),
    ("system_tag", &["system"]),
];

/// Columns of what is no text.
const MEDIA: &[&str] = &["images", "videos", "audios"];

/// A format, and which columns have other names than those that it reads.
type Written = (&'static str, BTreeMap<String, String>);

/// `dataset`, `eval_dataset` and `dataset_dir` as rows with their format and columns. A file of that name is taken as it is.
pub(super) fn datasets(t: &mut Translation, modelscope: bool) -> Result<()> {
    let (dir, _) = t.take_value("dataset_dir");
    let dir = dir.unwrap_or_else(|| "data".into());
    let single = t.ours_of("loss").is_some_and(|flag| flag.values == ["sft"]);
    let mut info = None;
    let mut written: Option<(String, Written)> = None;
    for (name, ours) in [("dataset", "dataset"), ("eval_dataset", "val-dataset")] {
        let Some(mut flag) = t.take(name) else { continue };
        let names: Vec<String> = flag.values.iter().flat_map(|v| v.split(',')).map(|v| v.trim().to_owned()).collect();
        let mut values = Vec::new();
        for name in names.iter().filter(|name| !name.is_empty()) {
            if dir == "ONLINE" && is_id(name) {
                values.push(format!("{}::{name}", if modelscope { "ms" } else { "hf" }));
                continue;
            }
            let listed = Path::new(&dir).join(INFO).exists();
            if exists(name) && !listed || name.contains("::") {
                values.push(name.clone());
                continue;
            }
            let info = match &info {
                Some(info) => info,
                None => info.insert(read(&dir, &flag)?),
            };
            let Some(Value::Object(entry)) = info.get(name) else {
                if exists(name) {
                    values.push(name.clone());
                    continue;
                }
                return Err(Error::unknown("dataset", name, info.keys().map(String::as_str))
                    .at(Path::new(&dir).join(INFO).display()));
            };
            let at = |e: Error| e.at(format!("{}: {name}", Path::new(&dir).join(INFO).display()));
            values.push(rows(entry, &dir, modelscope).map_err(at)?);
            let how = how_written(entry, single).map_err(at)?;
            match &written {
                Some((other, first)) if *first != how => {
                    return Err(Error::input(format!("'{name}' and '{other}' are written in different ways"))
                        .at(flag.spelled())
                        .help("one run reads one format and one set of columns: write their rows alike"));
                }
                _ => written = Some((name.clone(), how)),
            }
        }
        flag.values = values;
        t.push_as(ours, flag);
    }
    if let Some((_, (format, columns))) = written {
        if !t.has("dataset-format") {
            t.push("dataset-format", [format], None);
        }
        if !columns.is_empty() && !t.has("columns") {
            t.push("columns", [json!(columns).to_string()], None);
        }
    }
    Ok(())
}

fn read(dir: &str, flag: &Flag) -> Result<Map<String, Value>> {
    let path = Path::new(dir).join(INFO);
    let text = dpo_core::files::read_text(&path).map_err(|e| {
        Error::input(e.message()).at(path.display()).help(format!(
            "{} names datasets of this file, or files: say in which folder it is with dataset_dir",
            flag.spelled()
        ))
    })?;
    serde_json::from_str(&text).map_err(|e| Error::input(e.to_string()).at(path.display()))
}

fn text<'a>(entry: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    entry.get(key).and_then(Value::as_str).filter(|text| !text.is_empty())
}

/// Where the rows of an entry are, and how many are meant.
fn rows(entry: &Map<String, Value>, dir: &str, modelscope: bool) -> Result<String> {
    let (hf, ms) = (text(entry, "hf_hub_url"), text(entry, "ms_hub_url"));
    let folder = || text(entry, "folder").map_or_else(String::new, |folder| format!("/{folder}"));
    let place = match (hf, ms, text(entry, "file_name")) {
        (_, Some(name), _) if modelscope || hf.is_none() => format!("ms::{name}{}", folder()),
        (Some(name), ..) => format!("hf::{name}{}", folder()),
        (None, _, Some(file)) => Path::new(dir).join(file).display().to_string(),
        _ => {
            return Err(Error::input("names neither a file nor a dataset of Hugging Face or ModelScope")
                .help("give it a file_name, hf_hub_url or ms_hub_url"));
        }
    };
    if let Some(subset) = text(entry, "subset") {
        return Err(Error::input(format!("a subset by its name, '{subset}', is not known"))
            .help("name the folder that it is: \"folder\": \"FOLDER\""));
    }
    if text(entry, "split").is_some_and(|split| split != "train") {
        return Err(Error::input("only the split 'train' is taken").help("name a file or a folder of it"));
    }
    let count = entry.get("num_samples").and_then(Value::as_u64).map_or_else(String::new, |n| format!("#{n}"));
    Ok(place + &count)
}

/// The format of an entry's rows, and the names of its columns.
fn how_written(entry: &Map<String, Value>, single: bool) -> Result<Written> {
    let empty = Map::new();
    let object = |key: &str| entry.get(key).and_then(Value::as_object).unwrap_or(&empty);
    let (columns, tags) = (object("columns"), object("tags"));
    if let Some(column) = MEDIA.iter().find(|column| columns.contains_key(**column)) {
        return Err(Error::input(format!("has {column}")).help("rows of text alone are trained on"));
    }
    for (tag, names) in TAGS {
        if let Some(name) = text(tags, tag).filter(|name| !names.contains(name)) {
            let names = names.join(" or ");
            return Err(
                Error::input(format!("the tag {tag} '{name}' is not read")).help(format!("write {names} in the rows"))
            );
        }
    }
    let labelled = columns.contains_key("kto_tag");
    let conversation = ["sharegpt", "openai"].contains(&text(entry, "formatting").unwrap_or("alpaca"));
    let ranking = entry.get("ranking") == Some(&Value::Bool(true));
    if !labelled && !ranking && !single {
        return Err(Error::input("is no ranking: its rows have one answer")
            .help("\"ranking\": true, with chosen and rejected; or stage: sft"));
    }
    let (format, known) = match (labelled, ranking) {
        (true, _) => ("kto", SINGLE),
        (false, true) => ("pairs", RANKING),
        (false, false) => ("sft", SINGLE),
    };
    let mut renamed = BTreeMap::new();
    for (theirs, ours) in known {
        if let Some(column) = text(columns, theirs).filter(|column| column != ours && !is_read(column, ours)) {
            renamed.insert(column.to_owned(), (*ours).to_owned());
        }
    }
    // Without a column of its own, a conversation of single answers is in 'conversations'.
    if conversation && format != "pairs" && !columns.contains_key("messages") {
        renamed.insert("conversations".into(), "messages".into());
    }
    Ok((format, renamed))
}

/// Whether a format reads a column under both names.
fn is_read(column: &str, ours: &str) -> bool {
    (column, ours) == ("messages", "conversations")
}
