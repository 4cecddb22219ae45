//! A depthwise convolution over the text so far, with its activation: `causal_conv.cu`.

use super::{
    Args, Argument, BackwardReads, CudaOp, Execute, Launch, Lowering, Source, Step, Variant, View, multiple_of_8,
};
use dpo_core::error::{Error, Result};

pub(super) static SOURCE: Source = Source {
    variants: Some(|_| [2, 3, 4, 7].map(variant).to_vec()),
    ..Source::plain("causal_conv", include_str!("causal_conv.cu"), &["causal_conv", "causal_conv_vjp", TAIL])
};

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    ..CudaOp::new("causal_conv", forward, backward)
};

/// Rows of a thread: `RUN` of `causal_conv.cu`.
const RUN: usize = 8;

/// The kernel that keeps a text's last rows.
const TAIL: &str = "causal_conv_tail";

/// Weights of a column at most.
const MOST: usize = 8;

#[derive(Clone, Copy)]
struct Conv {
    weight: usize,
    bias: Option<usize>,
    width: usize,
    taps: usize,
    silu: bool,
    /// Where a text's last rows lie among what it carries.
    tail: usize,
}

struct ConvVjp(Conv);

/// `struct Conv` of `causal_conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Numbers {
    weight: u64,
    bias: u64,
    tail: u64,
    tokens: i32,
    width: i32,
    silu: i32,
    unused: i32,
}

// SAFETY: three addresses of eight bytes, then four numbers of four.
unsafe impl Argument for Numbers {}

/// The kernels for so many weights of a column.
fn variant(taps: usize) -> Variant {
    Variant {
        key: taps,
        label: format!("{taps} tokens"),
        before: format!("#define TAPS {taps}\n#define RUN {RUN}\n"),
        ..Variant::plain(&SOURCE)
    }
}

fn conv(l: &mut Lowering<'_>, index: usize) -> Result<Conv> {
    let node = &l.nodes[index];
    let width = multiple_of_8(node, "width", node.width)?;
    let taps = node.weight("weight").and_then(|w| w.shape.last()).copied().unwrap_or(0);
    if taps > MOST {
        let what = format!("op 'causal_conv': {taps} tokens are more than the {MOST} that CUDA has");
        return Err(Error::input(what).help("train with --device cpu"));
    }
    let (biased, silu) = (node.weight("bias").is_some(), node.attrs.contains_key("activation"));
    let bias = biased.then(|| l.vector(index, "bias")).transpose()?;
    Ok(Conv { weight: l.vector(index, "weight")?, bias, width, taps, silu, tail: 0 })
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([x], own) = (l.inputs(index)?, conv(l, index)?);
    let own = Conv { tail: l.carry((own.taps - 1) * own.width * 2), ..own };
    let y = l.place(index);
    l.push(Step::new("conv", [x], [y], own).mixes_rows())
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([x], own) = (l.inputs(index)?, conv(l, index)?);
    let (dx, sum) = l.write_gradient(l.nodes[index].inputs[0]);
    l.push(Step::new("conv vjp", [x, dy], [dx], ConvVjp(own)).mixes_rows())?;
    sum.map_or(Ok(()), |step| l.push(step))
}

impl Conv {
    fn start(&self, on: &Launch<'_>, kernel: &str, views: &[View]) -> Result<()> {
        let numbers = Numbers {
            weight: on.weights.vectors[self.weight],
            bias: self.bias.map_or(0, |at| on.weights.vectors[at]),
            tail: on.cache.map_or(0, |cache| cache.carried + self.tail as u64),
            tokens: on.rows as i32,
            width: self.width as i32,
            silu: i32::from(self.silu),
            unused: 0,
        };
        let args = views.iter().fold(Args::default().with(on.batch.segments), |args, view| args.with(*view));
        let (threads, run) =
            ((self.width / 8).next_multiple_of(32).min(128), if kernel == TAIL { on.rows } else { RUN });
        let grid = [(self.width / 8).div_ceil(threads) * on.rows.div_ceil(run), 1, 1];
        let (kernel, _) = on.kernels.variant(kernel, self.taps)?;
        on.gpu.launch(kernel, grid, [threads as u32, 1, 1], 0, args.with(numbers))
    }

    /// Of every row the rows that it reads, the nearest first.
    #[cfg(test)]
    fn reads(&self, on: &super::Emulation<'_>) -> Vec<Vec<usize>> {
        let places = super::super::segments::places(&on.batch().layout);
        let of = |(row, place): (usize, &[u32])| {
            let [before, _, jump, position] = [0, 1, 2, 3].map(|i| place[i] as usize);
            let back = (0..self.taps).take_while(|j| *j <= position);
            back.map(|j| row - j - if j > before { jump } else { 0 }).collect()
        };
        places.chunks(4).enumerate().map(of).collect()
    }

    /// What comes before the activation.
    #[cfg(test)]
    fn linear(&self, on: &super::Emulation<'_>, x: &super::Slice, reads: &[usize]) -> Vec<f32> {
        let (weight, bias) = (on.vector(self.weight), self.bias.map(|at| on.vector(at)));
        let mut y = bias.unwrap_or_else(|| vec![0.0; self.width]);
        for (j, row) in reads.iter().enumerate() {
            let x = on.row(x, *row);
            (0..self.width).for_each(|i| y[i] += weight[(i + 1) * self.taps - 1 - j] * x[i]);
        }
        y
    }
}

impl Execute for Conv {
    fn variants(&self, _: u32) -> Vec<Variant> {
        vec![variant(self.taps)]
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.start(on, "causal_conv", &[reads[0], writes[0]])?;
        if on.cache.is_some() && self.taps > 1 { self.start(on, TAIL, &[reads[0]]) } else { Ok(()) }
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        for (row, from) in self.reads(on).iter().enumerate() {
            let z = self.linear(on, &reads[0], from);
            let y: Vec<f32> = z.iter().map(|z| if self.silu { z / (1.0 + (-z).exp()) } else { *z }).collect();
            on.write(&writes[0], row, &y);
        }
    }
}

impl Execute for ConvVjp {
    fn variants(&self, _: u32) -> Vec<Variant> {
        vec![variant(self.0.taps)]
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.0.start(on, "causal_conv_vjp", &[reads[0], reads[1], writes[0]])
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        let (own, weight, rows) = (&self.0, on.vector(self.0.weight), self.0.reads(on));
        let mut dx = vec![vec![0.0; own.width]; rows.len()];
        for (row, from) in rows.iter().enumerate() {
            let (z, mut dy) = (own.linear(on, &reads[0], from), on.row(&reads[1], row));
            for (dy, z) in dy.iter_mut().zip(z).filter(|_| own.silu) {
                let s = 1.0 / (1.0 + (-z).exp());
                *dy *= s * (1.0 + z * (1.0 - s));
            }
            for (j, from) in from.iter().enumerate() {
                (0..own.width).for_each(|i| dx[*from][i] += weight[(i + 1) * own.taps - 1 - j] * dy[i]);
            }
        }
        dx.iter().enumerate().for_each(|(row, values)| on.write(&writes[0], row, values));
    }
}
