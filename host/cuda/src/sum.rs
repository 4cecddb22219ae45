//! Steps that every lowering needs: a copy, zeros, and the sum of two values or of two parts of a gradient.

use super::gpu::{Args, View};
use super::kernels::Source;
use super::launch::Launch;
use super::program::{Execute, Slice, Step};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source::plain("sum", include_str!("sum.cu"), &["add", "copy", "zero"]);

struct Sum {
    width: usize,
}

struct Copy {
    width: usize,
}

struct Zero {
    width: usize,
}

/// `y = a + b`; `y` may be one of them.
pub(crate) fn sum(a: Slice, b: Slice, y: Slice) -> Step {
    Step::new("add, copy", [a, b], [y], Sum { width: y.width }).in_place(&[(0, 0), (0, 1)])
}

/// `y = a`.
pub(crate) fn copy(a: Slice, y: Slice) -> Step {
    Step::new("add, copy", [a], [y], Copy { width: y.width })
}

/// `y = 0`.
pub(crate) fn zero(y: Slice) -> Step {
    Step::new("zero", [], [y], Zero { width: y.width })
}

impl Execute for Sum {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let args = Args::default().with(reads[0]).with(reads[1]).with(writes[0]);
        on.by_columns("add", on.rows, self.width, args.with(on.rows as i32).with(self.width as i32))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::tests::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        on.each_row(reads, writes, |_, read, write| {
            write[0] = read[0].iter().zip(&read[1]).map(|(a, b)| a + b).collect();
        });
    }
}

/// Copies rows of a width.
pub(crate) fn copy_rows(on: &Launch<'_>, width: usize, from: View, to: View) -> Result<()> {
    on.by_columns("copy", on.rows, width, Args::default().with(from).with(to).with(on.rows as i32).with(width as i32))
}

impl Execute for Copy {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        copy_rows(on, self.width, reads[0], writes[0])
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::tests::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        on.each_row(reads, writes, |_, read, write| write[0] = read[0].clone());
    }
}

impl Execute for Zero {
    fn launch(&self, on: &Launch<'_>, _: &[View], writes: &[View]) -> Result<()> {
        on.by_columns("zero", on.rows, self.width, Args::default().with(writes[0]).with(self.width as i32))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::tests::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        on.each_row(reads, writes, |_, _, write| write[0] = vec![0.0; self.width]);
    }
}
