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
use serde_json::json;

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
    let source = Source::parse(&dir.path().display().to_string()).unwrap();
    assert!(read(&source, false, 0).unwrap_err().to_string().contains("holds no data file"));
    file(dir.path(), "b.jsonl", "{\"n\": 2}");
    file(dir.path(), "a.json", "[{\"n\": 1}]");
    file(dir.path(), "README.md", "no data");
    // Of an editor, or of the system that the folder was packed on.
    file(dir.path(), ".b.jsonl", "{\"n\": 9}");
    file(dir.path(), "._b.jsonl", "Mac OS X");
    assert_eq!(numbers(&read(&source, false, 0).unwrap()), [1, 2]);
    std::fs::write(dir.path().join("c.jsonl.gz"), gzip("{\"n\": 3}")).unwrap();
    assert_eq!(numbers(&read(&source, false, 0).unwrap()), [1, 2, 3]);
    file(dir.path(), "d.jsonl.xz", "packed");
    let error = read(&source, false, 0).unwrap_err().to_string();
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
