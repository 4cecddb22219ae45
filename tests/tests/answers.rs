//! Runs over examples of one answer, of rankings and with detached answers, from rows to the log.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::Path;

use dpo_tests::{Sandbox, golden, log};
use serde_json::{Value, json};

const ANSWERS: [&str; 5] = ["the kettle sang", "ok", "perhaps 7 is not", "then it ran away", "sure and sure"];

/// A sandbox with the plugins of `tests/stateful`.
fn sandbox() -> (Sandbox, String) {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let file = format!("{}stateful{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let plugins = sandbox.path("plugins");
    std::fs::create_dir(&plugins).unwrap();
    std::fs::copy(std::env::current_exe().unwrap().with_file_name(&file), Path::new(&plugins).join(&file)).unwrap();
    (sandbox, plugins)
}

/// Six questions with so many answers each, best first.
fn rankings(count: impl Fn(usize) -> usize, more: impl Fn(usize, &mut Value)) -> String {
    let row = |i: usize| {
        let ranking: Vec<String> = (0..count(i)).map(|a| format!("{} {}", ANSWERS[(i + a) % 5], i * a)).collect();
        let mut row = json!({"question": format!("why is {i} not {}?", i + 1), "ranking": ranking});
        more(i, &mut row);
        format!("{row}\n")
    };
    (0..6).map(row).collect()
}

fn arguments(plugins: &str, rows: &str, output: &str, more: &[&str]) -> Vec<String> {
    let model = model();
    let fixed = ["train", "--device", "cpu", "--model", &model, "--dataset", rows, "--output-dir", output];
    let settings = ["--plugin-dir", plugins, "--batch-size", "3", "--learning-rate", "5e-3", "--logging-steps", "1"];
    let steps = ["--num-epochs", "2", "--warmup-ratio", "0", "--shuffle", "false"];
    fixed.iter().chain(&settings).chain(&steps).chain(more).map(|a| (*a).to_owned()).collect()
}

fn words(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

fn train(sandbox: &Sandbox, plugins: &str, rows: &str, name: &str, more: &[&str]) -> Vec<Value> {
    let output = sandbox.path(name);
    sandbox.ok(&words(&arguments(plugins, rows, &output, more)));
    log(&output)
}

fn number(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or_else(|| panic!("no {name} in {line}"))
}

fn assert_equal(a: &[Value], b: &[Value], names: &[&str]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        for name in names {
            let (a, b) = (number(a, name), number(b, name));
            assert!((a - b).abs() <= 2e-5 * b.abs().max(1.0), "{name}: {a} and {b}");
        }
    }
}

#[test]
fn rankings_are_learned() {
    let (sandbox, plugins) = sandbox();
    let rows = sandbox.write("rows.jsonl", &rankings(|i| 2 + i % 3, |_, _| {}));
    let lines = train(&sandbox, &plugins, &rows, "run", &["--loss", "plackett_luce", "--num-epochs", "20"]);
    // Before the first step policy and reference agree, so that each of the k! rankings is as likely: k is 2, 3 and 4.
    let start = [2.0_f64, 6.0, 24.0].map(f64::ln).iter().sum::<f64>() / 3.0;
    assert!((number(&lines[0], "loss") - start).abs() < 1e-5, "{}", lines[0]);
    let last = lines.last().unwrap();
    assert!(number(last, "loss") < 0.7 * start && number(last, "rewards/accuracies") > 0.9, "{last}");
    let samples = std::fs::read_to_string(Path::new(&sandbox.path("run")).join("samples.jsonl")).unwrap();
    let first: Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
    let names: Vec<&Value> = first["examples"][1]["answers"].as_array().unwrap().iter().map(|a| &a["name"]).collect();
    assert_eq!(names, ["answer 1", "answer 2", "answer 3"]);
    assert_eq!(first["scores"][2].as_array().unwrap().len(), 4);
    // Three ranks and small micro-batches take the same steps.
    let more = ["--loss", "plackett_luce", "--gpus", "3", "--micro-batch-tokens", "40"];
    let names = ["loss", "grad_norm", "rewards/margins", "logps/rejected"];
    assert_equal(
        &train(&sandbox, &plugins, &rows, "ranks", &more),
        &train(&sandbox, &plugins, &rows, "one", &more[..2]),
        &names,
    );
}

#[test]
fn a_ranking_of_two_is_a_pair() {
    let (sandbox, plugins) = sandbox();
    let rows = sandbox.write("rows.jsonl", &rankings(|_| 2, |_, _| {}));
    let run = |loss: &str| train(&sandbox, &plugins, &rows, loss, &["--loss", loss]);
    let names = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen"];
    assert_equal(&run("plackett_luce"), &run("sigmoid"), &names);
}

#[test]
fn one_answer_is_its_likelihood() {
    let (sandbox, plugins) = sandbox();
    let rows = sandbox.write("rows.jsonl", &rankings(|_| 2, |_, _| {}));
    let one = train(&sandbox, &plugins, &rows, "one", &["--loss", "sft"]);
    // Of pairs it is the term that RPO adds, here beside a loss that weighs nothing.
    let more = ["--loss", "sigmoid", "sft", "--loss-weights", "0", "1"];
    let two = train(&sandbox, &plugins, &rows, "two", &more);
    assert_equal(&one, &two, &["loss", "nll_loss", "grad_norm", "logps/chosen"]);
    // The first rows again, in the second epoch.
    assert!(number(&one[2], "loss") < number(&one[0], "loss"), "{one:?}");
    for name in ["rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/rejected"] {
        assert!(one[0].get(name).is_none() && two[0].get(name).is_some(), "{name}: {}", one[0]);
    }
    // Rows that judge one answer: those that are liked.
    let judged = |i: usize| json!({"prompt": format!("why {i}?"), "completion": " ok", "label": !i.is_multiple_of(3)});
    let judged: String = (0..6).map(|i| format!("{}\n", judged(i))).collect();
    let judged = sandbox.write("judged.jsonl", &judged);
    let ended = sandbox.ok(&words(&arguments(&plugins, &judged, &sandbox.path("judged"), &["--loss", "sft"])));
    assert!(ended.stderr.contains("data        4 examples"), "{}", ended.stderr);
    assert!(ended.stderr.contains("dropped 2: the answer is not liked, first at"), "{}", ended.stderr);
}

/// A detached answer has log-probs and no part in loss or gradient.
#[test]
fn detached_answers_are_not_learned() {
    let (sandbox, plugins) = sandbox();
    let bare = sandbox.write("bare.jsonl", &rankings(|_| 2, |_, _| {}));
    let mismatched = |i: usize, row: &mut Value| row["mismatched"] = json!(ANSWERS[(i + 3) % 5]);
    let rows = sandbox.write("rows.jsonl", &rankings(|_| 2, mismatched));
    let run = |rows: &str, name: &str| train(&sandbox, &plugins, rows, name, &["--loss", "sigmoid", "sft"]);
    let names = ["loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/rejected", "nll_loss"];
    assert_equal(&run(&rows, "detached"), &run(&bare, "bare"), &names);
    let samples = std::fs::read_to_string(Path::new(&sandbox.path("detached")).join("samples.jsonl")).unwrap();
    let first: Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
    assert_eq!(first["scores"][0].as_array().unwrap().len(), 2, "answers that are learned are looked at");
}

#[test]
fn numbers_of_answers_that_do_not_fit_are_refused() {
    let (sandbox, plugins) = sandbox();
    let rows = sandbox.write("rows.jsonl", &rankings(|i| if i == 2 { 3 } else { 2 }, |_, _| {}));
    let refuses = |rows: &str, more: &[&str], texts: &[&str]| {
        sandbox.refuses(&words(&arguments(&plugins, rows, &sandbox.path("no"), more)), texts);
    };
    refuses(&rows, &[], &["rows.jsonl:3: 3 answers, and the loss 'sigmoid' takes 2 answers", "plackett_luce"]);
    refuses(&rows, &["--loss", "hinge", "plackett_luce"], &["rows.jsonl:3: 3 answers, and the loss 'hinge'"]);
    refuses(&rows, &["--loss", "sigmoid", "kto"], &["--loss: 'sigmoid' takes 2 answers, 'kto' takes 1 answer, liked"]);
    let many = sandbox.write("many.jsonl", &rankings(|i| if i == 1 { 17 } else { 16 }, |_, _| {}));
    refuses(&many, &["--loss", "plackett_luce"], &["many.jsonl:2: 17 answers", "takes 2 to 16 answers"]);
}

/// A loss that is not finite has its step skipped, as log-probs that are not finite have, and its row is named.
#[test]
fn a_loss_that_overflows_skips_its_step() {
    let (sandbox, plugins) = sandbox();
    let long = |i: usize, row: &mut Value| {
        if i == 4 {
            row["ranking"][0] = json!("ok and ok ".repeat(20));
        }
    };
    let rows = sandbox.write("rows.jsonl", &rankings(|_| 2, long));
    let arguments = |name: &str, more: &[&str]| {
        let all = [&["--loss", "overflowing"], more].concat();
        arguments(&plugins, &rows, &sandbox.path(name), &all)
    };
    for more in [&[][..], &["--gpus", "3"]] {
        let ended = sandbox.ok(&words(&arguments(&format!("skips{}", more.len()), more)));
        let told: Vec<&str> = ended.stderr.lines().filter(|l| l.contains("the step is skipped")).collect();
        assert_eq!(told.len(), 2, "once an epoch:\n{}", ended.stderr);
        assert!(told.iter().all(|l| l.contains("rows.jsonl:5: ") && l.contains("has loss")), "{told:?}");
    }
    // Three in a row end the run.
    let ended = sandbox.run(&words(&arguments("ends", &["--batch-size", "6", "--num-epochs", "9"])));
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("rows.jsonl:5: step 3 has loss"), "{}", ended.stderr);
}

