//! Rows in JSON: objects in lines or in an array, columns, tables under a name.

use std::ops::Range;
use std::path::Path;

use dpo_plugin_api::dataset::{Row, kind};
use rayon::prelude::*;
use serde_json::Value;

use super::Give;
use super::row::{SourceRow, Text};
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
pub(super) fn read_json(path: &Path, give: Give<'_>) -> Result<()> {
    let mut text = Text::open(path)?;
    let is_space = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_whitespace);
    while text.more()? && is_space(text.bytes()) {}
    let begins = text.bytes().trim_ascii_start().first().copied();
    if begins == Some(b'[') {
        return read_array(&mut text, path, give);
    }
    if begins == Some(b'{') {
        // Another line behind a whole object: the file is lines. Otherwise it may be one object, which is then in memory.
        let first = |bytes: &[u8]| bytes.trim_ascii_start().iter().position(|b| *b == b'\n');
        while first(text.bytes()).is_none() && text.more()? {}
        let start = text.bytes().trim_ascii_start();
        let (line, rest) = start.split_at(first(text.bytes()).unwrap_or(start.len()));
        let whole = std::str::from_utf8(line).is_ok_and(|line| parse(line).is_ok());
        if !whole || is_space(rest) {
            while text.more()? {}
            if let Some(object) = std::str::from_utf8(text.bytes()).ok().and_then(only_object) {
                return table(object, path).into_iter().try_for_each(give);
            }
        }
    }
    loop {
        let (from, lines) = text.lines()?;
        if lines.is_empty() {
            return Ok(());
        }
        let text = utf8(lines, from, path)?;
        let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let pieces: Vec<Piece<'_>> = numbered.map(|(i, text)| Piece { text, line: from + i, column: 1 }).collect();
        let rows: Vec<SourceRow> = pieces.into_par_iter().map(|piece| piece.read(path)).collect();
        rows.into_iter().try_for_each(&mut *give)?;
    }
}

/// Bytes that begin in a line, as text.
fn utf8<'a>(bytes: &'a [u8], line: usize, path: &Path) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let line = line + bytes[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count();
        Error::input("is not UTF-8 text")
            .at(format!("{}:{line}", path.display()))
            .help("convert it, for instance with iconv -t UTF-8")
    })
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

/// Where an array is being cut: the elements are cut where its commas stand, and read one by one, so that a broken one costs one row.
#[derive(Default)]
struct Cut {
    depth: usize,
    quoted: bool,
    escaped: bool,
    /// Lines so far, and the byte of the file at which the last one begins.
    lines: usize,
    line_start: usize,
    /// Where the element that is not at its end begins: byte of the file, line and column.
    piece: Option<(usize, usize, usize)>,
    /// Whether the array is at its end.
    done: bool,
}

impl Cut {
    /// Takes the byte at a place of the file; the element that ends there, with line and column.
    fn take(&mut self, at: usize, byte: u8) -> Option<(Range<usize>, usize, usize)> {
        if byte == b'\n' {
            (self.lines, self.line_start) = (self.lines + 1, at + 1);
        }
        if self.quoted {
            (self.quoted, self.escaped) = (self.escaped || byte != b'"', !self.escaped && byte == b'\\');
            return None;
        }
        let ends = self.depth == 1 && (byte == b',' || byte == b']');
        if self.depth == 1 && !ends && !byte.is_ascii_whitespace() && self.piece.is_none() {
            self.piece = Some((at, self.lines + 1, at - self.line_start + 1));
        }
        let piece = if ends { self.piece.take() } else { None };
        match byte {
            b'"' => self.quoted = true,
            b'[' | b'{' => self.depth += 1,
            b']' | b'}' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.done = self.depth == 0 && byte == b']';
        piece.map(|(from, line, column)| (from..at, line, column))
    }
}

/// The elements of an array. Whatever follows it would be lost, so nothing may.
fn read_array(text: &mut Text, path: &Path, give: Give<'_>) -> Result<()> {
    let (mut cut, mut at) = (Cut::default(), text.start());
    loop {
        let mut pieces = Vec::new();
        let start = text.start();
        for byte in &text.bytes()[at - start..] {
            pieces.extend(cut.take(at, *byte));
            at += 1;
            if cut.done {
                break;
            }
        }
        let bytes = text.bytes();
        let read = |(range, line, column): &(Range<usize>, usize, usize)| {
            let bytes = &bytes[range.start - start..range.end - start];
            Ok(Piece { text: utf8(bytes, *line, path)?.trim_end(), line: *line, column: *column }.read(path))
        };
        let rows = pieces.par_iter().map(read).collect::<Result<Vec<SourceRow>>>()?;
        rows.into_iter().try_for_each(&mut *give)?;
        if cut.done {
            return refuse_more(text, at, cut.lines + 1, path);
        }
        text.forget(cut.piece.map_or(at, |(from, ..)| from));
        if !text.more()? {
            let place = cut.piece.map_or(cut.lines + 1, |(_, line, _)| line);
            return Err(Error::input("broken JSON: the array does not end; its last element begins here")
                .at(format!("{}:{place}", path.display())));
        }
    }
}

/// Refuses anything but space behind an array that ends before a byte of the file.
fn refuse_more(text: &mut Text, end: usize, line: usize, path: &Path) -> Result<()> {
    let mut line = line;
    text.forget(end);
    loop {
        for byte in text.bytes() {
            if *byte == b'\n' {
                line += 1;
            } else if !byte.is_ascii_whitespace() {
                return Err(Error::input("the array ends, and more follows here")
                    .at(format!("{}:{line}", path.display()))
                    .help(
                        "a file is one array of rows, or one row a line: join the arrays, or remove what is no row",
                    ));
            }
        }
        text.forget(text.start() + text.bytes().len());
        if !text.more()? {
            return Ok(());
        }
    }
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
