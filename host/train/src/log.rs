//! What a run tells as it goes: numbers in `logging.jsonl`, remarks in `remarks.jsonl`, token log-probs of a few pairs in
//! `samples.jsonl`, and the numbers again for TensorBoard and other trackers. One object a line, written at once, so that a run that is killed
//! leaves what it told.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::trackers::{About, End, Trackers};
use dpo_core::console::{self, Remark};
use dpo_core::error::{IoContext, Result};
use dpo_core::files;
use dpo_page::{LOG, REMARKS, SAMPLES};

pub(super) struct Log {
    numbers: Lines,
    remarks: Lines,
    samples: Lines,
    trackers: Trackers,
}

impl Log {
    /// Opens the files of a run that has taken `done` steps. Lines of later steps, which a resumed run takes again, go, and so
    /// does a line that a kill cut short. `samples` is the first line of its file. Trackers' files are made anew from what is
    /// left, which is returned as well.
    pub(super) fn open(
        about: &About<'_>,
        done: u64,
        samples: Map<String, Value>,
    ) -> Result<(Log, Vec<Map<String, Value>>)> {
        let folder = about.folder;
        let kept = |name: &str| lines_until(&folder.join(name), done);
        let numbers = kept(LOG);
        let remarks = kept(REMARKS);
        // The first line is of this run's pairs, whatever a run that began here before has looked at.
        let later = kept(SAMPLES).into_iter().filter(|l| step(l) > Some(0));
        let samples: Vec<_> = std::iter::once(samples).chain(later).collect();
        let log = Log {
            trackers: Trackers::open(about, &numbers)?,
            numbers: Lines::open(folder.join(LOG), &numbers)?,
            remarks: Lines::open(folder.join(REMARKS), &remarks)?,
            samples: Lines::open(folder.join(SAMPLES), &samples)?,
        };
        Ok((log, numbers))
    }

    /// Writes a line of numbers. Where the disk does not take it, it is kept until it does, and `warn` is told.
    pub(super) fn write(&mut self, line: &Map<String, Value>, warn: impl Fn(Remark)) {
        let (numbers, trackers) = (self.numbers.write(line), self.trackers.write(line));
        if let Err(e) = numbers.and(trackers) {
            warn(Remark::from(&e));
        }
    }

    /// Writes what was said at a step: a `warning`, or a remark of the loss `doctor`. It has been printed; a disk that does not
    /// take it is told of by the numbers.
    pub(super) fn remark(&mut self, step: u64, kind: &str, what: &Remark) {
        let mut line = Map::from_iter([("global_step".to_owned(), json!(step)), ("kind".to_owned(), json!(kind))]);
        line.extend(console::facts(what));
        let _ = self.remarks.write(&line);
    }

    /// Writes a line about the sample pairs.
    pub(super) fn samples(&mut self, line: &Map<String, Value>, warn: impl Fn(Remark)) {
        if let Err(e) = self.samples.write(line) {
            warn(Remark::from(&e));
        }
    }

    /// How the run ends, which trackers are told when this is dropped.
    pub(super) fn ends(&mut self, how: End) {
        self.trackers.ends(how);
    }

    /// Brings every line to disk.
    pub(super) fn flush(&mut self) -> Result<()> {
        [&mut self.numbers, &mut self.remarks, &mut self.samples].into_iter().try_for_each(Lines::flush)
    }
}

fn step(line: &Map<String, Value>) -> Option<u64> {
    line.get("global_step").and_then(Value::as_u64)
}

/// Whole lines of a file that are of no later step than `done`.
fn lines_until(path: &Path, done: u64) -> Vec<Map<String, Value>> {
    let before = std::fs::read(path).unwrap_or_default();
    let line = |l: &[u8]| serde_json::from_slice::<Map<String, Value>>(l).ok();
    before.split(|b| *b == b'\n').filter_map(line).filter(|l| step(l).is_some_and(|s| s <= done)).collect()
}

/// A file that grows line by line.
struct Lines {
    file: File,
    path: PathBuf,
    /// What a full disk did not take yet: a line is neither lost nor cut.
    unwritten: Vec<u8>,
    /// Whether anything was written since the last flush, which takes a disk its time.
    unflushed: bool,
}

impl Lines {
    /// A file that begins with these lines, in the place of one that may be there.
    fn open(path: PathBuf, lines: &[Map<String, Value>]) -> Result<Lines> {
        files::write_into(&path, &lines.iter().flat_map(bytes).collect::<Vec<u8>>())?;
        let file = OpenOptions::new().append(true).open(&path).writing(&path)?;
        Ok(Lines { file, path, unwritten: Vec::new(), unflushed: false })
    }

    fn write(&mut self, line: &Map<String, Value>) -> Result<()> {
        self.unwritten.extend(bytes(line));
        self.unflushed = true;
        self.drain()
    }

    fn flush(&mut self) -> Result<()> {
        if self.unflushed {
            self.drain()?;
            self.file.sync_data().writing(&self.path)?;
            self.unflushed = false;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        while !self.unwritten.is_empty() {
            match self.file.write(&self.unwritten) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()).writing(&self.path),
                Ok(written) => drop(self.unwritten.drain(..written)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).writing(&self.path),
            }
        }
        Ok(())
    }
}

fn bytes(line: &Map<String, Value>) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(line).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}
