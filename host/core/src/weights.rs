//! A checkpoint's tensors: safetensors files, mapped into memory, read where they are needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::{Layout, ModelGraph, Node, Weight, renamed};
use half::bf16;
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::{Error, IoContext, Result};
use crate::progress;
use crate::storage::Quantization;

/// Bytes of a sample of a file, and samples of a file, by which its content is known: reading 15 GB would take a minute.
const SAMPLE: usize = 4096;
const SAMPLES: usize = 1024;

/// The one file of a checkpoint that is not in shards.
pub const SINGLE: &str = "model.safetensors";
/// What names the shards of one that is.
pub const INDEX: &str = "model.safetensors.index.json";

/// The files of a checkpoint folder beside its weights, as far as anything here or the programs that serve models reads them.
pub const FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// The safetensors of a model folder: one file, or shards with an index.
pub struct Checkpoint {
    shards: Vec<Shard>,
    /// Every tensor by its name in the files.
    tensors: BTreeMap<String, Entry>,
    /// How the files name a graph's tensors.
    layout: Layout,
    folder: PathBuf,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// A file as it stands.
pub struct Part<'a> {
    /// Its path.
    pub path: &'a Path,
    /// Its first bytes: the header, and before it the header's length.
    pub header: &'a [u8],
    /// Names and bytes of its tensors, which fill the rest in this order.
    pub tensors: Vec<(String, &'a [u8])>,
}

/// A tensor, and where it lies.
struct Entry {
    /// Which file.
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Which bytes of it.
    bytes: Range<usize>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards of `model.safetensors.index.json`.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        let index = folder.join(INDEX);
        let single = folder.join(SINGLE);
        let files = if single.is_file() {
            vec![single]
        } else if index.is_file() {
            shard_files(&index)?
        } else {
            return Err(Error::input("holds neither model.safetensors nor model.safetensors.index.json")
                .at(folder.display())
                .help("only safetensors checkpoints are read; convert .bin files with transformers' save_pretrained"));
        };
        let shards = files.into_iter().map(Shard::open).collect::<Result<Vec<_>>>()?;
        let mut tensors = BTreeMap::new();
        for (at, shard) in shards.iter().enumerate() {
            for (name, entry) in shard.entries(at)? {
                if let Some(Entry { shard: other, .. }) = tensors.insert(name.clone(), entry) {
                    let place = shards[other].path.display();
                    return Err(Error::input(format!("tensor '{name}' is in {place} too")).at(shard.path.display()));
                }
            }
        }
        Ok(Checkpoint { shards, tensors, layout: Layout::new(), folder: folder.to_owned() })
    }

