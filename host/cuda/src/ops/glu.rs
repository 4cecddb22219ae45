//! Gated activation: `y = activation(gate) · up`.

use super::activation::Activation;
use super::{BackwardReads, CudaOp, Epilogue, Execute, Launch, Lowering, Source, Step, View};
use dpo_core::error::{Error, Result};

pub(super) static SOURCE: Source = Source {
    waits: true,
    ..Source::plain("glu", concat!(include_str!("activations.cuh"), include_str!("glu.cu")), &["glu", "glu_vjp"])
};

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    epilogue: Some(Epilogue::Gated),
    ..CudaOp::new("glu", forward, backward)
};

pub(super) struct Glu(pub(super) Activation);
struct GluVjp(Activation);

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([gate, up], own) = (l.inputs(index)?, Activation::of(&l.nodes[index])?);
    if gate.width != up.width {
        let what = format!("op 'glu' has no CUDA kernel for a gate of {} columns on {}", gate.width, up.width);
        return Err(Error::input(what).help("train with --device cpu"));
    }
    let y = l.place(index);
    l.push(Step::new("glu", [gate, up], [y], Glu(own)))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([gate, up], nodes) = (l.inputs(index)?, l.nodes);
    let values = &nodes[index].inputs;
    l.reuse_places(values);
    let (dgate, after_gate) = l.write_gradient(values[0]);
    let (dup, after_up) = l.write_gradient(values[1]);
    // Every element is read before it is written.
    let step = Step::new("glu vjp", [gate, up, dy], [dgate, dup], GluVjp(Activation::of(&nodes[index])?));
    l.push(step.in_place(&[(0, 0), (1, 1)]))?;
    after_gate.into_iter().chain(after_up).try_for_each(|step| l.push(step))
}

impl Execute for Glu {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.0.start(on, "glu", reads, writes)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            write[0] = read[0].iter().zip(&read[1]).map(|(gate, up)| self.0.at(*gate).0 * up).collect();
        });
    }
}

impl Execute for GluVjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.0.start(on, "glu_vjp", reads, writes)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            let both: Vec<(f32, f32)> = read[0].iter().map(|gate| self.0.at(*gate)).collect();
            write[0] = (0..both.len()).map(|i| read[2][i] * read[1][i] * both[i].1).collect();
            write[1] = (0..both.len()).map(|i| read[2][i] * both[i].0).collect();
        });
    }
}
