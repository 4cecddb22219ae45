//! Whole trajectories against TRL: every step's loss, log-probs, rewards and gradient norm, and the learned update.
//!
//! A case is a folder of `tests/golden/trajectories`: model, starting adapter, rows, and one or more `expected*.json` with
//! the settings and what TRL 1.16 computed. `tests/oracle/trajectories.py` made them. Every family that is built in has one, and the
//! table of docs/families.md says how far each is off: `DPO_HOST_BLESS=1 cargo test --release -p dpo-tests --test trajectories`
//! writes it anew.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dpo_core::base::Base;
use dpo_core::engine::Engine;
use dpo_core::lora::Adapter;
use dpo_core::ops::KvCache;
use dpo_core::weights::{Checkpoint, Values, read_f32};
use dpo_hub::model::{Model, ModelOptions};
use dpo_plugins::Registry;
use dpo_tests::{Sandbox, golden, log, logits};
use serde_json::Value;

/// Relative to TRL's value, absolute near zero.
const STEP: f64 = 1e-4;
const GRADIENT: f64 = 1e-3;
/// Of the learned update, relative to its own length.
const UPDATE: f64 = 1e-2;
/// Of the base model's logits, relative to the largest.
const LOGITS: f64 = 1e-5;

/// How far a case is off, at most: losses and log-probs, gradient norms, the learned update.
#[derive(Clone, Copy, Debug, Default)]
struct Off {
    step: f64,
    gradient: f64,
    update: f64,
}

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
        ("quantization", "--quantization"),
    ];
    for (name, flag) in given {
        let value = &args[name];
        let unset = value.is_null() || value == 0.0 || value == "reverse_kl";
        if !unset || (name == "ld_alpha" && value.is_number()) {
            all.push(flag.to_owned());
            all.extend(words(value));
        }
    }
    // Named, 0 is said, too: without the flag it is what the config says.
    if args["router_aux_loss_coef"].is_number() {
        all.push("--router-aux-loss-coef".to_owned());
        all.extend(words(&args["router_aux_loss_coef"]));
    }
    for (option, value) in args["options"].as_object().into_iter().flatten() {
        all.extend(["--loss-option".to_owned(), format!("{option}={}", words(value).join(" "))]);
    }
    if args["use_weighting"] == true {
        all.push("--use-weighting".to_owned());
    }
    all
}

fn check(folder: &Path, path: &Path) -> Result<Off, String> {
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
    let mut off = Off::default();
    let names =
        ["loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins", "aux_loss"];
    for (at, (ours, theirs)) in lines.iter().zip(steps).enumerate() {
        for (name, bound) in names.iter().map(|n| (*n, STEP)).chain([("grad_norm", GRADIENT), ("learning_rate", 1e-9)])
        {
            // Where all answers of a step were liked, neither has the rejected ones' numbers.
            let Some(b) = theirs[name].as_f64() else { continue };
            let Some(a) = ours[name].as_f64() else { return Err(format!("step {}: {name} is missing", at + 1)) };
            // Rewards are differences of log-probs near 100, so that f32 leaves 1e-5 of them.
            let apart = (a - b).abs() / b.abs().max(if name.starts_with("rewards") { 1.0 } else { 1e-3 });
            let worst = if name == "grad_norm" { &mut off.gradient } else { &mut off.step };
            *worst = worst.max(apart);
            if apart > bound {
                return Err(format!("step {}: {name} is {a}, TRL has {b}", at + 1));
            }
        }
    }
    if path.file_name().unwrap() != "expected.json" {
        // Only the first trajectory over a model has its final adapter beside it.
        return Ok(off);
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
    off.update = distance(&ours, &theirs) / distance(&theirs, &start);
    if off.update > UPDATE { Err(format!("the learned update is off by {:.1e}", off.update)) } else { Ok(off) }
}

/// How far the base model's logits after the first row are from transformers', where the case has those.
fn logits_off(folder: &Path, expected: &Value) -> Option<f64> {
    let theirs: Vec<f64> = expected["logits"].as_array()?.iter().map(|l| l.as_f64().unwrap()).collect();
    let ids = |name: &str| expected["rows"][0][name].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
    let row: Vec<u32> = ids("prompt_ids").chain(ids("chosen_ids")).collect();
    let registry = Registry::discover(&[], None);
    let model = Model::open(&registry, &folder.join("model"), &ModelOptions::default()).unwrap();
    let adapter = Adapter::load(&model.graph, &folder.join("init_adapter")).unwrap();
    let base = Base::load(&model.graph, &Checkpoint::of(&folder.join("model"), &model.graph).unwrap()).unwrap();
    let engine = Engine::new(model.graph, base, adapter).unwrap();
    let ours = logits(&engine, &row, &mut KvCache::default(), false);
    let largest = theirs.iter().fold(0.0_f64, |most, l| most.max(l.abs()));
    Some(ours.iter().zip(&theirs).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max) / largest)
}

/// Of the families that were measured on a GPU how far log-probs and gradients are off, as `selftest` printed it.
fn on_a_gpu() -> BTreeMap<String, [f64; 2]> {
    let text = std::fs::read_to_string(golden("selftest.txt")).unwrap();
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [name, logps, gradient, "equal"] = words[..]
            && let (Ok(logps), Ok(gradient)) = (logps.parse::<f64>(), gradient.parse::<f64>())
        {
            let worst: &mut [f64; 2] = found.entry(name.to_owned()).or_default();
            *worst = [worst[0].max(logps), worst[1].max(gradient)];
        }
    }
    found
}

