//! Files to examples: ids against TRL's own, and what becomes of rows that make none.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::{Path, PathBuf};

use dpo_core::error::Kind;
use dpo_core::example::Example;
use dpo_data::examples::Writer;
use dpo_data::{ChatTokenizer, DataOptions, Dataset, Report, Truncation, Wanted, split};
use dpo_plugins::Registry;
use serde_json::{Value, json};

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

fn options(path: &Path) -> DataOptions {
    DataOptions {
        paths: vec![path.display().to_string()],
        format: None,
        wanted: Wanted::default(),
        batch_size: 16,
        columns: Default::default(),
        max_length: None,
        vocabulary: None,
        truncation: Truncation::Delete,
        strict: false,
        max_samples: None,
        system: None,
        plain_text: true,
        shuffle: false,
        seed: 0,
    }
}

/// A data set with all of its examples.
#[derive(Debug)]
struct Loaded {
    examples: Vec<Example>,
    report: Report,
}

fn load(options: &DataOptions, registry: &Registry, tokenizer: &ChatTokenizer) -> dpo_core::error::Result<Loaded> {
    let Dataset { examples, report } = dpo_data::load(options, registry, tokenizer)?;
    Ok(Loaded { examples: examples.all()?, report })
}

fn tokenizer() -> ChatTokenizer {
    ChatTokenizer::open(&golden("trl/model"), None).unwrap()
}

fn load_with(change: impl Fn(&mut DataOptions), rows: &str) -> Result<Loaded, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, rows).unwrap();
    let mut options = options(&path);
    change(&mut options);
    let folder = format!("{}/", dir.path().display());
    load(&options, &Registry::discover(&[], None), &tokenizer()).map_err(|e| {
        assert_eq!(e.kind, Kind::Input);
        e.to_string().replace(&folder, "")
    })
}

fn load_rows(rows: &str) -> Result<Loaded, String> {
    load_with(|_| {}, rows)
}

fn row(chosen: &str, rejected: &str) -> String {
    let messages = json!([{"role": "user", "content": "why not?"}, {"role": "assistant", "content": chosen}]);
    json!({"messages": messages, "rejected_response": rejected}).to_string()
}

/// The tokens of an example's answer.
fn answer(done: &Loaded, example: usize, answer: usize) -> &[u32] {
    &done.examples[example].answers()[answer].ids
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Every row of a trajectory made by TRL: `prefs.jsonl`, `model/` and the ids in `expected.json`.
fn equals_trajectory(dir: &Path) {
    let tokenizer = ChatTokenizer::open(&dir.join("model"), None).unwrap();
    let done = load(&options(&dir.join("prefs.jsonl")), &Registry::discover(&[], None), &tokenizer).unwrap();
    let expected: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("expected.json")).unwrap()).unwrap();
    let expected = expected["rows"].as_array().unwrap();
    assert_eq!(done.examples.len(), expected.len(), "{}", dir.display());
    for (pair, row) in done.examples.iter().zip(expected) {
        let expected = ["prompt_ids", "chosen_ids", "rejected_ids"].map(|name| ids(&row[name]));
        assert!(pair.parts().eq(expected.iter().map(Vec::as_slice)), "{}", pair.place);
    }
    assert_eq!(done.report.eos.without, 0);
    assert_eq!(done.report.eos.token.as_deref(), Some("<|im_end|>"));
}

#[test]
fn ids_are_those_of_trl() {
    equals_trajectory(&golden("trl"));
}

/// Further trajectories, where the variable names a folder of them.
#[test]
fn ids_are_those_of_further_trajectories() {
    let Some(folder) = std::env::var_os("DPO_TRAJECTORIES") else { return };
    let dirs =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).filter(|p| p.join("expected.json").is_file());
    let count = dirs.map(|dir| equals_trajectory(&dir)).count();
    assert!(count > 0);
}