    /// Opens the checkpoint of a graph: it has every tensor of it in its shape, by the graph's names or in one of its layouts, and
    /// no other but those that the graph names as unused. Only headers are read, so that nothing is allocated for sizes that a
    /// config alone states.
    pub fn of(folder: &Path, graph: &ModelGraph) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint::open(folder)?;
        let own = Layout::new();
        let misfits = |layout: &&Layout| graph.weights().filter(|(p, w)| !checkpoint.fits(layout, p, w)).count();
        // The first of those that fit best.
        let best =
            std::iter::once(&own).chain(&graph.layouts).map(|l| (misfits(&l), l)).min_by_key(|(count, _)| *count);
        let (missing, layout) = best.unwrap_or((0, &own));
        checkpoint.layout = layout.clone();
        graph.weights().try_for_each(|(prefix, weight)| checkpoint.entry(prefix, weight).map(drop)).map_err(|e| {
            let (all, ways) = (graph.weights().count(), 1 + graph.layouts.len());
            let fits = format!("{} of the model's {all} tensors are in its files", all - missing);
            let by = if ways == 1 { String::new() } else { format!(" by the best of {ways} ways to name them") };
            let more = checkpoint.extra(graph).map(|(name, _)| format!(", where '{name}' is not part of the model"));
            e.help(format!("{OTHER_MODEL}: {fits}{by}{}", more.unwrap_or_default()))
        })?;
        graph.weights().try_for_each(|(prefix, weight)| checkpoint.raw(prefix, weight).map(drop))?;
        match checkpoint.extra(graph) {
            Some((name, entry)) => Err(Error::input(format!("tensor '{name}' is not part of the model's graph"))
                .at(checkpoint.shards[entry.shard].path.display())
                .help("the checkpoint has a part that the plugin does not know; training without it would be wrong")),
            None => Ok(checkpoint),
        }
    }

    /// A tensor that the graph neither reads nor names as unused.
    fn extra(&self, graph: &ModelGraph) -> Option<(&str, &Entry)> {
        let needed: BTreeSet<String> = graph.weights().map(|(prefix, weight)| self.name(prefix, weight)).collect();
        let unused = |name: &str| graph.unused_tensors.iter().any(|p| matches(p, name));
        let mut tensors = self.tensors.iter().map(|(name, entry)| (name.as_str(), entry));
        tensors.find(|(name, _)| !needed.contains(*name) && !unused(name))
    }

    /// Whether a weight is there in its shape.
    fn fits(&self, layout: &Layout, prefix: &str, weight: &Weight) -> bool {
        let entry = renamed(layout, &format!("{prefix}{}", weight.tensor)).and_then(|name| self.tensors.get(&name));
        entry.is_some_and(|entry| same_shape(&entry.shape, &weight.shape))
    }

    /// The name of a weight of the graph in the files.
    pub fn name(&self, prefix: &str, weight: &Weight) -> String {
        let own = format!("{prefix}{}", weight.tensor);
        renamed(&self.layout, &own).unwrap_or(own)
    }

    /// A weight of the graph in its shape.
    fn entry(&self, prefix: &str, weight: &Weight) -> Result<&Entry> {
        let name = self.name(prefix, weight);
        match self.tensors.get(&name) {
            Some(entry) if same_shape(&entry.shape, &weight.shape) => Ok(entry),
            Some(Entry { shape, shard, .. }) => {
                let what = format!("tensor '{name}' has shape {shape:?}, the model needs {:?}", weight.shape);
                Err(Error::input(what).at(self.shards[*shard].path.display()))
            }
            None => {
                let what = format!("tensor '{name}' of shape {:?} is missing", weight.shape);
                Err(Error::input(what).at(self.folder.display()))
            }
        }
    }

    /// A weight of the graph as it lies in its file: its type, which is one of bf16, f16 and f32, and its bytes. Its shape is
    /// checked.
    pub fn raw(&self, prefix: &str, weight: &Weight) -> Result<(DType, &[u8])> {
        progress::advance();
        let entry = self.entry(prefix, weight).map_err(|e| e.help(OTHER_MODEL))?;
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                let name = self.name(prefix, weight);
                let what = format!("tensor '{name}' is of type {other:?}; bf16, f16 and f32 are read");
                return Err(Error::input(what).at(self.shards[entry.shard].path.display()));
            }
        };
        Ok((dtype, self.shards[entry.shard].bytes(entry)))
    }

    /// A weight of the graph as a CPU tensor in f32.
    pub fn load(&self, prefix: &str, weight: &Weight) -> Result<Tensor> {
        let (dtype, bytes) = self.raw(prefix, weight)?;
        let tensor = Tensor::from_raw_buffer(bytes, dtype, &weight.shape, &Device::Cpu)?.to_dtype(DType::F32)?;
        self.leave(bytes);
        Ok(tensor)
    }

    /// Gives back the pages of a file's bytes that were copied: the weights would else be in memory twice while they load.
    fn leave(&self, bytes: &[u8]) {
        for map in self.shards.iter().map(|s| &s.map) {
            let Some(first) = (bytes.as_ptr() as usize).checked_sub(map.as_ptr() as usize) else { continue };
            if first + bytes.len() <= map.len() {
                // SAFETY: the mapping is of a file and only read, so that a page which is left is read from the file again.
                let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, first, bytes.len()) };
            }
        }
    }

    /// As [`load`](Self::load), but a matrix in bf16 stays what it is.
    pub fn load_kept(&self, prefix: &str, weight: &Weight) -> Result<Tensor> {
        match self.raw(prefix, weight)? {
            (DType::BF16, bytes) if weight.shape.len() > 1 => {
                let mut values = Vec::with_capacity(bytes.len() / 2);
                #[cfg(target_os = "linux")]
                in_huge_pages(&mut values);
                values.extend(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)));
                self.leave(bytes);
                Ok(Tensor::from_vec(values, weight.shape.as_slice(), &Device::Cpu)?)
            }
            _ => self.load(prefix, weight),
        }
    }

    /// A weight, quantised. What a checkpoint has in more than bf16 is rounded to that first, as it is for a model in bf16.
    pub fn load_packed(&self, prefix: &str, weight: &Weight, kind: Quantization) -> Result<Vec<u8>> {
        let tensor = self.load(prefix, weight)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
        Ok(kind.pack(&weight.shape, &tensor.flatten_all()?.to_vec1()?))
    }

    /// A range of a weight's values, without touching the others, in f32.
    pub fn load_range(&self, prefix: &str, weight: &Weight, range: &Range<usize>) -> Result<Vec<f32>> {
        let (dtype, bytes) = self.raw(prefix, weight)?;
        let size = dtype.size_in_bytes();
        let own = &bytes[range.start * size..range.end * size];
        let values = Tensor::from_raw_buffer(own, dtype, &[range.len()], &Device::Cpu)?.to_dtype(DType::F32)?;
        self.leave(own);
        Ok(values.to_vec1()?)
    }

    /// A text that changes when the weights do: path, size and times of every file. The time of its last change in any respect
    /// cannot be set, so that a file which was written over, with its old time of modification put back, is another.
    pub fn identity(&self) -> Result<String> {
        let mut text = String::new();
        for shard in &self.shards {
            text += &crate::files::identity(&shard.path)?;
        }
        Ok(text)
    }

    /// A text that other weights do not have, wherever they lie: name and size of every file, and a hash of samples of it.
    pub fn content(&self) -> Result<String> {
        let mut text = String::new();
        for shard in &self.shards {
            let name = shard.path.file_name().unwrap_or_default().to_string_lossy();
            let samples = shard.map.chunks(SAMPLE).step_by((shard.map.len() / SAMPLE / SAMPLES).max(1));
            let hash = samples.fold(Sha256::new(), |hash, sample| hash.chain_update(sample)).finalize();
            text += &format!("{name} {} {hash:x}\n", shard.map.len());
        }
        Ok(text)
    }

    /// The first number that is NaN or infinite, with its tensor. It reads every tensor from end to end, for a run that does not
    /// know why its numbers are not finite.
    pub fn first_not_finite(&self) -> Result<Option<String>> {
        for (name, entry) in &self.tensors {
            let Shard { path, .. } = &self.shards[entry.shard];
            let bytes = self.shards[entry.shard].bytes(entry);
            // The numbers whose exponent's bits are all set.
            let at = match entry.dtype {
                Dtype::F32 => {
                    bytes.as_chunks().0.iter().position(|b| u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000)
                }
                Dtype::BF16 => bytes.as_chunks().0.iter().position(|b| u16::from_le_bytes(*b) & 0x7f80 == 0x7f80),
                Dtype::F16 => bytes.as_chunks().0.iter().position(|b| u16::from_le_bytes(*b) & 0x7c00 == 0x7c00),
                _ => None,
            };
            if let Some(at) = at {
                let (shape, file) = (&entry.shape, path.display());
                return Ok(Some(format!(
                    "number {at} of tensor '{name}' of shape {shape:?} in {file} is NaN or infinite"
                )));
            }
        }
        Ok(None)
    }

    /// Every file, for one that is to be like it.
    pub fn parts(&self) -> impl Iterator<Item = Result<Part<'_>>> {
        self.shards.iter().map(Shard::part)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|s| s.map.len()).sum()
    }
}