/// KTO's estimate is over the whole step, whoever computes which part of it.
#[test]
fn kto_takes_the_same_steps_on_ranks_and_in_micro_batches() {
    let (sandbox, plugins) = sandbox();
    let judged =
        |i: usize| json!({"prompt": format!("why {i}?"), "completion": ANSWERS[i % 5], "label": !i.is_multiple_of(3)});
    let rows: String = (0..9).map(|i| format!("{}\n", judged(i))).collect();
    let rows = sandbox.write("judged.jsonl", &rows);
    let one = train(&sandbox, &plugins, &rows, "one", &["--loss", "kto"]);
    let more = ["--loss", "kto", "--gpus", "3", "--micro-batch-tokens", "40"];
    let ranks = train(&sandbox, &plugins, &rows, "ranks", &more);
    assert_equal(&ranks, &one, &["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen"]);
    // The first rows again, in the second epoch.
    assert!((number(&one[0], "loss") - 0.5).abs() < 1e-6 && number(&one[3], "loss") < 0.45, "{one:?}");
    // Pairs are two answers each.
    let pairs = sandbox.write("pairs.jsonl", &rankings(|_| 2, |_, _| {}));
    let said = sandbox.ok(&["data", &pairs, "--plugin-dir", &plugins, "--loss", "kto", "--model", &model()]).stdout;
    assert!(said.contains("12 examples") && said.contains("liked: 6 of 12 answers"), "{said}");
}

