//! Runs as a user has them: repeatable, resumable after a kill, the same from linked-in and loaded plugins, the demo.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::Path;
use std::time::{Duration, Instant};

use dpo_tests::{Sandbox, golden, log};
use serde_json::Value;

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// `train` on the small model and rows of a family's goldens.
fn train(case: &str, output: &str, more: &[&str]) -> Vec<String> {
    let path = |name: &str| golden("trajectories").join(case).join(name).display().to_string();
    let (model, rows) = (path("model"), path("prefs.jsonl"));
    let fixed = ["train", "--model", &model, "--dataset", &rows, "--output-dir", output, "--batch-size", "4"];
    let settings = ["--learning-rate", "2e-3", "--logging-steps", "1", "--seed", "7"];
    fixed.iter().chain(&settings).chain(more).map(|a| (*a).to_owned()).collect()
}

fn ok(sandbox: &Sandbox, args: &[String]) {
    sandbox.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
}

fn adapter(folder: &str) -> Vec<u8> {
    std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap()
}

/// A log without what depends on the clock and the machine.
fn timeless(folder: &str) -> Vec<Value> {
    let mut lines = log(folder);
    for line in &mut lines {
        ["tokens_per_second", "memory_gib", "elapsed_s"]
            .iter()
            .for_each(|k| drop(line.as_object_mut().unwrap().remove(*k)));
    }
    lines
}

#[test]
fn two_runs_are_equal_byte_for_byte() {
    let sandbox = sandbox();
    let outputs = [sandbox.path("a"), sandbox.path("b")];
    for output in &outputs {
        ok(&sandbox, &train("qwen2", output, &["--num-epochs", "2", "--split-dataset-ratio", "0.2"]));
    }
    assert_eq!(adapter(&outputs[0]), adapter(&outputs[1]));
    assert_eq!(timeless(&outputs[0]), timeless(&outputs[1]));
    let files = ["args.json", "adapter_config.json", "report.html", "runs", "logging.jsonl"];
    files.iter().for_each(|f| assert!(Path::new(&outputs[0]).join(f).exists(), "{f} is missing"));
    assert!(timeless(&outputs[0]).iter().any(|l| l.get("eval_loss").is_some()), "nothing was evaluated");
}

