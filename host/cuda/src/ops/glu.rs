//! Gated activation: `y = activation(gate) · up`. A gate may be narrower than up: then each of its columns carries a run of up's.

use super::activation::Activation;
use super::{
    Args, BackwardReads, CudaOp, Epilogue, Execute, Launch, Lowering, Source, Step, View, multiple_of_8, whole,
};
use dpo_core::error::Result;

pub(super) static SOURCE: Source = Source {
    waits: true,
    ..Source::plain(
        "glu",
        concat!(include_str!("activations.cuh"), include_str!("glu.cu")),
        &["glu", "glu_of_runs", "glu_of_runs_vjp", "glu_vjp"],
    )
};

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    epilogue: Some(Epilogue::Gated),
    any_width: true,
    ..CudaOp::new("glu", forward, backward)
};

/// Warps of a block whose warps have a column each.
const WARPS: usize = 8;

/// The activation, and how many columns of up each of the gate's carries.
pub(super) struct Glu(pub(super) Activation, pub(super) usize);
struct GluVjp(Activation, usize);

fn run(l: &Lowering<'_>, index: usize) -> Result<usize> {
    let node = &l.nodes[index];
    let gate = node.inputs[0].checked_sub(1).map_or(node.width, |maker| l.nodes[maker].width);
    let run = node.width / gate.max(1);
    multiple_of_8(node, "width", node.width)?;
    if run == 1 { Ok(1) } else { multiple_of_8(node, "columns that one of the gate carries", run) }
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([gate, up], own, run) = (l.inputs(index)?, Activation::of(&l.nodes[index])?, run(l, index)?);
    let y = l.place(index);
    l.push(Step::new("glu", [gate, up], [y], Glu(own, run)))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([gate, up], nodes, run) = (l.inputs(index)?, l.nodes, run(l, index)?);
    let values = &nodes[index].inputs;
    l.reuse_places(values);
    let (dgate, after_gate) = l.write_gradient(values[0]);
    let (dup, after_up) = l.write_gradient(values[1]);
    // Every element is read before it is written.
    let step = Step::new("glu vjp", [gate, up, dy], [dgate, dup], GluVjp(Activation::of(&nodes[index])?, run));
    l.push(step.in_place(&[(0, 0), (1, 1)]))?;
    after_gate.into_iter().chain(after_up).try_for_each(|step| l.push(step))
}

impl Execute for Glu {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let Glu(own, run) = *self;
        if run == 1 {
            return own.start(on, "glu", reads, writes);
        }
        on.by_columns("glu_of_runs", on.rows, own.width, own.args(on, reads, writes).with(run as i32))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            let columns = read[1].iter().enumerate();
            write[0] = columns.map(|(i, up)| self.0.at(read[0][i / self.1]).0 * up).collect();
        });
    }
}

impl Execute for GluVjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let GluVjp(own, run) = *self;
        if run == 1 {
            return own.start(on, "glu_vjp", reads, writes);
        }
        let grid = [(on.rows * whole(own.width / run)).div_ceil(WARPS), 1, 1];
        let args: Args = own.args(on, reads, writes).with(run as i32);
        on.gpu.launch(on.kernels.get("glu_of_runs_vjp")?, grid, [32 * WARPS as u32, 1, 1], 0, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[super::Slice], writes: &[super::Slice]) {
        let GluVjp(own, run) = *self;
        on.each_row(reads, writes, |_, read, write| {
            let both: Vec<(f32, f32)> = read[0].iter().map(|gate| own.at(*gate)).collect();
            write[0] = vec![0.0; read[0].len()];
            for i in 0..own.width {
                write[0][i / run] += read[2][i] * read[1][i] * both[i / run].1;
            }
            write[1] = (0..own.width).map(|i| read[2][i] * both[i / run].0).collect();
        });
    }
}
