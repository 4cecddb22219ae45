//! Layouts of rows as they are published: found without a flag, each with the examples that it makes; and rows that are refused,
//! with the words.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::Path;

use dpo_data::{ChatTokenizer, DataOptions, Dataset, Truncation, Wanted, load, parse_columns};
use dpo_plugin_api::loss::Answers;
use dpo_plugins::Registry;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}\
    {% if add_generation_prompt %}<assistant>{% endif %}";

/// A line of `golden/layouts.jsonl`.
#[derive(Deserialize)]
struct Layout {
    /// Whose rows look so.
    of: String,
    row: Map<String, Value>,
    /// The format that takes it, the prompt, and the answers with their labels.
    format: String,
    prompt: String,
    answers: Vec<(String, f64)>,
}

/// A line of `golden/refused.jsonl`: a row, and words of what is said where a file has no other.
#[derive(Deserialize)]
struct Refused {
    row: Map<String, Value>,
    says: Vec<String>,
}

fn lines<T: DeserializeOwned>(text: &str) -> Vec<T> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
}

/// What rows become for a loss that takes such answers.
fn loaded(rows: &str, answers: Answers) -> (ChatTokenizer, Result<Dataset, String>) {
    loaded_with(rows, answers, "{}")
}

/// The same, with an argument of `--columns`.
fn loaded_with(rows: &str, answers: Answers, columns: &str) -> (ChatTokenizer, Result<Dataset, String>) {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trl/model/tokenizer.json");
    std::fs::copy(golden, dir.path().join("tokenizer.json")).unwrap();
    let config = json!({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}).to_string();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, rows).unwrap();
    let options = DataOptions {
        paths: vec![path.display().to_string()],
        format: None,
        wanted: Wanted { answers, loss: "a loss".into(), mismatched: false, prompt: false },
        batch_size: 16,
        columns: parse_columns(columns).unwrap(),
        max_length: None,
        vocabulary: None,
        truncation: Truncation::Delete,
        strict: false,
        plain_text: true,
        max_samples: None,
        system: None,
        shuffle: false,
        seed: 0,
    };
    let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
    let done = load(&options, &Registry::discover(&[], None), &tokenizer).map_err(|e| e.to_string());
    (tokenizer, done)
}

#[test]
fn layouts_are_found_and_read() {
    let layouts: Vec<Layout> = lines(include_str!("golden/layouts.jsonl"));
    assert!(layouts.len() >= 30);
    for layout in layouts {
        let wanted = if layout.answers.len() == 1 { Answers::Labelled } else { Answers::Ranked };
        let (tokenizer, done) = loaded(&json!(layout.row).to_string(), wanted);
        let done = done.unwrap_or_else(|e| panic!("{}: {e}", layout.of));
        let text = |ids: &[u32]| tokenizer.decode(ids, false).replace("<|im_end|>", "");
        let examples = done.examples.all().unwrap();
        let [example] = examples.as_slice() else { panic!("{}: {examples:?}", layout.of) };
        let answers: Vec<(String, f64)> = example.answers().iter().map(|a| (text(&a.ids), a.label)).collect();
        let made = (done.report.files[0].format.clone(), text(example.prompt()), answers);
        assert_eq!(made, (layout.format, layout.prompt, layout.answers), "{}", layout.of);
    }
}

#[test]
fn rows_are_refused_with_words_that_help() {
    for Refused { row, says } in lines(include_str!("golden/refused.jsonl")) {
        let row = json!(row).to_string();
        let error = loaded(&row, Answers::Ranked).1.unwrap_err();
        for words in says.iter().chain([&"rows.jsonl".to_owned()]) {
            assert!(error.contains(words), "{row}\n{error}\nlacks: {words}");
        }
        // What a message about an unknown layout advises helps.
        let advised = error.split_once("known dataset format").and_then(|(_, rest)| rest.split_once("--columns '"));
        if let Some((columns, _)) =
            advised.and_then(|(_, rest)| rest.split_once('\'')).filter(|_| row.contains("why?\""))
        {
            let done = loaded_with(&row, Answers::Ranked, columns).1;
            assert!(done.is_ok() || columns.contains("theirs"), "{row} {columns}: {done:?}");
        }
    }
}

/// A loss over single answers takes the better half of those that were compared for liked ones, whatever their scores are.
#[test]
fn compared_answers_are_unpaired() {
    let rows = [
        r#"{"question": "why?", "chosen": "A", "rejected": "B", "score_chosen": 8, "score_rejected": 3}"#,
        r#"{"question": "how?", "chosen": "A", "rejected": "B", "score_chosen": -1, "score_rejected": -2}"#,
    ];
    let done = loaded(&rows.join("\n"), Answers::Labelled).1.unwrap();
    let labels: Vec<f64> = done.examples.iter().map(|e| e.unwrap().answers()[0].label).collect();
    assert_eq!(labels, [1.0, 0.0, 1.0, 0.0]);
}
