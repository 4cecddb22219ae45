//! Plugins as files: broken ones cost a line each, sound ones take the place of those that are linked in.
//!
//! Every case runs in a process of its own, with no plugin folders but the one under test, so that its standard error
//! can be looked at.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::{Path, PathBuf};
use std::process::Command;

use abi_stable::std_types::RSlice;
use dpo_plugin_api::abi::{RawAnswer, RawExample, RawTotals};
use dpo_plugin_api::loss::Answers;
use dpo_plugins::{LossCall, Registry};
use serde_json::{Value, json};

/// Set for a process that looks through the folder it names and prints what it found.
const FOLDER: &str = "DPO_TESTS_PLUGIN_FOLDER";
/// Put before what such a process prints, to tell it from what the test harness prints.
const MARK: &str = "found: ";

/// A library of this workspace, which cargo leaves beside the test.
fn library(crate_name: &str) -> PathBuf {
    let file = format!("{}{crate_name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    std::env::current_exe().unwrap().with_file_name(file)
}

/// A folder with copies of some libraries.
fn folder(crates: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in crates {
        let from = library(name);
        std::fs::copy(&from, folder.path().join(from.file_name().unwrap())).unwrap();
    }
    folder
}

/// What a fresh process finds in a folder. It must not write anything to standard error.
fn discover(folder: &Path) -> Value {
    let empty = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(FOLDER, folder)
        .env("XDG_DATA_HOME", empty.path())
        .env_remove("DPO_PLUGIN_PATH")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert_eq!(err, "", "a plugin wrote to standard error");
    // The harness writes "test child ... " before it, on the same line.
    let found = out.lines().find_map(|l| Some(l.split_once(MARK)?.1)).unwrap_or_else(|| panic!("{out}"));
    serde_json::from_str(found).unwrap()
}

/// Not a test of its own: what [`discover`] runs.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let registry = Registry::discover(&[folder.into()], None);
    let evals = registry.losses.iter().map(|loss| {
        let (logps, ones) = (RSlice::from_slice(&[-1.0_f32, -2.0]), RSlice::from_slice(&[1.0_f32; 2]));
        let answer = |label| RawAnswer {
            policy: logps,
            reference: logps,
            weights: ones,
            statistics: [RSlice::EMPTY; 4],
            reference_statistics: [RSlice::EMPTY; 4],
            label,
            detached: false,
        };
        let answers =
            if loss.needs.answers == Answers::One { vec![answer(1.0)] } else { vec![answer(1.0), answer(0.0)] };
        let examples = [RawExample { answers: RSlice::from_slice(&answers), prompt: RSlice::from_slice(&[]) }];
        let options: serde_json::Map<_, _> = loss.options.iter().cloned().map(|o| (o.name, o.default)).collect();
        let options = Value::Object(options).to_string();
        let totals = RawTotals {
            examples: 1.0,
            answers: answers.len() as f64,
            best_tokens: 2.0,
            tokens: 4.0,
            prompt_tokens: 0.0,
        };
        let call = LossCall { options: &options, examples: &examples, totals, state: &[] };
        (loss.name.clone(), loss.eval(&call).map_or_else(|e| json!(e.to_string()), |r| json!(r.losses)))
    });
    let records = registry.formats.iter().map(|format| {
        let row = format.examples.lines().next().unwrap_or_default();
        let row = serde_json::from_str(row).unwrap();
        (format.name.clone(), format.records(&row).map_or_else(|e| json!(e.to_string()), |r| json!(r.len())))
    });
    let graphs = registry.families.iter().map(|family| {
        let graph = dpo_hub::model::graph_of(family, &family.example_config);
        (family.name.clone(), graph.map_or_else(|e| json!(e.to_string()), |g| json!(g)))
    });
    let found = json!({
        "evals": evals.collect::<serde_json::Map<_, _>>(),
        "records": records.collect::<serde_json::Map<_, _>>(),
        "graphs": graphs.collect::<serde_json::Map<_, _>>(),
        "rows": registry.rows,
        "refusals": registry.refusals,
    });
    println!("{MARK}{found}");
}

/// `place: cause` of every refusal.
fn refusals(found: &Value) -> Vec<String> {
    let line = |r: &Value| format!("{}: {}", r["place"].as_str().unwrap(), r["cause"].as_str().unwrap());
    found["refusals"].as_array().unwrap().iter().map(line).collect()
}

/// `kind name` of every listed item that comes from a file, or of every one that is linked in.
fn listed(found: &Value, from_files: bool) -> Vec<String> {
    let rows = found["rows"].as_array().unwrap().iter().filter(|r| (r["origin"] != "built-in") == from_files);
    rows.map(|r| format!("{} {}", r["kind"].as_str().unwrap(), r["name"].as_str().unwrap())).collect()
}