/// Asks the system to back memory that nothing was written to yet with pages of 2 MiB, as far as they lie in it. Numbers that are
/// read from end to end for every token otherwise wait for the addresses of many small ones.
#[cfg(target_os = "linux")]
fn in_huge_pages<T>(room: &mut Vec<T>) {
    const HUGE: usize = 1 << 21;
    let (start, bytes) = (room.as_mut_ptr() as usize, room.capacity() * size_of::<T>());
    let (first, end) = (start.next_multiple_of(HUGE), (start + bytes) / HUGE * HUGE);
    if first < end {
        // SAFETY: these addresses are of `room` alone, and the advice changes no value there. One that is not taken costs nothing.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
    }
}

/// A block of a model, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockId {
    /// From token ids to the residual stream.
    Embed,
    /// A layer, counted from 0.
    Layer(usize),
    /// From the residual stream to what is projected.
    Head,
    /// The last node of the head, which computes logits.
    Projection,
}

/// Every block of a graph in the order it runs, with the prefix of its tensors and its nodes.
pub fn blocks(graph: &ModelGraph) -> impl Iterator<Item = (BlockId, &str, &[Node])> {
    let layer = |(at, l): (usize, &'_ dpo_plugin_api::graph::Layer)| {
        (BlockId::Layer(at), graph.layers[at].prefix.as_str(), graph.blocks[l.block].nodes.as_slice())
    };
    let (head, projection) = graph.head.nodes.split_at(graph.head.nodes.len().saturating_sub(1));
    std::iter::once((BlockId::Embed, "", graph.embed.nodes.as_slice()))
        .chain(graph.layers.iter().enumerate().map(layer))
        .chain([(BlockId::Head, "", head), (BlockId::Projection, "", projection)])
}

