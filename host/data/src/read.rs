//! A file of rows: jsonl, json, csv or parquet, text also packed with gzip or zstd. Every row has its place.
//!
//! A row that cannot be read is an error of its own, with its line; the rows around it are still there. A file is a
//! stranger's: what it unpacks to is bounded, and a panic of the library that reads it is an error of the file.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use dpo_plugin_api::abi::guard;
use dpo_plugin_api::dataset::{Row, kind};
use flate2::read::MultiGzDecoder;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use rayon::prelude::*;
use serde_json::Value;

use dpo_core::error::{Error, IoContext, Result};
use dpo_core::memory::size;

/// What can be read, by extension, best last: a repository that has its rows twice has them in parquet without loss.
const READERS: [(&str, Reader); 5] = [
    ("jsonl", read_json_lines),
    ("ndjson", read_json_lines),
    ("json", read_json_lines),
    ("csv", read_csv),
    ("parquet", read_parquet),
];
/// Extensions that follow that of a text.
const PACKED: [(&str, Unpack); 2] = [
    ("gz", |file| Ok(Box::new(MultiGzDecoder::new(file)))),
    ("zst", |file| Ok(Box::new(zstd::Decoder::with_buffer(file)?))),
];
/// Packings that are known and not read.
const UNREAD: [&str; 8] = ["bz2", "xz", "lz4", "br", "zip", "7z", "tar", "tgz"];

/// A file may be unpacked to this many bytes, and to so many for each of its own: texts shrink to a tenth, seldom to a hundredth.
const MOST_UNPACKED: u64 = if cfg!(test) { 1 << 20 } else { 1 << 30 };
const MOST_UNPACKED_OF_BYTE: u64 = 256;
/// Rows that are handed on at once.
const AT_ONCE: usize = 8192;
/// What a row takes beside its texts, in bytes.
const ROW: u64 = 256;

type Reader = fn(&Path) -> Result<Vec<SourceRow>>;
type Unpack = fn(BufReader<File>) -> std::io::Result<Box<dyn Read>>;

/// A row with where it stands.
#[derive(Clone, Debug)]
pub struct SourceRow {
    /// The row, or why it cannot be read.
    pub row: Result<Row>,
    /// `file:line`, or `file: row N` where lines mean nothing.
    pub place: String,
}

/// Whether a file can be read, by its name.
///
/// # Errors
/// A file of rows that is packed in a way that cannot be read.
pub(super) fn is_known(path: &Path) -> Result<bool> {
    if let Some((stem, packing)) = split(path).filter(|(_, ending)| UNREAD.contains(&ending.as_str()))
        && split(stem).is_some_and(|(_, kind)| READERS.iter().any(|(name, _)| *name == kind))
    {
        return Err(Error::input(format!("files packed as .{packing} are not read"))
            .at(path.display())
            .help("unpack it"));
    }
    Ok(reader(path).is_some())
}

/// Extensions of what can be read, those first that are to be preferred.
pub(super) fn kinds() -> Vec<String> {
    let packed = |name: &str| PACKED.map(|(packing, _)| format!("{name}.{packing}"));
    let texts = READERS.iter().rev().filter(|(name, _)| *name != "parquet");
    let texts = texts.flat_map(|(name, _)| [(*name).to_owned()].into_iter().chain(packed(name)));
    std::iter::once("parquet".to_owned()).chain(texts).collect()
}

pub(super) fn known_kinds() -> String {
    let kinds: Vec<String> = READERS.iter().map(|(name, _)| format!(".{name}")).collect();
    format!("known kinds: {}; texts also as .gz and .zst", kinds.join(", "))
}

/// A name without its extension, and that in lower case.
fn split(path: &Path) -> Option<(&Path, String)> {
    Some((Path::new(path.file_stem()?), path.extension()?.to_str()?.to_lowercase()))
}

fn unpack(path: &Path) -> Option<Unpack> {
    let (_, ending) = split(path)?;
    PACKED.iter().find(|(name, _)| *name == ending).map(|(_, unpack)| *unpack)
}

fn reader(path: &Path) -> Option<Reader> {
    let (stem, mut ending) = split(path)?;
    let packed = unpack(path).is_some();
    if packed {
        ending = split(stem)?.1;
    }
    let known = READERS.iter().find(|(name, _)| *name == ending).map(|(_, reader)| *reader);
    known.filter(|_| !packed || ending != "parquet")
}

/// Some rows of a file that follow each other.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// The file.
    pub path: PathBuf,
    /// Its next rows.
    pub rows: Vec<SourceRow>,
}

/// The rows of a file, [`AT_ONCE`] at a time.
///
/// # Errors
/// As [`read_file`].
pub fn chunks(path: &Path) -> Result<impl Iterator<Item = Result<Vec<SourceRow>>> + use<>> {
    let mut rows = read_file(path)?.into_iter();
    Ok(std::iter::from_fn(move || {
        let next: Vec<SourceRow> = rows.by_ref().take(AT_ONCE).collect();
        (!next.is_empty()).then_some(Ok(next))
    }))
}

/// All rows of a file.
///
/// # Errors
/// A file that is missing, empty, of an unknown kind or broken as a whole.
pub fn read_file(path: &Path) -> Result<Vec<SourceRow>> {
    let read = reader(path).ok_or_else(|| {
        let what = if path.exists() { "unknown kind of data file" } else { "cannot read: no such file or directory" };
        Error::input(what).at(path.display()).help(known_kinds())
    })?;
    if std::fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        // A pipe would be waited for, and a device has no end.
        return Err(Error::input("is not a regular file").at(path.display()));
    }
    let rows = guard(|| Ok(read(path)))
        .unwrap_or_else(|e| Err(Error::input(format!("cannot be read, its reader failed: {}", e.message))))
        .map_err(|e| e.at(path.display()).help("the file is broken: write or fetch it again"))?;
    if rows.is_empty() {
        return Err(Error::input("the file holds no row")
            .at(path.display())
            .help("the samples of `dpo-host describe FORMAT` show what rows look like; `dpo-host list datasets` names the formats"));
    }
    Ok(rows)
}