/// What the table says of a family: the worst of its cases.
#[derive(Clone, Copy, Default)]
struct Row {
    off: Off,
    logits: f64,
}

/// Rounding differs from machine to machine: the next power of ten.
fn bound(off: f64) -> String {
    format!("1e{}", off.max(1e-9).log10().ceil())
}

/// The table's rows in docs/families.md.
fn rows_of_docs(registry: &Registry, rows: &BTreeMap<String, Row>) -> String {
    let gpu = on_a_gpu();
    let mut text = String::new();
    for family in &registry.families {
        let Row { off, logits } = rows[&family.name];
        let on_a_gpu = gpu.get(&family.name).map_or("CPU alone".to_owned(), |[l, g]| format!("{l:.1e}, {g:.1e}"));
        text += &format!(
            "| `{}` | {} | {} | {} | {} | {} | {} | {on_a_gpu} |\n",
            family.name,
            family.claims.join(", "),
            family.checkpoints.join(", "),
            bound(off.step),
            bound(off.gradient),
            bound(off.update),
            bound(logits),
        );
    }
    text
}

/// The rows of the short table in both READMEs.
fn rows_of_readme(registry: &Registry, rows: &BTreeMap<String, Row>) -> String {
    let gpu = on_a_gpu();
    let mut text = String::new();
    for family in &registry.families {
        let short = |name: &String| name.split_once('/').map_or(name.clone(), |(_, name)| name.to_owned());
        let Row { off, .. } = rows[&family.name];
        let on_a_gpu = gpu.get(&family.name).map_or("CPU alone".to_owned(), |[_, gradient]| format!("{gradient:.0e}"));
        text += &format!(
            "| `{}` | {} | {} | {} | {on_a_gpu} |\n",
            family.name,
            family.checkpoints.iter().take(3).map(short).collect::<Vec<_>>().join(", "),
            bound(off.step),
            bound(off.update),
        );
    }
    text
}

/// The table, with every bound of rounding ten times as large: what a table that was made elsewhere has to be under.
fn agrees(written: &str, now: &str) -> bool {
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let number = |cell: &str| cell.strip_prefix("1e").and_then(|power| power.parse::<i32>().ok());
    let same = |a: &str, b: &str| match (number(a), number(b)) {
        (Some(a), Some(b)) => b <= a + 1,
        _ => a == b,
    };
    written.lines().count() == now.lines().count()
        && written.lines().zip(now.lines()).all(|(a, b)| {
            let (a, b) = (cells(a), cells(b));
            a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| same(a, b))
        })
}

#[test]
fn the_same_steps_as_trl() {
    let cases = cases();
    let registry = Registry::discover(&[], None);
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    let mut failed: Vec<String> = Vec::new();
    for (folder, path) in &cases {
        let name = |p: &Path| p.file_name().unwrap().to_string_lossy().into_owned();
        let named = format!("{}/{}", name(folder), name(path));
        let off = match check(folder, path) {
            Ok(off) => off,
            Err(why) => {
                failed.push(format!("{named}: {why}"));
                continue;
            }
        };
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("model/config.json")).unwrap()).unwrap();
        let family = registry.family_for(config["architectures"][0].as_str().unwrap()).unwrap();
        let row = rows.entry(family.name.clone()).or_default();
        row.off.step = row.off.step.max(off.step);
        row.off.gradient = row.off.gradient.max(off.gradient);
        row.off.update = row.off.update.max(off.update);
        let expected: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        if let Some(logits) = logits_off(folder, &expected) {
            row.logits = row.logits.max(logits);
            if logits > LOGITS {
                failed.push(format!("{named}: logits are off by {logits:.1e}"));
            }
        }
    }
    assert!(failed.is_empty(), "{} of {} cases differ from TRL:\n{}", failed.len(), cases.len(), failed.join("\n"));
    let untried: Vec<&str> =
        registry.families.iter().map(|f| f.name.as_str()).filter(|f| !rows.contains_key(*f)).collect();
    assert!(untried.is_empty(), "families without a trajectory: {}", untried.join(", "));
    let unseen: Vec<&str> =
        rows.iter().filter(|(_, row)| row.logits == 0.0).map(|(family, _)| family.as_str()).collect();
    assert!(unseen.is_empty(), "families without transformers' logits: {}", unseen.join(", "));
    let pages = [
        ("docs/families.md", rows_of_docs as fn(&_, &_) -> _),
        ("README.md", rows_of_readme),
        ("README.zh-CN.md", rows_of_readme),
    ];
    for (page, rows_of) in pages {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page);
        let text = std::fs::read_to_string(&path).unwrap();
        let (end, now) = ("<!-- The end of the families. -->\n", rows_of(&registry, &rows));
        let (before, after) = text.split_once(end).unwrap();
        let begin = before.rfind("|---|\n").unwrap() + "|---|\n".len();
        let (before, written) = before.split_at(begin);
        if std::env::var_os("DPO_HOST_BLESS").is_some() {
            std::fs::write(&path, format!("{before}{now}{end}{after}")).unwrap();
        } else {
            assert!(
                agrees(written, &now),
                "the families of {page} are others; write them anew with DPO_HOST_BLESS=1:\n{now}"
            );
        }
    }
}
