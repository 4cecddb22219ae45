//! Columns: renamed as the user says, and none that changes what a row means is lost.
//!
//! Rows carry ids, sources and statistics, which every format ignores. But a question, a turn, a label or an image that nobody
//! reads makes another row of it. Such columns have names that everybody uses; where one is filled, the format makes the same
//! of the row without it, and its text stands nowhere else, the row is refused. This needs no list of what formats read, and
//! so holds for plugins.

use std::collections::{BTreeMap, BTreeSet};

use dpo_plugin_api::dataset::{Message, Record, Row, Text};
use serde_json::Value;

use super::read::{SourceRow, chunks};
use super::source::Source;
use dpo_core::console;
use dpo_core::error::{Error, Result};
use dpo_plugins::Registry;

/// What is seen or heard, in a row or in a message. No format can read it.
const MEDIA: [&str; 27] = [
    "image_bytes",
    "video_bytes",
    "audio_bytes",
    "image",
    "images",
    "image_path",
    "image_paths",
    "image_url",
    "image_urls",
    "img",
    "imgs",
    "picture",
    "pictures",
    "photo",
    "photos",
    "pixel_values",
    "video",
    "videos",
    "video_path",
    "video_url",
    "audio",
    "audios",
    "audio_path",
    "audio_url",
    "speech",
    "objects",
    "rejected_images",
];
/// What a model is asked, what was said before, and what it is given for the answer.
const PROMPTS: [&str; 25] = [
    "prompt",
    "question",
    "query",
    "instruction",
    "instructions",
    "input",
    "inputs",
    "problem",
    "context",
    "system",
    "system_prompt",
    "system_message",
    "user_prompt",
    "history",
    "messages",
    "conversation",
    "conversations",
    "dialog",
    "dialogue",
    "trajectory",
    "tools",
    "functions",
    "chosen_messages",
    "rejected_messages",
    "rejected_response",
];
/// What is thought of the answers, with the number that says nothing.
const LABELS: [(&str, Option<f64>); 10] = [
    ("label", None),
    ("kto_tag", None),
    ("margin", Some(0.0)),
    ("weight", Some(1.0)),
    ("sample_weight", Some(1.0)),
    ("preference", None),
    ("overall_preference", None),
    ("preference_strength", None),
    ("better_response_id", None),
    ("winner", None),
];
/// What a turn has beside its text.
const OF_TURNS: [&str; 4] = ["function_call", "functions", "thinking", "reasoning"];
/// Whether a turn is learned.
const LEARNED: [&str; 3] = ["loss", "train", "weight"];
/// Verdicts of which a row has two: the one that is read, the other, and what that one says.
const CHOICES: [(&str, &str, &str); 1] = [("better_response_id", "safer_response_id", "which answer is safer")];
/// Words in the names of columns, by what they may hold.
const ASKED: [&str; 9] = ["prompt", "question", "instruct", "query", "problem", "input", "ask", "user", "context"];
const BETTER: [&str; 9] = ["chosen", "better", "best", "good", "win", "prefer", "accept", "positive", "correct"];
const WORSE: [&str; 9] = ["reject", "worse", "worst", "bad", "los", "disprefer", "negative", "wrong", "incorrect"];
/// Questions whose names every format knows.
const KNOWN: [&str; 6] = ["prompt", "question", "instruction", "query", "problem", "input"];
/// A text that is shorter may stand in another one by chance.
const LONG: usize = 16;

/// `--columns '{"theirs": "ours"}'`: the names that formats read, for the names that the files have.
pub type Columns = BTreeMap<String, String>;

