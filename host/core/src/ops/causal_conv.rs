//! A depthwise convolution over the text so far: `y_t = act(Σ_j w[K-1-j] · x_{t-j} + b)` of every column. Before a prompt are zeros; before an
//! answer lie the prompt's last tokens. Where a text is continued, the last K-1 rows are its state.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::real::Real;
use super::rows::{values, widest};
use super::{Call, Gradients, Kernel, Op, ValueAndState, main_weight, weight};
use crate::batch::Layout;
use crate::error::Result;

pub(super) const OP: Op = Op { name: "causal_conv", cached_inputs: &[], kernel: Kernel::Recurrence { forward, vjp } };

/// Of every row the rows that it reads with the taps they are multiplied by, the nearest first: tap 0 is that of the row itself. `before` rows
/// lie before the layout's first one, of a text that is continued.
fn reads(layout: &Layout, taps: usize, before: usize) -> Vec<Vec<(usize, usize)>> {
    let mut all = Vec::new();
    for span in &layout.spans {
        let start = before + span.start;
        let mut part = |rows: Range<usize>, earlier: Range<usize>| {
            for row in rows.clone() {
                let own = (rows.start..=row).rev();
                all.push(
                    own.chain(earlier.clone().rev()).take(taps).enumerate().map(|(tap, row)| (row, tap)).collect(),
                );
            }
        };
        let end = start + span.prompt;
        part(start..end, 0..before);
        let mut first = end;
        for length in &span.answers {
            part(first..first + length, start..end);
            first += length;
        }
    }
    all
}

/// Numbers that a call reads: rows with those before them, taps `[K, columns]` with that of the row itself first, the bias.
struct Conv<T> {
    columns: usize,
    taps: Vec<T>,
    bias: Vec<T>,
    silu: bool,
}

impl<T: Real> Conv<T> {
    fn of(call: &Call<'_>) -> Result<Conv<T>> {
        let of = |tensor: &Tensor| -> Result<Vec<T>> {
            let tensor = tensor.to_dtype(T::DTYPE)?.contiguous()?;
            let (storage, layout) = tensor.storage_and_layout();
            Ok(values::<T>(&storage, layout)?.to_vec())
        };
        let (columns, weight_of, bias) = (call.node.width, main_weight(call)?, weight(call, "bias"));
        let count = weight_of.dim(2)?;
        let taps = of(&weight_of.reshape((columns, count))?.t()?)?.chunks(columns).rev().flatten().copied().collect();
        let bias = bias.map_or(Ok(vec![T::zero(); columns]), of)?;
        Ok(Conv { columns, taps, bias, silu: call.node.attrs.contains_key("activation") })
    }

    fn tap(&self, tap: usize) -> &[T] {
        &self.taps[tap * self.columns..][..self.columns]
    }

    /// What comes before the activation.
    fn linear(&self, x: &[T], reads: &[(usize, usize)], y: &mut [T]) {
        y.copy_from_slice(&self.bias);
        self.add(x, reads, y);
    }

    /// Adds rows times their taps.
    fn add(&self, x: &[T], reads: &[(usize, usize)], y: &mut [T]) {
        for (row, tap) in reads {
            let x = &x[row * self.columns..][..self.columns];
            widest(|| y.iter_mut().zip(x).zip(self.tap(*tap)).for_each(|((y, x), w)| *y += *x * *w));
        }
    }
}

fn forward(call: &Call<'_>, state: Option<&Tensor>) -> Result<ValueAndState> {
    match call.inputs[0].dtype() {
        DType::F32 => forward_as::<f32>(call, state),
        _ => forward_as::<f64>(call, state),
    }
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    match dy.dtype() {
        DType::F32 => vjp_as::<f32>(call, dy),
        _ => vjp_as::<f64>(call, dy),
    }
}

fn forward_as<T: Real>(call: &Call<'_>, state: Option<&Tensor>) -> Result<ValueAndState> {
    let conv = Conv::<T>::of(call)?;
    let (columns, x) = (conv.columns, call.inputs[0]);
    let before = state.map_or(Ok(0), |state| state.dim(0))?;
    let x = match state {
        Some(state) => Tensor::cat(&[state, x], 0)?,
        None => x.contiguous()?,
    };
    let reads = reads(call.layout, conv.taps.len() / columns, before);
    let mut y = vec![T::zero(); reads.len() * columns];
    {
        let (storage, layout) = x.storage_and_layout();
        let x = values::<T>(&storage, layout)?;
        y.par_chunks_mut(columns).zip(&reads).for_each(|(y, reads)| {
            conv.linear(x, reads, y);
            if conv.silu {
                widest(|| y.iter_mut().for_each(|y| *y *= y.sigmoid()));
            }
        });
    }
    let y = Tensor::from_vec(y, (reads.len(), columns), &Device::Cpu)?;
    // The last rows, which what follows reads; as many as there are.
    let kept = (conv.taps.len() / columns - 1).min(x.dim(0)?);
    Ok((y, x.narrow(0, x.dim(0)? - kept, kept)?.copy()?))
}

fn vjp_as<T: Real>(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let conv = Conv::<T>::of(call)?;
    let (columns, x, dy) = (conv.columns, call.inputs[0].contiguous()?, dy.contiguous()?);
    let reads = reads(call.layout, conv.taps.len() / columns, 0);
    let (x, dy) = (x.storage_and_layout(), dy.storage_and_layout());
    let (x, dy) = (values::<T>(&x.0, x.1)?, values::<T>(&dy.0, dy.1)?);
    let bent: Vec<T>;
    let dy = if conv.silu {
        // silu' = s + z·s·(1 - s), s the sigmoid of z.
        let mut z = vec![T::zero(); dy.len()];
        z.par_chunks_mut(columns).zip(&reads).zip(dy.par_chunks(columns)).for_each(|((z, reads), dy)| {
            conv.linear(x, reads, z);
            widest(|| {
                for (z, dy) in z.iter_mut().zip(dy) {
                    let s = z.sigmoid();
                    *z = *dy * s * (T::one() + *z * (T::one() - s));
                }
            });
        });
        bent = z;
        &bent
    } else {
        dy
    };
    // Of every row the rows that read it, in their order.
    let mut readers = vec![Vec::new(); reads.len()];
    for (reader, reads) in reads.iter().enumerate() {
        reads.iter().for_each(|(row, tap)| readers[*row].push((reader, *tap)));
    }
    let mut dx = vec![T::zero(); x.len()];
    dx.par_chunks_mut(columns).zip(&readers).for_each(|(dx, readers)| conv.add(dy, readers, dx));
    let rows = reads.len();
    Ok(Gradients::of(vec![Tensor::from_vec(dx, (rows, columns), &Device::Cpu)?]))
}
