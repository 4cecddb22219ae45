//! Where the numbers of a run go beside its log: TensorBoard's file always, and the trackers of `--report-to`.
//!
//! Weights & Biases and SwanLab get a file in the run's folder as their own programs write it offline, which these send when the
//! user says so; MLflow's server gets them as the run goes on. Each has every line of the log, once, whatever a resumed run takes
//! again.

mod mlflow;
mod protobuf;
mod records;
mod swanlab;
mod tensorboard;
mod wandb;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::config::{ReportConfig, Service};
use dpo_core::console::{self, Remark};
use dpo_core::error::{IoContext, Result};
use tensorboard::TensorBoard;

/// A line of the log.
type Line = Map<String, Value>;

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It has taken its steps.
    Finished,
    /// An error ended it.
    Failed,
    /// It was told to end.
    Killed,
}

/// A program that shows numbers of runs.
trait Tracker {
    /// The numbers of a line of the log.
    fn write(&mut self, line: &Line) -> Result<()>;
    /// The run is over.
    fn end(&mut self, how: End) -> Result<()>;
}

/// What trackers are told of a run.
pub(super) struct About<'a> {
    /// Its folder.
    pub(super) folder: &'a Path,
    /// Which trackers, and under which names.
    pub(super) report: &'a ReportConfig,
    /// Its flags with their values.
    pub(super) flags: &'a Map<String, Value>,
}

impl About<'_> {
    /// The name of the run: the folder's, unless another one is given.
    fn name(&self) -> String {
        let own = || self.folder.file_name().unwrap_or(self.folder.as_os_str()).to_string_lossy().into_owned();
        self.report.run_name.clone().unwrap_or_else(own)
    }

    /// The project that runs are gathered in: as given, as the tracker's own variable says, or ours.
    fn project(&self, variable: &str) -> String {
        let named = self.report.project.clone().or_else(|| self::variable(variable));
        named.unwrap_or_else(|| "dpo-host".into())
    }

    /// Settings that were given or have a default.
    fn settings(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.flags.iter().filter(|(_, value)| !value.is_null() && **value != Value::Array(Vec::new()))
    }
}

/// The trackers of a run. Dropped before the end was told, they tell of a failure.
pub(super) struct Trackers {
    all: Vec<Box<dyn Tracker>>,
    board: TensorBoard,
    end: End,
}

/// Refuses trackers that cannot be reached as they are set up.
///
/// # Errors
/// A server that is not named.
pub(super) fn check(report: &ReportConfig) -> Result<()> {
    if report.to.contains(&Service::Mlflow) { mlflow::server().map(drop) } else { Ok(()) }
}

impl Trackers {
    /// Opens those that are asked for, with the lines of the log so far.
    pub(super) fn open(about: &About<'_>, lines: &[Line]) -> Result<Trackers> {
        let mut all: Vec<Box<dyn Tracker>> = Vec::new();
        for service in &about.report.to {
            let mut tracker: Box<dyn Tracker> = match service {
                Service::Wandb => Box::new(wandb::Wandb::create(about)?),
                Service::Swanlab => Box::new(swanlab::SwanLab::create(about)?),
                Service::Mlflow => Box::new(mlflow::Mlflow::start(about)?),
            };
            lines.iter().try_for_each(|line| tracker.write(line))?;
            all.push(tracker);
        }
        Ok(Trackers { all, board: TensorBoard::create(about.folder, lines)?, end: End::Failed })
    }

    /// The numbers of a line of the log.
    pub(super) fn write(&mut self, line: &Line) -> Result<()> {
        // What one does not take the others still do.
        let board = self.board.write(line);
        self.all.iter_mut().map(|tracker| tracker.write(line)).fold(board, Result::and)
    }

    /// How the run ends, once these are dropped.
    pub(super) fn ends(&mut self, how: End) {
        self.end = how;
    }
}

impl Drop for Trackers {
    fn drop(&mut self) {
        for tracker in &mut self.all {
            if let Err(e) = tracker.end(self.end) {
                console::warning(Remark::from(&e));
            }
        }
    }
}

/// The step of a line.
fn step(line: &Line) -> u64 {
    line.get("global_step").and_then(Value::as_u64).unwrap_or(0)
}

/// The numbers of a line by their names, those of evaluations apart from those of training, as transformers' trainer names them.
/// The epoch in a line of an evaluation is in that of its step as well.
fn numbers(line: &Line) -> impl Iterator<Item = (String, f64)> {
    let is_evaluation = line.keys().any(|name| name.starts_with("eval_"));
    line.iter().filter(|(name, _)| *name != "global_step").filter_map(move |(name, value)| {
        let name = match name.strip_prefix("eval_") {
            Some(name) => format!("eval/{name}"),
            None if is_evaluation => return None,
            None => format!("train/{name}"),
        };
        Some((name, value.as_f64()?))
    })
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A variable of the environment that says something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

/// The folder of a run that its tracker's program is given later, and the run's id there. That of a resumed run is its own, so
/// that what goes on is the same run.
fn offline(folder: &Path, prefix: &str) -> Result<(PathBuf, String)> {
    fs::create_dir_all(folder).writing(folder)?;
    let own = fs::read_dir(folder).reading(folder)?.flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let id = name.strip_prefix(prefix)?.rsplit_once('-')?.1;
        Some((entry.path(), id.to_owned()))
            .filter(|(_, id)| id.len() == ID && id.bytes().all(|b| b.is_ascii_alphanumeric()))
    });
    let (path, id) = own.unwrap_or_else(|| {
        let id = id(folder);
        (folder.join(format!("{prefix}{}-{id}", dpo_data::strftime_now("%Y%m%d_%H%M%S"))), id)
    });
    fs::create_dir_all(&path).writing(&path)?;
    Ok((path, id))
}

/// Letters of an id.
const ID: usize = 8;

/// A name that no other run has.
fn id(folder: &Path) -> String {
    let of = format!("{} {} {}", folder.display(), std::process::id(), now());
    const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    Sha256::digest(of).iter().take(ID).map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()])).collect()
}