/// `data --output` has every token that a loss sees, and writes over nothing.
#[test]
fn ids_of_examples_are_written_to_a_new_file() {
    let (sandbox, plugins) = sandbox();
    let mismatched = |i: usize, row: &mut Value| row["mismatched"] = json!(ANSWERS[(i + 3) % 5]);
    let rows = sandbox.write("rows.jsonl", &rankings(|_| 2, mismatched));
    let ids = sandbox.path("ids.jsonl");
    let arguments = ["data", &rows, "--plugin-dir", &plugins, "--model", &model(), "--output", &ids];
    sandbox.ok(&arguments);
    let text = std::fs::read_to_string(&ids).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 6);
    for line in &lines {
        let answers = line["answers"].as_array().unwrap();
        let masks: Vec<u64> = answers.iter().map(|a| a["mask"][0].as_u64().unwrap()).collect();
        assert_eq!(masks, [1, 1, 0], "{line}");
        let same = |a: &Value| a["ids"].as_array().unwrap().len() == a["mask"].as_array().unwrap().len();
        assert!(answers.iter().all(same) && !line["prompt_ids"].as_array().unwrap().is_empty(), "{line}");
    }
    sandbox.refuses(&arguments, &["--output", "ids.jsonl: is there already", "name a new file"]);
}

fn model() -> String {
    golden("trajectories/qwen2/model").display().to_string()
}
