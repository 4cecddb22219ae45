//! What `--dataset` names: a file, the files of a folder or of a hub's dataset, and how many of their rows.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use super::read::{Chunk, SourceRow, chunks, is_known, kinds, known_kinds};
use dpo_core::console;
use dpo_core::error::{Error, IoContext, Result};
use dpo_hub::{self as hub, Name, Splits};

/// A `--dataset` argument: a file or a folder, and how many rows of it are wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// The file or folder.
    pub path: PathBuf,
    /// `#N`: this many rows, by sampling or by repeating.
    pub rows: Option<usize>,
    /// Its files, once they were looked for.
    files: OnceLock<Vec<PathBuf>>,
}

/// Files beside the rows that say something of them.
const ABOUT: [&str; 7] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "metadata.json",
    "config.json",
    "info.json",
];
/// How far below a folder its rows may be.
const DEEPEST: usize = 3;
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
            Some((path, rows)) => Ok(Source { path: path.into(), rows: Some(rows), files: OnceLock::new() }),
            None => Ok(Source { path: argument.into(), rows: None, files: OnceLock::new() }),
        }
    }

    /// Its files: itself, the data files of a folder by name, or those of a hub's dataset.
    ///
    /// # Errors
    /// A folder without data files; a hub that does not answer.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        if let Some(files) = self.files.get() {
            return Ok(files.clone());
        }
        let files = data_files(&self.path)?;
        Ok(self.files.get_or_init(|| files).clone())
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

/// The file itself, or the files of a folder or of a hub's dataset: those of the training split where there are splits.
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
    collect(path, "", DEEPEST, &mut files)?;
    if files.is_empty() {
        return Err(Error::input("the folder holds no data file").at(path.display()).help(known_kinds()));
    }
    let splits = Splits::of(&files);
    splits.note_left_out(&path.display().to_string());
    Ok(splits.files.iter().map(|file| path.join(file)).collect())
}

/// Data files of a folder, as paths within the dataset: those that it holds itself, else those of its folders, such as the
/// `data` of a cloned repository or the splits of a `DatasetDict`.
fn collect(folder: &Path, within: &str, deep: usize, into: &mut Vec<String>) -> Result<()> {
    if let Some(saved) = saved_files(&folder.join("state.json")) {
        into.extend(saved.into_iter().map(|file| format!("{within}{file}")));
        return Ok(());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).reading(folder)? {
        let name = entry.reading(folder)?.file_name();
        // A hidden file is an editor's or a system's.
        names.extend(name.into_string().ok().filter(|name| !name.starts_with('.') && !ABOUT.contains(&name.as_str())));
    }
    names.sort();
    let before = into.len();
    for name in &names {
        let file = folder.join(name);
        if file.is_file() && is_known(&file)? {
            into.push(format!("{within}{name}"));
        }
    }
    if into.len() == before && deep > 0 {
        for name in names.iter().filter(|name| folder.join(name).is_dir()) {
            collect(&folder.join(name), &format!("{within}{name}/"), deep - 1, into)?;
        }
    }
    Ok(())
}

/// The files that Hugging Face's `save_to_disk` lists in its `state.json`: others beside them are results that it kept.
fn saved_files(state: &Path) -> Option<Vec<String>> {
    let state: Value = serde_json::from_str(&std::fs::read_to_string(state).ok()?).ok()?;
    // A name alone: no stranger's file leads out of its folder.
    let name = |file: &Value| file.get("filename")?.as_str().filter(|n| !n.contains(['/', '\\'])).map(str::to_owned);
    state.get("_data_files")?.as_array()?.iter().map(name).collect()
}
