//! Files of strangers, mutated: rows, a tokenizer, chat templates. Whatever they say is read or refused: no panic, no abort, and no
//! hang. `DPO_CAMPAIGN=N` makes N times as many.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use dpo_data::read::read_file;
use dpo_data::{ChatTemplate, ChatTokenizer, Rendering};
use dpo_plugin_api::dataset::Message;
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// Longest that one file may take.
const LONGEST: Duration = Duration::from_secs(10);

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

fn count(usual: usize) -> usize {
    usual * std::env::var("DPO_CAMPAIGN").map_or(1, |times| times.parse().unwrap())
}

/// Panics that reach the hook of the process, and so its user, although they are caught.
fn panics() -> &'static AtomicUsize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            before(info);
        }));
    });
    &PANICS
}

/// Tries `usual` mutations of `seeds`, of which `tried` says whether it is taken. Answers how many are.
fn campaign(
    usual: usize,
    seeds: &[Vec<u8>],
    mutate: fn(&mut Vec<u8>, &mut ChaCha8Rng),
    tried: impl Fn(&[u8]) -> bool,
) -> usize {
    let panics = panics();
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut taken = 0;
    for round in 0..count(usual) {
        let mut bytes = seeds.choose(&mut random).unwrap().clone();
        for _ in 0..random.random_range(1..=4) {
            mutate(&mut bytes, &mut random);
        }
        let started = Instant::now();
        taken += usize::from(tried(&bytes));
        assert!(started.elapsed() < LONGEST, "round {round}: {:?}", started.elapsed());
        assert_eq!(panics.load(Ordering::Relaxed), 0, "round {round}");
    }
    taken
}

/// Other bits, other bytes, a part less, a part twice, an end.
fn bytes(bytes: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    if bytes.is_empty() {
        return;
    }
    let at = random.random_range(0..bytes.len());
    let end = (at + random.random_range(1..=16)).min(bytes.len());
    match random.random_range(0..6) {
        0 => bytes[at] ^= 1 << random.random_range(0..8),
        1 => bytes[at..end].iter_mut().for_each(|byte| *byte = random.random()),
        2 => bytes[at..end].fill(if random.random() { 0xff } else { 0 }),
        3 => drop(bytes.drain(at..end)),
        4 => {
            let part = bytes[at..end].to_vec();
            bytes.splice(at..at, part);
        }
        _ => bytes.truncate(at.max(1)),
    }
}

/// Numbers and texts of a JSON file become others, parts change places, go or stand twice.
fn tree(bytes: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    let Ok(mut whole) = serde_json::from_slice::<Value>(bytes) else { return self::bytes(bytes, random) };
    let mut paths = Vec::new();
    walk(&whole, String::new(), &mut paths);
    let other = whole.pointer(paths.choose(random).unwrap()).unwrap().clone();
    let path = paths.choose(random).unwrap();
    let value = whole.pointer_mut(path).unwrap();
    *value = match random.random_range(0..6) {
        0 => other,
        1 => Value::Null,
        2 => [json!(-1), json!(0), json!(u32::MAX), json!(u64::MAX), json!(1e300), json!(0.5)]
            .choose(random)
            .unwrap()
            .clone(),
        3 => ["", "a", "\u{0}", "(a*)*b", "▁", "😀"].choose(random).unwrap().to_string().into(),
        4 => vec![value.clone(); 3].into(),
        _ => {
            json!({"type": "Sequence", "normalizers": [value.clone()], "pretokenizers": [value.clone()], "decoders": [value.clone()]})
        }
    };
    *bytes = serde_json::to_vec(&whole).unwrap();
}

/// Paths of a tree's values; of long lists the first ones.
fn walk(value: &Value, path: String, into: &mut Vec<String>) {
    match value {
        Value::Array(list) => list.iter().take(4).enumerate().for_each(|(i, v)| walk(v, format!("{path}/{i}"), into)),
        Value::Object(keys) => keys.iter().take(12).for_each(|(key, v)| {
            walk(v, format!("{path}/{}", key.replace('~', "~0").replace('/', "~1")), into);
        }),
        _ => {}
    }
    into.push(path);
}

/// Pieces of templates stand elsewhere, or twice.
fn pieces(bytes: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    const PIECES: [&str; 26] = [
        "{{ ",
        " }}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if m %}",
        "{% endif %}",
        "{% set n = namespace(a=[1]) %}",
        "{% set n.a = [n.a, n.a] %}",
        "{{ n.a }}",
        "messages",
        " ~ ",
        "|tojson(indent=99999999)",
        "|string",
        "|join('xx')",
        ".format(10 ** 9)",
        "'{:>99999999999}'",
        "|list",
        " * 999999999",
        "[::-1]",
        "range(99999)",
        "|replace('', 'yy')",
        "{% macro m(x) %}",
        "{% endmacro %}",
        "m(m)",
        "|groupby('role')",
        "{% generation %}",
    ];
    let text = String::from_utf8_lossy(bytes).into_owned();
    let cuts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let (a, b) = (*cuts.choose(random).unwrap(), *cuts.choose(random).unwrap());
    let (from, to) = (a.min(b), a.max(b).min(a.min(b) + 200));
    let to = cuts.iter().copied().filter(|cut| *cut <= to).max().unwrap();
    let piece = PIECES.choose(random).unwrap();
    let text = match random.random_range(0..4) {
        0 => format!("{}{piece}{}", &text[..from], &text[from..]),
        1 => format!("{}{}", &text[..from], &text[to..]),
        2 => format!("{}{}{}", &text[..to], &text[from..to], &text[to..]),
        _ => format!("{}{piece}{}", &text[..from], &text[to..]),
    };
    *bytes = text.into_bytes();
}

