//! Files of rows: jsonl, json, csv, parquet, or a folder of them, with the place of every row.
//!
//! A row that cannot be read is an error of its own, with its line; the rows around it are still there.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use dpo_plugin_api::dataset::{Row, kind};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::Value;

use dpo_core::error::{Error, IoContext, Result};
use dpo_hub::{self as hub, Name};

/// What can be read, by extension.
const READERS: [(&str, Reader); 5] = [
    ("jsonl", read_json_lines),
    ("ndjson", read_json_lines),
    ("json", read_json_lines),
    ("csv", read_csv),
    ("parquet", read_parquet),
];

type Reader = fn(&Path) -> Result<Vec<SourceRow>>;

/// A row with where it stands.
#[derive(Clone, Debug)]
pub struct SourceRow {
    /// The row, or why it cannot be read.
    pub row: Result<Row>,
    /// `file:line`, or `file: row N` where lines mean nothing.
    pub place: String,
}

/// A `--dataset` argument: a file or a folder, and how many rows of it are wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// The file or folder.
    pub path: PathBuf,
    /// `#N`: this many rows, by sampling or by repeating.
    pub rows: Option<usize>,
}

impl Source {
    /// Reads `PATH` or `PATH#N`. A path that exists as it is written is never cut.
    ///
    /// # Errors
    /// `#0`.
    pub fn parse(argument: &str) -> Result<Source> {
        let cut = argument.rsplit_once('#').and_then(|(path, rows)| Some((path, rows.parse().ok()?)));
        match cut.filter(|_| !Path::new(argument).exists()) {
            Some((_, 0)) => {
                Err(Error::input("'#0' asks for no row").at(argument).help("name how many rows to take, as in #500"))
            }
            Some((path, rows)) => Ok(Source { path: path.into(), rows: Some(rows) }),
            None => Ok(Source { path: argument.into(), rows: None }),
        }
    }

    /// The files of the source with their rows: of all rows, or of the `#N` that are wanted. Fewer than there are, are a
    /// sample without replacement (without `shuffle` the first ones); more are all of them, as often as they fit, and a
    /// sample for the rest. Rows stay in the order of the file.
    ///
    /// # Errors
    /// A file that is missing, empty, of an unknown kind or broken as a whole.
    pub fn read(&self, shuffle: bool, seed: u64) -> Result<Vec<(PathBuf, Vec<SourceRow>)>> {
        let mut files = Vec::new();
        for path in data_files(&self.path)? {
            let rows = read_file(&path)?;
            files.push((path, rows));
        }
        if let Some(wanted) = self.rows {
            let total = files.iter().map(|(_, rows)| rows.len()).sum();
            let mut times = times_taken(total, wanted, shuffle, seed).into_iter();
            for (_, rows) in &mut files {
                let counted: Vec<(SourceRow, usize)> = std::mem::take(rows).into_iter().zip(times.by_ref()).collect();
                *rows = counted.into_iter().flat_map(|(row, times)| std::iter::repeat_n(row, times)).collect();
            }
        }
        Ok(files)
    }
}

/// How often each of `total` rows is taken when `wanted` are.
fn times_taken(total: usize, wanted: usize, shuffle: bool, seed: u64) -> Vec<usize> {
    let mut times = vec![wanted / total; total];
    let rest = wanted % total;
    if shuffle {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        index::sample(&mut random, total, rest).into_iter().for_each(|row| times[row] += 1);
    } else {
        times[..rest].iter_mut().for_each(|t| *t += 1);
    }
    times
}

/// The file itself, a folder's data files by name, or those of a hub's dataset.
fn data_files(path: &Path) -> Result<Vec<PathBuf>> {
    let named = path.to_str().filter(|p| p.contains("::") && !path.exists());
    if let Some(text) = named {
        let name = Name::parse(text).ok_or_else(|| {
            Error::input("is not a file, and cannot be the name of a dataset").at(text).help("name it hf::owner/name")
        })?;
        // Parquet first: a repository that has its rows twice has them so without loss.
        let kinds: Vec<&str> = READERS.iter().rev().map(|(kind, _)| *kind).collect();
        return hub::dataset(&name, &kinds);
    }
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = std::fs::read_dir(path).reading(path)?;
    let mut files: Vec<PathBuf> =
        entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.is_file() && reader(p).is_some()).collect();
    files.sort();
    if files.is_empty() {
        return Err(Error::input("the folder holds no data file").at(path.display()).help(known_kinds()));
    }
    Ok(files)
}

