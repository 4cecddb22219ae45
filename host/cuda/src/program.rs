//! A block as a list of steps on buffers: what runs forward, and what runs backward.
//!
//! A [`Step`] declares what it reads and writes, what it may write in place, and what it costs; planning, profiling, loading and
//! the emulator of the tests know nothing else of it. What it computes is its [`Execute`], in the file of its op.

use std::sync::Arc;

use super::gpu::View;
use super::inputs::Rows;
use super::kernels::Variant;
use super::launch::Launch;
use super::weights::{Stack, Vector};
use dpo_core::error::Result;

/// The block's input, its output, and the gradient that goes from block to block.
pub(super) const INPUT: usize = 0;
pub(super) const OUTPUT: usize = 1;
pub(super) const GRADIENT: usize = 2;

/// Columns of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    pub buffer: usize,
    pub column: usize,
    pub width: usize,
}

/// What one token takes in a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Buffer {
    /// bf16 columns.
    Columns(usize),
    /// An f32 for every head; heads are rows.
    Heads(usize),
}

/// Time of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cost {
    /// Multiply-adds of matmuls, a token.
    Matmul(usize),
    /// That of reading and writing its buffers.
    Memory,
}

/// What computing a step's outputs again costs, from which follows whether they are saved for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recompute {
    /// About as much as reading and writing its values.
    Elementwise,
    /// A matmul.
    Matmul,
    /// More the longer a row is.
    Attention,
}

/// One operation of a program.
#[derive(Clone)]
pub(crate) struct Step {
    /// What a profile calls it.
    pub label: &'static str,
    pub reads: Vec<Slice>,
    pub writes: Vec<Slice>,
    /// Writes that may lie where a read lies, as places in both lists. Others never overlap.
    pub in_place: &'static [(usize, usize)],
    /// Writes that are left out where nobody reads them: their views are null then.
    pub optional: &'static [usize],
    /// What computes one of its writes from others, for less than the step itself.
    pub cheaper: Option<Arc<Step>>,
    pub cost: Cost,
    pub recompute: Recompute,
    /// The lowering says it.
    pub rows: Rows,
    /// Whether a row of its writes depends on other rows of its reads.
    pub mixes_rows: bool,
    pub run: Arc<dyn Execute>,
}

/// What a step computes. Views and slices come in the order in which the step declares them.
pub(crate) trait Execute: Send + Sync {
    /// Starts it on the GPU.
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()>;

    /// Which variants of kernels it starts on a card, of those that are compiled in more than one way.
    fn variants(&self, _capability: u32) -> Vec<Variant> {
        Vec::new()
    }

    /// Computes the same in f32.
    #[cfg(test)]
    fn emulate(&self, on: &mut super::tests::Emulation<'_>, reads: &[Slice], writes: &[Slice]);
}

/// A lowered block.
#[derive(Clone, Default)]
pub(super) struct Program {
    pub buffers: Vec<Buffer>,
    /// Matrices of linears with one input, and their adapters.
    pub stacks: Vec<Stack>,
    pub vectors: Vec<Vector>,
    /// Nodes that read rows of a table.
    pub tables: Vec<usize>,
    /// Bytes of what its ops carry from token to token, where a text is continued.
    pub carried: usize,
    pub forward: Vec<Step>,
    /// Reads buffers of the forward pass; [`Program::replayed`] adds what computes those that were not saved.
    pub backward: Vec<Step>,
}

impl Slice {
    /// All columns of a width from a buffer's first on.
    pub(crate) fn whole(buffer: usize, width: usize) -> Slice {
        Slice { buffer, column: 0, width }
    }

    /// The columns that lie behind these.
    pub(crate) fn behind(self, width: usize) -> Slice {
        Slice { column: self.column + self.width, width, ..self }
    }

    /// Some of these columns.
    pub(crate) fn part(self, start: usize, width: usize) -> Slice {
        Slice { column: self.column + start, width, ..self }
    }

