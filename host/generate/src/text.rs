//! Text of tokens as they come. A character may take several tokens, and a token's text may depend on the one before it.

use dpo_data::ChatTokenizer;

/// What stands for bytes that are no character, or not yet.
const BROKEN: char = '\u{FFFD}';

/// Text that only grows.
#[derive(Default)]
pub struct TextStream {
    /// Tokens from the last ones that were whole: decoders treat the first token of a text in another way.
    ids: Vec<u32>,
    /// How many of them are whole.
    whole: usize,
    /// Bytes of their text that were returned.
    shown: usize,
}

impl TextStream {
    /// What a further token adds: nothing, while it may be a part of a character. Special tokens have no text.
    pub fn push(&mut self, tokenizer: &ChatTokenizer, id: u32) -> String {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, false);
        let sure = text.trim_end_matches(BROKEN);
        let new = sure.get(self.shown..).unwrap_or_default().to_owned();
        self.shown += new.len();
        if sure.len() == text.len() {
            let last = tokenizer.decode(&self.ids[self.whole..], false);
            if !last.is_empty() {
                self.ids.drain(..self.whole);
                self.shown = last.len();
            }
            self.whole = self.ids.len();
        }
        new
    }

    /// What is left at the end: half a character is shown as what it is.
    pub fn end(&mut self, tokenizer: &ChatTokenizer) -> String {
        let text = tokenizer.decode(&self.ids, false);
        let rest = text.get(self.shown..).unwrap_or_default().to_owned();
        *self = TextStream::default();
        rest
    }
}
