//! `y = f · (x - m) / sqrt(mean((x - m)²) + eps) + b` over runs of columns, the whole row or every head: m is 0 in an RMS norm and
//! mean(x) in a layer norm, f is `offset + weight`.

use super::{
    Args, Argument, BackwardReads, CudaOp, Execute, Launch, Lowering, Slice, Source, Step, View, multiple_of_8, number,
    run,
};
use dpo_core::error::Result;

pub(super) static SOURCE: Source = Source {
    waits: true,
    ..Source::plain("norms", include_str!("norms.cu"), &["rms_norm", "rms_norm_vjp", "layer_norm", "layer_norm_vjp"])
};

pub(super) const RMS: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    ..CudaOp::new("rms_norm", forward, backward)
};

pub(super) const LAYER: CudaOp = CudaOp { name: "layer_norm", ..RMS };

#[derive(Clone, Copy)]
struct Norm {
    /// Whether the mean is taken away.
    centred: bool,
    weight: Option<usize>,
    bias: Option<usize>,
    width: usize,
    run: usize,
    /// Whether runs have their own weights.
    apart: bool,
    offset: f32,
    eps: f32,
}

struct NormVjp(Norm);

/// `struct Norm` of `norms.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Numbers {
    weight: u64,
    bias: u64,
    tokens: i32,
    runs: i32,
    run: i32,
    apart: i32,
    offset: f32,
    eps: f32,
}

// SAFETY: two addresses of eight bytes, then six numbers of four.
unsafe impl Argument for Numbers {}

fn norm(l: &mut Lowering<'_>, index: usize) -> Result<Norm> {
    let node = &l.nodes[index];
    let run = multiple_of_8(node, "norm of", run(node))?;
    let mut vector = |role| node.weight(role).map(|_| l.vector(index, role)).transpose();
    Ok(Norm {
        centred: node.op == LAYER.name,
        weight: vector("weight")?,
        bias: vector("bias")?,
        width: node.width,
        run,
        apart: node.weight("weight").is_some_and(|w| w.shape.iter().product::<usize>() > run),
        offset: number(node, "offset") as f32,
        eps: number(node, "eps") as f32,
    })
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([x], norm) = (l.inputs(index)?, norm(l, index)?);
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

impl Norm {
    fn start(&self, on: &Launch<'_>, kernels: [&str; 2], views: Args) -> Result<()> {
        let vector = |at: Option<usize>| at.map_or(0, |at| on.weights.vectors[at]);
        let runs = self.width / self.run;
        let numbers = Numbers {
            weight: vector(self.weight),
            bias: vector(self.bias),
            tokens: on.rows as i32,
            runs: runs as i32,
            run: self.run as i32,
            apart: i32::from(self.apart),
            offset: self.offset,
            eps: self.eps,
        };
        on.by_rows(kernels[usize::from(self.centred)], on.rows * runs, self.run, views.with(numbers))
    }

    /// Factors of a row's columns.
    #[cfg(test)]
    fn factors(&self, on: &super::Emulation<'_>) -> Vec<f32> {
        let own = self.weight.map(|at| on.vector(at));
        (0..self.width).map(|i| own.as_ref().map_or(1.0, |w| self.offset + w[i % w.len()])).collect()
    }

    /// A run with mean 0, as far as that is taken away, and mean square 1; and `1 / sqrt(mean square + eps)`.
    #[cfg(test)]
    fn normalised(&self, x: &[f32]) -> (Vec<f32>, f32) {
        let count = x.len() as f32;
        let mean = if self.centred { x.iter().sum::<f32>() / count } else { 0.0 };
        let scale = (x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / count + self.eps).powf(-0.5);
        (x.iter().map(|x| (x - mean) * scale).collect(), scale)
    }
}

impl Execute for Norm {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.start(on, ["rms_norm", "layer_norm"], Args::default().with(reads[0]).with(writes[0]))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let (factors, bias) = (self.factors(on), self.bias.map(|at| on.vector(at)));
        let shift = |i: usize| bias.as_ref().map_or(0.0, |b| b[i % b.len()]);
        on.each_row(reads, writes, |_, read, write| {
            let rows = read[0].chunks(self.run).flat_map(|x| self.normalised(x).0);
            write[0] = rows.enumerate().map(|(i, n)| n * factors[i] + shift(i)).collect();
        });
    }
}

impl Execute for NormVjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let before = reads.get(2).copied().unwrap_or(View { at: 0, ld: 0 });
        let views = Args::default().with(reads[0]).with(reads[1]).with(before).with(writes[0]);
        self.0.start(on, ["rms_norm_vjp", "layer_norm_vjp"], views)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let (own, factors) = (self.0, self.0.factors(on));
        on.each_row(reads, writes, |_, read, write| {
            let mut out = read.get(2).cloned().unwrap_or_else(|| vec![0.0; own.width]);
            for first in (0..own.width).step_by(own.run) {
                let (n, scale) = own.normalised(&read[0][first..first + own.run]);
                let g: Vec<f32> = (first..first + own.run).map(|i| factors[i] * read[1][i]).collect();
                let mean = |values: &mut dyn Iterator<Item = f32>| values.sum::<f32>() / own.run as f32;
                let level = if own.centred { mean(&mut g.iter().copied()) } else { 0.0 };
                let along = mean(&mut g.iter().zip(&n).map(|(g, n)| g * n));
                (0..own.run).for_each(|i| out[first + i] += scale * (g[i] - level - n[i] * along));
            }
            write[0] = out;
        });
    }
}
