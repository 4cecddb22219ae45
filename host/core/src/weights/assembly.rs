//! Tensors that files have in parts: a matrix for each expert, gate and up apart, rows and columns exchanged. They are put together a
//! tensor at a time, when they are read.

use std::borrow::Cow;

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::{Assembly, Layout, Weight, renamed};
use rayon::prelude::*;

use super::{Checkpoint, Held, same_shape};
use crate::error::{Error, Result};

/// Where a weight of the graph lies.
pub(super) enum Place<'a> {
    /// In a tensor of its own.
    Whole(&'a Held),
    /// In these, expert by expert where they are of each.
    Parts(&'a Assembly, Vec<&'a Held>),
}

/// A part of a weight of the graph, for one that is to be written in its place.
pub struct PartOf {
    /// Its name in the files.
    pub name: String,
    /// Its experts: all of them, or one.
    pub experts: std::ops::Range<usize>,
    /// Whether it is a matrix of one expert, not of all.
    pub of_one: bool,
    /// Its rows of every expert's matrix.
    pub rows: std::ops::Range<usize>,
    /// Whether rows and columns are exchanged in it.
    pub transposed: bool,
}

impl Checkpoint {
    /// Where a weight is, by its name in a layout and in its shape.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(super) fn place_in<'a>(&'a self, layout: &Layout, prefix: &str, weight: &Weight) -> Result<Place<'a>> {
        let own = format!("{prefix}{}", weight.tensor);
        if let Some(assembly) = self.assembly(layout, &own) {
            let held = |part: PartOf| self.of_shape(&part.name, &shape_of(weight, assembly, &part));
            let parts = parts_of(layout, &own, weight, assembly)?.map(held).collect::<Result<_>>()?;
            return Ok(Place::Parts(assembly, parts));
        }
        let name = renamed(layout, &own).unwrap_or(own);
        Ok(Place::Whole(self.of_shape(&name, &weight.shape)?))
    }

    /// The parts of a weight by their names in the files; the weight itself where it is in one tensor.
    pub fn parts_of(&self, prefix: &str, weight: &Weight) -> Result<Vec<PartOf>> {
        let own = format!("{prefix}{}", weight.tensor);
        match self.assembly(&self.layout, &own) {
            Some(assembly) => Ok(parts_of(&self.layout, &own, weight, assembly)?.collect()),
            None => {
                let (experts, rows) = match weight.shape[..] {
                    [experts, rows, _] => (experts, rows),
                    _ => (1, weight.shape.first().copied().unwrap_or(1)),
                };
                let name = self.name(prefix, weight);
                Ok(vec![PartOf { name, experts: 0..experts, of_one: false, rows: 0..rows, transposed: false }])
            }
        }
    }

    /// The first assembly of a tensor whose first part is in the files.
    fn assembly<'a>(&'a self, layout: &Layout, own: &str) -> Option<&'a Assembly> {
        let first = |assembly: &Assembly| renamed(layout, &assembly.part(own, 0, 0)?);
        self.assemblies.iter().find(|assembly| first(assembly).is_some_and(|name| self.tensors.contains_key(&name)))
    }

    fn of_shape(&self, name: &str, shape: &[usize]) -> Result<&Held> {
        match self.tensors.get(name) {
            Some(held) if same_shape(held.shape(), shape) => Ok(held),
            Some(held) => {
                let what = format!("tensor '{name}' has shape {:?}, the model needs {shape:?}", held.shape());
                Err(Error::input(what).at(self.path(held).display()))
            }
            None => {
                let what = format!("tensor '{name}' of shape {shape:?} is missing");
                Err(Error::input(what).at(self.folder.display()))
            }
        }
    }

    /// The type of a weight that is put together: that of its parts, f32 where they differ.
    pub(super) fn dtype_of_parts(&self, parts: &[&Held]) -> Result<DType> {
        let types = parts.iter().map(|held| self.dtype_of(held)).collect::<Result<Vec<DType>>>()?;
        let first = types.first().copied().unwrap_or(DType::F32);
        Ok(if types.iter().all(|other| *other == first) { first } else { DType::F32 })
    }

    /// A weight `[experts, rows, columns]` put together: its type and bytes.
    pub(super) fn assembled<'a>(
        &'a self,
        weight: &Weight,
        assembly: &Assembly,
        parts: &[&'a Held],
    ) -> Result<(DType, Cow<'a, [u8]>)> {
        if let ([held], false) = (parts, assembly.transposed) {
            return self.raw_of(held);
        }
        let &[_, rows, columns] = weight.shape.as_slice() else {
            return Err(Error::run(format!("'{}' of shape {:?} is put together", weight.tensor, weight.shape)));
        };
        let (dtype, count) = (self.dtype_of_parts(parts)?, assembly.parts.len());
        let (size, share) = (dtype.size_in_bytes(), rows / count);
        let matrix = share * columns * size;
        // Of all experts: read once, also where that is to dequantise. Of each: when it is copied.
        let whole = |part: usize| match assembly.is_of_each(part) {
            true => Ok(None),
            false => self.bytes_as(dtype, parts[part]).map(Some),
        };
        let whole = (0..count).map(whole).collect::<Result<Vec<_>>>()?;
        let mut bytes = vec![0; weight.shape.iter().product::<usize>() * size];
        bytes.par_chunks_mut(matrix.max(1)).enumerate().try_for_each(|(at, to)| {
            let (expert, part) = (at / count, at % count);
            let own = match &whole[part] {
                Some(all) => Cow::Borrowed(&all[expert * matrix..][..matrix]),
                None => self.bytes_as(dtype, parts[expert * count + part])?,
            };
            match assembly.transposed {
                true => transpose(&own, [columns, share], size, to),
                false => to.copy_from_slice(&own),
            }
            Ok::<(), Error>(())
        })?;
        parts.iter().for_each(|held| self.leave_held(held));
        Ok((dtype, Cow::Owned(bytes)))
    }

    fn bytes_as<'a>(&'a self, dtype: DType, held: &'a Held) -> Result<Cow<'a, [u8]>> {
        let (own, bytes) = self.raw_of(held)?;
        if own == dtype {
            return Ok(bytes);
        }
        let values = Tensor::from_raw_buffer(&bytes, own, &[bytes.len() / own.size_in_bytes()], &Device::Cpu)?;
        let mut wide = Vec::new();
        values.to_dtype(dtype)?.write_bytes(&mut wide)?;
        Ok(Cow::Owned(wide))
    }
}

