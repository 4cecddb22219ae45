//! Where the buffers of a block lie: those that are saved one after the other, the others where nothing lies that is still read.

use super::chunks::chains;
use super::program::{GRADIENT, Program, Step};
use super::saved::SavedActivations;

/// Bytes for every row of a batch, and for every row of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bytes {
    pub row: usize,
    pub chunk_row: usize,
}

/// Where a buffer lies in scratch memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scratch {
    pub at: Bytes,
    /// Whether it has the rows of a chunk alone.
    pub of_chunk: bool,
}

/// Where a block's buffers lie in a pass.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    /// Of buffers in scratch memory.
    pub scratch: Vec<Option<Scratch>>,
    /// Where what lies there ends; the pass takes the most of them.
    pub ends: Vec<Bytes>,
    /// Of buffers that are saved, in bytes a row.
    pub saved: Vec<Option<usize>>,
    pub saved_bytes: usize,
}

/// Both passes of a block.
#[derive(Default)]
pub(super) struct Passes {
    pub forward: Layout,
    pub backward: Layout,
}

/// A block's passes when this much of it is saved.
#[derive(Default)]
pub(super) struct Scheduled {
    /// Of batches whose rows are computed at once, and in chunks.
    pub whole: Passes,
    pub chunked: Passes,
    /// Of the backward pass, with what is computed again.
    pub steps: Vec<Step>,
}

impl Bytes {
    /// Of so many rows.
    pub(super) fn of(self, rows: usize, chunk: usize) -> usize {
        self.row * rows + self.chunk_row * chunk
    }
}

impl Scheduled {
    pub(super) fn new(program: &Program, level: SavedActivations) -> Scheduled {
        let saved = program.saved(level);
        let steps = program.replayed(&saved);
        let passes = |chunked| Passes {
            forward: Layout::new(program, &program.forward, &saved, chunked),
            backward: Layout::new(program, &steps, &saved, chunked),
        };
        Scheduled { whole: passes(false), chunked: passes(true), steps }
    }

    /// Of batches that are computed in chunks or at once.
    pub(super) fn passes(&self, chunked: bool) -> &Passes {
        if chunked { &self.chunked } else { &self.whole }
    }
}

impl Layout {
    /// In chunks a buffer that a chain of steps alone touches has the rows of a chunk. All others are there from the first chunk
    /// to the last: rows of one that is not read any more may not take the place of another's that still is.
    fn new(program: &Program, steps: &[Step], saved: &[bool], chunked: bool) -> Layout {
        let count = program.buffers.len();
        let bytes = |buffer: usize| program.buffers[buffer].bytes();
        let mut layout = Layout { scratch: vec![None; count], saved: vec![None; count], ..Layout::default() };
        for (buffer, _) in saved.iter().enumerate().filter(|(_, s)| **s) {
            layout.saved[buffer] = Some(layout.saved_bytes);
            layout.saved_bytes += bytes(buffer);
        }
        let needed: Vec<usize> = steps.iter().flat_map(Step::needs).collect();
        // The first and the last step that touches a buffer.
        let mut lives: Vec<Option<Life>> = vec![None; count];
        for (at, step) in steps.iter().enumerate() {
            for buffer in step.buffers().filter(|b| *b > GRADIENT && !saved[*b] && needed.contains(b)) {
                lives[buffer].get_or_insert((at, at)).1 = at;
            }
        }
        // The chain of every step.
        let chain: Vec<usize> = match chunked {
            true => chains(steps).enumerate().flat_map(|(at, chain)| chain.iter().map(move |_| at)).collect(),
            false => (0..steps.len()).collect(),
        };
        let in_chains = |buffer: usize| lives[buffer].map_or((0, 0), |(first, last)| (chain[first], chain[last]));
        let chain_of = |buffer: usize| {
            let (first, last) = lives[buffer]?;
            (chunked && chain[first] == chain[last] && !steps[first].mixes_rows).then_some(chain[first])
        };
        let mut order: Vec<usize> = (0..count).filter(|b| lives[*b].is_some()).collect();
        order.sort_by_key(|b| std::cmp::Reverse(bytes(*b)));
        let (of_chunks, mut whole): (Vec<usize>, Vec<usize>) = order.into_iter().partition(|b| chain_of(*b).is_some());
        // What lives beside those of a chunk lies below them.
        let beside = |buffer: &usize| {
            of_chunks.iter().filter_map(|b| chain_of(*b)).any(|chain| overlap(in_chains(*buffer), (chain, chain)))
        };
        whole.sort_by_key(|b| !beside(b));
        let places = pack(&whole, in_chains, bytes);
        layout.ends.push(Bytes { row: end(&places, bytes), chunk_row: 0 });
        for (buffer, row) in &places {
            layout.scratch[*buffer] = Some(Scratch { at: Bytes { row: *row, chunk_row: 0 }, of_chunk: false });
        }
        for own in 0..chain.last().map_or(0, |last| last + 1) {
            let buffers: Vec<usize> = of_chunks.iter().copied().filter(|b| chain_of(*b) == Some(own)).collect();
            if buffers.is_empty() {
                continue;
            }
            let alive = places.iter().copied().filter(|(buffer, _)| overlap(in_chains(*buffer), (own, own)));
            let row = end(&alive.collect::<Vec<_>>(), bytes);
            let places = pack(&buffers, |buffer| lives[buffer].unwrap_or_default(), bytes);
            layout.ends.push(Bytes { row, chunk_row: end(&places, bytes) });
            for (buffer, chunk_row) in places {
                layout.scratch[buffer] = Some(Scratch { at: Bytes { row, chunk_row }, of_chunk: true });
            }
        }
        layout
    }

    /// Bytes a row of scratch memory, where nothing has the rows of a chunk.
    pub(super) fn row_bytes(&self) -> usize {
        self.ends.iter().map(|end| end.row).max().unwrap_or(0)
    }
}

/// The first and the last of some steps or chains.
type Life = (usize, usize);

fn overlap(a: Life, b: Life) -> bool {
    a.0 <= b.1 && b.0 <= a.1
}

/// Places of buffers, one after the other where there is room between those that live at the same time.
fn pack(buffers: &[usize], life: impl Fn(usize) -> Life, bytes: impl Fn(usize) -> usize) -> Vec<(usize, usize)> {
    let mut places: Vec<(usize, usize)> = Vec::new();
    for buffer in buffers {
        let together = places.iter().filter(|(other, _)| overlap(life(*other), life(*buffer)));
        let mut taken: Vec<(usize, usize)> = together.map(|(other, at)| (*at, at + bytes(*other))).collect();
        taken.sort_unstable();
        let mut at = 0;
        for (start, end) in taken {
            if at + bytes(*buffer) <= start {
                break;
            }
            at = at.max(end);
        }
        places.push((*buffer, at));
    }
    places
}

/// Where the last of some places ends.
fn end(places: &[(usize, usize)], bytes: impl Fn(usize) -> usize) -> usize {
    places.iter().map(|(buffer, at)| at + bytes(*buffer)).max().unwrap_or(0)
}
