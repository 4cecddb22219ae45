//! A run whose file operations fail, one in each run: it ends with an error or goes on, and a resumed run comes to the same bytes.
//! `DPO_CAMPAIGN=1000` fails all of them, one after the other; without it a few are drawn.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use dpo_tests::{Numbers, Sandbox, golden, log};
use serde_json::Value;

/// Runs with a failure unless `DPO_CAMPAIGN` says otherwise.
const RUNS: usize = 12;
/// No space left, and an error of the device.
const ERRORS: [i32; 2] = [28, 5];

struct Run<'a> {
    sandbox: &'a Sandbox,
    output: String,
}

impl Run<'_> {
    /// Trains with further flags and variables; answers the exit code and what was said.
    fn train(&self, more: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String) {
        let path = |name: &str| golden("trajectories/qwen3").join(name).display().to_string();
        let (model, rows) = (path("model"), path("prefs.jsonl"));
        let fixed = ["train", "--model", &model, "--dataset", &rows, "--output-dir", &self.output, "--device", "cpu"];
        let settings = ["--batch-size", "4", "--learning-rate", "2e-3", "--logging-steps", "1", "--seed", "7"];
        let saves =
            ["--max-steps", "7", "--save-steps", "2", "--save-total-limit", "2", "--split-dataset-ratio", "0.2"];
        let mut command = self.sandbox.command(&[&fixed[..], &settings, &saves, more].concat());
        let ended = command.envs(variables.iter().copied()).output().unwrap();
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!text.contains("panicked"), "{text}");
        (ended.status.code(), text)
    }

    fn adapter(&self) -> Vec<u8> {
        fs::read(Path::new(&self.output).join("adapter_model.safetensors")).unwrap()
    }

    /// The log without what depends on the clock and the machine.
    fn log(&self) -> Vec<Value> {
        let mut lines = log(&self.output);
        for line in lines.iter_mut().map(|l| l.as_object_mut().unwrap()) {
            ["tokens_per_second", "memory_gib", "elapsed_s"].iter().for_each(|k| drop(line.remove(*k)));
        }
        lines
    }
}

#[test]
fn a_file_operation_that_fails_costs_no_result() {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let library = std::env::current_exe().unwrap().with_file_name("libfailing_disk.so").display().to_string();
    let (whole, list) = (Run { sandbox: &sandbox, output: sandbox.path("whole") }, sandbox.path("operations"));
    let variables = [("LD_PRELOAD", library.as_str()), ("FAILING_DISK", &whole.output), ("FAILING_DISK_LIST", &list)];
    assert_eq!(whole.train(&[], &variables).0, Some(0));
    let operations: Vec<String> = fs::read_to_string(&list).unwrap().lines().map(str::to_owned).collect();
    assert!(operations.len() > 50, "{operations:?}");

    let count = std::env::var("DPO_CAMPAIGN").map_or(RUNS, |n| n.parse().unwrap()).min(operations.len());
    let mut numbers = Numbers::new(11);
    let mut chosen = BTreeSet::new();
    while chosen.len() < count {
        chosen.insert(if count == operations.len() { chosen.len() } else { numbers.below(operations.len()) } + 1);
    }
    let mut failed = 0;
    for at in chosen {
        let (run, errno) = (Run { sandbox: &sandbox, output: sandbox.path(&format!("run-{at}")) }, ERRORS[at % 2]);
        let (at, errno) = (at.to_string(), errno.to_string());
        let variables = [
            ("LD_PRELOAD", library.as_str()),
            ("FAILING_DISK", &run.output),
            ("FAILING_DISK_AT", &at),
            ("FAILING_DISK_ERRNO", &errno),
        ];
        let (code, said) = run.train(&[], &variables);
        let which = &operations[at.parse::<usize>().unwrap() - 1];
        assert!(matches!(code, Some(0 | 1)), "{which}: {code:?}\n{said}");
        if code == Some(1) {
            failed += 1;
            assert!(said.contains("error: "), "{which}:\n{said}");
            let (code, said) = run.train(&["--resume-from-checkpoint", "latest"], &[]);
            assert_eq!(code, Some(0), "{which}, resumed:\n{said}");
        }
        assert!(whole.adapter() == run.adapter(), "{which}: the adapters differ");
        assert_eq!(whole.log(), run.log(), "{which}: the logs differ");
        fs::remove_dir_all(&run.output).unwrap();
    }
    println!("{count} of {} operations failed, {failed} of them ended the run", operations.len());
}
