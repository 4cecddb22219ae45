//! What a device does for answers, token by token.

use crate::error::Result;

/// Tokens of a prompt that are taken in at once: more gain nothing, and between them an answer can be stopped.
pub const CHUNK: usize = 256;

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Voice {
    /// The model without adapter.
    Base,
    /// The model with it.
    Tuned,
}

impl Voice {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Voice::Base => "base",
            Voice::Tuned => "tuned",
        }
    }
}

/// A device with a model, its adapter, and a text for each voice.
pub trait Decoder {
    /// What it is and how it computes, such as `cpu float32`.
    fn name(&self) -> String;

    /// Logits of the token after `ids`, `[vocab]`, which go on from the voice's text and are added to it.
    fn feed(&mut self, voice: Voice, ids: &[u32]) -> Result<Vec<f32>>;

    /// Forgets all but the first tokens of a voice's text.
    fn keep(&mut self, voice: Voice, tokens: usize);
}
