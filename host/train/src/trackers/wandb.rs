//! A run as Weights & Biases writes it offline: `wandb sync` sends it. Records are those of `wandb_internal.proto`.

use super::protobuf::{field_bytes, field_number, field_text, field_time};
use super::records::Records;
use super::{About, End, Line, Tracker, now, numbers, offline, step, variable};
use dpo_core::console;
use dpo_core::error::{IoContext, Result};

/// What a file begins with: `:W&B`, and the numbers of its version.
const KIND: (&[u8; 4], u16, u8) = (b":W&B", 0xBEE1, 0);
/// The fields of a `Record`.
const NUM: u64 = 1;
const HISTORY: u64 = 2;
const SUMMARY: u64 = 3;
const METRIC: u64 = 12;
const RUN: u64 = 17;
const EXIT: u64 = 18;
const HEADER: u64 = 21;
/// The number by which charts are laid out.
const STEP: &str = "train/global_step";
/// How a process ended that was told to.
const INTERRUPTED: i64 = 255;

pub(super) struct Wandb {
    records: Records,
    /// Records so far.
    count: i64,
    /// Lines so far: a line of an evaluation has the step of one of training.
    lines: i64,
    start: f64,
}

impl Wandb {
    pub(super) fn create(about: &About<'_>) -> Result<Wandb> {
        let (folder, id) = offline(&about.folder.join("wandb"), "offline-run-")?;
        // `wandb sync` writes what it makes of the records there.
        let files = folder.join("files");
        std::fs::create_dir_all(&files).writing(&files)?;
        let records = Records::create(folder.join(format!("run-{id}.wandb")), KIND)?;
        let mut wandb = Wandb { records, count: 0, lines: 0, start: now() };
        let version = field_bytes(1, concat!("dpo-host ", env!("CARGO_PKG_VERSION")).as_bytes());
        let config = about.settings().map(|(name, value)| field_bytes(1, &item(1, name, &value.to_string())));
        let run = [
            field_text(1, &id),
            field_text(2, &variable("WANDB_ENTITY").unwrap_or_default()),
            field_text(3, &about.project("WANDB_PROJECT")),
            field_bytes(4, &config.flatten().collect::<Vec<u8>>()),
            field_text(8, &about.name()),
            field_time(17, wandb.start),
        ];
        let every = [field_text(2, "*"), field_text(4, STEP), field_bytes(6, &field_number(1, 1))];
        wandb.append(&[
            (HEADER, field_bytes(1, &version)),
            (RUN, run.concat()),
            (METRIC, field_text(1, STEP)),
            (METRIC, every.concat()),
        ])?;
        console::line(format!("wandb       offline; to send it: wandb sync {}", folder.display()));
        Ok(wandb)
    }

    fn append(&mut self, messages: &[(u64, Vec<u8>)]) -> Result<()> {
        let record = |(i, (field, message)): (usize, &(u64, Vec<u8>))| {
            [field_number(NUM, self.count + 1 + i as i64), field_bytes(*field, message)].concat()
        };
        let all: Vec<Vec<u8>> = messages.iter().enumerate().map(record).collect();
        self.records.append(&all)?;
        self.count += messages.len() as i64;
        Ok(())
    }
}

impl Tracker for Wandb {
    fn write(&mut self, line: &Line) -> Result<()> {
        let mut items: Vec<(String, f64)> = numbers(line).collect();
        items.push((STEP.to_owned(), step(line) as f64));
        items.push(("_timestamp".to_owned(), now()));
        items.push(("_runtime".to_owned(), now() - self.start));
        items.push(("_step".to_owned(), self.lines as f64));
        let items: Vec<u8> =
            items.iter().flat_map(|(name, value)| field_bytes(1, &item(2, name, &number(*value)))).collect();
        let history = [items.clone(), field_bytes(2, &field_number(1, self.lines))].concat();
        self.append(&[(SUMMARY, items), (HISTORY, history)])?;
        self.lines += 1;
        Ok(())
    }

    fn end(&mut self, how: End) -> Result<()> {
        let code = match how {
            End::Finished => 0,
            End::Failed => 1,
            End::Killed => INTERRUPTED,
        };
        self.append(&[(EXIT, field_number(1, code))])
    }
}

/// A name, in its field, and a value as JSON.
fn item(field: u64, name: &str, json: &str) -> Vec<u8> {
    [field_text(field, name), field_text(16, json)].concat()
}

/// A number as JSON; whole ones without a point.
fn number(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 { format!("{}", value as i64) } else { value.to_string() }
}