fn reader(path: &Path) -> Option<Reader> {
    let extension = path.extension()?.to_str()?.to_lowercase();
    READERS.iter().find(|(name, _)| *name == extension).map(|(_, reader)| *reader)
}

fn known_kinds() -> String {
    format!("known kinds: {}", READERS.map(|(name, _)| format!(".{name}")).join(", "))
}

/// All rows of a file.
///
/// # Errors
/// As [`Source::read`].
pub fn read_file(path: &Path) -> Result<Vec<SourceRow>> {
    let read = reader(path).ok_or_else(|| {
        let what = if path.exists() { "unknown kind of data file" } else { "cannot read: no such file or directory" };
        Error::input(what).at(path.display()).help(known_kinds())
    })?;
    let rows = read(path)?;
    if rows.is_empty() {
        return Err(Error::input("the file holds no row")
            .at(path.display())
            .help("the samples of `dpo-host describe FORMAT` show what rows look like; `dpo-host list datasets` names the formats"));
    }
    Ok(rows)
}

/// A piece of a text file that should be one JSON object.
struct Piece<'a> {
    text: &'a str,
    /// Where it begins, both from 1.
    line: usize,
    column: usize,
}

/// One object a line, or an array of objects: the first letter tells, whatever the name says.
fn read_json_lines(path: &Path) -> Result<Vec<SourceRow>> {
    let bytes = std::fs::read(path).reading(path)?;
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let line = bytes[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        Error::input("is not UTF-8 text")
            .at(format!("{}:{line}", path.display()))
            .help("convert it, for instance with iconv -t UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let pieces = if text.trim_start().starts_with('[') { elements(text, path)? } else { lines(text) };
    Ok(pieces.into_par_iter().map(|piece| piece.read(path)).collect())
}

fn lines(text: &str) -> Vec<Piece<'_>> {
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    numbered.map(|(i, text)| Piece { text, line: i + 1, column: 1 }).collect()
}

/// The elements of an array, cut where its commas stand. They are not read here, so that a broken one costs one row.
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
            return Ok(pieces);
        }
    }
    let place = piece.map_or(line, |(_, line, _)| line);
    Err(Error::input("broken JSON: the array does not end; its last element begins here")
        .at(format!("{}:{place}", path.display())))
}