/// Reads the argument of `--columns`.
///
/// # Errors
/// Anything but an object of texts.
pub fn parse_columns(text: &str) -> Result<Columns> {
    serde_json::from_str(text).map_err(|e| {
        let what = e.to_string();
        Error::input(format!("is not a map of columns: {what}"))
            .at("--columns")
            .help(r#"write --columns '{"theirs": "ours"}'"#)
    })
}

/// Renames columns in every row. A name that is there already gives way: the user said which one is meant.
pub fn rename(rows: &mut [SourceRow], columns: &Columns) {
    for row in rows.iter_mut().filter_map(|r| r.row.as_mut().ok()) {
        // All are taken out before the first is put back, so that two may change places.
        let taken: Vec<_> = columns.iter().filter_map(|(from, to)| Some((from, to, row.remove(from)?))).collect();
        taken.into_iter().for_each(|(_, to, value)| drop(row.insert(to.clone(), value)));
    }
}

/// Refuses to rename a column that the first rows of no file have: some thousand of each.
///
/// # Errors
/// That, and a file that cannot be read.
pub fn refuse_missing(sources: &[Source], columns: &Columns) -> Result<()> {
    if columns.is_empty() {
        return Ok(());
    }
    let mut known = BTreeSet::new();
    for path in sources.iter().map(Source::files).collect::<Result<Vec<_>>>()?.concat() {
        for row in chunks(&path)?.next().transpose()?.into_iter().flatten().filter_map(|row| row.row.ok()) {
            known.extend(row.into_iter().map(|(name, _)| name).filter(|name| !name.is_empty()));
        }
    }
    match columns.keys().find(|from| !known.contains(*from)) {
        Some(missing) => Err(Error::unknown("column", missing, known.iter().map(String::as_str)).at("--columns")),
        None => Ok(()),
    }
}

/// Columns of the first rows that can be read.
pub fn first_columns(rows: &[SourceRow]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in rows.iter().filter_map(|r| r.row.as_ref().ok()).take(20) {
        for name in row.keys().filter(|n| !n.is_empty()) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
    }
    names
}

/// How rows of no known format are read all the same: what their columns may be, as an argument of `--columns`.
pub fn advice(rows: &[SourceRow], registry: &Registry) -> String {
    let known: Vec<&str> = registry.formats.iter().map(|f| f.name.as_str()).collect();
    let formats = format!("known formats: {}; `dpo-host describe NAME` shows rows of each", known.join(", "));
    let columns = first_columns(rows);
    if let Some((column, meant)) = misspelt_column(&columns, registry) {
        return format!(
            "did you mean '{meant}' for '{column}'? --columns '{{\"{column}\": \"{meant}\"}}' renames it; {formats}"
        );
    }
    let needed = "a row needs a prompt with a preferred and a rejected answer, or one answer with a label";
    match roles(rows) {
        Some((map, better)) => {
            let given =
                if better == "chosen" { String::new() } else { format!(" if '{better}' has the better answer") };
            format!("say what the columns are: --columns '{map}'{given}. {needed}; {formats}")
        }
        None => format!(
            "{needed}. --columns '{{\"theirs\": \"prompt\", \"good\": \"chosen\", \"bad\": \"rejected\"}}' renames columns; {formats}"
        ),
    }
}

/// A guess which columns are the prompt and both answers: by words in their names, else by their order. Also the name of the
/// column that is taken for the better answer.
fn roles(rows: &[SourceRow]) -> Option<(String, String)> {
    let row = rows.iter().find_map(|r| r.row.as_ref().ok())?;
    let about = |name: &str| ["_id", "id", "source", "model", "lang", "category"].iter().any(|end| name.ends_with(end));
    let said =
        row.iter().filter(|(name, value)| (value.is_string() || !turns(value).is_empty()) && !about(&plain(name)));
    let mut left: Vec<&str> = said.map(|(name, _)| name.as_str()).collect();
    let take = |left: &mut Vec<&str>, words: &[&str], else_first: bool| {
        let named = left.iter().position(|name| words.iter().any(|word| plain(name).contains(word)));
        named.or_else(|| (else_first && !left.is_empty()).then_some(0)).map(|at| left.remove(at).to_owned())
    };
    let worse = take(&mut left, &WORSE, false);
    let better = take(&mut left, &BETTER, false);
    let asked = take(&mut left, &ASKED, true)?;
    let better = better.or_else(|| take(&mut left, &[], true))?;
    let worse = worse.or_else(|| take(&mut left, &[], true))?;
    let mut map = Row::new();
    for (name, role) in [(&asked, "prompt"), (&better, "chosen"), (&worse, "rejected")] {
        let known = role == "prompt" && KNOWN.contains(&name.as_str());
        if name != role && !known {
            map.insert(name.clone(), role.into());
        }
    }
    Some((Value::Object(map).to_string(), better))
}

/// A column that is a misspelling of one that a format reads, and that one.
fn misspelt_column(columns: &[&str], registry: &Registry) -> Option<(String, String)> {
    let rows = registry.formats.iter().flat_map(|format| format.examples.lines());
    let known: BTreeSet<String> = rows
        .filter_map(|row| serde_json::from_str::<Row>(row).ok())
        .flat_map(|row| row.into_iter().map(|(name, _)| name))
        .collect();
    let unknown = columns.iter().filter(|column| !known.contains(**column));
    let known = || known.iter().map(String::as_str).filter(|name| !columns.contains(name));
    // `answer_zh` is no slip of `answers`: it says more.
    let is_slip = |column: &str, meant: &&str| !column.contains(meant.trim_end_matches('s'));
    let meant =
        |column: &str| Error::misspelt(column, known()).filter(|meant| is_slip(column, meant)).map(str::to_owned);
    unknown.filter_map(|column| Some(((*column).to_owned(), meant(column)?))).next()
}

/// Says which of two verdicts the rows are read by.
pub(super) fn note_choices(path: &std::path::Path, rows: &[SourceRow]) {
    let columns = first_columns(rows);
    for (read, other, what) in CHOICES.iter().filter(|(a, b, _)| columns.contains(a) && columns.contains(b)) {
        console::note(format!(
            "{}: the better answer is that of '{read}'; --columns '{{\"{other}\": \"{read}\"}}' takes {what}",
            path.display()
        ));
    }
}

/// Refuses a row of which something is lost that changes what it means: `records` is what `format` makes of it, and `again`
/// makes the same of another row.
///
/// # Errors
/// The name of the column, or of the key of a message.
pub(super) fn refuse_lost(
    format: &str,
    row: &Row,
    records: &[Record],
    again: impl Fn(&Row) -> Result<Vec<Record>>,
) -> Result<()> {
    refuse_media(row)?;
    let is_read = |without: Row| again(&without).map_or(true, |other| other != records);
    for (name, value) in row.iter().filter(|(name, value)| says_something(name, value)) {
        if !is_repeated(value, row, records) && !is_read(without_column(row, name)) {
            let error = Error::input(format!("column '{name}' would be lost: the format '{format}' does not read it"));
            return Err(aside(error, name, &format!("name what it is with --columns '{{\"{name}\": \"…\"}}', ")));
        }
    }
    let said = row
        .values()
        .flat_map(turns)
        .flatten()
        .filter(|(name, value)| OF_TURNS.contains(&name.as_str()) && !is_empty(value));
    if let Some((name, _)) = said.into_iter().find(|(name, _)| !is_read(without_key(row, name))) {
        let what = format!("'{name}' of a message would be lost: the format '{format}' does not read it");
        return Err(Error::input(what).help("write it into the text, or leave the key out"));
    }
    if let Some(name) =
        row.values().filter_map(|column| unlike_learned(column, records)).find(|name| !is_read(without_key(row, name)))
    {
        let what =
            format!("'{name}' of a message says otherwise than is done: answers are learned, and nothing before them");
        return Err(Error::input(what).help("leave such rows out, or the key"));
    }
    Ok(())
}

/// Refuses what no format can read.
fn refuse_media(row: &Row) -> Result<()> {
    // `image_0` is an image as well.
    let is_medium =
        |name: &str| MEDIA.contains(&plain(name).trim_end_matches(|c: char| c.is_ascii_digit() || c == '_'));
    let filled = |(name, value): &(&String, &Value)| is_medium(name) && !is_empty(value);
    if let Some((name, _)) = row.iter().find(filled) {
        let error = Error::input(format!("column '{name}' is filled, and models are trained on text alone"));
        return Err(aside(error, name, ""));
    }
    match row.values().flat_map(turns).flatten().find(filled) {
        Some((name, _)) => Err(Error::input(format!("a message has '{name}', and models are trained on text alone"))
            .help("leave such rows out")),
        None => Ok(()),
    }
}

/// Says how to go on without a column; `or_named` is what else can be done.
fn aside(error: Error, name: &str, or_named: &str) -> Error {
    error.help(format!(
        "leave such rows out, {or_named}or put the column aside with --columns '{{\"{name}\": \"unused\"}}'"
    ))
}

/// A name as the tables have it.
fn plain(name: &str) -> String {
    name.trim().to_lowercase().replace(['-', ' '], "_")
}

/// Whether nothing is said: null, no text, lists of nothing, and how csv writes them.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => matches!(text.trim(), "" | "[]" | "{}" | "null" | "None" | "nan" | "NaN"),
        Value::Array(list) => list.iter().all(is_empty),
        Value::Object(keys) => keys.values().all(is_empty),
        _ => false,
    }
}

