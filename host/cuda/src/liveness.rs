//! Where the buffers of a block lie: those that are saved one after the other, the others where nothing lies that is still read.

use super::program::{GRADIENT, Program, Step};
use super::saved::SavedActivations;

/// Where a block's buffers lie in a pass, in bytes a token.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    /// Of buffers in scratch memory.
    pub scratch: Vec<Option<usize>>,
    pub scratch_bytes: usize,
    /// Of buffers that are saved.
    pub saved: Vec<Option<usize>>,
    pub saved_bytes: usize,
}

/// A block's passes when this much of it is saved.
#[derive(Default)]
pub(super) struct Scheduled {
    pub forward: Layout,
    pub backward: Layout,
    /// Of the backward pass, with what is computed again.
    pub steps: Vec<Step>,
}

impl Scheduled {
    pub(super) fn new(program: &Program, level: SavedActivations) -> Scheduled {
        let saved = program.saved(level);
        let steps = program.replayed(&saved);
        Scheduled {
            forward: Layout::new(program, &program.forward, &saved),
            backward: Layout::new(program, &steps, &saved),
            steps,
        }
    }
}

impl Layout {
    fn new(program: &Program, steps: &[Step], saved: &[bool]) -> Layout {
        let count = program.buffers.len();
        let bytes = |buffer: usize| program.buffers[buffer].bytes();
        let mut layout = Layout { scratch: vec![None; count], saved: vec![None; count], ..Layout::default() };
        for (buffer, _) in saved.iter().enumerate().filter(|(_, s)| **s) {
            layout.saved[buffer] = Some(layout.saved_bytes);
            layout.saved_bytes += bytes(buffer);
        }
        let needed: Vec<usize> = steps.iter().flat_map(Step::needs).collect();
        // The first and the last step that touches a buffer.
        let mut lives: Vec<Option<(usize, usize)>> = vec![None; count];
        for (at, step) in steps.iter().enumerate() {
            for buffer in step.buffers().filter(|b| *b > GRADIENT && !saved[*b] && needed.contains(b)) {
                lives[buffer].get_or_insert((at, at)).1 = at;
            }
        }
        let mut order: Vec<usize> = (0..count).filter(|b| lives[*b].is_some()).collect();
        order.sort_by_key(|b| std::cmp::Reverse(bytes(*b)));
        for (done, buffer) in order.iter().enumerate() {
            let together = |other: &&usize| match (lives[**other], lives[*buffer]) {
                (Some(a), Some(b)) => a.0 <= b.1 && b.0 <= a.1,
                _ => false,
            };
            let mut taken: Vec<(usize, usize)> = order[..done]
                .iter()
                .filter(together)
                .filter_map(|o| Some((layout.scratch[*o]?, layout.scratch[*o]? + bytes(*o))))
                .collect();
            taken.sort_unstable();
            let mut at = 0;
            for (start, end) in taken {
                if at + bytes(*buffer) <= start {
                    break;
                }
                at = at.max(end);
            }
            layout.scratch[*buffer] = Some(at);
            layout.scratch_bytes = layout.scratch_bytes.max(at + bytes(*buffer));
        }
        layout
    }
}
