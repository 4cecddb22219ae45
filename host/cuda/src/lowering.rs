//! From a block's nodes to a [`Program`]: where every value and every gradient lies, and which steps compute them.
//!
//! What a node becomes is said by its op's [`CudaOp`]; here is what those have in common. Values and gradients have places that
//! ops ask for and pass on. A step that would overwrite a value or a gradient that is still read is refused. Where gradients lie
//! is said in `gradients`.

mod gradients;

use dpo_plugin_api::graph::{Block, Node};

use super::arena::{aligned, padded};
use super::inputs::Rows;
use super::launch::BatchTable;
use super::matmul::Gates;
use super::program::{Buffer, GRADIENT, INPUT, OUTPUT, Program, Slice, Step};
use super::sum::copy;
use super::weights::{NUMBERS, Stack, Vector};
use dpo_core::error::{Error, Result};
use dpo_core::ops::GATHER;
use dpo_core::storage::Numbers;

/// The LoRA rank of a node's weight of a role, a multiple of 8; 0 where it is not adapted.
pub(crate) type Ranks<'a> = &'a dyn Fn(usize, &str) -> usize;

/// An op on the GPU: what only this op knows. Its steps know the rest.
pub(crate) struct CudaOp {
    /// As the CPU's table and graphs call it.
    pub name: &'static str,
    /// What a node claims before anything is lowered: fusions with other nodes, columns behind values.
    pub prepare: fn(&mut Lowering<'_>, usize) -> Result<()>,
    /// Pushes a node's steps of the forward pass.
    pub forward: fn(&mut Lowering<'_>, usize) -> Result<()>,
    /// Pushes a node's steps of the backward pass.
    pub backward: fn(&mut Lowering<'_>, usize) -> Result<()>,
    /// Which values its backward steps read.
    pub backward_reads: BackwardReads,
    /// Whether its step turns a value into its own in place, and a gradient too.
    pub in_place: bool,
    /// First column and number of those of its input that are its value: it lies there, and no step makes it.
    pub part: fn(&Node) -> Option<(usize, usize)>,
    /// What a step that makes one of its inputs could compute in its stead.
    pub epilogue: Option<Epilogue>,
    /// LoRA columns that a node may claim behind a value, given the ranks of weights.
    pub columns_behind: fn(&[Node], usize, Ranks<'_>) -> usize,
    /// What is computed for it once a batch.
    pub table: fn(&Node) -> Option<BatchTable>,
    /// Whether its value, and what it reads, may have a width that is no multiple of 8: zeros fill the rest, in gradients too.
    pub any_width: bool,
}

/// The values that an op's backward steps read.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BackwardReads {
    pub inputs: bool,
    pub value: bool,
}

/// What may be computed at the end of another step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// The sum of that step's value and another one.
    Sum,
    /// A gated activation of that step's two values.
    Gated,
}

impl CudaOp {
    /// An op of one step each way, which claims nothing.
    pub(crate) const fn new(
        name: &'static str,
        forward: fn(&mut Lowering<'_>, usize) -> Result<()>,
        backward: fn(&mut Lowering<'_>, usize) -> Result<()>,
    ) -> CudaOp {
        CudaOp {
            name,
            prepare: |_, _| Ok(()),
            forward,
            backward,
            backward_reads: BackwardReads { inputs: false, value: false },
            in_place: false,
            part: |_| None,
            epilogue: None,
            columns_behind: |_, _, _| 0,
            table: |_| None,
            any_width: false,
        }
    }
}

/// What a block is lowered for.
pub(super) struct Frame<'a> {
    /// Columns of its input and of its output.
    pub widths: [usize; 2],
    /// LoRA columns that lie behind the values that go from block to block.
    pub behind: usize,
    /// What of its nodes is adapted.
    pub rank: Ranks<'a>,
    /// What its matrices are kept as.
    pub numbers: Numbers,
    /// Whether it has a backward pass.
    pub backward: bool,
    /// The rows that it begins with.
    pub rows: Rows,
    /// The gated activations that matmuls compute.
    pub gates: Gates,
}

/// Values whose columns lie side by side in one buffer, and whose gradients do too.
struct Bundle {
    values: Vec<usize>,
    width: usize,
    /// LoRA columns behind them.
    behind: usize,
    buffer: usize,
    gradient: Option<usize>,
}

/// Which pass steps are pushed to, at which node.
#[derive(Clone, Copy)]
enum At {
    Forward(usize),
    Backward(usize),
}

/// A block that is being lowered.
pub(crate) struct Lowering<'a> {
    pub nodes: &'a [Node],
    frame: &'a Frame<'a>,
    ops: Vec<&'static CudaOp>,
    output: usize,
    at: At,
    /// Where every value lies.
    homes: Vec<Option<Slice>>,
    /// Of every value, the one whose place it has, or a part of that.
    over: Vec<Option<usize>>,
    /// Columns that are claimed behind every value, and behind its gradient.
    behind: Vec<usize>,
    gradient_behind: Vec<usize>,
    /// Of every node, the node whose steps compute its value too.
    computed_by: Vec<Option<usize>>,
    /// Of every node, whether another one's backward steps are also its own.
    differentiated: Vec<bool>,
    /// Of every node, what its forward steps left for its backward steps.
    left: Vec<Vec<Slice>>,
    bundles: Vec<Bundle>,
    /// Where the gradient of every value lies that has one.
    gradients: Vec<Option<Slice>>,
    /// Where the gradient of a value lies whose parts have theirs in it.
    of_parts: Vec<Option<Slice>>,
    /// Values that the node at hand makes; in the backward pass, those whose gradients it makes.
    making: Vec<usize>,
    /// Of every buffer, the columns of its value, without those behind it.
    widths: Vec<usize>,
    pub program: Program,
}

impl Program {
    /// Lowers nodes of a block, of which `output` is the last value.
    pub(super) fn lower(
        block: &Block,
        (nodes, output): (&[Node], usize),
        find: fn(&str) -> Result<&'static CudaOp>,
        frame: &Frame<'_>,
    ) -> Result<Program> {
        let [input, width] = frame.widths;
        let edge = |width: usize| Buffer::Columns(padded(width + frame.behind));
        let mut lowering = Lowering {
            nodes,
            frame,
            ops: nodes.iter().map(|n| find(&n.op)).collect::<Result<_>>()?,
            output,
            at: At::Forward(0),
            homes: vec![None; nodes.len() + 1],
            over: vec![None; nodes.len() + 1],
            behind: vec![0; nodes.len() + 1],
            gradient_behind: vec![0; nodes.len() + 1],
            computed_by: vec![None; nodes.len()],
            differentiated: vec![false; nodes.len()],
            left: vec![Vec::new(); nodes.len()],
            bundles: Vec::new(),
            gradients: vec![None; nodes.len() + 1],
            of_parts: vec![None; nodes.len() + 1],
            making: Vec::new(),
            widths: vec![input, width, input.max(width)],
            program: Program { buffers: vec![edge(input), edge(width), edge(input.max(width))], ..Program::default() },
        };
        lowering.homes[0] = Some(Slice::whole(INPUT, input));
        for index in 0..nodes.len() {
            (lowering.ops[index].prepare)(&mut lowering, index)?;
        }
        for (index, node) in nodes.iter().enumerate() {
            if lowering.computed_by[index].is_none() {
                let reads = node.inputs.iter().filter_map(|v| v.checked_sub(1)).map(|maker| nodes[maker].width);
                for width in reads.chain([node.width]).filter(|_| !lowering.ops[index].any_width) {
                    multiple_of_8(node, "width", width)?;
                }
                lowering.at = At::Forward(index);
                lowering.making.clear();
                (lowering.ops[index].forward)(&mut lowering, index)?;
            }
        }
        let home = lowering.home(output)?;
        lowering.copy(home, Slice::whole(OUTPUT, home.width))?;
        if frame.backward {
            lowering.backward(&block.name, Slice::whole(GRADIENT, width))?;
        }
        Ok(lowering.program)
    }
}

/// Columns that a width takes: kernels go by eight.
pub(crate) fn whole(width: usize) -> usize {
    width.next_multiple_of(8)
}

/// Refuses a number that is no multiple of 8, by which kernels go.
pub(crate) fn multiple_of_8(node: &Node, what: &str, n: usize) -> Result<usize> {
    if n.is_multiple_of(8) {
        return Ok(n);
    }
    Err(Error::input(format!("op '{}': {what} {n} is not a multiple of 8, which CUDA needs", node.op))
        .help("train with --device cpu"))
}

impl Lowering<'_> {
    fn backward(&mut self, block: &str, whole: Slice) -> Result<()> {
        self.gradients[self.output] = Some(whole);
        for index in (0..self.nodes.len()).rev() {
            self.at = At::Backward(index);
            self.making.clear();
            (self.ops[index].backward)(self, index)?;
        }
        match self.gradients[0].take() {
            Some(is) => self.copy(is, Slice::whole(GRADIENT, is.width)),
            None => Err(Error::input(format!("block '{block}' does not read its input"))),
        }
    }

    /// Adds a step to the pass at hand.
    ///
    /// # Errors
    /// One that would overwrite what it reads, or what is read after it.
    pub(crate) fn push(&mut self, step: Step) -> Result<()> {
        let step = step.on(self.rows());
        let lost = step.clash().or_else(|| step.writes.iter().copied().find(|w| self.is_live(*w)));
        if let Some(lost) = lost {
            return Err(Error::run(format!("step '{}' would overwrite {lost:?}, which is still read", step.label)));
        }
        match self.at {
            At::Forward(_) => self.program.forward.push(step),
            At::Backward(_) => self.program.backward.push(step),
        }
        Ok(())
    }

    /// The rows that the node at hand runs on: where rows are gathered and behind, those that predict. Backward a gather gives all rows a gradient.
    fn rows(&self) -> Rows {
        let gathers = |index: usize| self.nodes[index].op == GATHER;
        let gathered = match self.at {
            At::Forward(index) => (0..=index).any(gathers),
            At::Backward(index) => !gathers(index) && (0..index).any(gathers),
        };
        if gathered { Rows::Predictors } else { self.frame.rows }
    }

    /// Whether a value or a gradient lies there that the node at hand does not make and later ones read.
    fn is_live(&self, place: Slice) -> bool {
        let backward = matches!(self.at, At::Backward(_));
        let made = |v: usize, backward_made: bool| backward == backward_made && self.making.contains(&v);
        let values = (0..self.homes.len()).filter(|v| !made(*v, false)).any(|v| self.is_read_later(v, place));
        let mut gradients = self.gradients.iter().enumerate().filter(|(v, _)| !made(*v, true));
        values || gradients.any(|(_, g)| g.is_some_and(|g| g.overlaps(place)))
    }

    /// Whether what lies in a place is read as a part of a value after the node at hand.
    fn is_read_later(&self, value: usize, place: Slice) -> bool {
        let lies = || self.homes[value].is_some_and(|home| home.overlaps(place));
        let reads = |c: usize| self.read_by(value, c).is_some_and(|read| read.overlaps(place));
        let backward_from = |last: usize| {
            let again = |c: usize| c < last && self.ops[c].backward_reads.inputs && !self.differentiated[c] && reads(c);
            let makes = |m: usize| m < last && self.ops[m].backward_reads.value && lies();
            self.frame.backward && (self.consumers(value).any(again) || value.checked_sub(1).is_some_and(makes))
        };
        match self.at {
            At::Forward(index) => {
                let ahead = self.consumers(value).any(|c| c > index && reads(c));
                ahead || (value == self.output && lies()) || backward_from(usize::MAX)
            }
            At::Backward(index) => backward_from(index),
        }
    }

    /// Where that lies of a value which a node reads.
    fn read_by(&self, value: usize, node: usize) -> Option<Slice> {
        let home = self.homes[value]?;
        Some((self.ops[node].part)(&self.nodes[node]).map_or(home, |(start, width)| home.part(start, width)))
    }

    /// Nodes that read a value.
    pub(crate) fn consumers(&self, value: usize) -> impl Iterator<Item = usize> + '_ {
        self.nodes.iter().enumerate().filter(move |(_, n)| n.inputs.contains(&value)).map(|(i, _)| i)
    }

