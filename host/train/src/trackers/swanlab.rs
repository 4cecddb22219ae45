//! A run as SwanLab writes it offline: `swanlab sync` sends it. Records are those of `swanlab/record/v1/record.proto`.

use std::collections::BTreeSet;

use super::protobuf::{field_bytes, field_double, field_number, field_text, field_time};
use super::records::Records;
use super::{About, End, Line, Tracker, now, numbers, offline, step, variable};
use dpo_core::console;
use dpo_core::error::Result;

/// What a file begins with: `:SWL`, and the numbers of its version, which other versions of SwanLab refuse to read.
const KIND: (&[u8; 4], u16, u8) = (b":SWL", 0xE1D6, 2);
/// The fields of a `Record`.
const NUM: u64 = 1;
const TIME: u64 = 2;
const START: u64 = 10;
const FINISH: u64 = 11;
const COLUMN: u64 = 12;
const SCALAR: u64 = 13;
const SAVE: u64 = 20;
/// Records of a kind that there is one of have numbers of their own; others are counted.
const START_NUM: i64 = -1;
const FINISH_NUM: i64 = -2;
const CONFIG_NUM: i64 = -3;

pub(super) struct SwanLab {
    records: Records,
    /// Counted records so far.
    count: i64,
    /// Names of numbers that are known.
    columns: BTreeSet<String>,
}

impl SwanLab {
    pub(super) fn create(about: &About<'_>) -> Result<SwanLab> {
        let (folder, id) = offline(&about.folder.join("swanlab"), "run-")?;
        let mut records = Records::create(folder.join(format!("run-{id}.swanlab")), KIND)?;
        let start = [
            field_text(1, &about.project("SWANLAB_PROJ_NAME")),
            field_text(2, &variable("SWANLAB_WORKSPACE").unwrap_or_default()),
            field_text(4, &about.name()),
            field_text(10, &id),
            field_time(12, now()),
        ];
        // JSON is YAML.
        let setting = |(i, (name, value)): (usize, (&String, &serde_json::Value))| {
            format!("{name}:\n  desc: ''\n  sort: {i}\n  value: {value}\n")
        };
        let config: String = about.settings().enumerate().map(setting).collect();
        let save = [field_text(1, "config"), field_number(5, 1), field_bytes(6, config.as_bytes())];
        records.append(&[record(START_NUM, START, &start.concat()), record(CONFIG_NUM, SAVE, &save.concat())])?;
        // With the id what is sent later goes on in the same experiment.
        console::line(format!("swanlab     offline; to send it: swanlab sync --id {id} {}", folder.display()));
        Ok(SwanLab { records, count: 0, columns: BTreeSet::new() })
    }
}

impl Tracker for SwanLab {
    fn write(&mut self, line: &Line) -> Result<()> {
        let (mut all, mut columns) = (Vec::new(), Vec::new());
        for (name, value) in numbers(line) {
            if !self.columns.contains(&name) {
                let section = name.split('/').next().unwrap_or_default();
                let column = [
                    field_number(1, 1),
                    field_number(2, 1),
                    field_text(3, &name),
                    field_text(5, section),
                    field_number(6, 3),
                ];
                all.push((COLUMN, column.concat()));
                columns.push(name.clone());
            }
            let number = field_bytes(5, &field_double(1, value));
            let scalar = [
                field_text(1, &name),
                field_number(2, step(line) as i64),
                field_number(3, 1),
                field_time(4, now()),
                number,
            ];
            all.push((SCALAR, scalar.concat()));
        }
        let numbered = all.iter().zip(self.count + 1..).map(|((field, message), num)| record(num, *field, message));
        self.records.append(&numbered.collect::<Vec<_>>())?;
        self.count += all.len() as i64;
        self.columns.extend(columns);
        Ok(())
    }

    fn end(&mut self, how: End) -> Result<()> {
        let (state, why) = match how {
            End::Finished => (1, ""),
            End::Failed => (2, "the run failed"),
            End::Killed => (3, "the run was told to end"),
        };
        let finish = [field_number(1, state), field_text(2, why), field_time(3, now())];
        self.records.append(&[record(FINISH_NUM, FINISH, &finish.concat())])
    }
}

fn record(num: i64, field: u64, message: &[u8]) -> Vec<u8> {
    [field_number(NUM, num), field_time(TIME, now()), field_bytes(field, message)].concat()
}
