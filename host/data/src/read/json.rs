//! Rows in JSON: objects in lines or in an array, columns, tables under a name.

use std::path::Path;

use dpo_plugin_api::dataset::{Row, kind};
use rayon::prelude::*;
use serde_json::Value;

use super::row::{SourceRow, read_bytes};
use dpo_core::console;
use dpo_core::error::{Error, Result};

/// Names under which a file that is one object has its rows.
const ROWS: [&str; 6] = ["data", "rows", "train", "examples", "instances", "records"];

/// A piece of a text file that should be one JSON object.
struct Piece<'a> {
    text: &'a str,
    /// Where it begins, both from 1.
    line: usize,
    column: usize,
}

/// One object a line, an array of objects, or one object that holds the rows: the text tells, whatever the name says.
pub(super) fn read_json(path: &Path) -> Result<Vec<SourceRow>> {
    let bytes = read_bytes(path)?;
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let line = bytes[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        Error::input("is not UTF-8 text")
            .at(format!("{}:{line}", path.display()))
            .help("convert it, for instance with iconv -t UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some(object) = only_object(text) {
        return Ok(table(object, path));
    }
    let pieces = if text.trim_start().starts_with('[') { elements(text, path)? } else { lines(text) };
    Ok(pieces.into_par_iter().map(|piece| piece.read(path)).collect())
}

/// The object that is all of a text, if it is one.
fn only_object(text: &str) -> Option<Row> {
    let first = |text: &str| {
        let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        let value = values.next()?;
        Some((value, text[values.byte_offset()..].trim().is_empty()))
    };
    match text.trim_start().starts_with('{').then(|| first(text))?? {
        (Ok(Value::Object(object)), true) => Some(object),
        (Ok(_), _) => None,
        (Err(_), _) => match first(&without_nan(text)?)? {
            (Ok(Value::Object(object)), true) => Some(object),
            _ => None,
        },
    }
}

/// The rows of a file that is one object: a list under a usual name, columns, or a row.
fn table(object: Row, path: &Path) -> Vec<SourceRow> {
    let is_row = |value: &Value| value.as_object().is_some_and(|keys| !is_turn(keys));
    let is_rows = |value: &Value| value.as_array().is_some_and(|l| !l.is_empty() && l.iter().all(is_row));
    if let Some(name) = ROWS.into_iter().find(|name| object.get(*name).is_some_and(is_rows)) {
        let others: Vec<&str> =
            object.iter().filter(|(n, v)| *n != name && is_rows(v)).map(|(n, _)| n.as_str()).collect();
        if !others.is_empty() {
            let others = others.join(", ");
            console::note(format!("{}: the rows of '{name}' are taken; left out: {others}", path.display()));
        }
        let rows = object.into_iter().find(|(key, _)| key == name).map(|(_, rows)| rows);
        let rows =
            rows.and_then(|rows| if let Value::Array(rows) = rows { Some(rows) } else { None }).into_iter().flatten();
        let rows = rows.filter_map(|row| if let Value::Object(row) = row { Some(row) } else { None });
        return rows.enumerate().map(|(at, row)| SourceRow::numbered(path, at, row)).collect();
    }
    match columns(&object) {
        Some(rows) => rows.into_iter().enumerate().map(|(at, row)| SourceRow::numbered(path, at, row)).collect(),
        None => vec![SourceRow { row: Ok(object), place: format!("{}:1", path.display()) }],
    }
}

/// The rows of columns: lists of one length, or what pandas makes of them, objects with the numbers of rows. A row of
/// conversations alone has lists as well, of turns.
fn columns(object: &Row) -> Option<Vec<Row>> {
    let cells = |column: &Value| -> Option<Vec<Value>> {
        match column {
            Value::Array(list) => Some(list.clone()),
            Value::Object(keys) if keys.keys().all(|key| key.parse::<u64>().is_ok()) => {
                Some(keys.values().cloned().collect())
            }
            _ => None,
        }
    };
    let columns: Vec<(&String, Vec<Value>)> =
        object.iter().map(|(name, column)| Some((name, cells(column)?))).collect::<Option<_>>()?;
    let count = columns.first().map(|(_, cells)| cells.len()).filter(|count| *count > 0)?;
    let turns = |cells: &[Value]| cells.iter().all(|cell| cell.as_object().is_some_and(is_turn));
    if columns.iter().any(|(_, cells)| cells.len() != count || turns(cells)) {
        return None;
    }
    let row = |at: usize| columns.iter().map(|(name, cells)| ((*name).clone(), cells[at].clone())).collect();
    Some((0..count).map(row).collect())
}

fn is_turn(keys: &Row) -> bool {
    keys.contains_key("role") || keys.contains_key("from")
}

/// A JSON value, with Python's NaN for null: pandas writes it for what is missing.
fn parse(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|e| without_nan(text).map_or(Err(e), |text| serde_json::from_str(&text)))
}

