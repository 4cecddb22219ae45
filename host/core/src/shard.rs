//! A file of safetensors, mapped into memory: what its header says, and where its tensors lie.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::{Error, IoContext, Result};
use crate::quantized::Stored;

/// Bytes of a sample of a file, and samples of a file, by which its content is known: reading 15 GB would take a minute.
const SAMPLE: usize = 4096;
const SAMPLES: usize = 1024;

/// The one file of a checkpoint that is not in shards.
pub const SINGLE: &str = "model.safetensors";
/// What names the shards of one that is.
pub const INDEX: &str = "model.safetensors.index.json";

/// A file.
pub(crate) struct Shard {
    /// Its path.
    pub(crate) path: PathBuf,
    map: Mmap,
}

/// A tensor of a file.
#[derive(Clone)]
pub(crate) struct Entry {
    /// Which file of a checkpoint.
    pub(crate) shard: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Which bytes of it.
    bytes: Range<usize>,
}

/// A tensor's shape and values.
pub type Values = (Vec<usize>, Vec<f32>);

/// Tensors of one safetensors file as f32 values with their shapes, by name.
pub fn read_f32(path: &Path) -> Result<BTreeMap<String, Values>> {
    let shard = Shard::open(path.to_owned())?;
    let mut tensors = BTreeMap::new();
    for (name, entry) in shard.entries(0)? {
        let bytes = shard.bytes(&entry);
        let values = match entry.dtype {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::BF16 => bytes.chunks_exact(2).map(|b| f32::from_le_bytes([0, 0, b[0], b[1]])).collect(),
            Dtype::F16 => {
                let tensor = Tensor::from_raw_buffer(bytes, DType::F16, &entry.shape, &Device::Cpu)?;
                tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?
            }
            other => return Err(Error::input(format!("tensor '{name}' is of type {other:?}")).at(path.display())),
        };
        tensors.insert(name, (entry.shape, values));
    }
    Ok(tensors)
}

/// Some rows of a matrix in bf16, f16 or f32.
pub(crate) fn read_rows(dtype: DType, bytes: &[u8], columns: usize, rows: &[usize]) -> Vec<f32> {
    let size = columns * dtype.size_in_bytes();
    let mut values = Vec::with_capacity(rows.len() * columns);
    for row in rows {
        let own = &bytes[row * size..][..size];
        match dtype {
            DType::BF16 => values.extend(own.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32())),
            DType::F16 => values.extend(own.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
            _ => values.extend(own.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        }
    }
    values
}

impl Shard {
    pub(crate) fn open(path: PathBuf) -> Result<Shard> {
        let file = File::open(&path).reading(&path)?;
        // SAFETY: the mapping is only read. A file that another program cuts short while we read it would end this process;
        // checkpoints are replaced by renaming, not rewritten in place.
        let map = unsafe { Mmap::map(&file) }.reading(&path)?;
        Ok(Shard { path, map })
    }

    /// Where the file's numbers begin, and what its header says of them.
    fn header(&self) -> Result<(usize, Metadata)> {
        let (length, header) = SafeTensors::read_metadata(&self.map).map_err(|e| {
            let cause = cut_tensor(&self.map).unwrap_or_else(|| format!("is not a safetensors file: {e}"));
            Error::input(cause).at(self.path.display()).help("download or copy the file again")
        })?;
        // The length is eight bytes itself.
        Ok((8 + length, header))
    }

    /// Every tensor of the file, which is that of this number.
    pub(crate) fn entries(&self, shard: usize) -> Result<Vec<(String, Entry)>> {
        let (first, header) = self.header()?;
        let entry = |(name, info): (String, &TensorInfo)| {
            let bytes = first + info.data_offsets.0..first + info.data_offsets.1;
            (name, Entry { shard, dtype: info.dtype, shape: info.shape.clone(), bytes })
        };
        Ok(header.tensors().into_iter().map(entry).collect())
    }

    pub(crate) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.bytes.clone()]
    }

    pub(crate) fn stored<'a>(&'a self, entry: &'a Entry) -> Stored<'a> {
        Stored { dtype: entry.dtype, shape: &entry.shape, bytes: self.bytes(entry) }
    }

    /// Gives back the pages of a tensor's bytes that were copied: the weights would else be in memory twice while they load.
    pub(crate) fn leave(&self, entry: &Entry) {
        self.leave_range(entry, 0..entry.bytes.len());
    }

    /// The same, of some of its bytes.
    pub(crate) fn leave_range(&self, entry: &Entry, bytes: Range<usize>) {
        let first = entry.bytes.start + bytes.start;
        // SAFETY: the mapping is of a file and only read, so that a page which is left is read from the file again.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, first, bytes.len()) };
    }

    /// Bytes of the file.
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// A line that another file does not have: name, size, and a hash of samples.
    pub(crate) fn content(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let samples = self.map.chunks(SAMPLE).step_by((self.map.len() / SAMPLE / SAMPLES).max(1));
        let hash = samples.fold(Sha256::new(), |hash, sample| hash.chain_update(sample)).finalize();
        format!("{name} {} {hash:x}\n", self.map.len())
    }

    /// The header as it stands, and before it its length.
    pub(crate) fn header_bytes(&self) -> Result<&[u8]> {
        Ok(&self.map[..self.header()?.0])
    }
}