    /// These columns and some behind them.
    pub(crate) fn with(self, more: usize) -> Slice {
        Slice { width: self.width + more, ..self }
    }

    pub(super) fn overlaps(self, other: Slice) -> bool {
        self.buffer == other.buffer
            && self.column < other.column + other.width
            && other.column < self.column + self.width
    }
}

impl Step {
    /// A step that costs about as much as reading and writing its values.
    pub(crate) fn new(
        label: &'static str,
        reads: impl Into<Vec<Slice>>,
        writes: impl Into<Vec<Slice>>,
        run: impl Execute + 'static,
    ) -> Step {
        let (reads, writes) = (reads.into(), writes.into());
        Step {
            label,
            reads,
            writes,
            in_place: &[],
            optional: &[],
            cheaper: None,
            cost: Cost::Memory,
            recompute: Recompute::Elementwise,
            rows: Rows::default(),
            mixes_rows: false,
            run: Arc::new(run),
        }
    }

    /// On these rows, as what computes one of its writes for less.
    pub(super) fn on(self, rows: Rows) -> Step {
        let cheaper = self.cheaper.map(|cheaper| Arc::new(Step { rows, ..(*cheaper).clone() }));
        Step { rows, cheaper, ..self }
    }

    /// Lets writes lie where reads lie.
    pub(crate) fn in_place(self, in_place: &'static [(usize, usize)]) -> Step {
        Step { in_place, ..self }
    }

    /// Lets writes be left out that nobody reads.
    pub(crate) fn optional(self, optional: &'static [usize]) -> Step {
        Step { optional, ..self }
    }

    /// With a step that computes one of its writes from others, for less.
    pub(crate) fn or_cheaper(self, cheaper: Step) -> Step {
        Step { cheaper: Some(Arc::new(cheaper)), ..self }
    }

    /// As one that reads other rows than it writes: it runs on all of them at once.
    pub(crate) fn mixes_rows(self) -> Step {
        Step { mixes_rows: true, ..self }
    }

    /// With another cost.
    pub(crate) fn costs(self, cost: Cost, recompute: Recompute) -> Step {
        Step { cost, recompute, ..self }
    }

    /// Buffers that it touches.
    pub(super) fn buffers(&self) -> impl Iterator<Item = usize> + '_ {
        self.reads.iter().chain(&self.writes).map(|s| s.buffer)
    }

    /// Buffers that have to have a place for it.
    pub(super) fn needs(&self) -> impl Iterator<Item = usize> + '_ {
        let written =
            self.writes.iter().enumerate().filter(|(w, _)| !self.optional.contains(w)).map(|(_, slice)| slice);
        self.reads.iter().chain(written).map(|s| s.buffer)
    }

    pub(super) fn writes(&self, buffer: usize) -> bool {
        self.writes.iter().any(|s| s.buffer == buffer)
    }

    pub(super) fn reads(&self, buffer: usize) -> bool {
        self.reads.iter().any(|s| s.buffer == buffer)
    }

    /// A write that overlaps a read and may not.
    pub(super) fn clash(&self) -> Option<Slice> {
        let clashes = |(w, write): (usize, &Slice)| {
            self.reads
                .iter()
                .enumerate()
                .any(|(r, read)| write.overlaps(*read) && !(write == read && self.in_place.contains(&(w, r))))
        };
        self.writes.iter().enumerate().find(|(w, write)| clashes((*w, write))).map(|(_, write)| *write)
    }
}

impl Buffer {
    /// Bytes a token takes.
    pub(super) fn bytes(self) -> usize {
        match self {
            Buffer::Columns(n) => n * 2,
            Buffer::Heads(n) => n * 4,
        }
    }

    /// Columns; 0 for one of heads.
    pub(super) fn columns(self) -> usize {
        match self {
            Buffer::Columns(n) => n,
            Buffer::Heads(_) => 0,
        }
    }
}

impl Program {
    /// Bytes a token takes between blocks.
    pub(super) fn edge(&self) -> usize {
        self.buffers[GRADIENT].bytes()
    }
}
