//! `tokenizer.json` of a stranger: what it may do with a text, and what it may not.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use dpo_core::error::{Error, Result};
use dpo_data::ChatTokenizer;
use serde_json::{Value, json};

/// The small tokenizer with a part of it changed.
fn changed(change: impl Fn(&mut Value)) -> Result<ChatTokenizer> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trl/model/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    change(&mut tokenizer);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    ChatTokenizer::open(dir.path(), None)
}

fn with(part: &str, value: Value) -> Result<ChatTokenizer> {
    changed(|tokenizer| tokenizer[part] = value.clone())
}

fn replace(from: &str, to: &str) -> Value {
    json!({"type": "Replace", "pattern": {"String": from}, "content": to})
}

#[track_caller]
fn refused<T>(done: Result<T>, what: &str) {
    let error: Error = done.err().unwrap();
    assert!(error.to_string().contains(what), "{error}");
}

/// Sixty steps of a line would make a letter as large as the memory of a million machines.
#[test]
fn normalizers_and_decoders_that_double_a_text_are_stopped() {
    let doubling = vec![replace("a", "aa"); 60];
    let tokenizer = with("normalizer", json!({"type": "Sequence", "normalizers": doubling})).unwrap();
    refused(tokenizer.encode("a", false), "cannot be tokenised: tokenizer.json makes");
    assert!(!tokenizer.encode("b", false).unwrap().is_empty());
    let nested =
        doubling.iter().fold(replace("a", "aa"), |inner, one| json!({"type": "Sequence", "normalizers": [inner, one]}));
    refused(with("normalizer", nested).unwrap().encode("a", false), "tokenizer.json makes");
    let tokenizer = with("decoder", json!({"type": "Sequence", "decoders": vec![replace("a", "aa"); 60]})).unwrap();
    let ids = tokenizer.encode("a a", false).unwrap();
    assert_eq!(tokenizer.decode(&ids, false), format!("{ids:?}"));
}

#[test]
fn a_normalizer_that_writes_much_is_refused() {
    let much = "y".repeat(100_000);
    let what = "tokenizer.json: the tokenizer's Replace writes 100000 bytes for what it finds, more than 64";
    refused(with("normalizer", replace("a", &much)), what);
    refused(with("decoder", json!({"type": "Sequence", "decoders": [replace("a", &much)]})), what);
    refused(with("normalizer", json!({"type": "Prepend", "prepend": much})), "the tokenizer's Prepend writes 100000");
    let map = |trie: u32, rest: &[u8]| BASE64_STANDARD.encode([&trie.to_le_bytes()[..], rest].concat());
    let precompiled = |map: String| with("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": map}));
    let texts = [&[0; 4][..], b"short\0", much.as_bytes(), b"\0"].concat();
    refused(precompiled(map(4, &texts)), "the tokenizer's Precompiled writes 100000");
    refused(precompiled(map(u32::MAX, &texts)), "its precompiled_charsmap is cut short");
}

/// What published tokenizers have, on the texts that they lengthen most.
#[test]
fn published_normalizers_are_taken() {
    let steps =
        json!([{"type": "NFKD"}, {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"), {"type": "Lowercase"}]);
    let tokenizer = with("normalizer", json!({"type": "Sequence", "normalizers": steps})).unwrap();
    for text in ["\u{fdfa}".repeat(50_000), " ".repeat(50_000)] {
        assert!(!tokenizer.encode(&text, false).unwrap().is_empty());
    }
}

#[test]
fn a_tokenizer_that_draws_is_refused() {
    refused(
        changed(|t| t["model"]["dropout"] = json!(0.1)),
        "dropout 0.1 of the tokenizer gives other tokens each time",
    );
    assert!(changed(|t| t["model"]["dropout"] = json!(0.0)).is_ok());
}

/// The library trusts the file's numbers.
#[test]
fn a_panic_over_the_file_is_an_error() {
    let map = BASE64_STANDARD.encode([4, 0, 0, 0, 255, 255, 255, 255, 0]);
    let precompiled = with("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": map})).unwrap();
    let fixed = with("pre_tokenizer", json!({"type": "FixedLength", "length": 0})).unwrap();
    for tokenizer in [precompiled, fixed] {
        refused(tokenizer.encode("hi there", true), "cannot be tokenised: tokenizer.json fails, it panicked at");
    }
}

/// `golden/settings.json`, made by `tests/oracle/tokenizer_settings.py`: special tokens that other files name or describe, BOS and EOS that
/// they ask for, and the class that transformers builds anew.
#[test]
fn settings_of_other_files_are_read_as_transformers_reads_them() {
    let golden: Value = serde_json::from_str(include_str!("golden/settings.json")).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, value: &Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        write("tokenizer.json", &golden["tokenizer"]);
        write("tokenizer_config.json", &case["tokenizer_config"]);
        if !case["model_type"].is_null() {
            write("config.json", &json!({"model_type": case["model_type"]}));
        }
        let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
        for row in case["ids"].as_array().unwrap() {
            for special in [false, true] {
                let made = tokenizer.encode(row[0].as_str().unwrap(), special).unwrap();
                assert_eq!(
                    json!(made),
                    row[1 + usize::from(special)],
                    "{}: {row}, {special}",
                    case["tokenizer_config"]
                );
            }
        }
    }
}