/// `golden/tokens.json`, made by `tests/oracle/token_rows.py`: prompts that lose their end, BOS, plain text.
#[test]
fn ids_are_those_of_trl_for_every_kind_of_row() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("golden/tokens.json")).unwrap();
    for case in &cases {
        let dir = tempfile::tempdir().unwrap();
        let mut tokenizer: Value =
            serde_json::from_str(&std::fs::read_to_string(golden("trl/model/tokenizer.json")).unwrap()).unwrap();
        let mut config = json!({"eos_token": "<|im_end|>", "chat_template": case["template"]});
        if case["bos"] == json!(true) {
            let special = json!({"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}});
            let processor = &mut tokenizer["post_processor"];
            processor["single"].as_array_mut().unwrap().insert(0, special);
            processor["special_tokens"] =
                json!({"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}});
            config["bos_token"] = "<|endoftext|>".into();
        }
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let rows: Vec<String> = case["rows"].as_array().unwrap().iter().map(Value::to_string).collect();
        std::fs::write(dir.path().join("rows.jsonl"), rows.join("\n")).unwrap();
        let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
        let done = load(&options(&dir.path().join("rows.jsonl")), &Registry::discover(&[], None), &tokenizer).unwrap();
        let expected = case["expected"].as_array().unwrap();
        assert_eq!(done.examples.len(), expected.len(), "{}", case["name"]);
        for (pair, row) in done.examples.iter().zip(expected) {
            let expected = ["prompt_ids", "chosen_ids", "rejected_ids"].map(|name| ids(&row[name]));
            assert!(pair.parts().eq(expected.iter().map(Vec::as_slice)), "{}", case["name"]);
        }
        let name = case["name"].as_str().unwrap();
        let parts = name.contains("does not continue") || name.contains("merge over");
        assert_eq!(
            parts,
            done.report.prompt_prefix.text.is_some(),
            "{}: {:?}",
            case["name"],
            done.report.prompt_prefix
        );
    }
}

#[test]
fn bad_rows_are_counted_with_their_cause_and_place() {
    let rows = [
        row("ok", "not"),
        row("ok", "ok"),
        row("ok", "  "),
        r#"{"messages": [{"role": "user", "content": "hi"}], "rejected_response": "x"}"#.into(),
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected_messages":
            [{"role": "user", "content": "c"}, {"role": "assistant", "content": "b"}]}"#
            .replace('\n', ""),
    ];
    let done = load_rows(&rows.join("\n")).unwrap();
    assert_eq!(done.examples.len(), 1);
    let causes: Vec<(&str, usize)> = done.report.dropped.iter().map(|d| (d.cause.as_str(), d.count)).collect();
    let expected = [
        "the conversation ends without an assistant's answer",
        "both answers are the same",
        "rejected answer is empty",
        "turn 1 of the chosen conversation, of role 'user', would be learned",
    ];
    for cause in expected {
        assert!(causes.contains(&(cause, 1)), "{cause}: {causes:?}");
    }
    assert_eq!(causes.len(), expected.len());
    let named = |m: &String| m.contains("rows.jsonl:4: the conversation ends");
    assert!(done.report.messages.iter().any(named), "{:?}", done.report.messages);
    assert!(done.report.to_string().contains("rows.jsonl: 1 pair, 5 rows of format ms-swift"), "{}", done.report);
}

#[test]
fn strict_ends_at_the_first_bad_row() {
    let strict = |rows: &str| load_with(|o| o.strict = true, rows).unwrap_err();
    let error = strict(&[row("ok", "not"), row("ok", "ok")].join("\n"));
    assert!(error.starts_with("rows.jsonl:2: both answers are the same"), "{error}");
}

#[test]
fn a_file_with_broken_json_is_refused() {
    let error = load_rows(&format!("{}\n\n{{\"a\" 1}}", row("ok", "not"))).unwrap_err();
    assert!(error.starts_with("rows.jsonl:3: broken JSON at column 6: expected `:`"), "{error}");
    let error = load_rows(&format!("{}\n7", row("ok", "not"))).unwrap_err();
    assert!(error.starts_with("rows.jsonl:2: a row should be an object, is a number"), "{error}");
}

#[test]
fn no_pair_left_says_why() {
    let error = load_rows(&[row("ok", "ok"), row("not", "not")].join("\n")).unwrap_err();
    assert!(error.starts_with("rows.jsonl: no pair is left of 2 rows: both answers are the same (2 rows)"), "{error}");
}

#[test]
fn unknown_formats_name_their_columns() {
    let error = load_rows(r#"{"question": "a", "good": "b", "bad": "c"}"#).unwrap_err();
    assert!(error.contains("their columns are question, good, bad") && error.contains("ms-swift"), "{error}");
    let columns = [("question", "prompt"), ("good", "chosen"), ("bad", "rejected")];
    let columns = columns.map(|(a, b)| (a.to_owned(), b.to_owned()));
    let done =
        load_with(|o| o.columns = columns.clone().into(), r#"{"question": "a", "good": "b", "bad": "c"}"#).unwrap();
    assert_eq!(done.report.files[0].format, "trl");
    assert_eq!(done.report.plain_examples, 1);
}

#[test]
fn judged_answers_are_joined_by_their_prompt() {
    let judged = |prompt: &str, answer: &str, liked: bool| {
        json!({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], "label": liked})
            .to_string()
    };
    let rows = [
        judged("why", "ok", true),
        judged("then", "a", true),
        judged("why", "not", false),
        judged("why", "mat", false),
    ];
    let done = load_rows(&rows.join("\n")).unwrap();
    assert_eq!(done.examples.len(), 2);
    assert!(done.examples[1].place.ends_with("rows.jsonl:4"), "{}", done.examples[1].place);
    assert_eq!(answer(&done, 0, 0), answer(&done, 1, 0));
    let dropped = &done.report.dropped[0];
    assert_eq!(dropped.cause, "no answer of the other kind to the same prompt");
    assert!(dropped.places[0].ends_with("rows.jsonl:2"));
}

/// As many pairs as the longer side has, not as their product; every answer is in one.
#[test]
fn many_answers_to_one_prompt_make_as_many_pairs() {
    let judged = |answer: String, liked: bool| {
        json!({"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": answer}], "label": liked})
            .to_string()
    };
    let liked = (0..3000).map(|i| judged(format!("ok {i}"), true));
    let rows: Vec<String> = liked.chain((0..2000).map(|i| judged(format!("not {i}"), false))).collect();
    let done = load_rows(&rows.join("\n")).unwrap();
    assert_eq!(done.examples.len(), 3000);
    let distinct = |side| (0..3000).map(|i| answer(&done, i, side)).collect::<std::collections::HashSet<_>>().len();
    assert_eq!((distinct(0), distinct(1)), (3000, 2000));
}

/// A row that costs more than a template may use is refused like any bad row: the same one whatever else runs, and no other.
#[test]
fn a_row_that_costs_too_much_is_the_only_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden("trl/model/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let template = "{% for m in messages %}{% if 'slow' in m.content %}{% for a in range(10000) %}{% for b in range(10000) %}\
        {% endfor %}{% endfor %}{% endif %}{{ m.content }}<|im_end|>{% endfor %}";
    let config = json!({"eos_token": "<|im_end|>", "chat_template": template}).to_string();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let rows: Vec<String> = (0..20).map(|i| row(if i == 7 { "slow" } else { "ok" }, &format!("not {i}"))).collect();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, rows.join("\n")).unwrap();
    let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let done = pool.install(|| load(&options(&path), &Registry::discover(&[], None), &tokenizer)).unwrap();
        assert_eq!((done.examples.len(), done.report.dropped.len()), (19, 1));
        let dropped = &done.report.dropped[0];
        assert!(dropped.cause.ends_with("rendering it costs more than a template may use"), "{}", dropped.cause);
        assert!(dropped.places[0].ends_with("rows.jsonl:8"), "{}", dropped.places[0]);
    }
}