/// A text in which every NaN that is no part of a string is null, which has another length; none where there is none.
fn without_nan(text: &str) -> Option<String> {
    let mut made = String::new();
    let (mut quoted, mut escaped, mut from) = (false, false, 0);
    for (at, byte) in text.bytes().enumerate() {
        if quoted {
            (quoted, escaped) = (escaped || byte != b'"', !escaped && byte == b'\\');
        } else if byte == b'"' {
            quoted = true;
        } else if byte == b'N' && text[at..].starts_with("NaN") {
            made.push_str(&text[from..at]);
            made.push_str("null");
            from = at + 3;
        }
    }
    (from > 0).then(|| made + &text[from..])
}

fn lines(text: &str) -> Vec<Piece<'_>> {
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    numbered.map(|(i, text)| Piece { text, line: i + 1, column: 1 }).collect()
}

/// The elements of an array, cut where its commas stand. They are not read here, so that a broken one costs one row. Whatever
/// follows the array would be lost, so nothing may.
fn elements<'a>(text: &'a str, path: &Path) -> Result<Vec<Piece<'a>>> {
    let mut pieces = Vec::new();
    let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
    let (mut line, mut line_start) = (1, 0);
    let mut piece: Option<(usize, usize, usize)> = None;
    for (at, byte) in text.bytes().enumerate() {
        if byte == b'\n' {
            (line, line_start) = (line + 1, at + 1);
        }
        if quoted {
            (quoted, escaped) = (escaped || byte != b'"', !escaped && byte == b'\\');
            continue;
        }
        let ends = depth == 1 && (byte == b',' || byte == b']');
        if depth == 1 && !ends && !byte.is_ascii_whitespace() && piece.is_none() {
            piece = Some((at, line, at - line_start + 1));
        }
        if ends && let Some((from, line, column)) = piece.take() {
            pieces.push(Piece { text: text[from..at].trim_end(), line, column });
        }
        match byte {
            b'"' => quoted = true,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 && byte == b']' {
            let rest = &text[at + 1..];
            let Some(more) = rest.find(|c: char| !c.is_whitespace()) else { return Ok(pieces) };
            let line = line + rest[..more].matches('\n').count();
            return Err(Error::input("the array ends, and more follows here")
                .at(format!("{}:{line}", path.display()))
                .help("a file is one array of rows, or one row a line: join the arrays, or remove what is no row"));
        }
    }
    let place = piece.map_or(line, |(_, line, _)| line);
    Err(Error::input("broken JSON: the array does not end; its last element begins here")
        .at(format!("{}:{place}", path.display())))
}

impl Piece<'_> {
    fn read(&self, path: &Path) -> SourceRow {
        let place = format!("{}:{}", path.display(), self.line);
        let row = match parse(self.text) {
            Ok(Value::Object(row)) => Ok(row),
            Ok(other) => Err(Error::input(format!("a row should be an object, is {}", kind(&other))).at(&place)),
            Err(e) => {
                let message = e.to_string();
                let what = message.split(" at line ").next().unwrap_or_default();
                let column = if e.line() == 1 { e.column() + self.column - 1 } else { e.column() };
                let line = self.line + e.line().max(1) - 1;
                Err(Error::input(format!("broken JSON at column {column}: {what}"))
                    .at(format!("{}:{line}", path.display()))
                    .help("mend the row, or remove it"))
            }
        };
        SourceRow { row, place }
    }
}