#[test]
fn a_killed_run_resumes_to_the_same_end() {
    let sandbox = sandbox();
    let (whole, cut) = (sandbox.path("whole"), sandbox.path("cut"));
    let settings = ["--num-epochs", "40", "--save-steps", "3", "--save-total-limit", "2", "--logging-steps", "5"];
    ok(&sandbox, &train("qwen3", &whole, &settings));
    let args = train("qwen3", &cut, &settings);
    let mut child = sandbox.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child = child.stderr(std::process::Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    let reached = |n: u64| Path::new(&cut).join(format!("checkpoint-{n}")).exists();
    // Checkpoints come every 3 steps and two are kept; any of them will do.
    while !(2..60).any(|n| reached(3 * n)) {
        assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint appeared");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!Path::new(&cut).join("adapter_model.safetensors").exists(), "the run ended before it was killed");
    let resumed = [args.clone(), vec!["--resume-from-checkpoint".into(), "latest".into()]].concat();
    ok(&sandbox, &resumed);
    assert_eq!(adapter(&whole), adapter(&cut));
    assert_eq!(timeless(&whole), timeless(&cut));
    // With other settings it is another run.
    let other = [resumed, vec!["--beta".into(), "0.5".into()]].concat();
    let other: Vec<&str> = other.iter().map(String::as_str).collect();
    sandbox.refuses(&other, &["is of another run: --beta was not given, is 0.5", "cut/args.json"]);
    let said = sandbox.run(&other).stderr;
    assert!(said.contains("adapter  ") && !said.contains("micro-batch"), "refused late:\n{said}");
}

#[test]
fn an_evaluation_computes_what_the_run_did() {
    let (sandbox, rows) = (sandbox(), golden("trajectories").join("qwen2/prefs.jsonl").display().to_string());
    let output = sandbox.path("run");
    let settings =
        ["--loss", "hinge", "--beta", "0.3", "--rpo-alpha", "0.5", "--val-dataset", &rows, "--max-steps", "4"];
    ok(&sandbox, &train("qwen2", &output, &settings));
    let lines = log(&output);
    let of_run = lines.iter().rev().find_map(|l| l.get("eval_loss")?.as_f64()).unwrap();
    let loss = |adapter: &str, more: &[&str]| {
        let args = [&["eval", "--adapter", adapter, "--dataset", &rows, "--json", "--device", "cpu"], more].concat();
        let means: Value = serde_json::from_str(&sandbox.ok(&args).stdout).unwrap();
        means[0]["loss"].as_f64().unwrap()
    };
    for folder in [output.clone(), format!("{output}/checkpoint-4")] {
        let is = loss(&folder, &[]);
        assert!((is - of_run).abs() < 1e-5, "{folder}: {is}, in the run {of_run}");
    }
    // What is said wins over the run.
    assert!((loss(&output, &["--loss", "sigmoid"]) - of_run).abs() > 1e-2);
}

#[test]
fn micro_batches_and_recomputation_change_nothing() {
    let sandbox = sandbox();
    let runs: Vec<Vec<Value>> = [["8192", "false"], ["1", "false"], ["8192", "true"], ["90", "true"]]
        .into_iter()
        .enumerate()
        .map(|(i, [tokens, recompute])| {
            let output = sandbox.path(&i.to_string());
            let losses = ["--loss", "sigmoid", "sft", "aot", "--loss-weights", "1", "0.3", "0.5"];
            let plan = ["--micro-batch-tokens", tokens, "--recompute", recompute];
            ok(&sandbox, &train("llama3", &output, &[&losses[..], &plan[..]].concat()));
            timeless(&output)
        })
        .collect();
    for (other, run) in runs.iter().enumerate().skip(1) {
        for (a, b) in runs[0].iter().zip(run) {
            for (name, value) in a.as_object().unwrap() {
                let (a, b) = (value.as_f64().unwrap(), b[name].as_f64().unwrap());
                // Log-probs near 100 carry 1e-5 of f32 rounding into rewards.
                assert!((a - b).abs() <= 1e-5 * a.abs().max(1.0), "run {other}: {name} is {b}, not {a}");
            }
        }
    }
}

#[test]
fn shared_libraries_train_the_same_adapters() {
    let sandbox = sandbox();
    let plugins = sandbox.path("plugins");
    std::fs::create_dir(&plugins).unwrap();
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    for family in ["qwen2", "qwen3", "llama3"] {
        let file = format!("{}dpo_model_{family}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
        std::fs::copy(deps.join(&file), Path::new(&plugins).join(&file)).unwrap();
        let (linked, loaded) = (sandbox.path(&format!("{family}-linked")), sandbox.path(&format!("{family}-loaded")));
        ok(&sandbox, &train(family, &linked, &["--plugin", family]));
        ok(&sandbox, &train(family, &loaded, &["--plugin", family, "--plugin-dir", &plugins]));
        assert_eq!(adapter(&linked), adapter(&loaded), "{family}");
    }
    let list = sandbox.ok(&["list", "--json", "--plugin-dir", &plugins]).stdout;
    let list: Value = serde_json::from_str(&list).unwrap();
    let used = |r: &&Value| r["origin"].as_str().unwrap().starts_with(&plugins) && r["shadowed_by"].is_null();
    let loaded: Vec<&Value> = list["plugins"].as_array().unwrap().iter().filter(used).collect();
    assert!(["qwen2", "qwen3", "llama3"].iter().all(|family| loaded.iter().any(|r| r["name"] == *family)), "{list:#}");
    let table = sandbox.ok(&["list", "--plugin-dir", &plugins]).stdout;
    assert!(table.contains(&format!("{} more are of the same versions and not used", loaded.len())), "{table}");
    let models =
        list["plugins"].as_array().unwrap().iter().filter(|r| r["kind"] == "model" && r["shadowed_by"].is_null());
    assert_eq!(table.lines().filter(|line| line.starts_with("model")).count(), models.count(), "{table}");
}

#[test]
fn an_adapter_is_the_reference_of_the_run_that_continues_it() {
    let sandbox = sandbox();
    let (first, second) = (sandbox.path("first"), sandbox.path("second"));
    ok(&sandbox, &train("qwen2", &first, &[]));
    ok(&sandbox, &train("qwen2", &second, &["--init-adapter", &first]));
    let begun = |folder: &str| log(folder)[0]["loss"].as_f64().unwrap();
    for folder in [&first, &second] {
        assert!((begun(folder) - std::f64::consts::LN_2).abs() < 1e-6, "{folder} begins at {}", begun(folder));
    }
    assert_ne!(log(&first)[0]["logps/chosen"], log(&second)[0]["logps/chosen"]);
}

#[test]
fn the_demo_learns_its_preference() {
    let sandbox = sandbox();
    let output = sandbox.path("demo");
    sandbox.ok(&["train", "--plugin", "qwen2", "--output-dir", &output]);
    let lines = log(&output);
    let first = |name: &str| lines[0][name].as_f64().unwrap();
    let last = |name: &str| lines.iter().rev().find_map(|l| l.get(name)).and_then(Value::as_f64).unwrap();
    assert!(last("loss") < std::f64::consts::LN_2 / 2.0, "loss {}", last("loss"));
    // Curt is what the model says at first; in the end it is warm, also where it was not trained to be.
    assert!(first("logps/rejected") > first("logps/chosen"), "{:?}", lines[0]);
    assert!(last("eval_logps/chosen") > last("eval_logps/rejected") + 5.0, "{:?}", lines.last());
    assert!(last("rewards/accuracies") > 0.9, "accuracy {}", last("rewards/accuracies"));
    assert!(
        last("eval_rewards/accuracies") > 0.9,
        "accuracy on rows not trained on {}",
        last("eval_rewards/accuracies")
    );
}

/// The commands a run ends with, taken as they are; `eval` gives the numbers of the run's own evaluation.
#[test]
fn what_a_run_says_next_works() {
    let sandbox = sandbox();
    let (output, rows) = (sandbox.path("a run"), golden("trajectories/qwen2/prefs.jsonl").display().to_string());
    let args = train("qwen2", &output, &["--num-epochs", "3", "--val-dataset", &rows]);
    let said = sandbox.ok(&args.iter().map(String::as_str).collect::<Vec<_>>()).stderr;
    let next: Vec<Vec<&str>> = said[said.find("next ").unwrap()..]
        .lines()
        .map(|l| l.split_once("dpo-host-test ").unwrap().1)
        .map(|l| l.split('\'').enumerate().flat_map(|(at, part)| words(at % 2 == 1, part)).collect())
        .collect();
    let [chat, eval, merge] = next.as_slice() else { panic!("{next:?}") };
    assert_eq!((chat[0], eval[0], merge[0]), ("chat", "eval", "merge"));
    let answers = sandbox.ok(&[&chat[..], &["--prompt", "hi", "--json", "--max-new-tokens", "4"]].concat()).stdout;
    let answers: Value = serde_json::from_str(&answers).unwrap();
    assert!(answers["base"]["tokens"].is_u64() && answers["tuned"]["tokens"].is_u64(), "{answers}");
    sandbox.ok(merge);
    let told = std::fs::read_to_string(Path::new(&output).join("answers.jsonl")).unwrap();
    let told: Vec<Value> = told.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(told.len() == 3 && told.iter().all(|t| t["before"].is_string() && t["after"].is_string()), "{told:?}");
    let report = std::fs::read_to_string(Path::new(&output).join("report.html")).unwrap();
    assert!(report.contains("<h4>before</h4>"), "the report lacks answers");
    assert!(Path::new(&format!("{output}-merged")).join("model.safetensors").exists());

    let lines = timeless(&output);
    let last = lines.iter().rev().find(|l| l.get("eval_loss").is_some()).unwrap();
    let means = |args: &[&str]| -> Vec<Value> { serde_json::from_str(&sandbox.ok(args).stdout).unwrap() };
    let all = means(&[&eval[..], &["--json"]].concat());
    assert_eq!((&all[0]["dataset"], &all[1]["dataset"]), (&Value::from(rows.as_str()), &Value::from("all")));
    for name in ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/rejected", "nll_loss"] {
        let (is, expected) = (all[0][name].as_f64().unwrap(), last[format!("eval_{name}")].as_f64().unwrap());
        assert!((is - expected).abs() < 1e-5 * expected.abs().max(1.0), "{name} is {is}, in the run {expected}");
        assert_eq!(all[0][name], all[1][name], "{name}");
    }
    let table = sandbox.ok(eval).stdout;
    assert!(table.lines().count() == 2 && table.contains("ACCURACY") && table.contains("prefs.jsonl"), "{table}");
    // Of several, a line each and one of all; without an adapter there are no rewards.
    let half = format!("{rows}#5");
    let two = means(&[&eval[..], &[&half, "--beta", "0.5", "--json"]].concat());
    let counts: Vec<u64> = two.iter().map(|m| m["examples"].as_u64().unwrap()).collect();
    assert_eq!(counts, [all[0]["examples"].as_u64().unwrap(), 5, counts[0] + 5]);
    let margin = |mean: &Value| mean["rewards/margins"].as_f64().unwrap();
    assert!((margin(&two[0]) - 5.0 * margin(&all[0])).abs() < 1e-4, "{two:?}");
    let model = golden("trajectories/qwen2/model").display().to_string();
    let base = means(&["eval", "--model", &model, "--dataset", &rows, "--json"]);
    assert!(base[0].get("rewards/margins").is_none() && base[0]["logps/chosen"].is_f64(), "{base:?}");
}

/// Words of a part of a command that is quoted, or not.
fn words(quoted: bool, part: &str) -> Vec<&str> {
    if quoted { vec![part] } else { part.split_whitespace().collect() }
}
