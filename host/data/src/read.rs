//! A file of rows: jsonl, json, csv, tsv, arrow or parquet, text also packed with gzip or zstd. Every row has its place.
//!
//! A row that cannot be read is an error of its own, with its line; the rows around it are still there. A file is a
//! stranger's: what it unpacks to is bounded, and a panic of the library that reads it is an error of the file.

mod columnar;
mod json;
mod row;
mod separated;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};

use dpo_plugin_api::abi::guard;

use columnar::{read_arrow, read_parquet};
use dpo_core::error::{Error, Result};
use json::read_json;
pub use row::SourceRow;
use row::{PACKED, split, unpack};
use separated::read_separated;

/// What can be read, by extension, best last: a repository that has its rows twice has them in parquet without loss.
const READERS: [(&str, Reader); 7] = [
    ("jsonl", read_json),
    ("ndjson", read_json),
    ("json", read_json),
    ("csv", read_separated),
    ("tsv", read_separated),
    ("arrow", read_arrow),
    ("parquet", read_parquet),
];
/// Those that are no texts, and have a packing of their own.
const BINARY: [&str; 2] = ["arrow", "parquet"];
/// Packings that are known and not read.
const UNREAD: [&str; 8] = ["bz2", "xz", "lz4", "br", "zip", "7z", "tar", "tgz"];
/// What stands in the place of a large file until Git LFS fetches it.
const LFS: &[u8] = b"version https://git-lfs";
/// Rows that are handed on at once.
const AT_ONCE: usize = 8192;

/// Takes the rows of a file, one after the other.
type Give<'a> = &'a mut dyn FnMut(SourceRow) -> Result<()>;
type Reader = fn(&Path, Give<'_>) -> Result<()>;

/// Whether a file can be read, by its name.
///
/// # Errors
/// A file of rows that is packed in a way that cannot be read.
pub(super) fn is_known(path: &Path) -> Result<bool> {
    if let Some((stem, packing)) = split(path).filter(|(_, ending)| UNREAD.contains(&ending.as_str()))
        && split(stem).is_some_and(|(_, kind)| READERS.iter().any(|(name, _)| *name == kind))
    {
        return Err(Error::input(format!("files packed as .{packing} are not read"))
            .at(path.display())
            .help("unpack it"));
    }
    Ok(reader(path).is_some())
}

/// Extensions of what can be read, those first that are to be preferred.
pub(super) fn kinds() -> Vec<String> {
    let packed = |name: &str| PACKED.map(|(packing, _)| format!("{name}.{packing}")).to_vec();
    let all = |name: &'static str| [vec![name.to_owned()], if BINARY.contains(&name) { vec![] } else { packed(name) }];
    READERS.iter().rev().flat_map(|(name, _)| all(name)).flatten().collect()
}

pub(super) fn known_kinds() -> String {
    let kinds: Vec<String> = READERS.iter().map(|(name, _)| format!(".{name}")).collect();
    format!("known kinds: {}; texts also as .gz and .zst", kinds.join(", "))
}

fn reader(path: &Path) -> Option<Reader> {
    let (stem, mut ending) = split(path)?;
    let packed = unpack(path).is_some();
    if packed {
        ending = split(stem)?.1;
    }
    let known = READERS.iter().find(|(name, _)| *name == ending).map(|(_, reader)| *reader);
    known.filter(|_| !packed || !BINARY.contains(&ending.as_str()))
}

/// Some rows of a file that follow each other.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// The file.
    pub path: PathBuf,
    /// Its next rows.
    pub rows: Vec<SourceRow>,
}

/// The rows of a file, some thousand at a time, read ahead of those who take them.
///
/// # Errors
/// A file that is missing or of an unknown kind; later one that is empty, or broken as a whole.
pub fn chunks(path: &Path) -> Result<impl Iterator<Item = Result<Vec<SourceRow>>> + use<>> {
    let read = reader(path).ok_or_else(|| {
        let what = if path.exists() { "unknown kind of data file" } else { "cannot read: no such file or directory" };
        Error::input(what).at(path.display()).help(known_kinds())
    })?;
    if std::fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        // A pipe would be waited for, and a device has no end.
        return Err(Error::input("is not a regular file").at(path.display()));
    }
    let mut begins = [0; LFS.len()];
    if std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut begins)).is_ok() && begins == LFS {
        return Err(Error::input("is a pointer of Git LFS, not the file itself")
            .at(path.display())
            .help("`git lfs pull` in its folder fetches that"));
    }
    let (sender, receiver) = sync_channel(1);
    let path = path.to_owned();
    std::thread::spawn(move || {
        // Nobody listens any more where an error has ended everything.
        let _ = read_ahead(&path, read, &sender).or_else(|e| sender.send(Err(e)));
    });
    Ok(receiver.into_iter())
}

fn read_ahead(path: &Path, read: Reader, to: &SyncSender<Result<Vec<SourceRow>>>) -> Result<()> {
    let (mut rows, mut any) = (Vec::new(), false);
    let mut give = |row: SourceRow| {
        rows.push(row);
        any = true;
        match rows.len() {
            AT_ONCE => {
                to.send(Ok(std::mem::take(&mut rows))).map_err(|_| Error::run("the rows are not wanted any more"))
            }
            _ => Ok(()),
        }
    };
    guard(|| Ok(read(path, &mut give)))
        .unwrap_or_else(|e| Err(Error::input(format!("cannot be read, its reader failed: {}", e.message))))
        .map_err(|e| e.at(path.display()).help("the file is broken: write or fetch it again"))?;
    if !any {
        return Err(Error::input("the file holds no row")
            .at(path.display())
            .help("the samples of `dpo-host describe FORMAT` show what rows look like; `dpo-host list datasets` names the formats"));
    }
    let _ = to.send(Ok(rows));
    Ok(())
}

/// All rows of a file.
///
/// # Errors
/// A file that is missing, empty, of an unknown kind or broken as a whole.
pub fn read_file(path: &Path) -> Result<Vec<SourceRow>> {
    let chunks: Vec<Vec<SourceRow>> = chunks(path)?.collect::<Result<_>>()?;
    Ok(chunks.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use std::sync::Arc;

    use parquet::basic::{Compression, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// A few kilobytes that become gigabytes, or here megabytes.
    #[test]
    fn a_file_that_unpacks_to_too_much_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = read_file(&path).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("it unpacks to more than 1.0 MiB and 256 times"), "{error}");
        };
        let text = " ".repeat(1 << 24);
        refused("bomb.jsonl.zst", &zstd::encode_all(text.as_bytes(), 3).unwrap());
        refused("bomb.csv.zst", &zstd::encode_all(format!("a\n{text}").as_bytes(), 3).unwrap());
        let schema = parse_message_type("message row { required binary prompt (UTF8); }").unwrap();
        let zstd = Compression::ZSTD(ZstdLevel::try_new(3).unwrap());
        let properties = WriterProperties::builder().set_compression(zstd).build();
        let mut file = SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::new(properties)).unwrap();
        let mut group = file.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values = vec![ByteArray::from(&text[..1 << 16]); 1 << 8];
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        refused("bomb.parquet", &file.into_inner().unwrap());
    }
}
