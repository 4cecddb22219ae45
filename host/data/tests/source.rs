//! Reading files: kinds, samples, places and broken rows.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dpo_data::columns::{parse_columns, refuse_missing, rename};
use dpo_data::read::{Chunk, SourceRow, read_file};
use dpo_data::source::Source;
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};

fn file(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn place(row: &SourceRow) -> &str {
    row.place.rsplit('/').next().unwrap()
}

/// The files of a source with their rows.
fn read(source: &Source, shuffle: bool, seed: u64) -> dpo_core::error::Result<Vec<Chunk>> {
    source.read(shuffle, seed)?.collect()
}

fn numbers(chunks: &[Chunk]) -> Vec<u64> {
    chunks.iter().flat_map(|chunk| &chunk.rows).map(|r| r.row.as_ref().unwrap()["n"].as_u64().unwrap()).collect()
}

#[test]
fn json_in_lines_and_in_an_array() {
    let dir = tempfile::tempdir().unwrap();
    let lines = file(dir.path(), "a.jsonl", "\u{feff}{\"n\": 1}\r\n\r\n{\"n\": 2}");
    let rows = read_file(&lines).unwrap();
    assert_eq!(rows.iter().map(place).collect::<Vec<_>>(), ["a.jsonl:1", "a.jsonl:3"]);
    let text = "[\n  {\"n\": 1, \"t\": \"a, ] \\\" } b\"},\n\n  {\"n\":\n   [2]},  {\"n\": 3}\n]\n";
    let rows = read_file(&file(dir.path(), "b.json", text)).unwrap();
    assert_eq!(rows.iter().map(place).collect::<Vec<_>>(), ["b.json:2", "b.json:4", "b.json:5"]);
    assert_eq!(rows[0].row.as_ref().unwrap()["t"], json!("a, ] \" } b"));
    assert_eq!(rows[1].row.as_ref().unwrap()["n"], json!([2]));
}

#[test]
fn a_broken_element_costs_one_row() {
    let dir = tempfile::tempdir().unwrap();
    let rows = read_file(&file(dir.path(), "b.json", "[{\"n\": 1},\n {\"n\": 2,}, 3, {\"n\": 4}]")).unwrap();
    assert_eq!(rows.iter().map(|r| r.row.is_ok()).collect::<Vec<_>>(), [true, false, false, true]);
    let error = rows[1].row.clone().unwrap_err().to_string();
    assert!(error.contains("b.json:2: broken JSON at column 10: trailing comma\n  help: "), "{error}");
    let error = read_file(&file(dir.path(), "c.json", "[{\"n\": 1},\n{\"n\": \"2}]")).unwrap_err().to_string();
    assert!(error.contains("c.json:2: broken JSON: the array does not end"), "{error}");
}

/// What follows an array would be lost.
#[test]
fn nothing_may_follow_an_array() {
    let dir = tempfile::tempdir().unwrap();
    for (text, line) in [
        ("[{\"n\": 1}][{\"n\": 2}, {\"n\": 3}]", 1),
        ("[\n{\"n\": 1}\n]\n\n  [{\"n\": 2}]\n", 5),
        ("[{\"n\": 1}]\nthe end", 2),
        ("[{\"n\": 1}]]", 1),
        ("[{\"n\": 1}],\n{\"n\": 2}", 1),
    ] {
        let error = read_file(&file(dir.path(), "b.json", text)).unwrap_err().to_string();
        assert!(error.contains(&format!("b.json:{line}: the array ends, and more follows here\n  help: ")), "{error}");
    }
    for text in ["[{\"n\": 1}]\n \t\r\n", "\u{feff}[{\"n\": 1}]"] {
        assert_eq!(read_file(&file(dir.path(), "b.json", text)).unwrap().len(), 1);
    }
}

#[test]
fn a_csv_column_that_is_there_twice_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = read_file(&file(dir.path(), "a.csv", "prompt,chosen,chosen\na,b,c\n")).unwrap_err().to_string();
    assert!(error.contains("a.csv:1: column 'chosen' is there twice"), "{error}");
}

fn gzip(text: &str) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(text.as_bytes()).unwrap();
    packed.finish().unwrap()
}

