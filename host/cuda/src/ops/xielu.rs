//! xIELU: `p·x² + beta·x` above 0, else `n·(expm1(min(x, eps)) - x) + beta·x`, with p and n of learned numbers.

#[cfg(test)]
use super::Slice;
use super::activation::{backward_by, forward_by};
use super::{Args, BackwardReads, CudaOp, Execute, Launch, Lowering, Source, View};
use dpo_core::error::Result;

pub(super) static SOURCE: Source = Source::plain("xielu", include_str!("xielu.cu"), &["xielu", "xielu_vjp"]);

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    in_place: true,
    ..CudaOp::new("xielu", forward, backward)
};

#[derive(Clone, Copy)]
struct Xielu {
    width: usize,
    /// alpha_p, alpha_n, beta, eps.
    numbers: [usize; 4],
}

struct Vjp(Xielu);

fn xielu(l: &mut Lowering<'_>, index: usize) -> Result<Xielu> {
    let mut numbers = [0; 4];
    for (number, role) in numbers.iter_mut().zip(["alpha_p", "alpha_n", "beta", "eps"]) {
        *number = l.vector(index, role)?;
    }
    Ok(Xielu { width: l.nodes[index].width, numbers })
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let own = xielu(l, index)?;
    forward_by(l, index, own)
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let own = xielu(l, index)?;
    backward_by(l, index, Vjp(own))
}

impl Xielu {
    fn start(&self, on: &Launch<'_>, kernel: &str, reads: &[View], writes: &[View]) -> Result<()> {
        let args = reads.iter().chain(writes).fold(Args::default(), |args, view| args.with(*view));
        let args = args.with(on.rows as i32).with(self.width as i32);
        let args = self.numbers.iter().fold(args, |args, at| args.with(on.weights.vectors[*at]));
        on.by_columns(kernel, on.rows, self.width, args)
    }

    /// Value and derivative, in f64.
    #[cfg(test)]
    fn at(&self, on: &super::Emulation<'_>) -> impl Fn(f32) -> (f32, f32) + use<> {
        let [alpha_p, alpha_n, beta, eps] = self.numbers.map(|at| f64::from(on.vector(at)[0]));
        let softplus = |a: f64| (1.0 + a.exp()).ln();
        let (p, n) = (softplus(alpha_p), beta + softplus(alpha_n));
        move |x| {
            let x = f64::from(x);
            let (value, slope) = match x {
                x if x > 0.0 => (p * x * x, 2.0 * p * x),
                x if x < eps => (n * (x.exp_m1() - x), n * x.exp_m1()),
                x => (n * (eps.exp_m1() - x), -n),
            };
            ((value + beta * x) as f32, (slope + beta) as f32)
        }
    }
}

impl Execute for Xielu {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.start(on, "xielu", reads, writes)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let at = self.at(on);
        on.each_row(reads, writes, |_, read, write| write[0] = read[0].iter().map(|x| at(*x).0).collect());
    }
}

impl Execute for Vjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.0.start(on, "xielu_vjp", reads, writes)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let at = self.0.at(on);
        on.each_row(reads, writes, |_, read, write| {
            write[0] = read[0].iter().zip(&read[1]).map(|(x, dy)| at(*x).1 * dy).collect();
        });
    }
}
