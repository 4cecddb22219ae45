//! What `--dataset` names: a file, the files of a folder or of a hub's dataset, and how many of their rows.

use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;

use super::read::{Chunk, SourceRow, chunks, is_known, kinds, known_kinds};
use dpo_core::console;
use dpo_core::error::{Error, IoContext, Result};
use dpo_hub::{self as hub, Name};

/// A `--dataset` argument: a file or a folder, and how many rows of it are wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// The file or folder.
    pub path: PathBuf,
    /// `#N`: this many rows, by sampling or by repeating.
    pub rows: Option<usize>,
}

/// Most rows of `#N`.
const MOST_ROWS: usize = 100_000_000;

impl Source {
    /// Reads `PATH` or `PATH#N`. A path that exists as it is written is never cut.
    ///
    /// # Errors
    /// `#0`.
    pub fn parse(argument: &str) -> Result<Source> {
        let cut = argument.rsplit_once('#').and_then(|(path, rows)| Some((path, rows.parse().ok()?)));
        match cut.filter(|_| !Path::new(argument).exists()) {
            Some((_, 0)) => {
                Err(Error::input("'#0' asks for no row").at(argument).help("name how many rows to take, as in #500"))
            }
            Some((_, rows)) if rows > MOST_ROWS => {
                Err(Error::input(format!("'#{rows}' asks for more than {MOST_ROWS} rows"))
                    .at(argument)
                    .help("name fewer, as in #500"))
            }
            Some((path, rows)) => Ok(Source { path: path.into(), rows: Some(rows) }),
            None => Ok(Source { path: argument.into(), rows: None }),
        }
    }

    /// Its files: itself, the data files of a folder by name, or those of a hub's dataset.
    ///
    /// # Errors
    /// A folder without data files; a hub that does not answer.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        data_files(&self.path)
    }

    /// Its rows, some thousand at a time: all of them, or the `#N` that are wanted. Fewer than there are, are a sample without
    /// replacement (without `shuffle` the first ones); more are all of them, as often as they fit, and a sample for the rest. Rows
    /// stay in the order of the file.
    ///
    /// # Errors
    /// A file that is missing, empty, of an unknown kind or broken as a whole.
    pub fn read(&self, shuffle: bool, seed: u64) -> Result<impl Iterator<Item = Result<Chunk>>> {
        let files = self.files()?;
        let mut times = None;
        if let Some(wanted) = self.rows {
            let mut total = 0;
            for path in &files {
                for rows in chunks(path)? {
                    total += rows?.len();
                }
            }
            if wanted > total && total > 0 {
                let (times, path) = (wanted.div_ceil(total), self.path.display());
                console::note(format!("{path}#{wanted}: it has {total} rows, which are taken up to {times} times"));
            }
            times = Some(times_taken(total, wanted, shuffle, seed).into_iter());
        }
        let opened = files.into_iter().map(|path| match chunks(&path) {
            Ok(chunks) => (path, Some(chunks), None),
            Err(error) => (path, None, Some(error)),
        });
        let rows = opened.flat_map(|(path, chunks, error)| {
            let chunks = chunks.into_iter().flatten().chain(error.map(Err));
            chunks.map(move |rows| Ok(Chunk { path: path.clone(), rows: rows? }))
        });
        Ok(rows.map(move |chunk: Result<Chunk>| {
            let mut chunk: Chunk = chunk?;
            if let Some(times) = &mut times {
                let counted: Vec<(SourceRow, usize)> = chunk.rows.into_iter().zip(times).collect();
                chunk.rows = counted.into_iter().flat_map(|(row, times)| std::iter::repeat_n(row, times)).collect();
            }
            Ok(chunk)
        }))
    }
}

/// How often each of `total` rows is taken when `wanted` are.
fn times_taken(total: usize, wanted: usize, shuffle: bool, seed: u64) -> Vec<usize> {
    let mut times = vec![wanted / total; total];
    let rest = wanted % total;
    if shuffle {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        index::sample(&mut random, total, rest).into_iter().for_each(|row| times[row] += 1);
    } else {
        times[..rest].iter_mut().for_each(|t| *t += 1);
    }
    times
}

/// The file itself, a folder's data files by name, or those of a hub's dataset.
fn data_files(path: &Path) -> Result<Vec<PathBuf>> {
    let named = path.to_str().filter(|p| p.contains("::") && !path.exists());
    if let Some(text) = named {
        let name = Name::parse(text).ok_or_else(|| {
            Error::input("is not a file, and cannot be the name of a dataset").at(text).help("name it hf::owner/name")
        })?;
        let kinds = kinds();
        return hub::dataset(&name, &kinds.iter().map(String::as_str).collect::<Vec<_>>());
    }
    if !path.is_dir() {
        // Whoever knows other tools writes no prefix.
        let id =
            path.to_str().filter(|text| !path.exists() && path.extension().is_none() && Name::parse(text).is_some());
        return match id {
            Some(id) => Err(Error::input("is neither a file nor a folder")
                .at(id)
                .help(format!("a dataset of Hugging Face is named --dataset hf::{id}"))),
            None => Ok(vec![path.to_owned()]),
        };
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).reading(path)? {
        let file = entry.reading(path)?.path();
        // A hidden file is an editor's or a system's.
        let hidden = file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && file.is_file() && is_known(&file)? {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::input("the folder holds no data file").at(path.display()).help(known_kinds()));
    }
    Ok(files)
}
