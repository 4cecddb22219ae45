//! Gated activation: `y = activation(gate) · up`.

use super::{Args, BackwardReads, CudaOp, Execute, Launch, Lowering, Source, Step, View};
use crate::error::{Error, Result};
use dpo_plugin_api::graph::Node;
use serde_json::Value;

pub(super) static SOURCE: Source = Source::plain("glu", include_str!("glu.cu"), &["glu", "glu_vjp"]);

pub(super) const OP: CudaOp =
    CudaOp { backward_reads: BackwardReads { inputs: true, value: false }, ..CudaOp::new("glu", forward, backward) };

/// Activations in the order in which `glu.cu` counts them.
const ACTIVATIONS: &[&str] = &["silu", "gelu", "gelu_tanh"];

#[derive(Clone, Copy)]
struct Glu {
    width: usize,
    activation: usize,
}

struct GluVjp(Glu);

fn glu(node: &Node) -> Result<Glu> {
    let name = node.attrs.get("activation").and_then(Value::as_str).unwrap_or_default();
    let known = ACTIVATIONS.iter().position(|n| *n == name);
    let activation = known.ok_or_else(|| Error::input(format!("activation '{name}' has no CUDA kernel")))?;
    Ok(Glu { width: node.width, activation })
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([gate, up], glu) = (l.inputs(index)?, glu(&l.nodes[index])?);
    let y = l.place(index);
    l.push(Step::new("glu", [gate, up], [y], glu))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([gate, up], nodes) = (l.inputs(index)?, l.nodes);
    let values = &nodes[index].inputs;
    l.reuse_places(values);
    let (dgate, after_gate) = l.write_gradient(values[0]);
    let (dup, after_up) = l.write_gradient(values[1]);
    // Every element is read before it is written.
    let step = Step::new("glu vjp", [gate, up, dy], [dgate, dup], GluVjp(glu(&nodes[index])?));
    l.push(step.in_place(&[(0, 0), (1, 1)]))?;
    after_gate.into_iter().chain(after_up).try_for_each(|step| l.push(step))
}

impl Execute for Glu {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let args = Args::default().with(reads[0]).with(reads[1]).with(writes[0]);
        let args = args.with(on.rows as i32).with(self.width as i32).with(self.activation as i32);
        on.by_columns("glu", on.rows, self.width, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            let pairs = read[0].iter().zip(&read[1]);
            write[0] = pairs.map(|(gate, up)| activation(self.activation, *gate).0 * up).collect();
        });
    }
}

impl Execute for GluVjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let own = &self.0;
        let args = reads.iter().chain(writes).fold(Args::default(), |args, view| args.with(*view));
        let args = args.with(on.rows as i32).with(own.width as i32).with(own.activation as i32);
        on.by_columns("glu_vjp", on.rows, own.width, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            let both: Vec<(f32, f32)> = read[0].iter().map(|gate| activation(self.0.activation, *gate)).collect();
            write[0] = (0..both.len()).map(|i| read[2][i] * read[1][i] * both[i].1).collect();
            write[1] = (0..both.len()).map(|i| read[2][i] * both[i].0).collect();
        });
    }
}

/// An activation and its derivative, that by differences in f64.
#[cfg(test)]
fn activation(kind: usize, x: f32) -> (f32, f32) {
    let value = |x: f64| match ACTIVATIONS[kind] {
        "silu" => x / (1.0 + (-x).exp()),
        "gelu" => x * 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(x / std::f64::consts::SQRT_2)),
        _ => 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x.powi(3))).tanh()),
    };
    let (x, h) = (f64::from(x), 1e-5);
    (value(x) as f32, ((value(x + h) - value(x - h)) / (2.0 * h)) as f32)
}
