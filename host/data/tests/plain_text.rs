//! Plain text of a chat model, and whose chat template it is.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::{Path, PathBuf};

use dpo_core::error::Result;
use dpo_data::{ChatTokenizer, Dataset};
use dpo_plugins::Registry;
use serde_json::{Value, json};

const TURNS: [&str; 3] = ["why not?", "then it ran", "then it sat"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trl/model")
}

fn load(rows: &[Value], tokenizer: &ChatTokenizer, plain_text: bool) -> Result<Dataset> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, rows.iter().map(Value::to_string).collect::<Vec<_>>().join("\n")).unwrap();
    let options = dpo_data::DataOptions { paths: vec![path.display().to_string()], plain_text, ..options() };
    dpo_data::load(&options, &Registry::discover(&[], None), tokenizer)
}

fn options() -> dpo_data::DataOptions {
    dpo_data::DataOptions {
        paths: Vec::new(),
        format: None,
        wanted: dpo_data::Wanted::default(),
        batch_size: 16,
        columns: dpo_data::columns::Columns::default(),
        max_length: None,
        vocabulary: None,
        truncation: dpo_data::Truncation::Delete,
        strict: true,
        max_samples: None,
        system: None,
        plain_text: false,
        shuffle: false,
        seed: 0,
    }
}

fn plain([prompt, chosen, rejected]: [&str; 3]) -> Value {
    json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})
}

fn ids(data: &Dataset) -> Vec<Vec<u32>> {
    data.examples.get(0).unwrap().parts().map(<[u32]>::to_vec).collect()
}

#[test]
fn plain_text_of_a_chat_model_becomes_turns() {
    let tokenizer = ChatTokenizer::open(&golden(), None).unwrap();
    let turn = |role: &str, text: &str| json!([{"role": role, "content": text}]);
    let [prompt, chosen, rejected] = TURNS;
    let chat = json!({"prompt": turn("user", prompt), "chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)});
    let made = load(&[plain(TURNS)], &tokenizer, false).unwrap();
    assert_eq!(ids(&made), ids(&load(&[chat], &tokenizer, false).unwrap()));
    assert!(made.report.to_string().contains("plain text: 1 record as turns of the chat template"), "{}", made.report);
    assert!(made.report.line().contains("1 of plain text as turns of the chat template"), "{}", made.report.line());

    let left = load(&[plain(TURNS)], &tokenizer, true).unwrap();
    assert_eq!(tokenizer.decode(left.examples.get(0).unwrap().prompt(), true), prompt);
    assert_eq!((left.report.templated, left.report.plain_examples), (0, 1));
}

#[test]
fn plain_text_that_was_rendered_before_stays() {
    let tokenizer = ChatTokenizer::open(&golden(), None).unwrap();
    let prompt = "<|im_start|>user\nwhy not?<|im_end|>\n<|im_start|>assistant\n";
    let made = load(&[plain([prompt, TURNS[1], TURNS[2]])], &tokenizer, false).unwrap();
    assert_eq!(tokenizer.decode(made.examples.get(0).unwrap().prompt(), true), prompt);
    let warnings: Vec<String> = made.report.warnings().iter().map(|w| w.text.clone()).collect();
    assert!(warnings[0].starts_with("1 prompt of plain text with tokens of the chat template"), "{warnings:?}");
}

/// What two texts begin with is no question.
#[test]
fn texts_without_a_prompt_stay() {
    let tokenizer = ChatTokenizer::open(&golden(), None).unwrap();
    let row = json!({"chosen": "The sky is blue.", "rejected": "The sky is green."});
    let made = load(&[row], &tokenizer, false).unwrap();
    assert_eq!(tokenizer.decode(made.examples.get(0).unwrap().prompt(), true), "The sky is");
    assert_eq!((made.report.templated, made.report.plain_examples), (0, 1));
}

/// A checkpoint without a template, as base models are.
fn base() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden().join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let config = json!({"eos_token": "<|im_end|>"});
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

#[test]
fn a_template_is_borrowed_of_the_family_alone() {
    let dir = base();
    let row = json!({"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "ok"}], "rejected_response": "not"});
    let turns = |tag: &str| {
        format!("{{% for m in messages %}}<|{tag}|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}")
    };
    let own = ChatTokenizer::open(dir.path(), Some(&turns("im_start"))).unwrap();
    let made = load(std::slice::from_ref(&row), &own, false).unwrap();
    assert!(made.report.template_is_borrowed);
    assert!(made.report.warnings().iter().any(|w| w.text.contains("the plugin's is used")));
    // A base model's plain text stays what it is.
    assert_eq!(load(&[plain(TURNS)], &own, false).unwrap().report.plain_examples, 1);

    for foreign in [turns("start_header_id"), "{% for m in messages %}{{ m.content }}{% endfor %}".into()] {
        let other = ChatTokenizer::open(dir.path(), Some(&foreign)).unwrap();
        let error = load(std::slice::from_ref(&row), &other, false).unwrap_err().to_string();
        assert!(error.contains("the checkpoint has no chat template, which conversations need"), "{error}");
        assert_eq!(error.contains("has not the family's <|start_header_id|>"), foreign.contains("header"), "{error}");
    }
}