/// The bytes of a file, unpacked.
fn open(path: &Path) -> Result<Bounded> {
    let file = File::open(path).reading(path)?;
    let left = most_unpacked(&file);
    let file = BufReader::new(file);
    let inner = match unpack(path) {
        Some(unpack) => unpack(file).reading(path)?,
        None => Box::new(file),
    };
    Ok(Bounded { inner, left })
}

/// Most bytes that a file may become.
fn most_unpacked(file: &File) -> u64 {
    let bytes = file.metadata().map_or(0, |m| m.len());
    MOST_UNPACKED.saturating_add(bytes.saturating_mul(MOST_UNPACKED_OF_BYTE))
}

/// A reader that fails where a file unpacks to more than can be rows.
struct Bounded {
    inner: Box<dyn Read>,
    left: u64,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left =
            self.left.checked_sub(count as u64).ok_or_else(|| std::io::Error::other(too_large().to_string()))?;
        Ok(count)
    }
}

fn too_large() -> Error {
    let (most, each) = (size(MOST_UNPACKED as usize), MOST_UNPACKED_OF_BYTE);
    Error::input(format!("it unpacks to more than {most} and {each} times its own size"))
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
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).reading(path)?;
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
        let row = match serde_json::from_str::<Value>(self.text) {
            Ok(Value::Object(row)) => Ok(row),
            Ok(other) => Err(Error::input(format!("a row should be an object, is {}", kind(&other))).at(&place)),
            // What is in the place of a large file until Git LFS fetches it.
            Err(_) if self.text.starts_with("version https://git-lfs") => {
                Err(Error::input("is a pointer of Git LFS, not the file itself")
                    .at(path.display())
                    .help("`git lfs pull` in its folder fetches that"))
            }
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
    let mut reader = csv::Reader::from_reader(open(path)?);
    let broken = |e: &csv::Error, line: u64| {
        let place = e.position().map_or(line, csv::Position::line);
        let message = e.to_string();
        let what = message.rsplit_once("): ").map_or(message.as_str(), |(_, what)| what);
        Error::input(format!("broken csv: {what}")).at(format!("{}:{place}", path.display()))
    };
    let header = reader.headers().map_err(|e| broken(&e, 1))?.clone();
    if let Some(twice) = header.iter().enumerate().find(|(i, name)| header.iter().take(*i).any(|other| other == *name))
    {
        let what = format!("column '{}' is there twice", twice.1);
        return Err(Error::input(what).at(format!("{}:1", path.display())).help("rename one of them"));
    }
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
            // What follows cannot be read either.
            Err(e) if e.is_io_error() => return Err(broken(&e, line)),
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
    let mut left = most_unpacked(&file);
    let broken = |e: parquet::errors::ParquetError| Error::input(format!("broken parquet: {e}")).at(path.display());
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let mut rows = Vec::new();
    for (i, row) in reader.get_row_iter(None).map_err(broken)?.enumerate() {
        let place = format!("{}: row {}", path.display(), i + 1);
        // The reader cannot go on after a broken page, so that is the file's error.
        let row = parquet_keys(row.map_err(|e| broken(e).at(&place))?.get_column_iter());
        let bytes = ROW + row.iter().map(|(name, value)| name.len() as u64 + weight(value)).sum::<u64>();
        left = left.checked_sub(bytes).ok_or_else(|| too_large().at(&place))?;
        rows.push(SourceRow { row: Ok(row), place });
    }
    Ok(rows)
}

/// Keys that are null are left out: parquet has one set of columns for all rows, and fills those that a row lacks.
fn parquet_keys<'a>(keys: impl Iterator<Item = (&'a String, &'a Field)>) -> Row {
    let keys = keys.filter(|(_, value)| !matches!(value, Field::Null));
    keys.map(|(name, value)| (name.clone(), parquet_value(value))).collect()
}

/// Bytes that a value takes, about.
fn weight(value: &Value) -> u64 {
    let own = size_of::<Value>() as u64;
    own + match value {
        Value::String(text) => text.len() as u64,
        Value::Array(list) => list.iter().map(weight).sum(),
        Value::Object(keys) => keys.iter().map(|(name, value)| name.len() as u64 + weight(value)).sum(),
        _ => 0,
    }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use std::sync::Arc;

    use parquet::basic::{Compression, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// A few kilobytes that become gigabytes, or here megabytes.
    #[test]
    fn a_file_that_unpacks_to_too_much_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = read_file(&path).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("it unpacks to more than 1.0 MiB and 256 times"), "{error}");
        };
        let text = " ".repeat(1 << 24);
        refused("bomb.jsonl.zst", &zstd::encode_all(text.as_bytes(), 3).unwrap());
        refused("bomb.csv.zst", &zstd::encode_all(format!("a\n{text}").as_bytes(), 3).unwrap());
        let schema = parse_message_type("message row { required binary prompt (UTF8); }").unwrap();
        let zstd = Compression::ZSTD(ZstdLevel::try_new(3).unwrap());
        let properties = WriterProperties::builder().set_compression(zstd).build();
        let mut file = SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::new(properties)).unwrap();
        let mut group = file.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values = vec![ByteArray::from(&text[..1 << 16]); 1 << 8];
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        refused("bomb.parquet", &file.into_inner().unwrap());
    }
}