impl Piece<'_> {
    fn read(&self, path: &Path) -> SourceRow {
        let place = format!("{}:{}", path.display(), self.line);
        let row = match serde_json::from_str::<Value>(self.text) {
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

/// A header, then a record a row. Values are text; a cell that holds a conversation is read as one.
fn read_csv(path: &Path) -> Result<Vec<SourceRow>> {
    let file = File::open(path).reading(path)?;
    let mut reader = csv::Reader::from_reader(file);
    let broken = |e: &csv::Error, line: u64| {
        let place = e.position().map_or(line, csv::Position::line);
        let message = e.to_string();
        let what = message.rsplit_once("): ").map_or(message.as_str(), |(_, what)| what);
        Error::input(format!("broken csv: {what}")).at(format!("{}:{place}", path.display()))
    };
    let header = reader.headers().map_err(|e| broken(&e, 1))?.clone();
    let mut rows = Vec::new();
    let mut record = csv::StringRecord::new();
    loop {
        let line = reader.position().line();
        match reader.read_record(&mut record) {
            Ok(false) => return Ok(rows),
            Ok(true) => {
                let line = record.position().map_or(line, csv::Position::line);
                let row = header.iter().zip(record.iter()).map(|(name, cell)| (name.to_owned(), csv_value(cell)));
                rows.push(SourceRow { row: Ok(row.collect()), place: format!("{}:{line}", path.display()) });
            }
            Err(e) => {
                let place = format!("{}:{}", path.display(), e.position().map_or(line, csv::Position::line));
                rows.push(SourceRow { row: Err(broken(&e, line)), place });
            }
        }
    }
}

/// A cell: a list of objects where it is one, otherwise text. An answer may well be JSON, so nothing else is read.
fn csv_value(cell: &str) -> Value {
    let list =
        Some(cell).filter(|c| c.trim_start().starts_with('[')).and_then(|c| serde_json::from_str::<Value>(c).ok());
    let turns = list.filter(|v| v.as_array().is_some_and(|l| !l.is_empty() && l.iter().all(Value::is_object)));
    turns.unwrap_or_else(|| cell.into())
}

fn read_parquet(path: &Path) -> Result<Vec<SourceRow>> {
    let file = File::open(path).reading(path)?;
    let broken = |e: parquet::errors::ParquetError| Error::input(format!("broken parquet: {e}")).at(path.display());
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let mut rows = Vec::new();
    for (i, row) in reader.get_row_iter(None).map_err(broken)?.enumerate() {
        let place = format!("{}: row {}", path.display(), i + 1);
        // The reader cannot go on after a broken page, so that is the file's error.
        let row = Ok(parquet_keys(row.map_err(|e| broken(e).at(&place))?.get_column_iter()));
        rows.push(SourceRow { row, place });
    }
    Ok(rows)
}

/// Keys that are null are left out: parquet has one set of columns for all rows, and fills those that a row lacks.
fn parquet_keys<'a>(keys: impl Iterator<Item = (&'a String, &'a Field)>) -> Row {
    let keys = keys.filter(|(_, value)| !matches!(value, Field::Null));
    keys.map(|(name, value)| (name.clone(), parquet_value(value))).collect()
}

/// Numbers, texts, lists and groups are what rows are made of; anything else becomes its text.
fn parquet_value(value: &Field) -> Value {
    match value {
        Field::Null => Value::Null,
        Field::Bool(flag) => (*flag).into(),
        Field::Byte(number) => (*number).into(),
        Field::Short(number) => (*number).into(),
        Field::Int(number) => (*number).into(),
        Field::Long(number) => (*number).into(),
        Field::UByte(number) => (*number).into(),
        Field::UShort(number) => (*number).into(),
        Field::UInt(number) => (*number).into(),
        Field::ULong(number) => (*number).into(),
        Field::Float(number) => (*number).into(),
        Field::Double(number) => (*number).into(),
        Field::Str(text) => text.as_str().into(),
        // Some writers leave out that a column is text.
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into(),
        Field::Group(row) => Value::Object(parquet_keys(row.get_column_iter())),
        Field::ListInternal(list) => list.elements().iter().map(parquet_value).collect(),
        Field::MapInternal(map) => {
            let key = |key: &Field| if let Field::Str(text) = key { text.clone() } else { key.to_string() };
            map.entries().iter().map(|(k, v)| (key(k), parquet_value(v))).collect()
        }
        other => other.to_string().into(),
    }
}

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
///
/// # Errors
/// A column that no row has.
pub fn rename(files: &mut [(PathBuf, Vec<SourceRow>)], columns: &Columns) -> Result<()> {
    let mut found: Vec<&str> = Vec::new();
    for row in files.iter_mut().flat_map(|(_, rows)| rows).filter_map(|r| r.row.as_mut().ok()) {
        // All are taken out before the first is put back, so that two may change places.
        let taken: Vec<_> = columns.iter().filter_map(|(from, to)| Some((from, to, row.remove(from)?))).collect();
        for (from, to, value) in taken {
            row.insert(to.clone(), value);
            if !found.contains(&from.as_str()) {
                found.push(from);
            }
        }
    }
    match columns.keys().find(|from| !found.contains(&from.as_str())) {
        Some(missing) => {
            let known = files.iter().flat_map(|(_, rows)| first_columns(rows));
            Err(Error::unknown("column", missing, known).at("--columns"))
        }
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
