//! Files that strangers changed: headers of weights, configs, adapters. Whatever stands in them, a command ends within seconds with an exit
//! code of its own, and never by a panic or a signal. `DPO_CAMPAIGN` says how many of each; the same number gives the same files.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use dpo_tests::{Numbers, Sandbox, copy, golden};
use serde_json::{Value, json};

/// Longest time of a command.
const LONGEST: Duration = Duration::from_secs(10);

fn count(usual: usize) -> usize {
    std::env::var("DPO_CAMPAIGN").map_or(usual, |n| n.parse().unwrap())
}

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// How a command ended: its exit code, which it has to have, and what it said.
fn run(sandbox: &Sandbox, args: &[&str], what: &str) -> (i32, String) {
    let start = Instant::now();
    let mut child = sandbox.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > LONGEST {
            child.kill().unwrap();
            panic!("{what}: no end after {LONGEST:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!said.contains("panicked"), "{what}:\n{said}");
    (output.status.code().unwrap_or_else(|| panic!("{what} ended by {}:\n{said}", output.status)), said)
}

/// Changes some bytes: others in their place, some more, some less, a piece twice.
fn mutated(bytes: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=numbers.below(3) {
        let at = numbers.below(bytes.len().max(1));
        let end = (at + 1 + numbers.below(12)).min(bytes.len());
        match numbers.below(6) {
            0 => bytes[at..end].iter_mut().for_each(|b| *b = numbers.below(256) as u8),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            3 => bytes[at] = b"0123456789{}[]\",:-eE."[numbers.below(21)],
            4 => bytes.truncate(at + 1),
            _ => bytes[at] ^= 1 << numbers.below(8),
        }
    }
    bytes
}

/// Another value in the place of one.
fn value(numbers: &mut Numbers) -> Value {
    let hard = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(1e308),
        json!(u64::MAX),
        json!(1_u64 << 31),
        json!(65_536),
        json!("x"),
        json!(""),
        json!([]),
        json!({}),
        json!([1, [2, {"a": null}]]),
        json!("full_attention"),
        json!({"rope_type": "yarn", "factor": 1e300}),
        json!({"rope_type": "linear", "factor": 0}),
        json!(0.5),
        json!(1e-320),
    ];
    hard[numbers.below(hard.len())].clone()
}

/// Keys of a config with other values, or without, or further ones.
fn changed(config: &Value, numbers: &mut Numbers) -> Value {
    let mut config = config.clone();
    let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
    for _ in 0..=numbers.below(2) {
        let key = &keys[numbers.below(keys.len())];
        match numbers.below(8) {
            0 => drop(config.as_object_mut().unwrap().remove(key)),
            1 => config[format!("{key}_2")] = value(numbers),
            _ => config[key] = value(numbers),
        }
    }
    config
}

/// Runs a command on so many changed files; what each ended with is counted.
fn campaign(
    what: &str,
    usual: usize,
    mut write: impl FnMut(&Sandbox, &mut Numbers) -> Vec<u8>,
    args: &[&str],
    file: &str,
) {
    let (sandbox, mut numbers) = (sandbox(), Numbers::new(20_261_126));
    let case = golden("trajectories/qwen2");
    for name in ["model", "init_adapter"] {
        copy(&case.join(name), Path::new(&sandbox.path(name)));
    }
    fs::copy(case.join("prefs.jsonl"), sandbox.path("prefs.jsonl")).unwrap();
    let mut ends = [0; 3];
    for number in 0..count(usual) {
        let bytes = write(&sandbox, &mut numbers);
        fs::write(sandbox.path(file), &bytes).unwrap();
        let what = format!("{what} {number}");
        let (code, said) = run(&sandbox, args, &what);
        let known = usize::try_from(code).ok().filter(|code| *code < 3);
        ends[known.unwrap_or_else(|| panic!("{what} ended with {code}: {said}"))] += 1;
        assert!(code == 0 || said.contains("error: "), "{what} says nothing:\n{said}");
    }
    println!("{what}: {} accepted, {} failed, {} refused", ends[0], ends[1], ends[2]);
    assert!(ends[2] > 0, "nothing was refused: the files are not changed");
}

const TRAIN: [&str; 13] = [
    "train",
    "--device",
    "cpu",
    "--model",
    "model",
    "--dataset",
    "prefs.jsonl",
    "--max-steps",
    "1",
    "--batch-size",
    "2",
    "--max-length",
    "64",
];
const EVAL: [&str; 7] = ["eval", "--model", "model", "--dataset", "prefs.jsonl#2", "--adapter", "init_adapter"];

#[test]
fn headers_of_weights() {
    let whole = fs::read(golden("trajectories/qwen2/model/model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let write = |_: &Sandbox, numbers: &mut Numbers| [&mutated(&whole[..header], numbers), &whole[header..]].concat();
    campaign("headers of weights", 60, write, &EVAL, "model/model.safetensors");
}

#[test]
fn configs() {
    let config = fs::read(golden("trajectories/qwen2/model/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let write = |s: &Sandbox, numbers: &mut Numbers| {
        let _ = fs::remove_dir_all(s.path("output"));
        changed(&config, numbers).to_string().into_bytes()
    };
    campaign("configs", 60, write, &TRAIN, "model/config.json");
}

#[test]
fn configs_of_adapters() {
    let config = fs::read(golden("trajectories/qwen2/init_adapter/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let write = |_: &Sandbox, numbers: &mut Numbers| changed(&config, numbers).to_string().into_bytes();
    campaign("configs of adapters", 60, write, &EVAL, "init_adapter/adapter_config.json");
}

#[test]
fn adapters() {
    let whole = fs::read(golden("trajectories/qwen2/init_adapter/adapter_model.safetensors")).unwrap();
    let write = |_: &Sandbox, numbers: &mut Numbers| mutated(&whole, numbers);
    campaign("adapters", 60, write, &EVAL, "init_adapter/adapter_model.safetensors");
}
