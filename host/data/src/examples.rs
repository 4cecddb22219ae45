//! Examples of any number, one after the other as bytes: in memory while they are few, then in a file of the cache, so that memory
//! holds some bytes for each. Such a file is found again by all that it depends on.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::report::Report;
use dpo_core::cache;
use dpo_core::console::{self, Remark};
use dpo_core::error::{Error, IoContext, Result};
use dpo_core::example::{Answer, Example};

/// The cache's folder.
const CACHE: &str = "examples";
/// Bytes that are held in memory.
const FEW: usize = if cfg!(test) { 1 << 10 } else { 32 << 20 };
/// Files that are kept: those that were used last.
const KEPT: usize = 8;
/// Bytes of the hash that a file ends with.
const HASH: usize = 32;
/// Bytes that are read at once.
const PIECE: usize = 8 << 20;

/// Examples, read where they are needed.
#[derive(Clone, Debug)]
pub struct Examples {
    held: Arc<Held>,
    /// Where each begins, and how many bytes it has.
    places: Vec<(u64, u32)>,
}

impl Default for Examples {
    /// None.
    fn default() -> Examples {
        Examples { held: Arc::new(Held::Memory(Vec::new())), places: Vec::new() }
    }
}

#[derive(Debug)]
enum Held {
    Memory(Vec<u8>),
    Disk(File, PathBuf),
}

impl Examples {
    /// How many.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The name of their file in the cache, where they are all of it.
    pub fn file(&self) -> Option<&str> {
        match &*self.held {
            Held::Disk(_, path) if path.is_file() => path.file_name()?.to_str(),
            _ => None,
        }
    }

    /// One of them.
    ///
    /// # Errors
    /// A file that cannot be read any more.
    ///
    /// # Panics
    /// A number that is too large, as for a slice.
    pub fn get(&self, index: usize) -> Result<Example> {
        let (at, length) = self.places[index];
        let decoded = match &*self.held {
            Held::Memory(bytes) => decode(&bytes[at as usize..][..length as usize]),
            Held::Disk(file, path) => {
                let mut bytes = vec![0; length as usize];
                file.read_exact_at(&mut bytes, at).reading(path)?;
                decode(&bytes)
            }
        };
        decoded.ok_or_else(|| Error::run("an example that was written is not there any more"))
    }

    /// Some of them.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn gather(&self, which: impl IntoIterator<Item = usize>) -> Result<Vec<Example>> {
        which.into_iter().map(|i| self.get(i)).collect()
    }

    /// All of them at once, for sets that are small.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn all(&self) -> Result<Vec<Example>> {
        self.iter().collect()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = Result<Example>> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }

    /// A hash of everything in them that decides numbers.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn digest(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        for example in self.iter() {
            hash.update(example?.content());
        }
        Ok(hash.finalize().into())
    }

    /// Those of these numbers, as a set of their own.
    #[must_use]
    pub fn select(&self, which: &[usize]) -> Examples {
        Examples { held: Arc::clone(&self.held), places: which.iter().map(|i| self.places[*i]).collect() }
    }

    /// The bytes of some that follow each other, for [`Writer::extend`] elsewhere: up to a few megabytes from `first` on, and the
    /// number of the next one.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn piece(&self, first: usize) -> Result<(Vec<u8>, usize)> {
        let (mut piece, mut next) = (Vec::new(), first);
        while next < self.len() && piece.len() < PIECE {
            encode(&self.get(next)?, &mut piece);
            next += 1;
        }
        Ok((piece, next))
    }

    /// The examples that were written under a name, with the report of their rows.
    pub fn cached(name: &str) -> Option<(Examples, Report)> {
        let path = cache::folder(CACHE).ok()?.join(name);
        let file = File::options().read(true).open(&path).ok()?;
        let found = read_back(&file, &path, name);
        if found.is_none() {
            console::warning(format!("{} is not what was written there: rows are tokenised again", path.display()));
        }
        // What was used last is kept longest.
        let _ = File::options().append(true).open(&path).and_then(|f| f.set_modified(SystemTime::now()));
        found
    }
}

/// Writes examples one after the other.
#[derive(Default)]
pub struct Writer {
    /// What is not on disk.
    memory: Vec<u8>,
    disk: Option<Disk>,
    /// Whether the disk cannot be used.
    stays: bool,
    places: Vec<(u64, u32)>,
    end: u64,
}

struct Disk {
    file: BufWriter<File>,
    path: PathBuf,
    hash: Sha256,
}

impl Writer {
    /// Adds an example.
    ///
    /// # Errors
    /// A full disk.
    pub fn push(&mut self, example: &Example) -> Result<()> {
        let before = self.memory.len();
        encode(example, &mut self.memory);
        let length = self.memory.len() - before;
        self.places.push((self.end, length as u32));
        self.end += length as u64;
        if self.memory.len() >= FEW { self.spill() } else { Ok(()) }
    }