    /// The one node that reads a value, where it is one.
    pub(crate) fn only_consumer(&self, value: usize) -> Option<usize> {
        let mut all = self.consumers(value);
        let first = all.next()?;
        (all.next().is_none() && value != self.output).then_some(first)
    }

    /// Whether nothing but its one consumer reads a value, so that this one may take its place.
    fn is_consumed(&self, value: usize) -> bool {
        let made = value.checked_sub(1).is_some_and(|m| !self.ops[m].backward_reads.value);
        made && self.only_consumer(value).is_some()
    }

    /// What the block's matrices are kept as.
    pub(crate) fn numbers(&self) -> Numbers {
        self.frame.numbers
    }

    /// The gated activations that matmuls compute.
    pub(crate) fn gates(&self) -> Gates {
        self.frame.gates
    }

    /// The LoRA rank of a node's weight; 0 where it is not adapted.
    pub(crate) fn rank(&self, index: usize, role: &str) -> usize {
        (self.frame.rank)(index, role)
    }
}

/// Fusions, claimed while nodes are prepared.
impl Lowering<'_> {
    /// Claims columns behind a value.
    pub(crate) fn claim_behind(&mut self, value: usize, columns: usize) {
        self.behind[value] = self.behind[value].max(columns);
    }

    /// Claims as many behind a value as are claimed behind its gradient, which may take its place.
    pub(crate) fn claim_behind_for_gradient(&mut self, value: usize) {
        self.claim_behind(value, self.gradient_behind[value]);
    }

    /// Claims columns behind a value's gradient, as many as lie behind values between blocks.
    pub(crate) fn claim_behind_gradient(&mut self, value: usize) {
        self.gradient_behind[value] = self.frame.behind;
    }

    /// A value's gradient is passed on to these as it is, so that what they claimed is claimed of it.
    pub(crate) fn share_gradient(&mut self, value: usize, with: &[usize]) {
        self.gradient_behind[value] = with.iter().map(|v| self.gradient_behind[*v]).max().unwrap_or(0);
    }

    /// The node after `index` that its steps could compute as their epilogue, and the other value it reads, which is made by
    /// then.
    pub(crate) fn epilogue(&self, index: usize, epilogue: Epilogue) -> Option<(usize, usize)> {
        let next = self.only_consumer(index + 1).filter(|c| self.ops[*c].epilogue == Some(epilogue))?;
        let other = self.nodes[next].inputs.iter().copied().find(|v| *v != index + 1)?;
        (other <= index).then_some((next, other))
    }

    /// The node that reads two values, and alone does, which their step could compute as its epilogue.
    pub(crate) fn epilogue_of_two(&self, values: [usize; 2], epilogue: Epilogue) -> Option<usize> {
        let [a, b] = values.map(|value| self.only_consumer(value));
        let next = a.filter(|next| b == Some(*next) && self.ops[*next].epilogue == Some(epilogue))?;
        (self.nodes[next].inputs == values).then_some(next)
    }

    /// Whether a matmul computes a node's gated activation, and nobody but the node at hand reads that.
    pub(crate) fn is_gate_of(&self, node: usize, reader: usize) -> bool {
        let gated = self.ops[node].epilogue == Some(Epilogue::Gated) && self.computed_by[node].is_some();
        gated && self.only_consumer(node + 1) == Some(reader)
    }

    /// Has the node at hand make the gradients that another one would.
    pub(crate) fn differentiate(&mut self, other: usize) {
        self.differentiated[other] = true;
    }

    /// Has a node's steps compute another one's value.
    pub(crate) fn compute_with(&mut self, other: usize, by: usize) {
        self.computed_by[other] = Some(by);
    }
}

