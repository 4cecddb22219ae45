//! What evaluations decide, how a run goes on beyond its end, and references that are not the adapter of the start.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::Path;

use dpo_tests::{Sandbox, golden, log};
use serde_json::Value;

const LATEST: [&str; 2] = ["--resume-from-checkpoint", "latest"];

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn path(case: &str, name: &str) -> String {
    golden("trajectories").join(case).join(name).display().to_string()
}

/// A run on few rows that overfits, evaluated on others at every step.
fn overfit(output: &str, more: &[&str]) -> Vec<String> {
    let rows = path("qwen2", "prefs.jsonl");
    let (few, model) = (format!("{rows}#4"), path("qwen2", "model"));
    let fixed = ["train", "--device", "cpu", "--model", &model, "--dataset", &few, "--output-dir", output];
    let settings = ["--learning-rate", "0.05", "--batch-size", "4", "--logging-steps", "1", "--eval-steps", "1"];
    fixed.iter().chain(&settings).chain(more).map(|a| (*a).to_owned()).collect()
}

fn ok(sandbox: &Sandbox, args: &[String]) -> String {
    sandbox.ok(&args.iter().map(String::as_str).collect::<Vec<_>>()).stderr
}

fn adapter(folder: &str) -> Vec<u8> {
    std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap()
}

/// Values of a metric, by step.
fn values(folder: &str, name: &str) -> Vec<(u64, f64)> {
    let value = |line: &Value| Some((line["global_step"].as_u64()?, line.get(name)?.as_f64()?));
    log(folder).iter().filter_map(value).collect()
}

fn least(values: &[(u64, f64)]) -> (u64, f64) {
    values.iter().copied().reduce(|best, next| if next.1 < best.1 { next } else { best }).unwrap()
}

fn checkpoints(folder: &str) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|n| n.starts_with("checkpoint-")).collect();
    names.sort();
    names
}

#[test]
fn a_run_ends_early_with_its_best_adapter() {
    let (sandbox, rows) = (sandbox(), path("qwen2", "prefs.jsonl"));
    let output = sandbox.path("run");
    let best = ["--load-best-model-at-end", "--early-stopping-patience", "3", "--save-total-limit", "1"];
    let args = overfit(&output, &[&["--val-dataset", &rows, "--num-epochs", "60"], &best[..]].concat());
    let said = ok(&sandbox, &args);
    let losses = values(&output, "eval_loss");
    let (step, loss) = least(&losses);
    let last = losses.last().unwrap().0;
    assert_eq!(last, step + 3, "{losses:?}");
    assert!(last < 60 && step > 1, "{losses:?}");
    let told = format!("eval_loss {loss:.4} after step {step} of {last}; ended early, as 3 evaluations were no better");
    assert!(said.contains(&told), "{said}");
    let best = format!("checkpoint-{step}");
    let mut kept = [best.clone(), format!("checkpoint-{last}")];
    kept.sort();
    assert_eq!(checkpoints(&output), kept);
    assert_eq!(adapter(&output), adapter(&format!("{output}/{best}")));
    assert_ne!(adapter(&output), adapter(&format!("{output}/checkpoint-{last}")));

    // It goes on where it is told to be patient, as if it had been from the start.
    let patient = |output: &str, more: &[&str]| {
        let patience = ["--val-dataset", &rows, "--num-epochs", "60", "--load-best-model-at-end"];
        let until = ["--early-stopping-patience", "6", "--save-total-limit", "1"];
        overfit(output, &[&patience[..], &until, more].concat())
    };
    ok(&sandbox, &patient(&output, &LATEST));
    let whole = sandbox.path("whole");
    ok(&sandbox, &patient(&whole, &[]));
    assert_eq!(values(&output, "eval_loss"), values(&whole, "eval_loss"));
    assert_eq!(adapter(&output), adapter(&whole));
}

