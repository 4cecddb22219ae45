//! Which activations are saved for the backward pass, and which are computed again in it.

use std::sync::Arc;

use super::program::{GRADIENT, INPUT, Program, Recompute, Step};

/// What of a layer is saved for its backward pass; the rest is computed again. From most to least memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub enum SavedActivations {
    /// Everything that is read.
    All,
    /// All but what element-wise ops make.
    Matmuls,
    /// Also not the widest matmuls (gate and up).
    SmallMatmuls,
    /// Only the block's input.
    BlockInput,
}

impl SavedActivations {
    /// Every level.
    pub const ALL: [SavedActivations; 4] = [
        SavedActivations::All,
        SavedActivations::Matmuls,
        SavedActivations::SmallMatmuls,
        SavedActivations::BlockInput,
    ];
}

/// A backward pass that is being completed.
struct Again {
    /// Buffers that are computed.
    ready: Vec<bool>,
    /// Steps of the forward pass that compute theirs again.
    done: Vec<bool>,
    steps: Vec<Step>,
}

impl Program {
    /// Buffers of the forward pass that are saved.
    pub(super) fn saved(&self, level: SavedActivations) -> Vec<bool> {
        let makers = |buffer: usize| self.forward.iter().filter(move |s| s.writes(buffer));
        let needed = |buffer: usize| {
            let read = self.backward.iter().any(|s| s.reads(buffer));
            buffer > GRADIENT && read && makers(buffer).next().is_some()
        };
        let elementwise = |buffer: usize| {
            makers(buffer).all(|s| match &s.cheaper {
                Some(cheaper) if cheaper.writes(buffer) => cheaper.recompute == Recompute::Elementwise,
                _ => s.recompute == Recompute::Elementwise,
            })
        };
        let wide = |buffer: usize| {
            let limit = 4 * self.buffers[INPUT].bytes();
            makers(buffer).any(|s| s.recompute == Recompute::Matmul) && self.buffers[buffer].bytes() > limit
        };
        let saves = |buffer: usize| {
            needed(buffer)
                && match level {
                    SavedActivations::All => true,
                    SavedActivations::Matmuls => !elementwise(buffer),
                    SavedActivations::SmallMatmuls => !elementwise(buffer) && !wide(buffer),
                    SavedActivations::BlockInput => false,
                }
        };
        (0..self.buffers.len()).map(saves).collect()
    }

    /// The backward pass, with what computes the buffers again that were not saved.
    pub(super) fn replayed(&self, saved: &[bool]) -> Vec<Step> {
        let mut ready = saved.to_vec();
        ready[INPUT] = true;
        let mut again = Again { ready, done: vec![false; self.forward.len()], steps: Vec::new() };
        for step in &self.backward {
            step.reads.iter().for_each(|read| self.ensure(read.buffer, &mut again));
            again.steps.push(step.clone());
        }
        again.steps
    }

    fn ensure(&self, buffer: usize, again: &mut Again) {
        if again.ready[buffer] {
            return;
        }
        again.ready[buffer] = true;
        for (at, step) in self.forward.iter().enumerate().filter(|(_, s)| s.writes(buffer)) {
            if std::mem::replace(&mut again.done[at], true) {
                continue;
            }
            // What it is computed from for less may have been saved.
            let saved =
                |cheaper: &&Arc<Step>| cheaper.writes(buffer) && cheaper.reads.iter().all(|r| again.ready[r.buffer]);
            let step = step.cheaper.as_ref().filter(saved).map_or(step, |cheaper| cheaper);
            step.reads.iter().for_each(|r| self.ensure(r.buffer, again));
            again.steps.push(step.clone());
        }
    }
}