#[test]
fn packed_texts_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        read_file(&path)
    };
    let lines = "{\"n\": 1}\n\n{\"n\": 2}";
    let rows = write("a.jsonl.gz", &gzip(lines)).unwrap();
    assert_eq!(rows.iter().map(place).collect::<Vec<_>>(), ["a.jsonl.gz:1", "a.jsonl.gz:3"]);
    // Two members, as `cat a.gz b.gz` makes them.
    assert_eq!(write("b.JSONL.GZ", &[gzip("{\"n\": 1}\n"), gzip("{\"n\": 2}")].concat()).unwrap().len(), 2);
    assert_eq!(
        write("c.json.zst", &zstd::encode_all("[{\"n\": 1}, {\"n\": 2}]".as_bytes(), 0).unwrap()).unwrap().len(),
        2
    );
    assert_eq!(write("d.csv.gz", &gzip("n\n1\n2\n")).unwrap().len(), 2);
    let cut = gzip(&lines.repeat(100));
    for (name, bytes) in [("e.jsonl.gz", &cut[..cut.len() / 2]), ("e.json.zst", b"no zstd".as_slice())] {
        let error = write(name, bytes).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("cannot read"), "{error}");
    }
    assert!(write("f.parquet.gz", &gzip("PAR1")).unwrap_err().to_string().contains("unknown kind"));
}

/// A parquet file with a column of texts.
fn parquet(compression: Compression, texts: &[&str]) -> Vec<u8> {
    let schema = parse_message_type("message row { required binary prompt (UTF8); }").unwrap();
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut file = SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::new(properties)).unwrap();
    let mut group = file.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let texts: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(*text)).collect();
    column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    file.into_inner().unwrap()
}

#[test]
fn parquet_is_read_with_every_compression() {
    let dir = tempfile::tempdir().unwrap();
    let all = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(Default::default()),
        Compression::BROTLI(Default::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
        Compression::ZSTD(Default::default()),
    ];
    for compression in all {
        let path = dir.path().join("a.parquet");
        std::fs::write(&path, parquet(compression, &["why?", &"so ".repeat(1000)])).unwrap();
        let rows = read_file(&path).unwrap();
        assert_eq!(rows[0].row.as_ref().unwrap()["prompt"], json!("why?"), "{compression:?}");
        assert_eq!(rows.len(), 2);
    }
}

/// Files of the campaign in `campaign.rs` over which the parquet crate panics.
#[test]
fn a_file_over_which_its_reader_panics_is_named() {
    for name in ["negative.parquet", "dictionary.parquet"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/broken").join(name);
        let error = read_file(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("{name}: cannot be read, its reader failed: it panicked at")), "{error}");
        assert!(error.contains("help: the file is broken"), "{error}");
    }
}

#[test]
fn csv_cells_are_text_or_conversations() {
    let dir = tempfile::tempdir().unwrap();
    let text =
        "prompt,chosen,rejected\n\"two\nlines\",[1],\"{\"\"a\"\": 1}\"\nx,\"[{\"\"role\"\": \"\"user\"\"}]\",\nshort\n";
    let rows = read_file(&file(dir.path(), "a.csv", text)).unwrap();
    assert_eq!(rows.iter().map(place).collect::<Vec<_>>(), ["a.csv:2", "a.csv:4", "a.csv:5"]);
    let row = rows[0].row.as_ref().unwrap();
    assert_eq!(
        (&row["prompt"], &row["chosen"], &row["rejected"]),
        (&json!("two\nlines"), &json!("[1]"), &json!("{\"a\": 1}"))
    );
    assert_eq!(rows[1].row.as_ref().unwrap()["chosen"], json!([{"role": "user"}]));
    let error = rows[2].row.clone().unwrap_err().to_string();
    assert!(error.contains("a.csv:5: broken csv: found record with 1 fields"), "{error}");
}

#[test]
fn parquet_rows_are_those_that_were_written() {
    // Written with pyarrow 26 from the rows below.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/rows.parquet");
    let rows: Vec<_> = read_file(&path).unwrap().into_iter().map(|r| json!(r.row.unwrap())).collect();
    let turns = |text: &str| json!([{"role": "user", "content": "天气?"}, {"role": "assistant", "content": text}]);
    assert_eq!(
        rows,
        [
            json!({"prompt": "天气?", "chosen": turns("ok"), "rejected": turns("no"), "score_chosen": 4.5, "n": 1}),
            json!({"prompt": "天气?", "chosen": turns("sun"), "rejected": turns("rain"), "n": 2}),
        ]
    );
}