#[test]
fn sets_with_names_are_evaluated_each_by_itself() {
    let (sandbox, rows) = (sandbox(), path("qwen2", "prefs.jsonl"));
    let output = sandbox.path("run");
    let sets = [format!("few={rows}#2"), format!("all={rows}")];
    let metric = ["--max-steps", "3", "--metric-for-best-model", "all_rewards/margins", "--load-best-model-at-end"];
    let args = overfit(&output, &[&["--val-dataset", &sets[0], &sets[1], "--eval-on-start"], &metric[..]].concat());
    let said = ok(&sandbox, &args);
    let lines = log(&output);
    assert_eq!(lines[0]["global_step"], 0);
    for name in ["eval_few_loss", "eval_all_loss"] {
        assert_eq!(values(&output, name).iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 1, 2, 3], "{name}");
    }
    let alone = sandbox.path("alone");
    ok(&sandbox, &overfit(&alone, &["--max-steps", "3", "--val-dataset", &rows]));
    assert_eq!(values(&alone, "eval_loss"), values(&output, "eval_all_loss")[1..]);
    let margins = values(&output, "eval_all_rewards/margins")[1..].to_vec();
    let (step, best) = margins.into_iter().reduce(|a, b| if b.1 > a.1 { b } else { a }).unwrap();
    assert!(said.contains(&format!("eval_all_rewards/margins {best:.4} after step {step} of 3")), "{said}");
    // Each set's numbers have its name.
    assert!(said.lines().any(|l| l.starts_with("evaluation 3 few loss ") && l.contains(", all loss ")), "{said}");
    assert!(said.contains("eval_few    2 examples to evaluate on, 4 to train on"), "{said}");
    let unknown = overfit(
        &sandbox.path("x"),
        &["--val-dataset", &rows, "--load-best-model-at-end", "--metric-for-best-model", "acc"],
    );
    sandbox.refuses(&unknown.iter().map(String::as_str).collect::<Vec<_>>(), &["unknown metric 'acc'", "eval_loss"]);
}

#[test]
fn a_run_that_came_to_its_end_is_prolonged() {
    let sandbox = sandbox();
    let output = sandbox.path("run");
    let constant = |epochs: &'static str| ["--lr-scheduler", "constant", "--num-epochs", epochs, "--save-steps", "2"];
    ok(&sandbox, &overfit(&output, &constant("4")));
    let said = ok(&sandbox, &overfit(&output, &[&constant("7")[..], &LATEST].concat()));
    assert!(said.contains("the run is prolonged from 4 to 7 steps"), "{said}");
    let whole = sandbox.path("whole");
    ok(&sandbox, &overfit(&whole, &constant("7")));
    // With a constant learning rate the longer run is the same from the start.
    assert_eq!(values(&output, "loss"), values(&whole, "loss"));
    assert_eq!(adapter(&output), adapter(&whole));
    let args: Value = serde_json::from_str(&std::fs::read_to_string(format!("{output}/args.json")).unwrap()).unwrap();
    assert_eq!(args["num_epochs"], 7.0);
    // One that was cut short keeps its length, which is what its learning rates were made for.
    std::fs::remove_dir_all(format!("{output}/checkpoint-7")).unwrap();
    let longer = overfit(&output, &[&constant("9")[..], &LATEST].concat());
    let texts = ["is of another run", "--num-epochs was 7.0, is 9.0"];
    sandbox.refuses(&longer.iter().map(String::as_str).collect::<Vec<_>>(), &texts);
}

#[test]
fn checkpoints_come_by_time() {
    let sandbox = sandbox();
    let output = sandbox.path("run");
    ok(&sandbox, &overfit(&output, &["--max-steps", "3", "--save-minutes", "1e-6"]));
    assert_eq!(checkpoints(&output), ["checkpoint-1", "checkpoint-2", "checkpoint-3"]);
}

/// Rewards at the first step: 0 where policy and reference are the same.
fn first_reward(output: &str) -> f64 {
    values(output, "rewards/chosen")[0].1
}

