//! A checkpoint's tensors, read where they are needed: from its files, and where these are quantised as the values that they stand for.

mod assembly;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::{Assembly, Layout, ModelGraph, Node, Weight, renamed};
use dpo_plugin_api::ops::is_module;
use half::bf16;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::memory::in_huge_pages;
use crate::mxfp4::Mxfp4;
use crate::nf4::Nf4;
use crate::progress;
use crate::quantized::{self, Method, Parts};
pub(crate) use crate::shard::read_rows;
use crate::shard::{Entry, Shard, shard_files};
pub use crate::shard::{INDEX, SINGLE, Values, read_f32, shard_names};
use crate::storage::{Numbers, Quantization};
pub use assembly::PartOf;
use assembly::Place;

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
    tensors: BTreeMap<String, Held>,
    /// How the files name a graph's tensors.
    layout: Layout,
    /// Of what parts they may have some.
    assemblies: Vec<Assembly>,
    folder: PathBuf,
}

/// A tensor, and where it lies.
enum Held {
    /// In a file, as it is.
    Plain(Entry),
    /// In several tensors, quantised.
    Quantized { method: Method, shape: Vec<usize>, parts: BTreeMap<&'static str, Entry> },
}

/// A file, for one that is to be like it. What is quantised in it is not, there.
pub struct Part<'a> {
    /// Its path.
    pub path: &'a Path,
    /// Its first bytes: the header, and before it the header's length.
    pub header: Cow<'a, [u8]>,
    /// Names of its tensors, whose [bytes](Checkpoint::bytes_of) fill the rest in this order.
    pub tensors: Vec<String>,
    /// How many these bytes are.
    pub bytes: usize,
}

impl Held {
    fn shape(&self) -> &[usize] {
        match self {
            Held::Plain(entry) => &entry.shape,
            Held::Quantized { shape, .. } => shape,
        }
    }

    /// What of it lies in files. Of one that is quantised the first is where the others are looked for.
    fn entries(&self) -> impl Iterator<Item = &Entry> {
        let (plain, parts) = match self {
            Held::Plain(entry) => (Some(entry), None),
            Held::Quantized { parts, .. } => (None, Some(parts.values())),
        };
        plain.into_iter().chain(parts.into_iter().flatten())
    }

