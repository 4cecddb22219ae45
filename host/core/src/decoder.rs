//! What a device does for generation, token by token.

use crate::error::Result;

/// Tokens of a prompt that are taken in at once: more gain nothing, and between them an answer can be stopped.
pub const CHUNK: usize = 256;

/// Which of the two models answers. Both share the frozen weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// The base model, its adapter disabled.
    Base,
    /// The model with its adapter.
    Tuned,
}

impl Variant {
    /// What output calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Variant::Base => "base",
            Variant::Tuned => "tuned",
        }
    }
}

/// A device with a model, its adapter, and a KV cache for each variant.
pub trait Decoder {
    /// What it is and how it computes, such as `cpu float32`.
    fn name(&self) -> String;

    /// Appends `ids` to the variant's sequence; returns the logits of the next token, `[vocab]`.
    fn append(&mut self, variant: Variant, ids: &[u32]) -> Result<Vec<f32>>;

    /// Truncates the variant's sequence to its first tokens, or to fewer where it has a state that cannot be cut there; returns how many
    /// are left.
    fn truncate(&mut self, variant: Variant, tokens: usize) -> usize;
}
