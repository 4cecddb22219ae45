//! `y = w · x / sqrt(mean(x²) + eps)` over runs of `w`'s length, the whole row or every head.

use super::{Args, BackwardReads, CudaOp, Execute, Launch, Lowering, Slice, Source, Step, View, multiple_of_8, number};
use crate::error::Result;

pub(super) static SOURCE: Source =
    Source::plain("rms_norm", include_str!("rms_norm.cu"), &["rms_norm", "rms_norm_vjp"]);

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    ..CudaOp::new("rms_norm", forward, backward)
};

#[derive(Clone, Copy)]
struct Norm {
    weight: usize,
    width: usize,
    dim: usize,
    eps: f32,
}

struct NormVjp(Norm);

fn norm(l: &mut Lowering<'_>, index: usize) -> Result<Norm> {
    let node = &l.nodes[index];
    let weight = l.vector(index, "weight")?;
    let dim = multiple_of_8(node, "norm of", l.program.vectors[weight].width)?;
    Ok(Norm { weight, width: node.width, dim, eps: number(node, "eps") as f32 })
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let [x] = l.inputs(index)?;
    let norm = norm(l, index)?;
    let y = l.place(index);
    l.push(Step::new("norm", [x], [y], norm))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([x], norm) = (l.inputs(index)?, norm(l, index)?);
    let (before, dx) = l.accumulate(l.nodes[index].inputs[0], None);
    let reads: Vec<Slice> = [x, dy].into_iter().chain(before).collect();
    // Every element is read before it is written.
    l.push(Step::new("norm vjp", reads, [dx], NormVjp(norm)).in_place(&[(0, 1), (0, 2)]))
}

impl Execute for Norm {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (rows, heads) = (on.rows, self.width / self.dim);
        let args = Args::default().with(reads[0]).with(on.weights.vectors[self.weight]).with(writes[0]);
        let args = args.with(rows as i32).with(heads as i32).with(self.dim as i32).with(self.eps);
        on.by_rows("rms_norm", rows * heads, self.dim, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let w = on.vector(self.weight);
        on.each_row(reads, writes, |_, read, write| {
            let run = |x: &[f32]| {
                let scale = scale(x, self.eps);
                x.iter().zip(&w).map(move |(x, w)| scale * w * x).collect::<Vec<f32>>()
            };
            write[0] = read[0].chunks(self.dim).flat_map(run).collect();
        });
    }
}

impl Execute for NormVjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (own, rows) = (&self.0, on.rows);
        let heads = own.width / own.dim;
        let before = reads.get(2).copied().unwrap_or(View { at: 0, ld: 0 });
        let args = Args::default().with(reads[0]).with(on.weights.vectors[own.weight]).with(reads[1]).with(before);
        let args = args.with(writes[0]).with(rows as i32).with(heads as i32).with(own.dim as i32).with(own.eps);
        on.by_rows("rms_norm_vjp", rows * heads, own.dim, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let Norm { weight, dim, eps, .. } = self.0;
        let w = on.vector(weight);
        on.each_row(reads, writes, |_, read, write| {
            let mut out = read.get(2).cloned().unwrap_or_else(|| vec![0.0; read[0].len()]);
            for ((x, dy), out) in read[0].chunks(dim).zip(read[1].chunks(dim)).zip(out.chunks_mut(dim)) {
                let s = scale(x, eps);
                let pull = (0..dim).map(|i| w[i] * dy[i] * x[i]).sum::<f32>() / dim as f32 * s * s;
                (0..dim).for_each(|i| out[i] += s * (w[i] * dy[i] - x[i] * pull));
            }
            write[0] = out;
        });
    }
}

#[cfg(test)]
fn scale(x: &[f32], eps: f32) -> f32 {
    (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32 + eps).powf(-0.5)
}