/// Written with pyarrow 26 from the rows below: the stream of `save_to_disk`, and a file.
#[test]
fn arrow_rows_are_those_that_were_written() {
    let turns = |text: &str| json!([{"role": "user", "content": "天气?"}, {"role": "assistant", "content": text}]);
    for name in ["stream.arrow", "file.arrow"] {
        let rows = read_file(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap();
        assert_eq!(rows.iter().map(place).collect::<Vec<_>>(), [format!("{name}: row 1"), format!("{name}: row 2")]);
        let rows: Vec<_> = rows.into_iter().map(|r| json!(r.row.unwrap())).collect();
        let expected = [
            json!({"prompt": "天气?", "chosen": turns("ok"), "rejected": turns("no"), "score": 4.5, "n": 1, "ok": true,
                "kind": "a", "when": null, "nums": [1, 2], "half": 0.5}),
            json!({"prompt": "天气?", "chosen": turns("sun"), "rejected": turns("rain"), "n": 2, "kind": "b", "nums": []}),
        ];
        assert_eq!(rows, expected, "{name}");
    }
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/packed.arrow");
    let error = read_file(&packed).unwrap_err().to_string();
    assert!(error.contains("packed.arrow: its columns are compressed"), "{error}");
}

#[test]
fn a_file_that_is_one_object_holds_rows() {
    let dir = tempfile::tempdir().unwrap();
    let rows = |text: &str| -> Vec<Value> {
        let rows = read_file(&file(dir.path(), "a.json", text)).unwrap();
        rows.into_iter().map(|r| json!(r.row.unwrap())).collect()
    };
    let two = [json!({"n": 1, "t": "a"}), json!({"n": 2, "t": null})];
    assert_eq!(rows(r#"{"version": "1", "data": [{"n": 1, "t": "a"}, {"n": 2, "t": NaN}]}"#), two);
    assert_eq!(rows("{\n \"n\": [1, 2],\n \"t\": [\"a\", null]\n}\n"), two);
    assert_eq!(rows(r#"{"n": {"0": 1, "1": 2}, "t": {"0": "a", "1": null}}"#), two);
    // Rows, of which there is one.
    for row in [
        json!({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        json!({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}),
        json!({"prompt": "a", "data": [{"role": "user", "content": "a"}]}),
    ] {
        for text in [format!("{row}"), format!("{row:#}"), format!("{row}\n{row}")] {
            assert!(rows(&text).iter().all(|read| *read == row), "{text}");
        }
    }
}

#[test]
fn a_nan_is_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "{\"n\": NaN, \"t\": \"\\\"NaN\"}\n{\"n\": 2}\n{\"n\": [NaN, -Infinity]}";
    let rows = read_file(&file(dir.path(), "a.jsonl", lines)).unwrap();
    assert_eq!(json!(rows[0].row.as_ref().unwrap()), json!({"n": null, "t": "\"NaN"}));
    assert!(rows[1].row.is_ok());
    let error = rows[2].row.clone().unwrap_err().to_string();
    assert!(error.contains("a.jsonl:3: broken JSON at column"), "{error}");
}

#[test]
fn cells_stand_between_commas_tabs_or_semicolons() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("a.tsv", "n\tt\r\n1\t\"a, b; c\"\r\n"),
        ("b.csv", "n;t\n1;a, b; c".replace("a, b; c", "\"a, b; c\"").as_str()),
        ("c.csv", "\u{feff}n,t\n1,\"a, b; c\"\n"),
    ] {
        let rows = read_file(&file(dir.path(), name, text)).unwrap();
        assert_eq!(json!(rows[0].row.as_ref().unwrap()), json!({"n": "1", "t": "a, b; c"}), "{name}");
    }
}

#[test]
fn lines_of_csv_are_counted_whatever_ends_them() {
    let dir = tempfile::tempdir().unwrap();
    for end in ["\n", "\r\n"] {
        let text = ["n,t", "1,a", "", "2,\"b", "c\"", "3", "4,d", ""].join(end);
        let rows = read_file(&file(dir.path(), "a.csv", &text)).unwrap();
        assert_eq!(rows.iter().map(place).collect::<Vec<_>>(), ["a.csv:2", "a.csv:4", "a.csv:6", "a.csv:7"], "{end:?}");
        assert!(rows[2].row.is_err());
    }
}

/// What pandas' `to_csv` makes of a list would be trained as text.
#[test]
fn a_conversation_as_python_prints_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for cell in [
        "[{'role': 'user', 'content': 'a'}]",
        "[{'content': 'a', 'role': 'user'}\n {'content': 'b'}]",
        "{'from': 'gpt'}",
    ] {
        let text = format!("prompt,chosen\na,b\nc,\"{cell}\"\n");
        let error = read_file(&file(dir.path(), "a.csv", &text)).unwrap_err().to_string();
        assert!(error.contains("a.csv:3: column 'chosen' has a conversation as Python prints it"), "{error}");
        assert!(error.contains("to_json"), "{error}");
    }
    assert!(read_file(&file(dir.path(), "b.csv", "prompt,chosen\na,{'x': 1}\n")).is_ok());
}

#[test]
fn a_pointer_of_git_lfs_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.parquet", "a.jsonl", "a.arrow", "a.csv"] {
        let text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
        let error = read_file(&file(dir.path(), name, text)).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{name}: is a pointer of Git LFS")) && error.contains("git lfs pull"),
            "{error}"
        );
    }
}

