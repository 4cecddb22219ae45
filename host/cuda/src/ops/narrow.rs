//! Columns `[start, start + length)` of a value. They are read where they lie; where parts of a value are all that is read of it,
//! and have no columns in common, their gradients lie side by side in its gradient, too. Columns of every head are copied.

use super::super::sum::sum;
use super::heads::{self, Columns, Copied};
use super::{Args, CudaOp, Execute, Launch, Lowering, Slice, Source, Step, View, count, multiple_of_8};
use dpo_core::error::Result;
use dpo_plugin_api::graph::Node;

pub(super) static SOURCE: Source = Source::plain("narrow", include_str!("narrow.cu"), &["narrow_vjp"]);

pub(super) const OP: CudaOp = CudaOp {
    prepare,
    part: |node| (heads(node) == 1).then(|| (count(node, "start"), count(node, "length"))),
    ..CudaOp::new("narrow", forward, backward)
};

struct Vjp {
    width: usize,
    /// Columns of a head.
    run: usize,
    start: usize,
    length: usize,
}

fn heads(node: &Node) -> usize {
    count(node, "heads").max(1)
}

fn prepare(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let from = l.nodes[index].inputs[0];
    if l.is_parted(from) {
        l.claim_behind_for_gradient(from);
    }
    Ok(())
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let node = &l.nodes[index];
    let ([x], heads, start) = (l.inputs(index)?, heads(node), count(node, "start"));
    if heads > 1 {
        let (run, length) = (x.width / heads, count(node, "length"));
        let y = l.place(index);
        let (from, to) = ((0, Columns { run, start }), (0, Columns { run: length, start: 0 }));
        return l.push(heads::copy(&[x], &[y], heads, vec![Copied { from, to, length }]));
    }
    let start = multiple_of_8(node, "first column", start)?;
    if x.width > node.width {
        return l.place_in_input(index, start);
    }
    // Two values that are the same columns would claim the same ones behind them.
    let y = l.place(index);
    l.copy(x, y)
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let node = &l.nodes[index];
    let from = node.inputs[0];
    if l.is_parted(from) {
        // The first part comes here last.
        let first = l.consumers(from).next() == Some(index);
        return if first { l.join_parts(from) } else { Ok(()) };
    }
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let (before, dx) = l.accumulate(from, Some(dy));
    let (start, heads) = (count(node, "start"), heads(node));
    if before == Some(dx) && heads == 1 {
        let part = dx.part(start, node.width);
        return l.push(sum(part, dy, part));
    }
    let reads: Vec<Slice> = [dy].into_iter().chain(before).collect();
    let vjp = Vjp { width: dx.width, run: dx.width / heads, start, length: node.width / heads };
    // Every element is read before it is written.
    l.push(Step::new("narrow vjp", reads, [dx], vjp).in_place(&[(0, 1)]))
}

impl Execute for Vjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let before = reads.get(1).copied().unwrap_or(View { at: 0, ld: 0 });
        let args = Args::default().with(reads[0]).with(before).with(writes[0]);
        let args = args.with(self.width as i32).with(self.run as i32).with(self.start as i32).with(self.length as i32);
        on.by_columns("narrow_vjp", on.rows, self.width, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            let mut sum = read.get(1).cloned().unwrap_or_else(|| vec![0.0; self.width]);
            for (head, dy) in sum.chunks_mut(self.run).zip(read[0].chunks(self.length)) {
                head[self.start..].iter_mut().zip(dy).for_each(|(s, dy)| *s += dy);
            }
            write[0] = sum;
        });
    }
}
