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

/// Text up to the first of some strings. What may be the beginning of one is held back.
#[derive(Default)]
pub(super) struct StopStrings {
    strings: Vec<String>,
    held: String,
}

impl StopStrings {
    /// An empty string would stop every text before it begins, and is left out.
    pub(super) fn new(strings: &[String]) -> StopStrings {
        StopStrings { strings: strings.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// What is sure after further text, and whether a string came: then that is all before it.
    pub(super) fn push(&mut self, text: &str) -> (String, bool) {
        if self.strings.is_empty() {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        if let Some(at) = self.strings.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            let before = self.held[..at].to_owned();
            self.held.clear();
            return (before, true);
        }
        let begins = |at: usize| self.strings.iter().any(|s| s.starts_with(&self.held[at..]));
        let unsure = self.held.char_indices().map(|(at, _)| at).find(|at| begins(*at));
        let rest = self.held.split_off(unsure.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, at the end.
    pub(super) fn end(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::StopStrings;

    #[test]
    fn text_ends_before_a_string() {
        let mut stops = StopStrings::new(&["\n\nUser:".into(), "END".into(), String::new()]);
        assert_eq!(stops.push("one E"), ("one ".into(), false));
        assert_eq!(stops.push("N two\n"), ("EN two".into(), false));
        assert_eq!(stops.push("\nUse"), (String::new(), false));
        assert_eq!(stops.push("d 用E"), ("\n\nUsed 用".into(), false));
        assert_eq!(stops.push("ND and\n\nUser:"), (String::new(), true));
        let mut stops = StopStrings::new(&["ab".into()]);
        assert_eq!((stops.push("xa"), stops.end()), (("x".into(), false), "a".into()));
    }
}
