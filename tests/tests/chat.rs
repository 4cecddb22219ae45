//! `chat` as scripts have it: prompts, lines, objects, both variants; and what it refuses.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::io::Write;
use std::process::Stdio;

use dpo_tests::{Sandbox, golden};
use serde_json::Value;

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn of_golden(case: &str, name: &str) -> String {
    golden("trajectories").join(case).join(name).display().to_string()
}

/// What chat prints for lines of stdin.
fn piped(sandbox: &Sandbox, args: &[&str], lines: &str) -> (String, String) {
    let mut command = sandbox.command(&[&["chat"], args].concat());
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && !stderr.contains("panicked"), "{stderr}");
    (stdout, stderr)
}

fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The demo's model, a run on it, and the run's folder as all that chat is told.
#[test]
fn the_demo_answers_before_and_after() {
    let s = sandbox();
    let greedy = ["--temperature", "0", "--max-new-tokens", "24", "--json"];
    let ask = |more: &[&str]| objects(&s.ok(&[&["chat"], &greedy[..], more].concat()).stdout);
    let prompts = ["--prompt", "How do I cook rice?", "米饭怎么煮？"];
    let base = ask(&prompts);
    assert_eq!(base.len(), 2);
    assert!(base.iter().all(|o| o["tuned"].is_null() && o["base"]["tokens"].as_u64().unwrap() > 0), "{base:?}");
    assert_eq!(base, ask(&prompts), "the same prompts have other answers");
    let run = s.path("run");
    s.ok(&["train", "--output-dir", &run, "--max-steps", "24"]);
    let both = ask(&[&["--adapter", &run, "--compare"], &prompts[..]].concat());
    let tuned = ask(&[&["--adapter", &run], &prompts[..]].concat());
    for at in 0..2 {
        assert_eq!(both[at]["base"], base[at]["base"]);
        assert_eq!(both[at]["tuned"], tuned[at]["tuned"]);
        assert_ne!(both[at]["base"], both[at]["tuned"], "training has changed nothing");
        assert_eq!(both[at]["prompt"], base[at]["prompt"]);
    }
    // The same for people: no colours, no columns where nobody reads.
    let text =
        s.ok(&[&["chat", "--adapter", &run, "--compare", "--max-new-tokens", "24"], &prompts[..]].concat()).stdout;
    for (at, prompt) in ["> How do I cook rice?", "> 米饭怎么煮？"].iter().enumerate() {
        assert!(text.contains(prompt), "{text}");
        for variant in ["base", "tuned"] {
            let answer = both[at][variant]["text"].as_str().unwrap();
            assert!(text.contains(&format!("{variant}:\n{answer}")), "no '{answer}' of {variant} in:\n{text}");
        }
    }
    assert!(!text.contains('\x1b') && !text.contains("tokens/s"), "{text}");
}

/// Lines are turns of one conversation until it is reset.
#[test]
fn lines_are_turns() {
    let (s, model) = (sandbox(), of_golden("qwen3", "model"));
    // Draws show small changes of the logits; the likeliest tokens of such a small model are often the same.
    let args = ["--model", &model, "--json", "--max-new-tokens", "8", "--temperature", "2", "--system", "be brief"];
    let (text, _) = piped(&s, &args, "one\n\none\n/reset\none\n/quit\none\n");
    let answers = objects(&text);
    assert_eq!(answers.len(), 3, "{text}");
    assert_eq!(answers[0], answers[2], "a new conversation is not new");
    assert_ne!(answers[0], answers[1], "the first turn is forgotten");
    let (other, _) = piped(&s, &args[..7], "one\n");
    let (plain, notes) = piped(&s, &args[..2], "one\n");
    assert_ne!(objects(&other)[0], answers[0], "the system's turn is not seen");
    assert!(!plain.is_empty() || !notes.is_empty());
    let (_, notes) = piped(&s, &["--model", &model, "--max-new-tokens", "2"], "one\n");
    assert!(notes.contains("--max-new-tokens 2"), "{notes}");
}

/// Draws depend on the seed, and only on it.
#[test]
fn draws_are_repeatable() {
    let (s, model) = (sandbox(), of_golden("llama3", "model"));
    let ask = |seed: &str| {
        let args = [
            "chat",
            "--model",
            &model,
            "--temperature",
            "1.5",
            "--prompt",
            "hello",
            "--max-new-tokens",
            "16",
            "--json",
        ];
        s.ok(&[&args[..], &["--seed", seed]].concat()).stdout
    };
    assert_eq!(ask("1"), ask("1"));
    assert_ne!(ask("1"), ask("2"));
}

#[test]
fn what_cannot_be_used_is_named() {
    let (s, model) = (sandbox(), of_golden("qwen2", "model"));
    let other = of_golden("qwen3", "final_adapter");
    let with = |more: &[&str]| {
        [&["chat", "--prompt", "hi", "--model", &model], more]
            .concat()
            .iter()
            .map(|a| (*a).to_owned())
            .collect::<Vec<_>>()
    };
    let refuses =
        |args: Vec<String>, texts: &[&str]| s.refuses(&args.iter().map(String::as_str).collect::<Vec<_>>(), texts);
    refuses(with(&["--adapter", &other]), &["final_adapter", "tensor '"]);
    refuses(with(&["--adapter", "nowhere"]), &["nowhere", "no such file", "adapter_config.json"]);
    refuses(with(&["--device", "tpu"]), &["--device", "tpu"]);
    refuses(with(&["--compare"]), &["--adapter"]);
    refuses(with(&["--top-p", "2"]), &["--top-p", "out of range"]);
    let folder = s.path("empty");
    std::fs::create_dir(&folder).unwrap();
    s.refuses(&["chat", "--prompt", "hi", "--model", &folder], &["config.json"]);
    s.refuses(&["chat", "--prompt", "hi", "--model", "nowhere"], &["--model", "nowhere"]);
    let nameless = s.write("adapter/adapter_config.json", "{}");
    let nameless = nameless.trim_end_matches("/adapter_config.json");
    s.refuses(&["chat", "--prompt", "hi", "--adapter", nameless], &["does not name the model", "--model"]);
    s.write("adapter/adapter_config.json", r#"{"base_model_name_or_path": "/gone/model"}"#);
    s.refuses(&["chat", "--prompt", "hi", "--adapter", nameless], &["/gone/model", "--model"]);
}