    /// Its file, and where it begins there.
    fn place(&self) -> (usize, usize) {
        self.entries().map(|entry| (entry.shard, entry.first())).min().unwrap_or_default()
    }
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
        let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
        for (at, shard) in shards.iter().enumerate() {
            for (name, entry) in shard.entries(at)? {
                if let Some(Entry { shard: other, .. }) = entries.insert(name.clone(), entry) {
                    let place = shards[other].path.display();
                    return Err(Error::input(format!("tensor '{name}' is in {place} too")).at(shard.path.display()));
                }
            }
        }
        let quantized = match method_of(folder) {
            Some(method) => gathered(method, &shards, &mut entries)?,
            None => BTreeMap::new(),
        };
        let mut tensors: BTreeMap<String, Held> = entries.into_iter().map(|(n, e)| (n, Held::Plain(e))).collect();
        tensors.extend(quantized);
        let (layout, assemblies) = Default::default();
        Ok(Checkpoint { shards, tensors, layout, assemblies, folder: folder.to_owned() })
    }

    /// Opens the checkpoint of a graph: it has every tensor of it in its shape, by the graph's names or in one of its layouts, and
    /// no other but those that the graph names as unused. Only headers are read, so that nothing is allocated for sizes that a
    /// config alone states.
    pub fn of(folder: &Path, graph: &ModelGraph) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint { assemblies: graph.assemblies.clone(), ..Checkpoint::open(folder)? };
        let own = Layout::new();
        let misfits = |layout: &&Layout| {
            graph.weights().filter(|(prefix, weight)| checkpoint.place_in(layout, prefix, weight).is_err()).count()
        };
        // The first of those that fit best.
        let best =
            std::iter::once(&own).chain(&graph.layouts).map(|l| (misfits(&l), l)).min_by_key(|(count, _)| *count);
        let (missing, layout) = best.unwrap_or((0, &own));
        checkpoint.layout = layout.clone();
        let place =
            |(prefix, weight): (&str, &Weight)| checkpoint.place_in(&checkpoint.layout, prefix, weight).map(drop);
        graph.weights().try_for_each(place).map_err(|e| {
            let (all, ways) = (graph.weights().count(), 1 + graph.layouts.len());
            let fits = format!("{} of the model's {all} tensors are in its files", all - missing);
            let by = if ways == 1 { String::new() } else { format!(" by the best of {ways} ways to name them") };
            let more = checkpoint.extra(graph).map(|(name, _)| format!(", where '{name}' is not part of the model"));
            e.help(format!("{OTHER_MODEL}: {fits}{by}{}", more.unwrap_or_default()))
        })?;
        graph.weights().try_for_each(|(prefix, weight)| checkpoint.place(prefix, weight).map(drop))?;
        match checkpoint.extra(graph) {
            Some((name, held)) => Err(Error::input(format!("tensor '{name}' is not part of the model's graph"))
                .at(checkpoint.path(held).display())
                .help("the checkpoint has a part that the plugin does not know; training without it would be wrong")),
            None => Ok(checkpoint),
        }
    }

    /// A tensor that the graph neither reads nor names as unused.
    fn extra(&self, graph: &ModelGraph) -> Option<(&str, &Held)> {
        let names = |(prefix, weight): (&str, &Weight)| self.parts_of(prefix, weight).unwrap_or_default();
        let needed: BTreeSet<String> = graph.weights().flat_map(names).map(|part| part.name).collect();
        let unused = |name: &str| graph.unused_tensors.iter().any(|p| matches(p, name));
        let mut tensors = self.tensors.iter().map(|(name, held)| (name.as_str(), held));
        tensors.find(|(name, held)| !needed.contains(*name) && !unused(name) && !self.is_no_bias(name, held))
    }

    /// Whether it is the bias of zeros that AutoGPTQ writes for linears without one.
    fn is_no_bias(&self, name: &str, held: &Held) -> bool {
        let weight = name.strip_suffix("bias").and_then(|module| self.tensors.get(&format!("{module}weight")));
        let is_zero = |entry: &Entry| self.shards[entry.shard].bytes(entry).iter().all(|byte| *byte == 0);
        matches!((weight, held), (Some(Held::Quantized { .. }), Held::Plain(entry)) if is_zero(entry))
    }

    fn path(&self, held: &Held) -> &Path {
        &self.shards[held.place().0].path
    }

    /// The name of a weight of the graph in the files.
    pub fn name(&self, prefix: &str, weight: &Weight) -> String {
        let own = format!("{prefix}{}", weight.tensor);
        renamed(&self.layout, &own).unwrap_or(own)
    }

    /// Where a weight of the graph lies, in its shape, and of a type that is read.
    fn place(&self, prefix: &str, weight: &Weight) -> Result<Place<'_>> {
        let place = self.place_in(&self.layout, prefix, weight).map_err(|e| e.help(OTHER_MODEL))?;
        let parts = match &place {
            Place::Whole(held) => std::slice::from_ref(held),
            Place::Parts(_, parts) => parts,
        };
        let unread = |held: &&&Held| matches!(held, Held::Plain(entry) if dtype(entry).is_none());
        if let Some(Held::Plain(entry)) = parts.iter().find(unread) {
            let name = self.name(prefix, weight);
            let what = format!("tensor '{name}' is of type {:?}; bf16, f16 and f32 are read", entry.dtype);
            return Err(Error::input(what).at(self.shards[entry.shard].path.display()));
        }
        Ok(place)
    }

    /// The type of a weight of the graph, one of bf16, f16 and f32. Its shape is checked.
    ///
    /// # Errors
    /// A weight that is not there, or not in its shape or such a type.
    pub fn dtype(&self, prefix: &str, weight: &Weight) -> Result<DType> {
        match self.place(prefix, weight)? {
            Place::Whole(held) => self.dtype_of(held),
            Place::Parts(_, parts) => self.dtype_of_parts(&parts),
        }
    }

    /// The type of a tensor by its name in the files.
    ///
    /// # Errors
    /// One that is not there.
    pub fn dtype_named(&self, name: &str) -> Result<DType> {
        let missing = || Error::input(format!("tensor '{name}' is missing")).at(self.folder.display());
        self.dtype_of(self.tensors.get(name).ok_or_else(missing)?)
    }

    fn dtype_of(&self, held: &Held) -> Result<DType> {
        match held {
            Held::Plain(entry) => Ok(dtype(entry).unwrap_or(DType::F32)),
            Held::Quantized { method, parts, .. } => method.dtype(&self.stored(parts)),
        }
    }

    /// A weight of the graph: its type, which is one of bf16, f16 and f32, and its bytes, as they lie in its file or, of one that is
    /// quantised or in parts, as they are computed. Its shape is checked.
    pub fn raw(&self, prefix: &str, weight: &Weight) -> Result<(DType, Cow<'_, [u8]>)> {
        progress::advance();
        let read = match self.place(prefix, weight)? {
            Place::Whole(held) => self.raw_of(held),
            Place::Parts(assembly, parts) => self.assembled(weight, assembly, &parts),
        };
        read.map_err(|e| e.at(format!("tensor '{}'", self.name(prefix, weight))))
    }

    fn raw_of<'a>(&'a self, held: &'a Held) -> Result<(DType, Cow<'a, [u8]>)> {
        match held {
            Held::Plain(entry) => {
                Ok((dtype(entry).unwrap_or(DType::F32), Cow::Borrowed(self.shards[entry.shard].bytes(entry))))
            }
            Held::Quantized { method, parts, .. } => {
                let (dtype, values) = method.values(&self.stored(parts))?;
                self.leave_held(held);
                Ok((dtype, Cow::Owned(quantized::bytes(dtype, &values))))
            }
        }
    }

    /// Gives back the pages of a tensor's bytes that were copied.
    fn leave_held(&self, held: &Held) {
        held.entries().for_each(|entry| self.shards[entry.shard].leave(entry));
    }

    fn stored<'a>(&'a self, parts: &'a BTreeMap<&'static str, Entry>) -> Parts<'a> {
        parts.iter().map(|(name, entry)| (*name, self.shards[entry.shard].stored(entry))).collect()
    }

    /// Bytes of a tensor by its name in the files, as in [`raw`](Self::raw), whatever its type.
    ///
    /// # Errors
    /// One that is not there, or is quantised wrongly.
    pub fn bytes_of(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        match self.tensors.get(name) {
            Some(Held::Plain(entry)) => Ok(Cow::Borrowed(self.shards[entry.shard].bytes(entry))),
            Some(Held::Quantized { method, parts, .. }) => {
                let (dtype, values) = method.values(&self.stored(parts))?;
                Ok(Cow::Owned(quantized::bytes(dtype, &values)))
            }
            None => Err(Error::input(format!("tensor '{name}' is missing")).at(self.folder.display())),
        }
    }

    /// Whether some of it is quantised.
    pub fn is_quantized(&self) -> bool {
        self.tensors.values().any(|held| matches!(held, Held::Quantized { .. }))
    }

    /// A weight of the graph as a CPU tensor in f32.
    pub fn load(&self, prefix: &str, weight: &Weight) -> Result<Tensor> {
        let (dtype, bytes) = self.raw(prefix, weight)?;
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, &weight.shape, &Device::Cpu)?.to_dtype(DType::F32)?;
        self.leave(prefix, weight, 0..bytes.len());
        Ok(tensor)
    }

    /// Gives back the pages of a weight's bytes that were copied, as far as they are a file's.
    fn leave(&self, prefix: &str, weight: &Weight, bytes: Range<usize>) {
        if let Ok(Place::Whole(Held::Plain(entry))) = self.place_in(&self.layout, prefix, weight) {
            self.shards[entry.shard].leave_range(entry, bytes);
        }
    }

    /// As [`load`](Self::load), but a matrix in bf16 stays what it is.
    pub fn load_kept(&self, prefix: &str, weight: &Weight) -> Result<Tensor> {
        match self.raw(prefix, weight)? {
            (DType::BF16, bytes) if weight.shape.len() > 1 => {
                let mut values = Vec::with_capacity(bytes.len() / 2);
                in_huge_pages(&mut values);
                values.extend(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)));
                self.leave(prefix, weight, 0..bytes.len());
                Ok(Tensor::from_vec(values, weight.shape.as_slice(), &Device::Cpu)?)
            }
            _ => self.load(prefix, weight),
        }
    }

    /// A weight, quantised: what a checkpoint has in these numbers already, or from values that are rounded to bf16, as they are for a
    /// model in bf16.
    pub fn load_packed(&self, prefix: &str, weight: &Weight, kind: Quantization) -> Result<Vec<u8>> {
        let published = match kind {
            Quantization::Nf4 => self.nf4(prefix, weight)?.map(|nf4| nf4.to_bytes()),
            Quantization::Mxfp4 => self.mxfp4(prefix, weight)?.map(|mxfp4| mxfp4.to_bytes()),
            Quantization::Fp8 => None,
        };
        if let Some(bytes) = published {
            return Ok(bytes);
        }
        let tensor = self.load(prefix, weight)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
        Ok(kind.pack(&weight.shape, &tensor.flatten_all()?.to_vec1()?))
    }

    /// The codes and scales of a weight that the checkpoint has in nf4.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn nf4(&self, prefix: &str, weight: &Weight) -> Result<Option<Nf4>> {
        match self.place(prefix, weight)? {
            Place::Whole(Held::Quantized { method, parts, .. }) => {
                method.nf4(&self.stored(parts)).map_err(|e| e.at(format!("tensor '{}'", self.name(prefix, weight))))
            }
            Place::Whole(_) | Place::Parts(..) => Ok(None),
        }
    }

    /// The codes and scales of experts that the checkpoint has in mxfp4.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn mxfp4(&self, prefix: &str, weight: &Weight) -> Result<Option<Mxfp4>> {
        match self.place(prefix, weight)? {
            Place::Parts(Assembly { transposed: true, .. }, held) => match held.as_slice() {
                [held @ Held::Quantized { method, parts, .. }] => {
                    let packed = method.mxfp4(&self.stored(parts));
                    self.leave_held(held);
                    packed.map_err(|e| e.at(format!("tensor '{}'", self.name(prefix, weight))))
                }
                _ => Ok(None),
            },
            Place::Whole(_) | Place::Parts(..) => Ok(None),
        }
    }

    /// A range of a weight's values, without touching the others, in f32.
    pub fn load_range(&self, prefix: &str, weight: &Weight, range: &Range<usize>) -> Result<Vec<f32>> {
        let (dtype, bytes) = self.raw(prefix, weight)?;
        let size = dtype.size_in_bytes();
        let own = range.start * size..range.end * size;
        let values = Tensor::from_raw_buffer(&bytes[own.clone()], dtype, &[range.len()], &Device::Cpu)?;
        let values = values.to_dtype(DType::F32)?;
        self.leave(prefix, weight, own);
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
        Ok(self.shards.iter().map(Shard::content).collect())
    }

    /// The first number that is NaN or infinite, with its tensor. It reads every tensor from end to end, for a run that does not
    /// know why its numbers are not finite.
    pub fn first_not_finite(&self) -> Result<Option<String>> {
        for (name, held) in &self.tensors {
            for entry in held.entries() {
                let shard = &self.shards[entry.shard];
                if let Some(at) = shard.stored(entry).first_not_finite() {
                    let (shape, file) = (&entry.shape, shard.path.display());
                    return Ok(Some(format!(
                        "number {at} of tensor '{name}' of shape {shape:?} in {file} is NaN or infinite"
                    )));
                }
            }
        }
        Ok(None)
    }

    /// Every file, for one that is to be like it.
    pub fn parts(&self) -> impl Iterator<Item = Result<Part<'_>>> {
        self.shards.iter().enumerate().map(|(at, shard)| self.part(at, shard))
    }

    fn part<'a>(&'a self, at: usize, shard: &'a Shard) -> Result<Part<'a>> {
        let mut own: Vec<(&String, &Held)> = self.tensors.iter().filter(|(_, held)| held.place().0 == at).collect();
        own.sort_by_key(|(_, held)| held.place());
        let tensors = own.iter().map(|(name, _)| (*name).clone()).collect();
        if own.iter().all(|(_, held)| matches!(held, Held::Plain(_))) && own.len() == shard.entries(at)?.len() {
            let header = shard.header_bytes()?;
            return Ok(Part {
                path: &shard.path,
                header: Cow::Borrowed(header),
                tensors,
                bytes: shard.len() - header.len(),
            });
        }
        let (mut header, mut first) = (Map::new(), 0);
        for (name, held) in own {
            let (dtype, bytes) = match held {
                Held::Plain(entry) => (entry.dtype, shard.bytes(entry).len()),
                Held::Quantized { method, parts, shape } => {
                    let dtype = method.dtype(&self.stored(parts))?;
                    (safetensors_type(dtype), shape.iter().product::<usize>() * dtype.size_in_bytes())
                }
            };
            let end = first + bytes;
            header.insert(name.clone(), json!({"dtype": dtype, "shape": held.shape(), "data_offsets": [first, end]}));
            first = end;
        }
        let mut text = Value::Object(header).to_string();
        // As safetensors' own writer does, tensors begin at multiples of eight.
        text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
        let header = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        Ok(Part { path: &shard.path, header: Cow::Owned(header), tensors, bytes: first })
    }

    /// Bytes of all tensors, of quantised ones as they are computed.
    pub fn bytes(&self) -> usize {
        let of = |held: &Held| match held {
            Held::Plain(entry) => entry.len(),
            Held::Quantized { method, shape, parts } => {
                let dtype = method.dtype(&self.stored(parts)).unwrap_or(DType::F32);
                shape.iter().product::<usize>() * dtype.size_in_bytes()
            }
        };
        self.tensors.values().map(of).sum()
    }

    /// Bytes that a graph's weights take as [`load_kept`](Self::load_kept) has them.
    ///
    /// # Errors
    /// As [`dtype`](Self::dtype).
    pub fn kept_bytes(&self, graph: &ModelGraph) -> Result<usize> {
        let mut bytes = BTreeMap::new();
        for (prefix, weight) in graph.weights() {
            let stays = self.dtype(prefix, weight)? == DType::BF16 && weight.shape.len() > 1;
            let numbers = if stays { Numbers::Bf16 } else { Numbers::F32 };
            bytes.insert(self.name(prefix, weight), numbers.bytes_of(&weight.shape));
        }
        Ok(bytes.values().sum())
    }
}

