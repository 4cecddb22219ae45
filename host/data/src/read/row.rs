//! A row with where it stands, and how large a file may become.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use dpo_plugin_api::dataset::Row;
use flate2::read::MultiGzDecoder;
use serde_json::Value;

use dpo_core::error::{Error, IoContext, Result};
use dpo_core::memory::size;

/// Extensions that follow that of a text.
pub(super) const PACKED: [(&str, Unpack); 2] = [
    ("gz", |file| Ok(Box::new(MultiGzDecoder::new(file)))),
    ("zst", |file| Ok(Box::new(zstd::Decoder::with_buffer(file)?))),
];

/// A file may be unpacked to this many bytes, and to so many for each of its own: texts shrink to a tenth, seldom to a hundredth.
const MOST_UNPACKED: u64 = if cfg!(test) { 1 << 20 } else { 1 << 30 };
const MOST_UNPACKED_OF_BYTE: u64 = 256;
/// Bytes that are read at once.
const AT_ONCE: u64 = if cfg!(test) { 1 << 10 } else { 8 << 20 };
/// What some editors begin a text with.
const BOM: &[u8] = "\u{feff}".as_bytes();
/// What a row takes beside its texts, in bytes.
const ROW: u64 = 256;

type Unpack = fn(BufReader<File>) -> std::io::Result<Box<dyn Read>>;

/// A row with where it stands.
#[derive(Clone, Debug)]
pub struct SourceRow {
    /// The row, or why it cannot be read.
    pub row: Result<Row>,
    /// `file:line`, or `file: row N` where lines mean nothing.
    pub place: String,
}

impl SourceRow {
    /// A row of a file in which lines mean nothing; `at` counts from 0.
    pub(super) fn numbered(path: &Path, at: usize, row: Row) -> SourceRow {
        SourceRow { row: Ok(row), place: format!("{}: row {}", path.display(), at + 1) }
    }
}

/// A name without its extension, and that in lower case.
pub(super) fn split(path: &Path) -> Option<(&Path, String)> {
    Some((Path::new(path.file_stem()?), path.extension()?.to_str()?.to_lowercase()))
}

/// How a file is unpacked, by its name.
pub(super) fn unpack(path: &Path) -> Option<Unpack> {
    let (_, ending) = split(path)?;
    PACKED.iter().find(|(name, _)| *name == ending).map(|(_, unpack)| *unpack)
}

/// A text, unpacked, of which some is in memory: what was read and not yet forgotten.
pub(super) struct Text {
    inner: Bounded,
    path: PathBuf,
    buffer: Vec<u8>,
    /// The byte of the text that the buffer begins with, and its line, from 1.
    start: usize,
    line: usize,
    /// Bytes at the buffer's beginning that were given out as lines.
    given: usize,
    ended: bool,
}

impl Text {
    /// A text at its beginning.
    pub(super) fn open(path: &Path) -> Result<Text> {
        let inner = open(path)?;
        let (path, buffer) = (path.to_owned(), Vec::new());
        Ok(Text { inner, path, buffer, start: 0, line: 1, given: 0, ended: false })
    }

    /// What is in memory.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    /// The byte of the text that it begins with.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    /// Reads on; false where the text ends.
    pub(super) fn more(&mut self) -> Result<bool> {
        if self.ended {
            return Ok(false);
        }
        let before = self.buffer.len();
        let count = (&mut self.inner).take(AT_ONCE).read_to_end(&mut self.buffer).reading(&self.path)?;
        if self.start == 0 && before == 0 && self.buffer.starts_with(BOM) {
            self.buffer.drain(..BOM.len());
        }
        self.ended = (count as u64) < AT_ONCE;
        Ok(count > 0)
    }

    /// Forgets what stands before a byte of the text.
    pub(super) fn forget(&mut self, before: usize) {
        self.buffer.drain(..before - self.start);
        self.start = before;
    }

    /// Whole lines that were not given out before, with the number of the first; none where more has to be read.
    pub(super) fn lines(&mut self) -> Result<(usize, &[u8])> {
        self.line += self.buffer[..self.given].iter().filter(|b| **b == b'\n').count();
        self.forget(self.start + self.given);
        self.given = loop {
            let end = if self.ended { None } else { self.buffer.iter().rposition(|b| *b == b'\n') };
            match end {
                Some(last) => break last + 1,
                None if !self.more()? => break self.buffer.len(),
                None => {}
            }
        };
        Ok((self.line, &self.buffer[..self.given]))
    }
}

/// A text to be read from end to end.
pub(super) fn open_text(path: &Path) -> Result<impl Read> {
    open(path)
}

fn open(path: &Path) -> Result<Bounded> {
    let file = File::open(path).reading(path)?;
    let left = Budget::of(&file);
    let file = BufReader::new(file);
    let inner = match unpack(path) {
        Some(unpack) => unpack(file).reading(path)?,
        None => Box::new(file),
    };
    Ok(Bounded { inner, left })
}

/// Bytes that a file may still become.
pub(super) struct Budget(u64);

impl Budget {
    pub(super) fn of(file: &File) -> Budget {
        let bytes = file.metadata().map_or(0, |m| m.len());
        Budget(MOST_UNPACKED.saturating_add(bytes.saturating_mul(MOST_UNPACKED_OF_BYTE)))
    }

    /// Counts bytes.
    ///
    /// # Errors
    /// More than the file may become.
    pub(super) fn spend(&mut self, bytes: u64) -> Result<()> {
        self.0 = self.0.checked_sub(bytes).ok_or_else(|| {
            let (most, each) = (size(MOST_UNPACKED as usize), MOST_UNPACKED_OF_BYTE);
            Error::input(format!("it unpacks to more than {most} and {each} times its own size"))
        })?;
        Ok(())
    }

    /// Counts a row.
    pub(super) fn spend_row(&mut self, row: &Row) -> Result<()> {
        self.spend(ROW + row.iter().map(|(name, value)| name.len() as u64 + weight(value)).sum::<u64>())
    }
}

/// A reader that fails where a file unpacks to more than can be rows.
struct Bounded {
    inner: Box<dyn Read>,
    left: Budget,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left.spend(count as u64).map_err(|e| std::io::Error::other(e.to_string()))?;
        Ok(count)
    }
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
