//! Which tokens of an example see which others: the one statement of the rule, for attention on every device.
//!
//! An example lies as prompt | answer 1 | … | answer k. A token sees the prompt and the earlier tokens of its own answer, and
//! nothing of other answers, so that each answer continues the prompt as if it were alone. All that has to be known of a token
//! is where its answer begins. With a window, distances are those of positions, which restart at the prompt's end, not those of
//! places in the row.

use std::ops::Range;

use crate::batch::Span;

/// The mask of one example.
pub struct AnswerMask {
    /// Where the prompt ends.
    prompt: usize,
    /// Of every token, where its answer begins; of the prompt's, the prompt's end. It never falls.
    pub begins: Vec<u32>,
    /// How many positions a token sees, its own included.
    window: usize,
}

impl AnswerMask {
    /// That of an example which continues a text of `cached` tokens, of which places are counted; `window` 0 is none.
    pub fn of(span: &Span, cached: usize, window: usize) -> AnswerMask {
        let prompt = cached + span.prompt;
        let mut begins = vec![prompt as u32; prompt];
        for answer in &span.answers {
            begins.extend(std::iter::repeat_n(begins.len() as u32, *answer));
        }
        AnswerMask { prompt, begins, window: if window == 0 { usize::MAX } else { window } }
    }

    /// The keys that the token at `query` sees: of the prompt, and of its own answer. Both ends of both never fall from a token of an answer to the
    /// next one, nor within the prompt.
    pub fn keys(&self, query: usize) -> [Range<usize>; 2] {
        let begin = self.begins[query] as usize;
        let skipped = begin - self.prompt;
        let first = (query + 1).saturating_sub(self.window);
        let end = self.prompt.min(query + 1);
        // Positions of an answer go on from the prompt's end.
        let of_prompt = (query + 1 - skipped).saturating_sub(self.window).min(end)..end;
        let own = if query < self.prompt { begin..begin } else { begin.max(first)..query + 1 };
        [of_prompt, own]
    }

    /// Whether the token at `query` sees the one at `key`; places in the example.
    pub fn sees(&self, query: usize, key: usize) -> bool {
        let begin = self.begins[query] as usize;
        let of_another_answer = (self.prompt..begin).contains(&key);
        // Answers that lie between the prompt and the query's own have no part in its positions.
        let skipped = if key < self.prompt { begin - self.prompt } else { 0 };
        key <= query && !of_another_answer && query - key - skipped < self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the sequences written out: each answer with the prompt before it, alone.
    #[test]
    fn an_answer_sees_what_it_sees_alone() {
        for (prompt, answers) in
            [(3, vec![]), (1, vec![1]), (4, vec![2, 3]), (2, vec![3, 0, 1]), (3, vec![1, 4, 2, 2, 5])]
        {
            let span = Span { start: 5, prompt, answers };
            // Of every token, its answer and its position.
            let of_prompt = (0..prompt).map(|p| (None, p));
            let of_answers =
                span.answers.iter().enumerate().flat_map(|(a, n)| (0..*n).map(move |p| (Some(a), prompt + p)));
            let tokens: Vec<(Option<usize>, usize)> = of_prompt.chain(of_answers).collect();
            for window in [0, 1, 2, 3, 100] {
                let mask = AnswerMask::of(&span, 0, window);
                assert!(mask.begins.is_sorted() && mask.begins.len() == span.len());
                for (query, (answer, position)) in tokens.iter().enumerate() {
                    let keys: Vec<usize> = mask.keys(query).into_iter().flatten().collect();
                    assert!(
                        keys.into_iter().eq((0..tokens.len()).filter(|key| mask.sees(query, *key))),
                        "{span:?}, {query}"
                    );
                    for (key, (other, before)) in tokens.iter().enumerate() {
                        let same = other.is_none() || answer == other;
                        let seen = same && before <= position && (window == 0 || position - before < window);
                        assert_eq!(mask.sees(query, key), seen, "{span:?}, window {window}: {query} sees {key}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_text_is_continued() {
        let span = Span { start: 0, prompt: 2, answers: Vec::new() };
        let mask = AnswerMask::of(&span, 4, 3);
        let seen = |query: usize| (0..6).filter(|key| mask.sees(query, *key)).collect::<Vec<_>>();
        assert_eq!((seen(4), seen(5)), (vec![2, 3, 4], vec![3, 4, 5]));
    }
}
