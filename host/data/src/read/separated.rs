//! Rows of csv and tsv: a header, then a record a row. Values are text; a cell that holds a conversation as JSON is read as one.

use std::path::Path;

use csv::{Position, ReaderBuilder, StringRecord};
use dpo_plugin_api::dataset::Row;
use serde_json::Value;

use super::row::{SourceRow, read_bytes};
use dpo_core::error::{Error, Result};

/// What may stand between cells, the likeliest first.
const SEPARATORS: [u8; 3] = [b',', b'\t', b';'];

/// # Errors
/// A header that has a column twice, or a conversation as Python prints it.
pub(super) fn read_separated(path: &Path) -> Result<Vec<SourceRow>> {
    let bytes = read_bytes(path)?;
    let mut reader = ReaderBuilder::new().delimiter(separator(&bytes)).from_reader(bytes.as_slice());
    // The library counts a line too few behind CR LF.
    let line = |position: Option<&Position>| {
        let at = position.map_or(0, |position| position.byte() as usize).min(bytes.len());
        let blank = bytes[at..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        1 + bytes[..at + blank].iter().filter(|byte| **byte == b'\n').count()
    };
    let place = |line: usize| format!("{}:{line}", path.display());
    let broken = |e: &csv::Error, line: usize| {
        let message = e.to_string();
        let what = message.rsplit_once("): ").map_or(message.as_str(), |(_, what)| what);
        Error::input(format!("broken csv: {what}")).at(place(line))
    };
    let header = reader.headers().map_err(|e| broken(&e, 1))?.clone();
    if let Some(twice) = header.iter().enumerate().find(|(i, name)| header.iter().take(*i).any(|other| other == *name))
    {
        let what = format!("column '{}' is there twice", twice.1);
        return Err(Error::input(what).at(place(1)).help("rename one of them"));
    }
    let mut rows = Vec::new();
    let mut record = StringRecord::new();
    loop {
        let before = reader.position().clone();
        match reader.read_record(&mut record) {
            Ok(false) => return Ok(rows),
            Ok(true) => {
                let line = line(record.position());
                let row: Row = header.iter().zip(&record).map(|(name, cell)| (name.to_owned(), value(cell))).collect();
                if let Some((name, _)) = header.iter().zip(&record).find(|(_, cell)| is_python(cell)) {
                    return Err(Error::input(format!("column '{name}' has a conversation as Python prints it, not JSON"))
                        .at(place(line))
                        .help("pandas' to_csv writes lists so: write the rows with to_json(…, orient=\"records\", lines=True) or to_parquet"));
                }
                rows.push(SourceRow { row: Ok(row), place: place(line) });
            }
            Err(e) => {
                let line = line(e.position().or(Some(&before)));
                rows.push(SourceRow { row: Err(broken(&e, line)), place: place(line) });
            }
        }
    }
}

/// What the first line has most of.
fn separator(bytes: &[u8]) -> u8 {
    let header = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let count = |separator: &u8| header.iter().filter(|byte| *byte == separator).count();
    SEPARATORS.into_iter().rev().max_by_key(count).unwrap_or(b',')
}

/// A cell: a list of objects where it is one, otherwise text. An answer may well be JSON, so nothing else is read.
fn value(cell: &str) -> Value {
    let list =
        Some(cell).filter(|c| c.trim_start().starts_with('[')).and_then(|c| serde_json::from_str::<Value>(c).ok());
    let turns = list.filter(|v| v.as_array().is_some_and(|l| !l.is_empty() && l.iter().all(Value::is_object)));
    turns.unwrap_or_else(|| cell.into())
}

/// Whether a cell is a turn, or a list of turns, as Python prints it.
fn is_python(cell: &str) -> bool {
    let turn = cell.trim_start().trim_start_matches("array(").trim_start_matches('[').trim_start();
    let Some(key) = turn.strip_prefix("{'") else { return false };
    ["role", "content", "from", "value"].iter().any(|name| key.strip_prefix(name).is_some_and(|r| r.starts_with("':")))
}