/// A way to try the bytes as a file of a name.
fn as_file(name: &str) -> impl Fn(&[u8]) -> bool + use<> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    move |bytes| {
        let _kept = &dir;
        std::fs::write(&path, bytes).unwrap();
        match read_file(&path) {
            Ok(rows) => rows.iter().all(|row| row.row.is_ok()),
            Err(error) => {
                assert!(error.to_string().contains(path.to_str().unwrap()), "no file is named: {error}");
                false
            }
        }
    }
}

/// Texts and numbers, with what is compressed in one of the ways.
fn parquet(compression: Compression) -> Vec<u8> {
    let schema = "message row { required binary prompt (UTF8); optional binary chosen (UTF8); required int64 n; }";
    let properties = WriterProperties::builder().set_compression(compression).set_data_page_row_count_limit(8).build();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut file = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    let mut group = file.next_row_group().unwrap();
    for name in ["prompt", "chosen", "n"] {
        let mut column = group.next_column().unwrap().unwrap();
        let texts: Vec<ByteArray> = (0..40).map(|i| ByteArray::from(format!("{name} {}", i % 7).as_str())).collect();
        match name {
            "prompt" => column.typed::<ByteArrayType>().write_batch(&texts, None, None),
            "chosen" => column.typed::<ByteArrayType>().write_batch(&texts[..20], Some(&[1, 0].repeat(20)), None),
            _ => column.typed::<Int64Type>().write_batch(&(0..40).collect::<Vec<_>>(), None, None),
        }
        .unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    file.into_inner().unwrap()
}

#[test]
fn parquet_files() {
    let mut seeds = vec![std::fs::read(golden("rows.parquet")).unwrap()];
    let ways = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(Default::default()),
        Compression::LZ4_RAW,
        Compression::ZSTD(Default::default()),
    ];
    seeds.extend(ways.map(parquet));
    let taken = campaign(300, &seeds, bytes, as_file("a.parquet"));
    assert!(taken < count(300), "no mutation was seen");
}

#[test]
fn arrow_files() {
    let seeds = ["stream.arrow", "file.arrow"].map(|name| std::fs::read(golden(name)).unwrap());
    let taken = campaign(600, &seeds, bytes, as_file("a.arrow"));
    assert!((1..count(600)).contains(&taken), "{taken}");
}

#[test]
fn texts() {
    let rows = json!([{"prompt": "why?", "chosen": [{"role": "user", "content": "天气\n\"?\""}]}, {"prompt": "so", "n": -1.5e3}]);
    let lines: String = rows.as_array().unwrap().iter().map(|row| format!("{row}\n")).collect();
    for (name, seed) in [
        ("a.jsonl", lines.as_str()),
        ("a.json", &format!("{rows:#}")),
        ("b.json", r#"{"prompt": ["why?", "so"], "n": [NaN, 2]}"#),
        ("c.json", r#"{"data": [{"prompt": "why?"}, {"n": 1}]}"#),
        ("a.csv", "prompt,chosen\n\"a \"\"b\"\"\nc\",[{}]\nd,e\n"),
    ] {
        let taken = campaign(300, &[seed.into()], bytes, as_file(name));
        assert!((1..count(300)).contains(&taken), "{name}: {taken}");
    }
    let packed = zstd::encode_all(lines.as_bytes(), 3).unwrap();
    campaign(100, &[packed], bytes, as_file("a.jsonl.zst"));
}

#[test]
fn tokenizers() {
    let dir = tempfile::tempdir().unwrap();
    let mut sound: Value = serde_json::from_slice(&std::fs::read(golden("trl/model/tokenizer.json")).unwrap()).unwrap();
    let plain = serde_json::to_vec(&sound).unwrap();
    sound["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "Replace", "pattern": {"Regex": "(a|b)+"}, "content": "aa"},
        {"type": "Lowercase"}, {"type": "Strip", "strip_left": true, "strip_right": true}, {"type": "BertNormalizer",
        "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}]});
    sound["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    let rich = serde_json::to_vec(&sound).unwrap();
    let taken = campaign(150, &[plain, rich], tree, |bytes| {
        std::fs::write(dir.path().join("tokenizer.json"), bytes).unwrap();
        let Ok(tokenizer) = ChatTokenizer::open(dir.path(), None) else { return false };
        for text in ["Why is ab the sky blue? 天气 ﷺ\n\t<|im_end|>", ""] {
            if let Ok(ids) = tokenizer.encode(text, true) {
                tokenizer.decode(&ids, true);
            }
        }
        tokenizer.decode(&[0, 1, 299, 407, u32::MAX], false);
        true
    });
    assert!((1..count(150)).contains(&taken), "{taken}");
}

#[test]
fn chat_templates() {
    let golden: Value = serde_json::from_slice(&std::fs::read(golden("chat.json")).unwrap()).unwrap();
    let seeds: Vec<Vec<u8>> =
        golden["templates"].as_object().unwrap().values().map(|t| t["text"].as_str().unwrap().into()).collect();
    let turns = [Message::new("system", "Be brief."), Message::new("user", "Why?"), Message::new("assistant", "So.")];
    let tools =
        json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]);
    let taken = campaign(200, &seeds, pieces, |bytes| {
        let Ok(template) = ChatTemplate::from_text(std::str::from_utf8(bytes).unwrap(), Default::default()) else {
            return false;
        };
        let with = Rendering { tools: Some(&tools), generation_prompt: true, args: None };
        template.render(&turns, Rendering::default()).is_ok() | template.render(&turns, with).is_ok()
    });
    assert!((1..count(200)).contains(&taken), "{taken}");
}
