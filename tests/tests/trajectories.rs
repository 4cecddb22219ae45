//! Whole trajectories against TRL: every step's loss, log-probs, rewards and gradient norm, and the learned update.
//!
//! A case is a folder of `tests/golden/trajectories`: model, starting adapter, rows, and one or more `expected*.json` with
//! the settings and what TRL 1.16 computed. `tests/oracle/trajectories.py` made them.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dpo_core::weights::{Values, read_f32};
use dpo_tests::{Sandbox, golden, log};
use serde_json::Value;

/// Relative to TRL's value, absolute near zero.
const STEP: f64 = 1e-4;
const GRADIENT: f64 = 1e-3;
/// Of the learned update, relative to its own length.
const UPDATE: f64 = 1e-2;

fn cases() -> Vec<(PathBuf, PathBuf)> {
    let list = |folder: &Path| -> Vec<PathBuf> {
        let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        paths.sort();
        paths
    };
    let expected = |p: &PathBuf| p.file_name().unwrap().to_str().unwrap().starts_with("expected");
    let folders = list(&golden("trajectories")).into_iter().filter(|p| p.is_dir());
    folders.flat_map(|f| list(&f).into_iter().filter(expected).map(move |e| (f.clone(), e))).collect()
}

fn words(value: &Value) -> Vec<String> {
    match value {
        Value::Array(list) => list.iter().flat_map(words).collect(),
        Value::String(text) => vec![text.clone()],
        other => vec![other.to_string()],
    }
}

/// The command that takes the steps of a case.
fn arguments(folder: &Path, args: &Value, output: &str) -> Vec<String> {
    let path = |name: &str| folder.join(name).display().to_string();
    let fixed = [
        ("--model", path("model")),
        ("--dataset", path("prefs.jsonl")),
        ("--init-adapter", path("init_adapter")),
        ("--output-dir", output.to_owned()),
    ];
    let mut all = vec!["train".to_owned()];
    all.extend(fixed.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
    all.extend(
        "--device cpu --dtype float32 --lr-scheduler linear --warmup-steps 0 --weight-decay 0.01 --adam-beta1 0.9 \
         --adam-beta2 0.95 --max-grad-norm 1.0 --shuffle false --logging-steps 1 --truncation-strategy right --seed 0"
            .split_whitespace()
            .map(str::to_owned),
    );
    let given = [
        ("batch", "--batch-size"),
        ("steps", "--max-steps"),
        ("lr", "--learning-rate"),
        ("max_length", "--max-length"),
        ("beta", "--beta"),
        ("loss", "--loss"),
        ("loss_weights", "--loss-weights"),
        ("label_smoothing", "--label-smoothing"),
        ("ld_alpha", "--ld-alpha"),
        ("f_divergence", "--f-divergence"),
    ];
    for (name, flag) in given {
        let value = &args[name];
        let unset = value.is_null() || value == 0.0 || value == "reverse_kl";
        if !unset || (name == "ld_alpha" && value.is_number()) {
            all.push(flag.to_owned());
            all.extend(words(value));
        }
    }
    all
}

fn check(folder: &Path, path: &Path) -> Result<(), String> {
    let expected: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let output = sandbox.path("run");
    let arguments = arguments(folder, &expected["args"], &output);
    let ended = sandbox.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    if ended.code != 0 {
        return Err(format!("exit code {}: {}", ended.code, ended.stderr));
    }
    let steps = expected["steps"].as_array().unwrap();
    let lines = log(&output);
    if lines.len() != steps.len() {
        return Err(format!("{} lines for {} steps", lines.len(), steps.len()));
    }
    let names = ["loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins"];
    for (at, (ours, theirs)) in lines.iter().zip(steps).enumerate() {
        for (name, bound) in names.iter().map(|n| (*n, STEP)).chain([("grad_norm", GRADIENT), ("learning_rate", 1e-9)])
        {
            // Where all answers of a step were liked, neither has the rejected ones' numbers.
            let Some(b) = theirs[name].as_f64() else { continue };
            let Some(a) = ours[name].as_f64() else { return Err(format!("step {}: {name} is missing", at + 1)) };
            // Rewards are differences of log-probs near 100, so that f32 leaves 1e-5 of them.
            if (a - b).abs() > bound * b.abs().max(if name.starts_with("rewards") { 1.0 } else { 1e-3 }) {
                return Err(format!("step {}: {name} is {a}, TRL has {b}", at + 1));
            }
        }
    }
    if path.file_name().unwrap() != "expected.json" {
        // Only the first trajectory over a model has its final adapter beside it.
        return Ok(());
    }
    let last = folder.join("final_adapter/adapter_model.safetensors");
    let read = |path: &Path| -> BTreeMap<String, Values> { read_f32(path).unwrap() };
    let ours = read(&Path::new(&output).join("adapter_model.safetensors"));
    let (theirs, start) = (read(&last), read(&folder.join("init_adapter/adapter_model.safetensors")));
    if ours.keys().ne(theirs.keys()) {
        return Err("the adapter's tensors have other names than PEFT's".into());
    }
    let distance = |a: &BTreeMap<String, Values>, b: &BTreeMap<String, Values>| -> f64 {
        let of = |(x, y): (&Values, &Values)| x.1.iter().zip(&y.1).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>();
        a.values().zip(b.values()).map(of).sum::<f64>().sqrt()
    };
    let off = distance(&ours, &theirs) / distance(&theirs, &start);
    if off > UPDATE { Err(format!("the learned update is off by {off:.1e}")) } else { Ok(()) }
}

#[test]
fn the_same_steps_as_trl() {
    let cases = cases();
    assert!(cases.len() >= 12, "{} cases", cases.len());
    let named = |folder: &Path, expected: &Path| {
        let name = |p: &Path| p.file_name().unwrap().to_string_lossy().into_owned();
        format!("{}/{}", name(folder), name(expected))
    };
    let failed: Vec<String> = cases
        .iter()
        .filter_map(|(folder, expected)| {
            Some(format!("{}: {}", named(folder, expected), check(folder, expected).err()?))
        })
        .collect();
    assert!(failed.is_empty(), "{} of {} cases differ from TRL:\n{}", failed.len(), cases.len(), failed.join("\n"));
}
