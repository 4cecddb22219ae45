//! The adapter folded into the weights: every adapted W is W + scale · B · A, and of DoRA that with its rows at their lengths. Files like the
//! checkpoint's, and rows of weights for files of another kind.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::{ModelGraph, Weight};

use super::{Adapter, Site};
use crate::error::{Error, IoContext, Result};
use crate::ops::Lora;
use crate::weights::{Checkpoint, PartOf, blocks, read_rows};

/// Bytes of a weight that are computed at once; a merge takes some ten times as much memory.
const PIECE: usize = 8 << 20;

/// A tensor of the files that is written anew: a weight, or a part of one of experts.
struct Adapted {
    dtype: DType,
    lora: Lora,
    /// Rows that a matrix has in the graph.
    outputs: usize,
    part: PartOf,
}

/// Writes the checkpoint's files into a folder, with the adapter in them; `done` hears of bytes. They are flushed.
///
/// # Errors
/// A tensor of the graph that the checkpoint lacks, a sum that the checkpoint's type cannot hold, a full disk.
pub fn merge(
    graph: &ModelGraph,
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    folder: &Path,
    done: impl Fn(usize),
) -> Result<()> {
    let adapted = adapted(graph, checkpoint, adapter)?;
    for part in checkpoint.parts() {
        let part = part?;
        let path = folder.join(part.path.file_name().unwrap_or_default());
        let mut file = BufWriter::new(File::create(&path).writing(&path)?);
        file.write_all(&part.header).writing(&path)?;
        for name in part.tensors {
            let bytes = checkpoint.bytes_of(&name)?;
            match adapted.get(&name) {
                None => file.write_all(&bytes).writing(&path)?,
                Some(weight) => {
                    let piece = |piece: &[u8]| file.write_all(piece).writing(&path);
                    weight.sum(&bytes, piece).map_err(|e| e.at(format!("tensor '{name}'")))?;
                }
            }
            done(bytes.len());
        }
        file.into_inner().map_err(std::io::IntoInnerError::into_error).and_then(|f| f.sync_all()).writing(&path)?;
    }
    Ok(())
}

/// The adapted weights by the names of their tensors.
fn adapted(graph: &ModelGraph, checkpoint: &Checkpoint, adapter: &Adapter) -> Result<HashMap<String, Adapted>> {
    let mut adapted = HashMap::new();
    for (block, prefix, nodes) in blocks(graph) {
        for (index, node) in nodes.iter().enumerate() {
            for (at, weight) in node.weights.iter().enumerate() {
                // Also of those that are copied: a checkpoint that lacks one is not to look merged.
                checkpoint.dtype(prefix, weight)?;
                let Some(site) = adapter.sites.iter().find(|s| s.node == (block, index) && s.weight == at) else {
                    continue;
                };
                for part in checkpoint.parts_of(prefix, weight)? {
                    let name = part.name.clone();
                    let twice = twice(&name);
                    let (dtype, lora) = (checkpoint.dtype_named(&name)?, adapter.lora(site)?);
                    if adapted.insert(name, Adapted { dtype, lora, outputs: site.outputs, part }).is_some() {
                        return Err(twice);
                    }
                }
            }
        }
    }
    Ok(adapted)
}

impl Adapted {
    /// What W becomes, matrix by matrix, as bytes of W's own type.
    fn sum(&self, bytes: &[u8], mut write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (PartOf { experts, rows, transposed, .. }, Lora { a, b, .. }) = (&self.part, &self.lora);
        let rank = b.dim(1)?;
        let own = |expert: usize| -> Result<[Tensor; 2]> {
            let a = a.narrow(0, expert * rank, rank)?;
            let b = b.narrow(0, expert * self.outputs + rows.start, rows.len())?;
            Ok(if *transposed { [a.t()?.contiguous()?, b.t()?.contiguous()?] } else { [b, a] })
        };
        let matrices = bytes.chunks((bytes.len() / experts.len().max(1)).max(1));
        experts
            .clone()
            .zip(matrices)
            .try_for_each(|(expert, bytes)| self.sum_of_matrix(own(expert)?, bytes, &mut write))
    }

    /// The same of a matrix and the factors of its update, rows of it at a time.
    fn sum_of_matrix(
        &self,
        [left, right]: [Tensor; 2],
        bytes: &[u8],
        mut write: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (_, columns) = right.dims2()?;
        let row = columns * self.dtype.size_in_bytes();
        let rows = (PIECE / row.max(1)).max(1);
        let mut summed = Vec::new();
        for (at, piece) in bytes.chunks(rows * row).enumerate() {
            let count = piece.len() / row;
            let w = Tensor::from_raw_buffer(piece, self.dtype, &[count, columns], &Device::Cpu)?;
            let magnitude = self.lora.magnitude.as_ref().map(|all| all.narrow(0, at * rows, count)).transpose()?;
            let left = left.narrow(0, at * rows, count)?;
            let sum = sum_of_rows(w.to_dtype(DType::F32)?, [&left, &right], self.lora.scale, magnitude)?;
            // candle rounds to nearest, ties to even.
            let sum = sum.to_dtype(self.dtype)?;
            refuse_infinite(&sum)?;
            summed.clear();
            sum.write_bytes(&mut summed)?;
            write(&summed)?;
        }
        Ok(())
    }
}

