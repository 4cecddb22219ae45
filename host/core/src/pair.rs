//! A preference as token ids.

/// A preference as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenPair {
    /// What both answers follow. Never empty.
    pub prompt: Vec<u32>,
    /// The preferred answer, all of it learned.
    pub chosen: Vec<u32>,
    /// The other answer.
    pub rejected: Vec<u32>,
    /// Where the row stands.
    pub place: String,
}

impl TokenPair {
    /// Tokens of the prompt and of the longer answer: what `max_length` is about.
    pub fn longest(&self) -> usize {
        self.prompt.len() + self.chosen.len().max(self.rejected.len())
    }
}
