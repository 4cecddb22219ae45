//! `y = w · (x - mean) / sqrt(variance + eps) + b` over the whole row; `b` may be left out.

use super::{Args, BackwardReads, CudaOp, Execute, Launch, Lowering, Slice, Source, Step, View, number};
use dpo_core::error::Result;

pub(super) static SOURCE: Source =
    Source::plain("layer_norm", include_str!("layer_norm.cu"), &["layer_norm", "layer_norm_vjp"]);

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    ..CudaOp::new("layer_norm", forward, backward)
};

#[derive(Clone, Copy)]
struct LayerNorm {
    weight: usize,
    bias: Option<usize>,
    width: usize,
    eps: f32,
}

struct LayerNormVjp(LayerNorm);

fn norm(l: &mut Lowering<'_>, index: usize) -> Result<LayerNorm> {
    let node = &l.nodes[index];
    let weight = l.vector(index, "weight")?;
    let bias = node.weight("bias").map(|_| l.vector(index, "bias")).transpose()?;
    Ok(LayerNorm { weight, bias, width: node.width, eps: number(node, "eps") as f32 })
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([x], norm) = (l.inputs(index)?, norm(l, index)?);
    let y = l.place(index);
    l.push(Step::new("layer norm", [x], [y], norm))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([x], norm) = (l.inputs(index)?, norm(l, index)?);
    let (before, dx) = l.accumulate(l.nodes[index].inputs[0], None);
    let reads: Vec<Slice> = [x, dy].into_iter().chain(before).collect();
    // Every element is read before it is written.
    l.push(Step::new("layer norm vjp", reads, [dx], LayerNormVjp(norm)).in_place(&[(0, 1), (0, 2)]))
}

impl LayerNorm {
    /// A warp a row.
    fn start(&self, on: &Launch<'_>, kernel: &str, args: Args) -> Result<()> {
        let args = args.with(on.rows as i32).with(self.width as i32).with(self.eps);
        on.gpu.launch(on.kernels.get(kernel)?, [on.rows.div_ceil(8), 1, 1], [32, 8, 1], 0, args)
    }
}

impl Execute for LayerNorm {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let bias = self.bias.map_or(0, |at| on.weights.vectors[at]);
        let args = Args::default().with(reads[0]).with(on.weights.vectors[self.weight]).with(bias).with(writes[0]);
        self.start(on, "layer_norm", args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let (w, b) = (on.vector(self.weight), self.bias.map(|at| on.vector(at)));
        on.each_row(reads, writes, |_, read, write| {
            let (n, _) = normalised(&read[0], self.eps);
            let shift = |i: usize| b.as_ref().map_or(0.0, |b| b[i]);
            write[0] = (0..n.len()).map(|i| n[i] * w[i] + shift(i)).collect();
        });
    }
}

impl Execute for LayerNormVjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let before = reads.get(2).copied().unwrap_or(View { at: 0, ld: 0 });
        let args = Args::default().with(reads[0]).with(on.weights.vectors[self.0.weight]).with(reads[1]);
        self.0.start(on, "layer_norm_vjp", args.with(before).with(writes[0]))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let w = on.vector(self.0.weight);
        on.each_row(reads, writes, |_, read, write| {
            let (n, inverse) = normalised(&read[0], self.0.eps);
            let g: Vec<f32> = w.iter().zip(&read[1]).map(|(w, dy)| w * dy).collect();
            let mean = g.iter().sum::<f32>() / g.len() as f32;
            let along = g.iter().zip(&n).map(|(g, n)| g * n).sum::<f32>() / g.len() as f32;
            let before = |i: usize| read.get(2).map_or(0.0, |b| b[i]);
            write[0] = (0..g.len()).map(|i| before(i) + inverse * (g[i] - mean - n[i] * along)).collect();
        });
    }
}

/// A row with mean 0 and variance 1, and `1 / sqrt(variance + eps)`.
#[cfg(test)]
fn normalised(x: &[f32], eps: f32) -> (Vec<f32>, f32) {
    let count = x.len() as f32;
    let mean = x.iter().sum::<f32>() / count;
    let inverse = (x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / count + eps).powf(-0.5);
    (x.iter().map(|x| (x - mean) * inverse).collect(), inverse)
}
