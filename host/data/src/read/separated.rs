//! Rows of csv and tsv: a header, then a record a row. Values are text; a cell that holds a conversation as JSON is read as one.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::rc::Rc;

use csv::{Position, ReaderBuilder, StringRecord};
use dpo_plugin_api::dataset::Row;
use serde_json::Value;

use super::Give;
use super::row::{SourceRow, open_text};
use dpo_core::error::{Error, IoContext, Result};

/// What may stand between cells, the likeliest first.
const SEPARATORS: [u8; 3] = [b',', b'\t', b';'];

/// # Errors
/// A header that has a column twice, or a conversation as Python prints it.
pub(super) fn read_separated(path: &Path, give: Give<'_>) -> Result<()> {
    let mut text = BufReader::new(open_text(path)?);
    let mut first = Vec::new();
    text.read_until(b'\n', &mut first).reading(path)?;
    let separator = separator(&first);
    let ends = Rc::new(RefCell::new(LineEnds::default()));
    let counted = Counted { inner: Cursor::new(first).chain(text), ends: Rc::clone(&ends) };
    let mut reader = ReaderBuilder::new().delimiter(separator).from_reader(counted);
    let line = |position: Option<&Position>| ends.borrow_mut().line(position.map_or(0, Position::byte));
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
    let mut record = StringRecord::new();
    let mut last = 1;
    loop {
        let before = reader.position().clone();
        match reader.read_record(&mut record) {
            Ok(false) if ends.borrow().quotes % 2 == 1 => {
                let what = "broken csv: a quote is opened and not closed, so that all that follows is one cell; the last row begins here";
                return Err(Error::input(what).at(place(last)).help("double a quote that is text"));
            }
            Ok(false) => return Ok(()),
            Ok(true) => {
                let line = line(record.position());
                last = line;
                let row: Row = header.iter().zip(&record).map(|(name, cell)| (name.to_owned(), value(cell))).collect();
                if let Some((name, _)) = header.iter().zip(&record).find(|(_, cell)| is_python(cell)) {
                    return Err(Error::input(format!("column '{name}' has a conversation as Python prints it, not JSON"))
                        .at(place(line))
                        .help("pandas' to_csv writes lists so: write the rows with to_json(…, orient=\"records\", lines=True) or to_parquet"));
                }
                give(SourceRow { row: Ok(row), place: place(line) })?;
            }
            Err(e) => {
                let line = line(e.position().or(Some(&before)));
                // What follows cannot be read either.
                if e.is_io_error() {
                    return Err(broken(&e, line));
                }
                give(SourceRow { row: Err(broken(&e, line)), place: place(line) })?;
            }
        }
    }
}

/// Where lines end, as far as it is not known which line a record is in. The library counts a line too few behind CR LF.
#[derive(Default)]
struct LineEnds {
    /// Of every line feed its byte, and the byte at which the line feeds and carriage returns around it begin.
    ahead: VecDeque<(u64, u64)>,
    passed: usize,
    /// Quotation marks: of a file that is whole they are even.
    quotes: usize,
    /// Bytes so far, and where the run of ends begins that they end with.
    read: u64,
    run: Option<u64>,
}

impl LineEnds {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\r' | b'\n' => {
                    let run = *self.run.get_or_insert(self.read);
                    if *byte == b'\n' {
                        self.ahead.push_back((self.read, run));
                    }
                }
                _ => {
                    self.run = None;
                    self.quotes += usize::from(*byte == b'"');
                }
            }
            self.read += 1;
        }
    }

    /// The line of a record that begins at a byte, or at the end of the empty lines there. Records come in order.
    fn line(&mut self, byte: u64) -> usize {
        while self.ahead.front().is_some_and(|(at, run)| *at < byte || *run <= byte) {
            self.ahead.pop_front();
            self.passed += 1;
        }
        self.passed + 1
    }
}

/// A reader whose lines are counted.
struct Counted<R> {
    inner: R,
    ends: Rc<RefCell<LineEnds>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.ends.borrow_mut().add(&buffer[..count]);
        Ok(count)
    }
}

/// What the first line has most of.
fn separator(header: &[u8]) -> u8 {
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
