//! `logging.jsonl`: one object a line, written at once, so that a run that is killed leaves what it logged; and the same
//! numbers for TensorBoard.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::tensorboard::TensorBoard;
use crate::error::{IoContext, Result};
use crate::files;

pub(super) struct Log {
    file: File,
    path: PathBuf,
    board: TensorBoard,
    /// What a full disk did not take yet: a line is neither lost nor cut.
    unwritten: Vec<u8>,
}

impl Log {
    /// Opens the log of a run that has taken `done` steps. Lines of later steps, which a resumed run takes again, go, and so
    /// does a line that a kill cut short. TensorBoard's file is made anew from what is left.
    pub(super) fn open(folder: &Path, done: u64) -> Result<Log> {
        let path = folder.join("logging.jsonl");
        let before = std::fs::read(&path).unwrap_or_default();
        let line = |l: &[u8]| serde_json::from_slice::<Map<String, Value>>(l).ok();
        let step = |l: &Map<String, Value>| l.get("global_step").and_then(Value::as_u64);
        let kept: Vec<_> =
            before.split(|b| *b == b'\n').filter_map(line).filter(|l| step(l).is_some_and(|s| s <= done)).collect();
        let text: String = kept.iter().map(|l| format!("{}\n", Value::Object(l.clone()))).collect();
        files::write_into(&path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).writing(&path)?;
        Ok(Log { file, path, board: TensorBoard::create(folder, &kept)?, unwritten: Vec::new() })
    }

    /// Writes a line. Where the disk does not take it, it is kept until it does, and `warn` is told.
    pub(super) fn write(&mut self, line: &Map<String, Value>, warn: impl Fn(&str)) {
        self.unwritten.extend(format!("{}\n", Value::Object(line.clone())).bytes());
        if let Err(e) = self.drain().and_then(|()| self.board.write(line)) {
            warn(&e.to_string());
        }
    }

    /// Brings every line to disk.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.drain()?;
        self.file.sync_data().writing(&self.path)
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