    /// Adds what [`Examples::piece`] gave.
    ///
    /// # Errors
    /// Bytes that are no examples; a full disk.
    pub fn extend(&mut self, mut piece: &[u8]) -> Result<()> {
        while !piece.is_empty() {
            let length = encoded_length(piece).ok_or_else(|| Error::run("what came is no example"))?;
            let example = decode(&piece[..length]).ok_or_else(|| Error::run("what came is no example"))?;
            self.push(&example)?;
            piece = &piece[length..];
        }
        Ok(())
    }

    /// Examples so far.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none yet.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    fn spill(&mut self) -> Result<()> {
        if self.disk.is_none() && !self.stays {
            match Disk::new() {
                Ok(disk) => self.disk = Some(disk),
                Err(e) => {
                    console::warning(Remark::because("tokenised rows stay in memory", &e));
                    self.stays = true;
                }
            }
        }
        if let Some(disk) = &mut self.disk {
            disk.write(&self.memory)?;
            self.memory.clear();
        }
        Ok(())
    }

    /// All that was added. A file stays in the cache under `name`, if there is one, with the report.
    ///
    /// # Errors
    /// A full disk.
    pub fn finish(mut self, report: &Report, name: Option<&str>) -> Result<Examples> {
        let places = std::mem::take(&mut self.places);
        let Some(mut disk) = self.disk.take() else {
            return Ok(Examples { held: Arc::new(Held::Memory(std::mem::take(&mut self.memory))), places });
        };
        disk.write(&self.memory)?;
        let path = match name {
            Some(name) => disk.keep(name, &places, report)?,
            None => {
                disk.file.flush().writing(&disk.path)?;
                disk.path.clone()
            }
        };
        let file = File::open(&path).reading(&path)?;
        if name.is_none() {
            // It is there as long as it is open.
            let _ = fs::remove_file(&path);
        }
        Ok(Examples { held: Arc::new(Held::Disk(file, path)), places })
    }
}

impl Disk {
    fn new() -> Result<Disk> {
        let path = cache::folder(CACHE)?.join(format!("{}-{:?}.tmp", std::process::id(), std::thread::current().id()));
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path).writing(&path)?;
        Ok(Disk { file: BufWriter::new(file), path, hash: Sha256::new() })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes).writing(&self.path).map_err(|e| {
            // On a full disk the half that was written is in the way of everything else.
            let _ = fs::remove_file(&self.path);
            e.help("the folder of the cache can be named with XDG_CACHE_HOME")
        })
    }

    /// Ends the file with the places, the report, their sizes and the hash of all, and gives it its name.
    fn keep(&mut self, name: &str, places: &[(u64, u32)], report: &Report) -> Result<PathBuf> {
        let lengths: Vec<u8> = places.iter().flat_map(|(_, length)| length.to_le_bytes()).collect();
        let report = serde_json::to_vec(report).map_err(|e| Error::run(e.to_string()))?;
        self.write(&lengths)?;
        self.write(&report)?;
        let sizes = [places.len() as u64, report.len() as u64];
        self.write(&sizes.map(u64::to_le_bytes).concat())?;
        let hash = self.hash.clone().chain_update(name).finalize();
        self.file.write_all(&hash).and_then(|()| self.file.flush()).writing(&self.path)?;
        let path = self.path.with_file_name(name);
        fs::rename(&self.path, &path).writing(&path)?;
        forget(&path);
        Ok(path)
    }
}