/// Whether a column changes a row, by its name and value.
fn says_something(name: &str, value: &Value) -> bool {
    let name = plain(name);
    let number = || value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
    let label = LABELS.iter().find(|(label, _)| *label == name);
    !is_empty(value)
        && (PROMPTS.contains(&name.as_str())
            || label.is_some_and(|(_, neutral)| neutral.is_none() || *neutral != number()))
}

/// Whether all of a value's texts stand in the records, or in the texts that they were taken from.
fn is_repeated(value: &Value, row: &Row, records: &[Record]) -> bool {
    let mut wanted = Vec::new();
    texts(value, &mut wanted);
    let of_text = |text: &Text| match text {
        Text::Plain(text) => vec![text.clone()],
        Text::Messages(turns) => turns.iter().map(|turn| turn.content.clone()).collect(),
    };
    let made = records.iter().flat_map(|r| std::iter::once(&r.prompt).chain(r.answers.iter().map(|a| &a.text)));
    let raw = ["chosen", "rejected"].iter().filter_map(|name| row.get(*name)?.as_str().map(str::to_owned));
    let all: Vec<String> = made.flat_map(of_text).chain(raw).collect();
    let stands = |text: &&str| {
        all.iter().any(|other| if text.len() < LONG { other.trim() == *text } else { other.contains(*text) })
    };
    !wanted.is_empty() && wanted.iter().all(stands)
}