/// Places of values.
impl Lowering<'_> {
    /// A buffer of columns, with some behind them.
    pub(crate) fn buffer(&mut self, width: usize, behind: usize) -> Slice {
        self.program.buffers.push(Buffer::Columns(padded(width + behind)));
        self.widths.push(width);
        Slice::whole(self.program.buffers.len() - 1, width)
    }

    /// A buffer with an f32 for every head.
    pub(crate) fn heads(&mut self, heads: usize) -> Slice {
        self.program.buffers.push(Buffer::Heads(heads));
        self.widths.push(0);
        Slice::whole(self.program.buffers.len() - 1, heads)
    }

    /// Room among what a text carries from token to token; where it begins.
    pub(crate) fn carry(&mut self, bytes: usize) -> usize {
        let at = self.program.carried;
        self.program.carried += aligned(bytes);
        at
    }

    /// Where a value lies.
    pub(crate) fn home(&self, value: usize) -> Result<Slice> {
        self.homes[value].ok_or_else(|| Error::run(format!("value {value} of a block is read before it is made")))
    }

    /// Where the inputs of a node lie.
    pub(crate) fn inputs<const N: usize>(&self, index: usize) -> Result<[Slice; N]> {
        let homes: Vec<Slice> = self.nodes[index].inputs.iter().map(|v| self.home(*v)).collect::<Result<_>>()?;
        homes.try_into().map_err(|_| Error::run(format!("op '{}' does not read {N} values", self.nodes[index].op)))
    }

    /// A new place for the value of a node.
    pub(crate) fn place(&mut self, index: usize) -> Slice {
        let (value, width) = (index + 1, whole(self.nodes[index].width));
        let home =
            if value == self.output { Slice::whole(OUTPUT, width) } else { self.buffer(width, self.behind[value]) };
        self.make(value, home);
        home
    }

    fn make(&mut self, value: usize, home: Slice) {
        self.homes[value] = Some(home);
        self.making.push(value);
    }

    /// One place for the values of some nodes, their columns side by side.
    pub(crate) fn place_together(&mut self, nodes: &[usize], behind: usize) -> Slice {
        let width = nodes.iter().map(|n| self.nodes[*n].width).sum();
        let home = self.buffer(width, behind);
        let mut column = 0;
        for node in nodes {
            let own = Slice { buffer: home.buffer, column, width: self.nodes[*node].width };
            self.make(node + 1, own);
            column += own.width;
        }
        let values = nodes.iter().map(|n| n + 1).collect();
        self.bundles.push(Bundle { values, width, behind, buffer: home.buffer, gradient: None });
        home
    }

    /// The place of a node's value: its input's, where nothing else reads that, else a new one.
    pub(crate) fn place_over_input(&mut self, index: usize) -> Result<Slice> {
        let from = self.nodes[index].inputs[0];
        let home = self.home(from)?;
        if index + 1 == self.output || !self.is_free_for(home, from, index) {
            return Ok(self.place(index));
        }
        self.over[index + 1] = Some(from);
        self.make(index + 1, home);
        Ok(home)
    }

    /// The place of a value that is a part of a node's input: in that one's.
    pub(crate) fn place_in_input(&mut self, index: usize, start: usize) -> Result<()> {
        let from = self.nodes[index].inputs[0];
        let home = self.home(from)?.part(start, self.nodes[index].width);
        self.over[index + 1] = Some(from);
        self.make(index + 1, home);
        Ok(())
    }

    /// Whether nothing but a node reads what lies in a place as a value, or as a part of one that this one is a part of: what
    /// is computed of it would be lost, and could not be computed again.
    fn is_free_for(&self, place: Slice, mut value: usize, mut reader: usize) -> bool {
        loop {
            let Some(maker) = value.checked_sub(1) else { return false };
            let mut others = self.consumers(value).filter(|c| *c != reader);
            let read = others.any(|c| self.read_by(value, c).is_some_and(|read| read.overlaps(place)));
            if read || value == self.output || self.ops[maker].backward_reads.value {
                return false;
            }
            let Some(whole) = self.over[value] else { return true };
            (value, reader) = (whole, maker);
        }
    }

    /// Copies columns, unless they are there.
    pub(crate) fn copy(&mut self, from: Slice, to: Slice) -> Result<()> {
        if from == to { Ok(()) } else { self.push(copy(from, to)) }
    }

    /// A value with columns behind it: where it lies, or a copy.
    pub(crate) fn with_behind(&mut self, slice: Slice, behind: usize) -> Result<Slice> {
        let Buffer::Columns(columns) = self.program.buffers[slice.buffer] else {
            return Err(Error::run("numbers of heads have no columns"));
        };
        // Behind some columns of a buffer lie others.
        let whole = slice.width == self.widths[slice.buffer] && slice.width + behind <= columns;
        if behind == 0 || whole {
            return Ok(slice);
        }
        self.copy_with_behind(slice, behind)
    }

    /// A copy of a value with columns behind it; the value itself, if there are none.
    pub(crate) fn copy_with_behind(&mut self, slice: Slice, behind: usize) -> Result<Slice> {
        if behind == 0 {
            return Ok(slice);
        }
        let own = self.buffer(slice.width, behind);
        self.copy(slice, own)?;
        Ok(own)
    }

    /// Keeps slices for the backward steps of a node.
    pub(crate) fn leave(&mut self, index: usize, slices: Vec<Slice>) {
        self.left[index] = slices;
    }

    /// All that the node's forward steps left.
    pub(crate) fn all_left(&self, index: usize) -> Vec<Slice> {
        self.left[index].clone()
    }

    /// What the node's forward steps left.
    pub(crate) fn left<const N: usize>(&self, index: usize) -> Result<[Slice; N]> {
        let left = self.left[index].clone().try_into();
        left.map_err(|_| Error::run(format!("op '{}' runs backward before it ran forward", self.nodes[index].op)))
    }

    /// A vector that a node's steps read; its place among the block's.
    pub(crate) fn vector(&mut self, node: usize, role: &'static str) -> Result<usize> {
        let weight = self.nodes[node].weight(role);
        let weight = weight.ok_or_else(|| Error::run(format!("op '{}' lacks its {role}", self.nodes[node].op)))?;
        let known = self.program.vectors.iter().position(|v| v.node == node && v.role == role);
        Ok(known.unwrap_or_else(|| {
            let width = weight.shape.iter().product();
            self.program.vectors.push(Vector { node, role, width, numbers: NUMBERS });
            self.program.vectors.len() - 1
        }))
    }

    /// The same of one that is kept in f32; `None` where the node has none.
    pub(crate) fn wide_vector(&mut self, node: usize, role: &'static str) -> Result<Option<usize>> {
        if self.nodes[node].weight(role).is_none() {
            return Ok(None);
        }
        let at = self.vector(node, role)?;
        self.program.vectors[at].numbers = Numbers::F32;
        Ok(Some(at))
    }

    /// The stack of a node's matrix, its place among the block's.
    pub(crate) fn stack(&self, node: usize) -> Result<(usize, &Stack)> {
        let found = self.program.stacks.iter().enumerate().find(|(_, s)| s.member(node, "weight").is_some());
        found.ok_or_else(|| Error::run("a matrix is in no stack"))
    }
}
