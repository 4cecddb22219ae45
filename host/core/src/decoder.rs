//! What a device does for generation, token by token.

use crate::error::Result;

/// Tokens of a prompt that are taken in at once: more gain nothing, and between them an answer can be stopped.
pub const CHUNK: usize = 256;

/// What a decoder keeps memory for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequences {
    /// How many there are.
    pub count: usize,
    /// Tokens of each: so many where memory has room for them, and less down to `least`.
    pub most: usize,
    /// Tokens of each without which there is nothing to begin.
    pub least: usize,
}

impl Sequences {
    /// So many as long as memory allows, within reason.
    pub fn of(count: usize) -> Sequences {
        Sequences { count, most: 32 << 10, least: CHUNK }
    }
}

/// A device with a model, its adapters, and a KV cache for each of some sequences.
pub trait Decoder {
    /// What it is and how it computes, such as `cpu float32`.
    fn name(&self) -> String;

    /// How many sequences it has, and tokens of each at most.
    fn sequences(&self) -> (usize, usize);

    /// Appends tokens to sequences, each named by its place, with an adapter or without; returns for each the logits of its next
    /// token, `[vocab]`. Tokens of one sequence are all computed with the same adapter.
    ///
    /// # Errors
    /// No tokens, a sequence that has no room for them, a device that fails. Then the sequences are what they were before.
    fn append(&mut self, adapter: Option<usize>, new: &[(usize, &[u32])]) -> Result<Vec<Vec<f32>>>;

    /// Truncates a sequence to its first tokens, or to fewer where it has a state that cannot be cut there; returns how many are left.
    fn truncate(&mut self, sequence: usize, tokens: usize) -> usize;
}