impl Entry {
    /// Where it begins in its file.
    pub(crate) fn first(&self) -> usize {
        self.bytes.start
    }

    /// How many bytes it has.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// The first tensor whose bytes a cut file no longer holds.
fn cut_tensor(file: &[u8]) -> Option<String> {
    if file.starts_with(b"version https://git-lfs") {
        return Some("is a pointer of Git LFS, not the file itself: `git lfs pull` in its folder fetches that".into());
    }
    let length = u64::from_le_bytes(file.get(..8)?.try_into().ok()?) as usize;
    let Some(header) = file.get(8..8usize.checked_add(length)?) else {
        return Some(format!("is cut short: its header has {length} bytes, the file {}", file.len()));
    };
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).ok()?;
    let there = file.len() - 8 - length;
    let end = |v: &Value| v.get("data_offsets")?.get(1)?.as_u64().map(|e| e as usize);
    let mut cut: Vec<_> =
        header.iter().filter_map(|(n, v)| Some((end(v)?, n, v))).filter(|(e, ..)| *e > there).collect();
    cut.sort_by_key(|(e, ..)| *e);
    let (end, name, value) = cut.first()?;
    let shape = value.get("shape").map(Value::to_string).unwrap_or_default();
    Some(format!("is cut short at tensor '{name}' of shape {shape}: needs {end} bytes of data, has {there}"))
}

/// The shards that an index names, all of which are there.
pub(crate) fn shard_files(index: &Path) -> Result<Vec<PathBuf>> {
    let files: Vec<PathBuf> = shard_names(index)?.into_iter().map(|name| index.with_file_name(name)).collect();
    match files.iter().find(|f| !f.is_file()) {
        Some(missing) => Err(Error::input(format!("names {}, which is missing", missing.display()))
            .at(index.display())
            .help("copy or fetch all files of the model")),
        None => Ok(files),
    }
}

/// The files that an index names, all of which belong into its folder.
pub fn shard_names(index: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(index).reading(index)?;
    let wrong = |what: String| Error::input(what).at(index.display());
    let value: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    let Some(map) = value.get("weight_map").and_then(Value::as_object) else {
        return Err(wrong("has no weight_map".into()));
    };
    let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    let plain = |n: &str| Path::new(n).file_name().is_some_and(|f| f == n);
    if let Some(name) = names.iter().find(|n| !plain(n)) {
        return Err(wrong(format!("names '{name}', which is not a file of this folder")));
    }
    names.sort_unstable();
    names.dedup();
    Ok(names.into_iter().map(str::to_owned).collect())
}