/// Rows of W with the product of two factors of the update, in f32; those of DoRA have the lengths that `magnitude` says.
fn sum_of_rows(w: Tensor, [left, right]: [&Tensor; 2], scale: f64, magnitude: Option<Tensor>) -> Result<Tensor> {
    let sum = (w + left.matmul(right)?.affine(scale, 0.0)?)?;
    let Some(magnitude) = magnitude else { return Ok(sum) };
    let norms = sum.sqr()?.sum_keepdim(1)?.sqrt()?;
    Ok(sum.broadcast_mul(&magnitude.unsqueeze(1)?.div(&norms)?)?)
}

/// A graph's weights with an adapter in them, before they are rounded to any type.
pub struct Merged<'a> {
    checkpoint: &'a Checkpoint,
    adapter: &'a Adapter,
    /// The site of every adapted weight, by the weight's whole name.
    sites: HashMap<String, &'a Site>,
}

/// One of these weights.
pub struct MergedWeight<'a> {
    dtype: DType,
    bytes: Cow<'a, [u8]>,
    columns: usize,
    /// Its update, and how many rows a matrix of it has.
    update: Option<(Lora, usize)>,
}

impl<'a> Merged<'a> {
    /// Nothing is read yet but headers.
    ///
    /// # Errors
    /// A weight that the checkpoint lacks; one that is read at two places with an update each.
    pub fn new(graph: &ModelGraph, checkpoint: &'a Checkpoint, adapter: &'a Adapter) -> Result<Merged<'a>> {
        let mut sites = HashMap::new();
        for (block, prefix, nodes) in blocks(graph) {
            for (index, node) in nodes.iter().enumerate() {
                for (at, weight) in node.weights.iter().enumerate() {
                    checkpoint.dtype(prefix, weight)?;
                    let site = adapter.sites.iter().find(|s| s.node == (block, index) && s.weight == at);
                    let name = format!("{prefix}{}", weight.tensor);
                    if site.is_some_and(|site| sites.insert(name.clone(), site).is_some()) {
                        return Err(twice(&name));
                    }
                }
            }
        }
        Ok(Merged { checkpoint, adapter, sites })
    }

    /// A weight of the graph, whose values are read when they are asked for.
    ///
    /// # Errors
    /// As [`Checkpoint::raw`].
    pub fn weight(&self, prefix: &str, weight: &Weight) -> Result<MergedWeight<'a>> {
        let (dtype, bytes) = self.checkpoint.raw(prefix, weight)?;
        let site = self.sites.get(&format!("{prefix}{}", weight.tensor));
        let update = site.map(|site| Ok::<_, Error>((self.adapter.lora(site)?, site.outputs))).transpose()?;
        let is_vector = weight.shape.len() < 2 || weight.role.ends_with("bias");
        let columns = if is_vector { 1 } else { weight.shape.last().copied().unwrap_or(1) };
        Ok(MergedWeight { dtype, bytes, columns, update })
    }
}

impl MergedWeight<'_> {
    /// Columns of its rows.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Some rows, `[rows, columns]` in f32. Rows of experts are counted through all matrices; the values of a vector, or of
    /// every expert's bias, are rows of one column.
    ///
    /// # Errors
    /// A sum that is no finite number.
    pub fn rows(&self, rows: &[usize]) -> Result<Vec<f32>> {
        let own = read_rows(self.dtype, &self.bytes, self.columns, rows);
        let Some((lora, outputs)) = &self.update else { return Ok(own) };
        let rank = lora.b.dim(1)?;
        let (mut all, mut done) = (Vec::with_capacity(own.len()), 0);
        for run in rows.chunk_by(|a, b| a / outputs == b / outputs) {
            let values = own[done * self.columns..][..run.len() * self.columns].to_vec();
            let w = Tensor::from_vec(values, (run.len(), self.columns), &Device::Cpu)?;
            let index = Tensor::from_iter(run.iter().map(|row| *row as u32), &Device::Cpu)?;
            let left = lora.b.index_select(&index, 0)?;
            let right = lora.a.narrow(0, run[0] / outputs * rank, rank)?;
            let magnitude = lora.magnitude.as_ref().map(|all| all.index_select(&index, 0)).transpose()?;
            let sum = sum_of_rows(w, [&left, &right], lora.scale, magnitude)?;
            refuse_infinite(&sum)?;
            all.extend(sum.flatten_all()?.to_vec1::<f32>()?);
            done += run.len();
        }
        Ok(all)
    }
}

fn twice(name: &str) -> Error {
    Error::input(format!("tensor '{name}' is read at two places with an update each; it cannot hold both"))
}

/// Only NaN and infinity do not become zero when multiplied by zero.
fn refuse_infinite(values: &Tensor) -> Result<()> {
    let zero: f32 = values.to_dtype(DType::F32)?.affine(0.0, 0.0)?.sum_all()?.to_scalar()?;
    if zero == 0.0 {
        return Ok(());
    }
    let what = format!("with the update it has values that are no finite {:?}", values.dtype());
    Err(Error::run(what).help("keep the adapter apart, or convert the model to bf16 or f32 before merging"))
}
