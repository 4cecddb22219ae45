//! The adapter folded into the weights: files like the checkpoint's, in which every adapted W is W + scale · B · A, and of DoRA that with
//! its rows at their lengths.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::ModelGraph;

use super::Adapter;
use crate::error::{Error, IoContext, Result};
use crate::ops::Lora;
use crate::weights::{Checkpoint, PartOf, blocks};

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
                    let what =
                        format!("tensor '{name}' is read at two places with an update each; it cannot hold both");
                    let (dtype, lora) = (checkpoint.dtype_named(&name)?, adapter.lora(site)?);
                    if adapted.insert(name, Adapted { dtype, lora, outputs: site.outputs, part }).is_some() {
                        return Err(Error::input(what));
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
        let Lora { scale, magnitude, .. } = &self.lora;
        let (_, columns) = right.dims2()?;
        let row = columns * self.dtype.size_in_bytes();
        let rows = (PIECE / row.max(1)).max(1);
        let mut summed = Vec::new();
        for (at, piece) in bytes.chunks(rows * row).enumerate() {
            let count = piece.len() / row;
            let w = Tensor::from_raw_buffer(piece, self.dtype, &[count, columns], &Device::Cpu)?;
            let update = left.narrow(0, at * rows, count)?.matmul(&right)?.affine(*scale, 0.0)?;
            let mut sum = (w.to_dtype(DType::F32)? + update)?;
            if let Some(magnitude) = magnitude {
                let norms = sum.sqr()?.sum_keepdim(1)?.sqrt()?;
                sum = sum.broadcast_mul(&magnitude.narrow(0, at * rows, count)?.unsqueeze(1)?.div(&norms)?)?;
            }
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

/// Only NaN and infinity do not become zero when multiplied by zero.
fn refuse_infinite(values: &Tensor) -> Result<()> {
    let zero: f32 = values.to_dtype(DType::F32)?.affine(0.0, 0.0)?.sum_all()?.to_scalar()?;
    if zero == 0.0 {
        return Ok(());
    }
    let what = format!("with the update it has values that are no finite {:?}", values.dtype());
    Err(Error::run(what).help("keep the adapter apart, or convert the model to bf16 or f32 before merging"))
}
