//! `logging.jsonl`: one object a line, written at once, so that a run that is killed leaves what it logged; and the same
//! numbers for TensorBoard.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::tensorboard::TensorBoard;
use crate::error::{IoContext, Result};
use crate::files;

pub(super) struct Log {
    file: File,
    path: PathBuf,
    board: TensorBoard,
}

impl Log {
    /// Opens the log of a run that has taken `done` steps. Lines of later steps, which a resumed run takes again, go.
    pub(super) fn open(folder: &Path, done: u64) -> Result<Log> {
        let path = folder.join("logging.jsonl");
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        let step = |l: &str| serde_json::from_str::<Value>(l).ok()?.get("global_step")?.as_u64();
        let kept: Vec<&str> = before.lines().filter(|l| step(l).is_some_and(|s| s <= done)).collect();
        let text: String = kept.iter().flat_map(|l| [*l, "\n"]).collect();
        files::write(&path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).writing(&path)?;
        Ok(Log { file, path, board: TensorBoard::create(folder)? })
    }

    pub(super) fn write(&mut self, line: &Map<String, Value>) -> Result<()> {
        let text = format!("{}\n", Value::Object(line.clone()));
        self.file.write_all(text.as_bytes()).writing(&self.path)?;
        self.board.write(line)
    }
}