/// How the folder's `config.json` says that its weights are quantised. What cannot be read is refused where a model is opened.
fn method_of(folder: &Path) -> Option<Method> {
    let config = std::fs::read(folder.join("config.json")).ok()?;
    Method::of(&serde_json::from_slice(&config).ok()?, &[]).ok().flatten()
}

/// Takes the tensors that make weights, which then are there by their own names.
fn gathered(method: Method, shards: &[Shard], entries: &mut BTreeMap<String, Entry>) -> Result<BTreeMap<String, Held>> {
    let module = |(name, entry): (&String, &Entry)| method.module(name, entry.dtype).map(str::to_owned);
    let modules: Vec<String> = entries.iter().filter_map(module).collect();
    let mut gathered = BTreeMap::new();
    for module in modules {
        let name = format!("{module}{}", method.weight());
        let take = |part: &&'static str| Some((*part, entries.remove(&format!("{module}{part}"))?));
        let parts: BTreeMap<&'static str, Entry> = method.parts().iter().filter_map(take).collect();
        let stored: Parts<'_> = parts.iter().map(|(name, entry)| (*name, shards[entry.shard].stored(entry))).collect();
        let shape = method.shape(&stored).map_err(|e| e.at(format!("tensor '{name}'")))?;
        gathered.insert(name, Held::Quantized { method, shape, parts });
    }
    Ok(gathered)
}

