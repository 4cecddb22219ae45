//! Columns of heads: what `narrow`, `cat` and `expand` copy and sum, a step each.

use super::{Args, Execute, Launch, Slice, Source, Step, View};
use dpo_core::error::Result;

pub(super) static SOURCE: Source = Source::plain("heads", include_str!("heads.cu"), &["copy_heads", "sum_heads"]);

/// The same columns of every head of a value: from the first one of a head on, whose heads are `run` columns apart; 0 where all have the same.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub run: usize,
    pub start: usize,
}

/// A copy of columns of heads, of a value that a step reads to one that it writes, which are told by their places in its lists.
#[derive(Clone, Copy)]
pub(super) struct Copied {
    pub from: (usize, Columns),
    pub to: (usize, Columns),
    /// Columns of a head.
    pub length: usize,
}

struct Copy {
    heads: usize,
    copies: Vec<Copied>,
}

struct Sum {
    heads: usize,
    dim: usize,
}

/// Copies that fill what they write together.
pub(super) fn copy(reads: &[Slice], writes: &[Slice], heads: usize, copies: Vec<Copied>) -> Step {
    Step::new("copy of heads", reads, writes, Copy { heads, copies })
}

/// `y` is the sum of the heads of `x`.
pub(super) fn sum(x: Slice, y: Slice, heads: usize) -> Step {
    Step::new("sum of heads", [x], [y], Sum { heads, dim: y.width })
}

/// `[tokens, groups · heads · dim]` becomes the sum over the heads of every group, `[tokens, groups · dim]`.
pub(super) fn sum_groups(on: &Launch<'_>, x: View, y: View, [groups, heads, dim]: [usize; 3]) -> Result<()> {
    let args = Args::default().with(x).with(y).with(groups as i32).with(heads as i32).with(dim as i32);
    on.by_columns("sum_heads", on.rows, groups * dim, args)
}

impl Execute for Copy {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        for Copied { from, to, length } in &self.copies {
            let args =
                Args::default().with(reads[from.0]).with(writes[to.0]).with(self.heads as i32).with(*length as i32);
            let args =
                [from.1.run, from.1.start, to.1.run, to.1.start].iter().fold(args, |args, n| args.with(*n as i32));
            on.by_columns("copy_heads", on.rows, self.heads * length, args)?;
        }
        Ok(())
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let widths: Vec<usize> = writes.iter().map(|w| w.width).collect();
        on.each_row(reads, writes, |_, read, write| {
            write.iter_mut().zip(&widths).for_each(|(w, width)| *w = vec![f32::NAN; *width]);
            for Copied { from, to, length } in &self.copies {
                for head in 0..self.heads {
                    let [x, y] = [from.1, to.1].map(|columns| head * columns.run + columns.start);
                    write[to.0][y..y + length].copy_from_slice(&read[from.0][x..x + length]);
                }
            }
        });
    }
}

impl Execute for Sum {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        sum_groups(on, reads[0], writes[0], [1, self.heads, self.dim])
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            let sum = |column: usize| read[0].iter().skip(column).step_by(self.dim).sum();
            write[0] = (0..self.dim).map(sum).collect();
        });
    }
}