/// Removes all but the files that were used last, and what a process left that is gone.
fn forget(newest: &Path) {
    let Some(folder) = newest.parent() else { return };
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut files: Vec<(SystemTime, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .filter(|(_, path)| path != newest)
        .collect();
    let (left, mut kept): (Vec<_>, Vec<_>) =
        files.drain(..).partition(|(_, path)| path.extension().is_some_and(|e| e == "tmp"));
    kept.sort();
    let old = kept.len().saturating_sub(KEPT - 1);
    let day = std::time::Duration::from_secs(24 * 3600);
    let stale = left.into_iter().filter(|(time, _)| time.elapsed().is_ok_and(|age| age > day));
    for (_, path) in kept.into_iter().take(old).chain(stale) {
        let _ = fs::remove_file(path);
    }
}

/// What is in a file, if it is whole.
fn read_back(file: &File, path: &Path, name: &str) -> Option<(Examples, Report)> {
    let size = file.metadata().ok()?.len();
    let hashed = size.checked_sub(HASH as u64)?;
    let mut hash = Sha256::new();
    let mut reader = file.take(hashed);
    let mut piece = vec![0; PIECE];
    loop {
        match reader.read(&mut piece).ok()? {
            0 => break,
            count => hash.update(&piece[..count]),
        }
    }
    let mut written = [0; HASH];
    file.read_exact_at(&mut written, hashed).ok()?;
    if hash.chain_update(name).finalize().as_slice() != written {
        return None;
    }
    let part = |end: u64, bytes: u64| -> Option<Vec<u8>> {
        let mut part = vec![0; bytes as usize];
        file.read_exact_at(&mut part, end.checked_sub(bytes)?).ok()?;
        Some(part)
    };
    let sizes = part(hashed, 16)?;
    let number = |at: usize| sizes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    let (count, report) = (number(0)?, number(8)?);
    let text = part(hashed - 16, report)?;
    let lengths = part(hashed - 16 - report, count.checked_mul(4)?)?;
    let mut at = 0;
    let places = lengths.as_chunks().0.iter().map(|length| {
        let length = u32::from_le_bytes(*length);
        at += u64::from(length);
        (at - u64::from(length), length)
    });
    let places = places.collect();
    let held = Arc::new(Held::Disk(file.try_clone().ok()?, path.to_owned()));
    Some((Examples { held, places }, serde_json::from_slice(&text).ok()?))
}

/// An example as bytes: its length, place, prompt with whether it is scored, and answers with label and whether they are detached.
fn encode(example: &Example, into: &mut Vec<u8>) {
    let start = into.len();
    let ids = |into: &mut Vec<u8>, ids: &[u32]| {
        into.extend((ids.len() as u32).to_le_bytes());
        ids.iter().for_each(|id| into.extend(id.to_le_bytes()));
    };
    into.extend([0; 4]);
    into.extend((example.place.len() as u32).to_le_bytes());
    into.extend(example.place.as_bytes());
    into.push(u8::from(example.is_prompt_scored()));
    ids(into, example.prompt());
    into.push(example.answers().len() as u8);
    for answer in example.answers() {
        into.extend(answer.label.to_le_bytes());
        into.push(u8::from(answer.detached));
        ids(into, &answer.ids);
    }
    let length = (into.len() - start) as u32;
    into[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

/// Bytes of the example that some bytes begin with.
fn encoded_length(bytes: &[u8]) -> Option<usize> {
    let length = u32::from_le_bytes(*bytes.first_chunk()?) as usize;
    (4..=bytes.len()).contains(&length).then_some(length)
}

fn decode(bytes: &[u8]) -> Option<Example> {
    let mut left = bytes.get(4..)?;
    let mut take = |count: usize| {
        let (taken, rest) = left.split_at_checked(count)?;
        left = rest;
        Some(taken)
    };
    let number = |four: &[u8]| Some(u32::from_le_bytes(*four.first_chunk()?) as usize);
    let places = number(take(4)?)?;
    let place = std::str::from_utf8(take(places)?).ok()?.to_owned();
    let scored = take(1)?[0] == 1;
    let ids = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect::<Vec<u32>>();
    let length = number(take(4)?)?;
    let prompt = ids(take(length * 4)?);
    let mut answers = Vec::new();
    for _ in 0..take(1)?[0] {
        let label = f64::from_le_bytes(*take(8)?.first_chunk()?);
        let detached = take(1)?[0] == 1;
        let length = number(take(4)?)?;
        answers.push(Answer { ids: ids(take(length * 4)?), label, detached });
    }
    let example = Example::new(prompt, answers, place).ok()?;
    Some(if scored { example.with_prompt_scored() } else { example })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    fn example(i: u32) -> Example {
        let answer =
            |n: u32, label: f64, detached: bool| Answer { ids: (0..n).map(|j| i * j).collect(), label, detached };
        let answers = vec![answer(1 + i % 3, 2.5, false), answer(2, -1.0, false), answer(1, 0.0, true)];
        let made = Example::new((1..2 + i % 4).collect(), answers, format!("rows.jsonl:{i}")).unwrap();
        if i % 4 == 3 { made.with_prompt_scored() } else { made }
    }

    #[test]
    fn what_is_written_is_read() {
        let examples: Vec<Example> = (0..100).map(example).collect();
        let mut writer = Writer::default();
        examples.iter().for_each(|e| writer.push(e).unwrap());
        assert!(writer.disk.is_some(), "so many do not stay in memory");
        let written = writer.finish(&Report::default(), None).unwrap();
        assert_eq!(written.iter().collect::<Result<Vec<_>>>().unwrap(), examples);
        let some = written.select(&[7, 3, 99]);
        assert_eq!(some.get(1).unwrap(), examples[3]);
        let mut elsewhere = Writer::default();
        let mut next = 0;
        while next < written.len() {
            let (piece, then) = written.piece(next).unwrap();
            elsewhere.extend(&piece).unwrap();
            next = then;
        }
        assert!(elsewhere.extend(&[9, 0, 0, 0, 1]).is_err());
        let there = elsewhere.finish(&Report::default(), None).unwrap();
        assert_eq!(there.gather([5, 50]).unwrap(), [examples[5].clone(), examples[50].clone()]);
    }

    /// A file is found by its name, and one that was changed is not used.
    #[test]
    fn a_file_is_found_again_while_it_is_whole() {
        let name = format!("test-{}", std::process::id());
        let write = || {
            let mut writer = Writer::default();
            (0..100).for_each(|i| writer.push(&example(i)).unwrap());
            writer.finish(&Report { truncated: 3, ..Report::default() }, Some(&name)).unwrap()
        };
        write();
        let (found, report) = Examples::cached(&name).unwrap();
        assert_eq!((found.len(), report.truncated, found.get(42).unwrap()), (100, 3, example(42)));
        let path = cache::folder(CACHE).unwrap().join(&name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[1000] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(Examples::cached(&name).is_none());
        write();
        assert!(Examples::cached(&name).is_some());
        fs::remove_file(path).unwrap();
    }
}
