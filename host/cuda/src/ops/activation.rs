//! `y = activation(x)`, and the table of activations that `glu` has too.

#[cfg(test)]
use super::Slice;
use super::{Args, BackwardReads, CudaOp, Execute, Gated, Launch, Lowering, Source, Step, View, number};
use dpo_core::error::{Error, Result};
use dpo_plugin_api::graph::Node;
use serde_json::Value;

pub(super) static SOURCE: Source = Source::plain(
    "activation",
    concat!(include_str!("activations.cuh"), include_str!("activation.cu")),
    &["activation", "activation_vjp"],
);

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    in_place: true,
    ..CudaOp::new("activation", forward, backward)
};

/// Activations in the order in which `activations.cuh` counts them.
const ACTIVATIONS: &[&str] = &["silu", "gelu", "gelu_tanh", "relu2", "sigmoid", "identity", "clamp"];

/// The activation of a node.
#[derive(Clone, Copy)]
pub(super) struct Activation {
    pub width: usize,
    /// Its place among [`ACTIVATIONS`].
    pub kind: usize,
    pub limit: f32,
}

struct Vjp(Activation);

impl Activation {
    pub(super) fn of(node: &Node) -> Result<Activation> {
        let name = node.attrs.get("activation").and_then(Value::as_str).unwrap_or_default();
        let known = ACTIVATIONS.iter().position(|n| *n == name);
        let kind = known.ok_or_else(|| Error::input(format!("activation '{name}' has no CUDA kernel")))?;
        Ok(Activation { width: node.width, kind, limit: number(node, "limit") as f32 })
    }

    /// As the end of a matmul.
    pub(super) fn gated(self) -> Gated {
        Gated { activation: self.kind, limit: self.limit, width: self.width }
    }

    /// What a kernel takes that runs on these views.
    pub(super) fn args(self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Args {
        let args = reads.iter().chain(writes).fold(Args::default(), |args, view| args.with(*view));
        args.with(on.rows as i32).with(self.width as i32).with(self.kind as i32).with(self.limit)
    }

    /// Starts one, with a thread for every eight columns.
    pub(super) fn start(self, on: &Launch<'_>, kernel: &str, reads: &[View], writes: &[View]) -> Result<()> {
        on.by_columns(kernel, on.rows, self.width, self.args(on, reads, writes))
    }

    /// Its value and its derivative, that by differences in f64.
    #[cfg(test)]
    pub(super) fn at(self, x: f32) -> (f32, f32) {
        let limit = f64::from(self.limit);
        let value = |x: f64| match ACTIVATIONS[self.kind] {
            "silu" => x / (1.0 + (-x).exp()),
            "gelu" => x * 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(x / std::f64::consts::SQRT_2)),
            "gelu_tanh" => 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x.powi(3))).tanh()),
            "relu2" => x.max(0.0).powi(2),
            "sigmoid" => 1.0 / (1.0 + (-x).exp()),
            "identity" => x,
            _ => x.clamp(-limit, limit),
        };
        let (x, h) = (f64::from(x), 1e-5);
        (value(x) as f32, ((value(x + h) - value(x - h)) / (2.0 * h)) as f32)
    }
}

/// The forward step of an op that makes every number of one.
pub(super) fn forward_by(l: &mut Lowering<'_>, index: usize, run: impl Execute + 'static) -> Result<()> {
    let [x] = l.inputs(index)?;
    let y = l.place(index);
    l.push(Step::new("activation", [x], [y], run))
}

/// Its backward step, in the place of the value's gradient where that is no other's.
pub(super) fn backward_by(l: &mut Lowering<'_>, index: usize, run: impl Execute + 'static) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([x], from) = (l.inputs(index)?, l.nodes[index].inputs[0]);
    let dx = l.place_over_gradient(from, dy);
    l.push(Step::new("activation vjp", [x, dy], [dx], run).in_place(&[(0, 1)]))?;
    l.pass_on(from, dx)
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let own = Activation::of(&l.nodes[index])?;
    forward_by(l, index, own)
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let own = Activation::of(&l.nodes[index])?;
    backward_by(l, index, Vjp(own))
}

impl Execute for Activation {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.start(on, "activation", reads, writes)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        on.each_row(reads, writes, |_, read, write| write[0] = read[0].iter().map(|x| self.at(*x).0).collect());
    }
}

impl Execute for Vjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.0.start(on, "activation_vjp", reads, writes)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            write[0] = read[0].iter().zip(&read[1]).map(|(x, dy)| self.0.at(*x).1 * dy).collect();
        });
    }
}