/// Files that lie in a folder in the way of Hugging Face's `save_to_disk`, of a cloned repository, and so on.
#[test]
fn a_folder_is_its_training_split() {
    let row = |n: u32| format!("{{\"n\": {n}}}");
    let state = |files: &[&str]| {
        json!({"_data_files": files.iter().map(|f| json!({"filename": f})).collect::<Vec<_>>()}).to_string()
    };
    let about = |text: &str| text.to_owned();
    type Case = (&'static str, Vec<(&'static str, String)>, &'static [u64]);
    let cases: [Case; 7] = [
        ("two splits", vec![("train_a.jsonl", row(1)), ("train_b.jsonl", row(2)), ("test_a.jsonl", row(9))], &[1, 2]),
        ("no split", vec![("a.jsonl", row(1)), ("b.jsonl", row(2))], &[1, 2]),
        (
            "a cloned repository",
            vec![
                ("README.md", about("x")),
                ("data/train-00000-of-00001.jsonl", row(1)),
                ("data/test-00000-of-00001.jsonl", row(9)),
                (".git/a.jsonl", row(9)),
            ],
            &[1],
        ),
        (
            "ultrafeedback_binarized",
            vec![
                ("data/train_prefs-0.jsonl", row(1)),
                ("data/train_sft-0.jsonl", row(9)),
                ("data/test_prefs-0.jsonl", row(9)),
            ],
            &[1],
        ),
        (
            "save_to_disk",
            vec![
                ("state.json", state(&["b.jsonl", "a.jsonl"])),
                ("dataset_info.json", about("{}")),
                ("a.jsonl", row(2)),
                ("b.jsonl", row(1)),
                ("cache-1.jsonl", row(9)),
            ],
            &[1, 2],
        ),
        (
            "a DatasetDict",
            vec![
                ("dataset_dict.json", json!({"splits": ["train", "test"]}).to_string()),
                ("train/state.json", state(&["a.jsonl", "../test/b.jsonl"])),
                ("train/a.jsonl", row(1)),
                ("test/state.json", state(&["b.jsonl"])),
                ("test/b.jsonl", row(9)),
            ],
            &[1],
        ),
        (
            "files beside the rows",
            vec![
                ("metadata.json", about("{\"by\": \"me\"}")),
                ("dataset_info.json", about("{}")),
                ("rows.jsonl", row(1)),
            ],
            &[1],
        ),
    ];
    for (name, files, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            std::fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
            file(dir.path(), path, &text);
        }
        let source = Source::parse(&dir.path().display().to_string()).unwrap();
        assert_eq!(numbers(&read(&source, false, 0).unwrap()), expected, "{name}");
    }
}