/// The texts of a value, without roles.
fn texts<'a>(value: &'a Value, into: &mut Vec<&'a str>) {
    match value {
        Value::String(text) if !is_empty(value) => into.push(text.trim()),
        Value::Array(list) => list.iter().for_each(|item| texts(item, into)),
        Value::Object(keys) => {
            let said = keys.iter().filter(|(name, _)| !matches!(name.as_str(), "role" | "from" | "type" | "name"));
            said.for_each(|(_, item)| texts(item, into));
        }
        _ => {}
    }
}

/// The messages of a column, if it has any: one, or a list of them.
fn turns(column: &Value) -> Vec<&Row> {
    let list = column.as_array().map_or(std::slice::from_ref(column), Vec::as_slice);
    let turns = list.iter().filter_map(Value::as_object).filter(|keys| role(keys).is_some());
    turns.collect()
}

fn role(turn: &Row) -> Option<&str> {
    turn.get("role").or_else(|| turn.get("from")).and_then(Value::as_str)
}

/// A key of a conversation's turn that says that it is learned, or not, where the opposite is done.
fn unlike_learned(column: &Value, records: &[Record]) -> Option<&'static str> {
    let turns = turns(column);
    let asks = |turn: &&Row| matches!(role(turn), Some("user" | "human" | "system"));
    let last = turns.iter().rposition(asks).map_or(0, |last| last + 1);
    let is_prompt = |text: &Text| !matches!(text, Text::Messages(turns) if turns.is_empty());
    let alone = records.iter().filter(|record| is_prompt(&record.prompt)).flat_map(|record| &record.answers);
    let answers: Vec<&Message> =
        alone.filter_map(|a| if let Text::Messages(turns) = &a.text { Some(turns) } else { None }).flatten().collect();
    let learned = |at: usize| {
        matches!(role(turns[at]), Some("assistant" | "gpt" | "bot" | "model"))
            && (at >= last
                || Message::parse(&Value::Object(turns[at].clone())).is_ok_and(|turn| answers.contains(&&turn)))
    };
    let says = |value: &Value| value.as_f64().or_else(|| Some(f64::from(u8::from(value.as_bool()?))));
    let unlike = |(at, turn): (usize, &&Row)| {
        let key = LEARNED.into_iter().find(|key| turn.contains_key(*key))?;
        (says(&turn[key])? != f64::from(u8::from(learned(at)))).then_some(key)
    };
    turns.iter().enumerate().find_map(unlike)
}

fn without_column(row: &Row, column: &str) -> Row {
    row.iter().filter(|(name, _)| *name != column).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// A row whose messages lack a key.
fn without_key(row: &Row, key: &str) -> Row {
    let strip = |value: &Value| {
        let mut value = value.clone();
        let turns = match &mut value {
            Value::Array(list) => list.iter_mut().collect(),
            one => vec![one],
        };
        turns
            .into_iter()
            .filter_map(Value::as_object_mut)
            .filter(|turn| role(turn).is_some())
            .for_each(|turn| drop(turn.remove(key)));
        value
    };
    row.iter().map(|(name, value)| (name.clone(), strip(value))).collect()
}