/// Both answers of a row, and what the row has beside them.
fn with_columns(columns: &Value) -> String {
    let mut row: Value = serde_json::from_str(&row("ok", "not")).unwrap();
    row.as_object_mut().unwrap().extend(columns.as_object().unwrap().clone());
    row.to_string()
}

#[test]
fn a_column_that_changes_the_row_is_refused_by_name() {
    let cases = [
        (json!({"images": ["a.png"]}), "column 'images'"),
        (json!({"image": {"bytes": "iVBOR", "path": "a.png"}}), "column 'image'"),
        (json!({"Videos": ["a.mp4"]}), "column 'Videos'"),
        (json!({"audio": "a.wav"}), "column 'audio'"),
        (json!({"objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}}), "column 'objects'"),
        (json!({"context": [{"role": "user", "content": "What was said before"}]}), "column 'context'"),
        (json!({"question": "Is it?"}), "column 'question'"),
        (json!({"label": false}), "column 'label'"),
        (json!({"winner": "model_b"}), "column 'winner'"),
        (json!({"weight": "0.1"}), "column 'weight'"),
        (json!({"overall_preference": -2}), "column 'overall_preference'"),
    ];
    for (columns, named) in cases {
        let rows = [with_columns(&columns), row("ok", "mat")].join("\n");
        let done = load_rows(&rows).unwrap();
        assert_eq!(done.examples.len(), 1, "{columns}");
        let message = &done.report.messages[0];
        assert!(
            message.contains("rows.jsonl:1: ") && message.contains(named) && message.contains("--columns"),
            "{message}"
        );
        let error = load_with(|o| o.strict = true, &rows).unwrap_err();
        assert!(error.contains(named), "{error}");
        // What the user puts aside is not asked about.
        let name = columns.as_object().unwrap().keys().next().unwrap().clone();
        let aside = load_with(|o| o.columns = [(name.clone(), "unused".to_owned())].into(), &rows).unwrap();
        assert_eq!(aside.examples.len(), 2, "{columns}");
    }
}

#[test]
fn a_turn_that_says_more_is_refused() {
    let turns = |user: Value, assistant: Value| {
        let mut turns = json!([{"role": "user", "content": "why not?"}, {"role": "assistant", "content": "ok"}]);
        turns[0].as_object_mut().unwrap().extend(user.as_object().unwrap().clone());
        turns[1].as_object_mut().unwrap().extend(assistant.as_object().unwrap().clone());
        json!({"messages": turns, "rejected_response": "not"}).to_string()
    };
    let cases = [
        (turns(json!({"images": ["a.png"]}), json!({})), "a message has 'images'"),
        (
            turns(json!({"content": [{"type": "text", "text": "?"}, {"type": "image", "image": "a"}]}), json!({})),
            "not text",
        ),
        (turns(json!({}), json!({"loss": false})), "'loss' of a message says otherwise"),
        (turns(json!({}), json!({"weight": 0})), "'weight' of a message says otherwise"),
        (turns(json!({}), json!({"thinking": "Well, let me see."})), "'thinking' of a message would be lost"),
        (turns(json!({}), json!({"function_call": {"name": "f", "arguments": "{}"}})), "'function_call' of a message"),
    ];
    for (row, named) in cases {
        let error = load_with(|o| o.strict = true, &row).unwrap_err();
        assert!(error.starts_with("rows.jsonl:1: ") && error.contains(named), "{error}");
    }
    let harmless = turns(
        json!({"images": [], "loss": false, "name": "Ann"}),
        json!({"loss": true, "weight": 1, "thinking": null}),
    );
    assert_eq!(load_with(|o| o.strict = true, &harmless).unwrap().examples.len(), 1);
}

#[test]
fn harmless_columns_are_never_refused() {
    let columns = json!({"id": 7, "prompt_id": "x", "source": "web", "score_chosen": 1.5, "chosen-rating": 2, "model": "m",
        "images": [], "image": null, "videos": "", "audios": [null], "system": "", "tools": "[]", "history": [],
        "weight": 1.0, "margin": 0, "metadata": {"images": "two"}, "image_count": 2, "lang": "en", "tokens": 12,
        // What the messages say already.
        "prompt": "why not?", "question": "why not?", "conversations": [{"from": "human", "value": "why not?"}]});
    let done = load_with(|o| o.strict = true, &with_columns(&columns)).unwrap();
    assert_eq!(done.examples.len(), 1);
    // A column that the format makes another text of is read.
    let alpaca = json!({"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4", "system": "Be brief."});
    assert_eq!(load_with(|o| o.strict = true, &alpaca.to_string()).unwrap().report.files[0].format, "pairs");
}

#[test]
fn lengths_are_kept() {
    let rows = [row("ok", "then it ran away then it ran away"), row("ok", "not")].join("\n");
    let whole = load_rows(&rows).unwrap().examples;
    let (prompt, long) = (whole[0].prompt().len(), whole[0].longest());
    let [chosen, rejected] = [0, 1].map(|side| whole[0].answers()[side].ids.as_slice());
    assert!(whole[1].longest() < long - 2);
    let cut = |truncation, most: usize| {
        load_with(|o| (o.truncation, o.max_length) = (truncation, Some(most)), &rows).unwrap()
    };
    let delete = cut(Truncation::Delete, long - 1);
    assert_eq!((delete.examples.len(), delete.report.dropped[0].cause.as_str()), (1, "longer than max_length"));
    let right = cut(Truncation::Right, long - 2);
    assert_eq!(answer(&right, 0, 1), &rejected[..rejected.len() - 2]);
    assert_eq!((answer(&right, 0, 0), right.report.truncated), (chosen, 1));
    let left = cut(Truncation::Left, long - 2);
    assert_eq!(left.examples[0].prompt(), &whole[0].prompt()[2..]);
    assert_eq!(answer(&left, 0, 1), rejected);
    let error = load_with(|o| (o.truncation, o.max_length) = (Truncation::Right, Some(prompt)), &rows).unwrap_err();
    assert!(error.contains("the prompt alone fills max_length (2 rows)"), "{error}");
}

#[test]
fn the_first_pair_and_its_duplicates_are_reported() {
    let done = load_rows(&[row("ok", "not"), row("ok", "not")].join("\n")).unwrap();
    assert_eq!((done.examples.len(), done.report.duplicates), (2, 1));
    let text = done.report.to_string();
    assert!(text.contains("[chosen: learned] 3 tokens\n      ok<|im_end|>"), "{text}");
    assert!(text.contains("eos: every answer ends with <|im_end|>"), "{text}");
    let sum: usize = done.examples.iter().flat_map(|e| e.parts()).map(<[u32]>::len).sum();
    assert_eq!(done.report.unique_tokens, sum);
}

#[test]
fn a_checkpoint_without_template_cannot_take_conversations() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden("trl/model/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
    let error = load(&options(&golden("trl/prefs.jsonl")), &Registry::discover(&[], None), &tokenizer).unwrap_err();
    assert!(error.message().contains("no chat template"), "{error}");
}

#[test]
fn a_split_keeps_every_pair_once() {
    let rows: Vec<String> = (0..10).map(|i| row(&format!("ok {i}"), "not")).collect();
    let pairs = load_rows(&rows.join("\n")).unwrap().examples;
    let mut writer = Writer::default();
    pairs.iter().for_each(|pair| writer.push(pair).unwrap());
    let written = writer.finish(&Report::default(), None).unwrap();
    let parts = || {
        let (train, val) = split(&written, 0.2, 3);
        (train.all().unwrap(), val.all().unwrap())
    };
    let (train, val) = parts();
    assert_eq!((train.len(), val.len()), (8, 2));
    assert!(pairs.iter().all(|p| train.contains(p) != val.contains(p)));
    assert_eq!(parts(), (train, val));
    assert_eq!(split(&written, 0.0, 3).1.len(), 0);
}