/// Whether `--quantization` is for a weight: the matrices of a layer's linears.
pub fn is_quantized(block: BlockId, node: &Node, weight: &Weight) -> bool {
    matches!(block, BlockId::Layer(_)) && node.op == "linear" && weight.role == "weight"
}

/// Whether two shapes are the same. PyTorch saves a scalar as `[]`, others write it as a vector of one.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    a == b || matches!((a, b), ([], [1]) | ([1], []))
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

impl Shard {
    fn open(path: PathBuf) -> Result<Shard> {
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
    fn entries(&self, shard: usize) -> Result<Vec<(String, Entry)>> {
        let (first, header) = self.header()?;
        let entry = |(name, info): (String, &TensorInfo)| {
            let bytes = first + info.data_offsets.0..first + info.data_offsets.1;
            (name, Entry { shard, dtype: info.dtype, shape: info.shape.clone(), bytes })
        };
        Ok(header.tensors().into_iter().map(entry).collect())
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.bytes.clone()]
    }

    fn part(&self) -> Result<Part<'_>> {
        let (first, header) = self.header()?;
        let (first, data) = self.map.split_at(first);
        let bytes = |name: &str| header.info(name).and_then(|t| data.get(t.data_offsets.0..t.data_offsets.1));
        let tensors = header.offset_keys().into_iter().map(|name| {
            let bytes = bytes(&name).unwrap_or_default();
            (name, bytes)
        });
        Ok(Part { path: &self.path, header: first, tensors: tensors.collect() })
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

const OTHER_MODEL: &str = "config.json and the weights are of different models";

fn shard_files(index: &Path) -> Result<Vec<PathBuf>> {
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

/// Whether a name is of a pattern in which `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => {
            let Some(rest) = name.strip_prefix(head) else { return false };
            (0..=rest.len()).any(|at| rest.is_char_boundary(at) && matches(tail, &rest[at..]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{matches, same_shape};

    #[test]
    fn a_scalar_is_a_vector_of_one() {
        assert!(same_shape(&[], &[1]) && same_shape(&[1], &[]) && same_shape(&[2, 3], &[2, 3]));
        assert!(!same_shape(&[], &[2]) && !same_shape(&[1, 1], &[1]));
    }

    #[test]
    fn patterns() {
        assert!(matches("model.layers.*.inv_freq", "model.layers.11.self_attn.inv_freq"));
        assert!(!matches("model.layers.*.inv_freq", "model.layers.11.self_attn.inv_freq.x"));
        assert!(matches("lm_head.weight", "lm_head.weight") && !matches("lm_head", "lm_head.weight"));
    }
}