/// A type that is read.
fn dtype(entry: &Entry) -> Option<DType> {
    match entry.dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

fn safetensors_type(dtype: DType) -> Dtype {
    match dtype {
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
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

/// Whether a weight is kept as such numbers where layers are: the matrices of a layer's linears, but for those of mxfp4, and experts; but
/// not routers, which are no linears of PyTorch, and what makes a column or two, such as the gate of a shared expert: a GPU's kernels go
/// by eight, those of fp8 by sixteen inputs.
pub fn is_quantized(numbers: Numbers, block: BlockId, node: &Node, weight: &Weight) -> bool {
    let inputs = weight.shape.last().copied().unwrap_or(0);
    let of_linears = match numbers {
        Numbers::Mxfp4 => false,
        Numbers::Fp8 => inputs.is_multiple_of(16),
        _ => true,
    };
    let matrices: &[&str] = match node.op.as_str() {
        "linear" if of_linears && is_module(node) && node.width.is_multiple_of(8) => &["weight"],
        "experts" => &["gate_up", "up", "down"],
        _ => &[],
    };
    matches!(block, BlockId::Layer(_)) && matrices.contains(&weight.role.as_str())
}

/// Whether two shapes are the same but for a one before the others: PyTorch saves a scalar as `[]`, others write it as a vector of
/// one, and some a vector as a row.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    a == b || a.strip_prefix(&[1]) == Some(b) || b.strip_prefix(&[1]) == Some(a)
}

const OTHER_MODEL: &str = "config.json and the weights are of different models";

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
        assert!(same_shape(&[1, 5], &[5]) && !same_shape(&[5, 1], &[5]));
        assert!(!same_shape(&[], &[2]) && !same_shape(&[1, 1, 3], &[3]));
    }

    #[test]
    fn patterns() {
        assert!(matches("model.layers.*.inv_freq", "model.layers.11.self_attn.inv_freq"));
        assert!(!matches("model.layers.*.inv_freq", "model.layers.11.self_attn.inv_freq.x"));
        assert!(matches("lm_head.weight", "lm_head.weight") && !matches("lm_head", "lm_head.weight"));
    }
}