#[test]
fn broken_plugins_cost_a_line_each() {
    let names = [
        "hostile_calls",
        "hostile_graphs",
        "hostile_later",
        "hostile_no_plugin",
        "hostile_other_layout",
        "hostile_panicking_manifest",
        "hostile_taken_name",
    ];
    let folder = folder(&names);
    let text = folder.path().join(format!("notes{}", std::env::consts::DLL_SUFFIX));
    std::fs::write(&text, "not a library").unwrap();
    std::fs::write(folder.path().join("README.txt"), "not even by name").unwrap();
    let found = discover(folder.path());

    let expected: [(&str, &[&str]); 6] = [
        ("notes", &["is not a shared library"]),
        ("hostile_later", &["requires the feature 'foresight'"]),
        ("hostile_no_plugin", &["is not a plugin", "dpo_plugin_*"]),
        ("hostile_other_layout", &["built with another layout", "RawLossCall"]),
        ("hostile_panicking_manifest", &["panicked at", "lib.rs:", "no name comes to mind"]),
        ("hostile_taken_name", &["'qwen2' is taken by dpo-model-qwen2 (built-in)"]),
    ];
    let lines = refusals(&found);
    for (of, parts) in expected {
        let about: Vec<_> = lines.iter().filter(|l| l.contains(of)).collect();
        assert_eq!(about.len(), 1, "'{of}' in {lines:#?}");
        assert!(!about[0].contains('\n'), "{}", about[0]);
        for part in parts {
            assert!(about[0].contains(part), "'{part}' in: {}", about[0]);
        }
    }
    assert_eq!(lines.len(), expected.len(), "{lines:#?}");
    for line in &lines {
        assert!(line.starts_with(folder.path().to_str().unwrap()), "no file: {line}");
    }

    let sound = [
        "model panics",
        "model sound",
        "model unknown-attribute",
        "model unknown-feature",
        "model unknown-op",
        "model wrong-widths",
        "dataset flooding-format",
        "dataset panicking-format",
        "loss index-loss",
        "loss nan-loss",
        "loss nan-state-loss",
        "loss panicking-loss",
    ];
    assert_eq!(listed(&found, true), sound);
    let alone = discover(tempfile::tempdir().unwrap().path());
    assert_eq!(refusals(&alone), Vec::<String>::new());
    assert_eq!(listed(&found, false), listed(&alone, false), "a broken plugin took a built-in one with it");
}

/// A family is called when it is used, and then its graph is checked.
#[test]
fn a_graph_that_cannot_be_run_costs_its_family_alone() {
    let found = discover(folder(&["hostile_graphs"]).path());
    let expected: [(&str, &[&str]); 5] = [
        ("panics", &["panicked at", "no graph comes to mind"]),
        ("unknown-op", &["block 'decoder': unknown op 'hyper_norm'", "did you mean 'layer_norm'"]),
        ("unknown-attribute", &["block 'decoder': op 'rms_norm' (norm.weight): unknown attribute 'momentum'"]),
        (
            "wrong-widths",
            &["block 'decoder': op 'linear' (down.weight): weight 'down.weight' is [8, 24], needs [9, 24]"],
        ),
        ("unknown-feature", &["'telepathy'"]),
    ];
    for (family, parts) in expected {
        let error = found["graphs"][family].as_str().unwrap_or_else(|| panic!("{family}: {}", found["graphs"][family]));
        assert!(parts.iter().all(|p| error.contains(p)), "{family}: {error}");
    }
    assert!(found["graphs"]["sound"]["layers"].is_array());
}

/// What a plugin says of itself, and its graphs, are asked for where no loop, exit, abort or hunger for memory can end a command.
#[test]
fn code_that_cannot_be_stopped_costs_a_line() {
    let sandbox = dpo_tests::Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let folder = folder(&["hostile_unstoppable"]);
    let folder = folder.path().to_str().unwrap();
    let ways = [
        ("hangs", "within 5 s"),
        ("exits", "exit status: 0"),
        ("aborts", "SIGABRT"),
        ("hoards", "memory allocation of"),
    ];
    std::thread::scope(|scope| {
        for (way, cause) in ways {
            let sandbox = &sandbox;
            scope.spawn(move || {
                let start = std::time::Instant::now();
                let mut command = sandbox.command(&["list", "--plugin-dir", folder]);
                let listed = command.env("HOSTILE_MANIFEST", way).output().unwrap();
                let text = String::from_utf8_lossy(&listed.stdout);
                let refused =
                    text.lines().find(|l| l.starts_with("refused")).unwrap_or_else(|| panic!("{way}: {text}"));
                assert!(
                    listed.status.success() && refused.contains("its manifest") && refused.contains(cause),
                    "{refused}"
                );
                assert!(text.contains("Qwen2ForCausalLM"), "{text}");
                sandbox.refuses(&["describe", way, "--plugin-dir", folder], &["its graph", cause]);
                assert!(start.elapsed().as_secs() < 30, "{way} took {:?}", start.elapsed());
            });
        }
    });
    let (model, rows) =
        (dpo_tests::golden("trajectories/qwen2/model"), dpo_tests::golden("trajectories/qwen2/prefs.jsonl"));
    let data = ["data", "--model", model.to_str().unwrap(), "--dataset", rows.to_str().unwrap()];
    let quit = sandbox.run(&[&data[..], &["--dataset-format", "quits", "--plugin-dir", folder]].concat());
    assert_eq!(quit.code, 1, "{}", quit.stderr);
    assert!(
        quit.stderr.contains("hostile_unstoppable") && quit.stderr.contains("ended the process"),
        "{}",
        quit.stderr
    );
    // Nothing of a plugin that is not used runs but what it says of itself.
    sandbox.ok(&["describe", "qwen2", "--plugin-dir", folder]);
}