#[test]
fn a_reference_may_be_another_model_or_adapter() {
    let (sandbox, model) = (sandbox(), path("qwen2", "model"));
    let started = sandbox.path("started");
    ok(&sandbox, &overfit(&started, &["--max-steps", "3"]));
    let run = |name: &str, more: &[&str]| {
        let output = sandbox.path(name);
        let said = ok(&sandbox, &overfit(&output, &[&["--max-steps", "2"], more].concat()));
        (output, said)
    };
    // The adapter of the start is the reference: nothing has moved yet.
    let (same, _) = run("same", &["--init-adapter", &started]);
    assert_eq!(first_reward(&same), 0.0);
    // The base model: what the adapter has learned is seen at once.
    let (base, said) = run("base", &["--init-adapter", &started, "--ref-model", &model]);
    assert!(said.contains("without an adapter"), "{said}");
    let of_start = values(&started, "rewards/chosen").last().unwrap().1;
    assert!(first_reward(&base).abs() > 0.5 * of_start.abs() && of_start != 0.0, "{} {of_start}", first_reward(&base));
    // Named by itself, the usual reference takes the usual steps.
    let (named, _) = run("named", &["--init-adapter", &started, "--ref-adapter", &started]);
    assert_eq!(adapter(&named), adapter(&same));
    let (model_named, _) = run("model-named", &["--ref-model", &model]);
    let (plain, _) = run("plain", &[]);
    assert_eq!(adapter(&model_named), adapter(&plain));
    // The other way round: the model against one that has learned.
    let (other, _) = run("other", &["--ref-adapter", &started]);
    assert!(
        (first_reward(&other) + first_reward(&base)).abs() < 1e-4,
        "{} {}",
        first_reward(&other),
        first_reward(&base)
    );

    // Resumed with another reference it is another run.
    let resumed = overfit(&base, &[&["--max-steps", "4", "--init-adapter", &started], &LATEST[..]].concat());
    let refused = resumed.iter().map(String::as_str).collect::<Vec<_>>();
    sandbox.refuses(&refused, &["is of another run", "the reference was", "the adapter at the start"]);
    // A reference that reads other tokens.
    let foreign = overfit(&sandbox.path("foreign"), &["--ref-model", &path("llama3", "model")]);
    sandbox.refuses(&foreign.iter().map(String::as_str).collect::<Vec<_>>(), &["--ref-model"]);
}

#[test]
fn a_system_message_is_what_the_rows_would_have_said() {
    let sandbox = sandbox();
    let turns = |system: &str| {
        let row = |n: usize| {
            format!(
                "{{\"messages\": [{system}{{\"role\": \"user\", \"content\": \"Say {n}\"}}, {{\"role\": \"assistant\", \"content\": \
                 \"Gladly: {n}\"}}], \"rejected_response\": \"No\"}}"
            )
        };
        (1..5).map(row).collect::<Vec<_>>().join("\n")
    };
    let bare = sandbox.write("bare.jsonl", &turns(""));
    let own = sandbox.write("own.jsonl", &turns("{\"role\": \"system\", \"content\": \"Be kind.\"}, "));
    let model = path("qwen2", "model");
    let data = |rows: &str, more: &[&str]| {
        let said = sandbox.ok(&[&["data", rows, "--model", &model, "--json"], more].concat()).stdout;
        serde_json::from_str::<Value>(&said).unwrap()["sample"]["parts"].clone()
    };
    assert_eq!(data(&bare, &["--system", "Be kind."]), data(&own, &[]));
    assert_eq!(data(&own, &["--system", "Be rude."]), data(&own, &[]));
    assert_ne!(data(&bare, &[]), data(&own, &[]));
    let plain = sandbox.write("plain.jsonl", "{\"prompt\": \"a b\", \"chosen\": \" c\", \"rejected\": \" d\"}\n");
    let stays = ["data", &plain, "--model", &model, "--system", "Be kind.", "--plain-text"];
    sandbox.refuses(&stays, &["plain.jsonl:1", "--system"]);
}