/// The parts of a weight, expert by expert, by their names in a layout.
fn parts_of<'a>(
    layout: &'a Layout,
    own: &'a str,
    weight: &Weight,
    assembly: &'a Assembly,
) -> Result<impl Iterator<Item = PartOf> + use<'a>> {
    let count = assembly.parts.len();
    let &[experts, rows, _] = weight.shape.as_slice() else {
        let what = format!("tensor '{own}' of shape {:?} is assembled; those of three dimensions are", weight.shape);
        return Err(Error::input(what));
    };
    if !rows.is_multiple_of(count) {
        return Err(Error::input(format!("tensor '{own}' has {rows} rows an expert, of {count} parts")));
    }
    let share = rows / count;
    let some = if (0..count).any(|part| assembly.is_of_each(part)) { experts } else { 1 };
    Ok((0..some * count).map(move |at| {
        let (expert, part) = (at / count, at % count);
        let name = assembly.part(own, part, expert).unwrap_or_default();
        PartOf {
            name: renamed(layout, &name).unwrap_or(name),
            experts: if assembly.is_of_each(part) { expert..expert + 1 } else { 0..experts },
            of_one: assembly.is_of_each(part),
            rows: part * share..(part + 1) * share,
            transposed: assembly.transposed,
        }
    }))
}

/// The shape that a part has in the files.
fn shape_of(weight: &Weight, assembly: &Assembly, part: &PartOf) -> Vec<usize> {
    let (rows, columns) = (part.rows.len(), weight.shape.last().copied().unwrap_or(1));
    let matrix = if assembly.transposed { [columns, rows] } else { [rows, columns] };
    (!part.of_one).then_some(part.experts.len()).into_iter().chain(matrix).collect()
}

/// `[rows, columns]` of values of so many bytes, as `[columns, rows]`.
fn transpose(from: &[u8], [rows, columns]: [usize; 2], size: usize, to: &mut [u8]) {
    for (column, to) in to.chunks_exact_mut((rows * size).max(1)).enumerate() {
        for (row, to) in to.chunks_exact_mut(size).enumerate() {
            to.copy_from_slice(&from[(row * columns + column) * size..][..size]);
        }
    }
}