#[test]
fn a_call_that_fails_is_an_error() {
    let folder = folder(&["hostile_calls"]);
    let found = discover(folder.path());
    let parts = [
        ("evals", "panicking-loss", ["panicked at", "no loss comes to mind"]),
        ("evals", "index-loss", ["panicked at", "index is 1000"]),
        ("records", "panicking-format", ["panicked at", "no record comes to mind"]),
        ("records", "flooding-format", ["1000000 records of one row", "more than 10000"]),
    ];
    for (call, name, parts) in parts {
        let error = found[call][name].as_str().unwrap_or_else(|| panic!("{name}: {}", found[call][name]));
        assert!(parts.iter().all(|p| error.contains(p)), "{name}: {error}");
    }
    // The run skips such a step.
    assert_eq!(found["evals"]["nan-loss"], json!([null]));
    let sigmoid = found["evals"]["sigmoid"][0].as_f64().unwrap();
    assert!((sigmoid - std::f64::consts::LN_2).abs() < 1e-12, "a broken loss took a built-in one with it: {sigmoid}");
}

/// A loss that is not finite, and one that leaves such a state: steps are skipped and told, and the third in a row ends the run.
#[test]
fn a_loss_that_is_not_finite_ends_a_run_after_three_steps() {
    let sandbox = dpo_tests::Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let folder = folder(&["hostile_calls"]);
    let case = dpo_tests::golden("trajectories/qwen2");
    let [model, rows] = ["model", "prefs.jsonl"].map(|name| case.join(name).display().to_string());
    for (loss, first) in [("nan-loss", 1), ("nan-state-loss", 2)] {
        let output = sandbox.path(loss);
        let args = ["train", "--device", "cpu", "--model", &model, "--dataset", &rows, "--output-dir", &output];
        let more =
            ["--loss", loss, "--batch-size", "2", "--save-steps", "1", "--plugin-dir", folder.path().to_str().unwrap()];
        let ended = sandbox.run(&[&args[..], &more].concat());
        assert_eq!(ended.code, 1, "{}", ended.stderr);
        for step in first..first + 3 {
            assert!(ended.stderr.contains(&format!("step {step} has loss NaN")), "{loss}: {}", ended.stderr);
        }
        assert!(ended.stderr.contains("as had the 2 steps before"), "{loss}: {}", ended.stderr);
        // A checkpoint holds no such state, and a run goes on from it.
        let state = std::fs::read_to_string(format!("{output}/checkpoint-{}/trainer_state.json", first + 1)).unwrap();
        let state: Value = serde_json::from_str(&state).unwrap();
        assert!(state["losses"][0].as_array().unwrap().iter().all(Value::is_number), "{state}");
    }
}

#[test]
fn libraries_take_the_place_of_their_built_in_twins() {
    let names = ["dpo_model_llama3", "dpo_model_qwen2", "dpo_model_qwen3", "dpo_losses"];
    let folder = folder(&names);
    let (found, alone) = (discover(folder.path()), discover(tempfile::tempdir().unwrap().path()));
    assert_eq!(refusals(&found), Vec::<String>::new());
    for name in ["llama3", "qwen2", "qwen3", "sigmoid", "orpo"] {
        let rows: Vec<&Value> = found["rows"].as_array().unwrap().iter().filter(|r| r["name"] == name).collect();
        let [used, shadowed] = rows[..] else { panic!("{name}: {rows:#?}") };
        assert!(used["origin"].as_str().unwrap().starts_with(folder.path().to_str().unwrap()), "{used}");
        assert_eq!((&used["shadowed_by"], &shadowed["origin"]), (&Value::Null, &json!("built-in")), "{name}");
        assert_eq!(shadowed["shadowed_by"], used["origin"], "{name}");
    }
    for name in ["llama3", "qwen2", "qwen3"] {
        assert!(found["graphs"][name]["layers"].is_array(), "{name}: {}", found["graphs"][name]);
        assert_eq!(found["graphs"][name], alone["graphs"][name], "{name}");
    }
    assert_eq!(found["evals"], alone["evals"]);
}

#[test]
fn a_folder_that_is_not_there_is_said() {
    let found = discover(Path::new("/no/such/folder"));
    assert_eq!(refusals(&found), ["/no/such/folder: is not a folder"]);
}
