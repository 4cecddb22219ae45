//! Prompts to answer: the lines of a text, or the prompts of rows of any known format.

use std::collections::HashSet;
use std::path::Path;

use dpo_plugin_api::dataset::{Message, Record, Row, Text};

use super::DataOptions;
use super::columns::{refuse_missing, rename};
use super::pipeline::choose;
use super::read::{Chunk, SourceRow};
use super::shape::{Item, add_system};
use super::source::Source;
use super::tokens::{ChatTokenizer, shared_turns};
use dpo_core::error::{Error, Result};
use dpo_core::files::read_text;
use dpo_plugins::{Format, Registry};

/// Extensions of texts with a prompt a line.
const TEXTS: [&str; 2] = ["txt", "text"];

/// A prompt that is to be answered.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Where it stands: `file:line`.
    pub place: String,
    /// What is asked, as a person reads it.
    pub text: String,
    /// Its tokens, with those that an answer begins behind.
    pub ids: Vec<u32>,
}

/// The prompts of a file that `options` name, each once: of rows their prompts, of texts (.txt) the lines.
///
/// # Errors
/// A file that cannot be read, a row that asks nothing, a prompt that the chat template refuses.
pub fn prompts(options: &DataOptions, registry: &Registry, tokenizer: &ChatTokenizer) -> Result<Vec<Prompt>> {
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for source in options.sources()? {
        for (record, place) in records(&source, options, registry)? {
            let mut record = record.map_err(|e| e.at(&place))?;
            if !options.plain_text {
                tokenizer.make_turns(&mut record);
            }
            let mut item = Item { record, file: 0, place };
            if let Some(system) = &options.system {
                add_system(&mut item, system)?;
            }
            let ids = tokenizer.encode_prompt(&item.record).map_err(|e| e.at(&item.place))?;
            if seen.insert(ids.clone()) {
                all.push(Prompt { text: spoken(&item.record.prompt), place: item.place, ids });
            }
        }
    }
    if all.is_empty() {
        return Err(Error::input("there is no prompt").at(options.paths.join(" ")));
    }
    Ok(all)
}

/// What is asked, with where it stands.
type Asked = Vec<(Result<Record>, String)>;

fn records(source: &Source, options: &DataOptions, registry: &Registry) -> Result<Asked> {
    let most = options.max_samples.unwrap_or(usize::MAX);
    if source.path.extension().is_some_and(|kind| TEXTS.iter().any(|text| kind.eq_ignore_ascii_case(text))) {
        let text = read_text(&source.path)?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let record = |(i, line): (usize, &str)| {
            let turns = vec![Message::new("user", line.trim())];
            (Ok(of_prompt(Text::Messages(turns))), format!("{}:{}", source.path.display(), i + 1))
        };
        return Ok(lines.take(source.rows.unwrap_or(most).min(most)).map(record).collect());
    }
    refuse_missing(std::slice::from_ref(source), &options.columns)?;
    let mut all = Asked::new();
    let mut left = most;
    for chunk in source.read(options.shuffle, options.seed)? {
        let Chunk { path, mut rows } = chunk?;
        rows.truncate(left);
        left -= rows.len();
        rename(&mut rows, &options.columns);
        if !rows.is_empty() {
            all.extend(of_rows(&path, rows, options, registry)?);
        }
    }
    Ok(all)
}

/// What rows ask: by their format, or where they have no answers and so are of none, by their `prompt` or `messages`.
fn of_rows(path: &Path, rows: Vec<SourceRow>, options: &DataOptions, registry: &Registry) -> Result<Asked> {
    let bare = rows.iter().all(|row| row.row.as_ref().is_ok_and(|row| alone(row).is_some()));
    let format = if bare { None } else { Some(choose(options, registry, path, &rows)?) };
    let of = |SourceRow { row, place }: SourceRow| {
        let made = row.and_then(|row| asked(&row, format));
        match made {
            Ok(records) => records.into_iter().map(|record| (Ok(record), place.clone())).collect(),
            Err(e) => vec![(Err(e), place)],
        }
    };
    Ok(rows.into_iter().flat_map(of).collect())
}