#[test]
fn samples() {
    let dir = tempfile::tempdir().unwrap();
    let lines: Vec<String> = (0..10).map(|n| format!("{{\"n\": {n}}}")).collect();
    let path = file(dir.path(), "a.jsonl", &lines.join("\n")).display().to_string();
    let take = |n: usize, shuffle, seed| {
        numbers(&read(&Source::parse(&format!("{path}#{n}")).unwrap(), shuffle, seed).unwrap())
    };
    assert_eq!(take(3, false, 0), [0, 1, 2]);
    assert_eq!(take(12, false, 0), [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let mut sample = take(4, true, 7);
    assert_eq!(sample, take(4, true, 7));
    assert!((8..20).any(|seed| take(4, true, seed) != sample));
    sample.dedup();
    assert_eq!(sample.len(), 4);
    let many = take(25, true, 1);
    assert!((0..10).all(|n| (2..=3).contains(&many.iter().filter(|m| **m == n).count())));
    assert!(Source::parse("a.jsonl#0").is_err());
    assert_eq!(Source::parse("a#b.jsonl").unwrap().path, Path::new("a#b.jsonl"));
}

#[test]
fn a_folder_is_all_its_data_files() {
    let dir = tempfile::tempdir().unwrap();
    let source = || Source::parse(&dir.path().display().to_string()).unwrap();
    assert!(read(&source(), false, 0).unwrap_err().to_string().contains("holds no data file"));
    file(dir.path(), "b.jsonl", "{\"n\": 2}");
    file(dir.path(), "a.json", "[{\"n\": 1}]");
    file(dir.path(), "README.md", "no data");
    // Of an editor, or of the system that the folder was packed on.
    file(dir.path(), ".b.jsonl", "{\"n\": 9}");
    file(dir.path(), "._b.jsonl", "Mac OS X");
    assert_eq!(numbers(&read(&source(), false, 0).unwrap()), [1, 2]);
    std::fs::write(dir.path().join("c.jsonl.gz"), gzip("{\"n\": 3}")).unwrap();
    assert_eq!(numbers(&read(&source(), false, 0).unwrap()), [1, 2, 3]);
    file(dir.path(), "d.jsonl.xz", "packed");
    let error = read(&source(), false, 0).unwrap_err().to_string();
    assert!(error.contains("d.jsonl.xz: files packed as .xz are not read\n  help: unpack it"), "{error}");
}

#[test]
fn what_cannot_be_read_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let error = |path: &Path| read_file(path).unwrap_err().to_string();
    assert!(error(&dir.path().join("none.jsonl")).contains("none.jsonl: cannot read: no such file"));
    assert!(error(&file(dir.path(), "empty.jsonl", "\n\n")).contains("empty.jsonl: the file holds no row"));
    assert!(error(&file(dir.path(), "a.txt", "x")).contains("unknown kind of data file"));
    assert!(error(&file(dir.path(), "a.parquet", "x")).contains("a.parquet: broken parquet"));
    let bytes = dir.path().join("latin.jsonl");
    std::fs::write(&bytes, b"{\"n\": 1}\n{\"n\": \"\xe9\"}").unwrap();
    assert!(error(&bytes).contains("latin.jsonl:2: is not UTF-8 text"));
}

/// All rows behind it would be one cell.
#[test]
fn a_quote_of_csv_that_is_not_closed_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "a.csv", "a,b\n1,2\n3,\"four\n5,6\n");
    let error = read_file(&path).unwrap_err().to_string();
    assert!(error.contains("a.csv:3: broken csv: a quote is opened and not closed"), "{error}");
    assert_eq!(read_file(&file(dir.path(), "b.csv", "a,b\n1,\"say \"\"hi\"\"\"\n")).unwrap().len(), 1);
}

#[test]
fn columns_may_change_places() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "a.jsonl", "{\"a\": 1, \"b\": 2}");
    let mut rows = read_file(&path).unwrap();
    rename(&mut rows, &parse_columns(r#"{"a": "b", "b": "a"}"#).unwrap());
    assert_eq!(json!(rows[0].row.as_ref().unwrap()), json!({"a": 2, "b": 1}));
    let source = Source::parse(&path.display().to_string()).unwrap();
    let error = refuse_missing(&[source], &parse_columns(r#"{"c": "d"}"#).unwrap()).unwrap_err().to_string();
    assert!(error.contains("unknown column 'c'"), "{error}");
    assert!(parse_columns("[]").is_err());
}