fn asked(row: &Row, format: Option<&Format>) -> Result<Vec<Record>> {
    match (alone(row), format) {
        (Some(prompt), _) => Ok(vec![Record { tools: row.get("tools").cloned(), ..of_prompt(prompt?) }]),
        (None, Some(format)) => Ok(format.records(row)?.into_iter().map(with_prompt).collect()),
        (None, None) => Err(Error::input("asks nothing").help("a row has a `prompt`, or `messages`")),
    }
}

/// A record whose prompt stands in its answers alone has as its prompt what they have in common.
fn with_prompt(mut record: Record) -> Record {
    let turns = |text: &Text| if let Text::Messages(turns) = text { turns.clone() } else { Vec::new() };
    if record.prompt == Text::Messages(Vec::new()) {
        let whole: Vec<Vec<Message>> = record.answers.iter().map(|answer| turns(&answer.text)).collect();
        let shared = shared_turns(&whole);
        record.prompt = Text::Messages(whole.first().map(|first| first[..shared].to_vec()).unwrap_or_default());
    }
    record
}

/// The prompt of a row that has nothing but one: turns that end with the user's, or a text.
fn alone(row: &Row) -> Option<Result<Text>> {
    let has = |name: &str| row.get(name).filter(|value| !value.is_null());
    let (name, value) = ["prompt", "messages"].iter().find_map(|name| Some((*name, has(name)?)))?;
    let others = row.keys().filter(|key| *key != name && has(key).is_some());
    if others.into_iter().any(|key| ANSWERS.iter().any(|word| key.contains(word))) {
        return None;
    }
    if let Some(text) = value.as_str() {
        return (name == "prompt").then(|| Ok(Text::Plain(text.to_owned())));
    }
    match Message::parse_list(value) {
        Ok(turns) if turns.last().is_some_and(|turn| turn.role == "assistant") => None,
        turns => Some(turns.map(Text::Messages).map_err(|e| Error::input(e.message))),
    }
}

/// What names of columns with answers have in them.
const ANSWERS: [&str; 8] = ["chosen", "reject", "answer", "response", "completion", "output", "messages", "label"];

fn of_prompt(prompt: Text) -> Record {
    Record { prompt, answers: Vec::new(), tools: None, template_args: serde_json::Map::new() }
}

/// A prompt as a person reads it: what the user says, or where there was more, who said what.
fn spoken(prompt: &Text) -> String {
    match prompt {
        Text::Plain(text) => text.clone(),
        Text::Messages(turns) => match turns.as_slice() {
            [turn] => turn.content.clone(),
            turns => turns.iter().map(|t| format!("{}: {}", t.role, t.content)).collect::<Vec<_>>().join("\n\n"),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;
    use serde_json::json;

    /// What a file of rows asks.
    fn of(rows: &str) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, rows).unwrap();
        let options = DataOptions::of_file(&path.display().to_string());
        let asked = records(&Source::parse(&options.paths[0])?, &options, &Registry::discover(&[], None))?;
        asked.into_iter().map(|(record, place)| Ok(spoken(&record.map_err(|e| e.at(place))?.prompt))).collect()
    }

    #[test]
    fn rows_of_any_kind_ask() {
        let turn = |role: &str, text: &str| json!({"role": role, "content": text});
        let rows = [
            json!({"prompt": "a"}),
            json!({"prompt": [turn("user", "b")], "id": 7}),
            json!({"messages": [turn("system", "s"), turn("user", "c")]}),
        ];
        let lines = rows.map(|row| row.to_string()).join("\n");
        assert_eq!(of(&lines).unwrap(), ["a", "b", "system: s\n\nuser: c"]);
        let pair = json!({"prompt": "d", "chosen": "yes", "rejected": "no"}).to_string();
        assert_eq!(of(&pair).unwrap(), ["d"]);
        let sft = json!({"messages": [turn("user", "e"), turn("assistant", "x")]}).to_string();
        assert_eq!(of(&sft).unwrap(), ["e"]);
        let whole = |answer: &str| json!([turn("user", "f"), turn("assistant", answer)]);
        let pair = json!({"chosen": whole("yes"), "rejected": whole("no")}).to_string();
        assert_eq!(of(&pair).unwrap(), ["f"]);
        let error = of(&json!({"colour": "red"}).to_string()).unwrap_err();
        assert!(error.to_string().contains("no known dataset format"), "{error}");
        let error = of(&json!({"prompt": [{"role": "user"}]}).to_string()).unwrap_err();
        assert!(error.to_string().contains("rows.jsonl:1"), "{error}");
    }
}
