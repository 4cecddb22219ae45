//! An example in tokens: one prompt and one to k answers to it. Data becomes examples; batches, losses and reports are of them.

use crate::error::{Error, Result};

/// A prompt and its answers, best first; detached ones behind all others. Neither the prompt nor an answer is empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    prompt: Vec<u32>,
    answers: Vec<Answer>,
    /// Whether the prompt's tokens get log-probs as well, from the second one on.
    prompt_scored: bool,
    /// Where its row stands.
    pub place: String,
}

/// An answer in tokens, EOS included.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// 1 for one that was preferred or liked, 0 for one that was not, or a score: the higher, the better.
    pub label: f64,
    /// Whether it gives log-probs alone: no gradient flows through it.
    pub detached: bool,
}

impl Answer {
    /// An answer with a gradient.
    pub fn new(ids: Vec<u32>, label: f64) -> Answer {
        Answer { ids, label, detached: false }
    }
}

impl Example {
    /// An example of the row at `place`.
    ///
    /// # Errors
    /// An empty prompt, no answer to learn from, an empty one, or answers that do not come best first.
    pub fn new(prompt: Vec<u32>, answers: Vec<Answer>, place: impl Into<String>) -> Result<Example> {
        let wrong = |what: &str| Err(Error::input(what));
        if prompt.is_empty() {
            return wrong("the prompt has no tokens");
        }
        if answers.iter().any(|a| a.ids.is_empty()) {
            return wrong("an answer has no tokens");
        }
        if answers.iter().any(|a| !a.label.is_finite()) {
            return wrong("the label of an answer is not a finite number");
        }
        if answers.first().is_none_or(|a| a.detached) {
            return wrong("there is no answer to learn from");
        }
        let ordered = |two: &[Answer]| two[1].detached || !two[0].detached && two[0].label >= two[1].label;
        if !answers.windows(2).all(ordered) {
            return wrong("answers should come best first, and detached ones behind all others");
        }
        Ok(Example { prompt, answers, prompt_scored: false, place: place.into() })
    }

    /// A better and a worse answer.
    ///
    /// # Errors
    /// As [`Example::new`].
    pub fn pair(prompt: Vec<u32>, chosen: Vec<u32>, rejected: Vec<u32>, place: impl Into<String>) -> Result<Example> {
        Example::new(prompt, vec![Answer::new(chosen, 1.0), Answer::new(rejected, 0.0)], place)
    }

    /// Tokens that all answers follow.
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// The answers, best first.
    pub fn answers(&self) -> &[Answer] {
        &self.answers
    }

    /// Answers with a gradient, best first.
    pub fn learned(&self) -> &[Answer] {
        let count = self.answers.iter().position(|a| a.detached).unwrap_or(self.answers.len());
        &self.answers[..count]
    }

    /// The same example, of whose prompt log-probs are computed as well.
    #[must_use]
    pub fn with_prompt_scored(self) -> Example {
        Example { prompt_scored: true, ..self }
    }

    /// The same example with an answer behind all others that only gives log-probs.
    ///
    /// # Errors
    /// An answer without tokens.
    pub fn with_detached(mut self, ids: Vec<u32>) -> Result<Example> {
        if ids.is_empty() {
            return Err(Error::input("an answer has no tokens"));
        }
        self.answers.push(Answer { ids, label: 0.0, detached: true });
        Ok(self)
    }

    /// Whether log-probs of the prompt are computed as well.
    pub fn is_prompt_scored(&self) -> bool {
        self.prompt_scored
    }

    /// Tokens of the prompt that get log-probs: none, unless they are asked for.
    pub fn scored_prompt(&self) -> &[u32] {
        if self.prompt_scored { &self.prompt[1..] } else { &[] }
    }

    /// How many tokens get log-probs: of every answer, then of the prompt where they are asked for.
    pub fn scored_lengths(&self) -> impl Iterator<Item = usize> {
        let answers = self.answers.iter().map(|a| a.ids.len());
        answers.chain(self.prompt_scored.then(|| self.scored_prompt().len()))
    }

    /// Drops all answers but the best one and detached ones.
    pub fn keep_best(&mut self) {
        let learned = self.learned().len();
        self.answers.drain(1..learned);
    }

    /// Cuts tokens off the prompt's head; false, and nothing is cut, where none would be left.
    pub fn cut_prompt(&mut self, tokens: usize) -> bool {
        let cut = tokens < self.prompt.len();
        if cut {
            self.prompt.drain(..tokens);
        }
        cut
    }

    /// Cuts answers to their first tokens, of which at least one stays.
    pub fn cut_answers(&mut self, tokens: usize) {
        self.answers.iter_mut().for_each(|a| a.ids.truncate(tokens.max(1)));
    }

    /// Tokens of the prompt and of the longest answer: what `max_length` is about.
    pub fn longest(&self) -> usize {
        self.prompt.len() + self.answers.iter().map(|a| a.ids.len()).max().unwrap_or(0)
    }

    /// Tokens of all answers.
    pub fn answer_tokens(&self) -> usize {
        self.answers.iter().map(|a| a.ids.len()).sum()
    }

    /// Tokens of the prompt, once, and of all answers.
    pub fn unique_tokens(&self) -> usize {
        self.prompt.len() + self.answer_tokens()
    }

    /// Tokens it takes in a [batch](crate::batch::Batch): the last one of an answer predicts nothing and is not laid out.
    pub fn packed_tokens(&self) -> usize {
        self.laid_out(false)
    }

    /// The same; with `ends`, in one that has those last tokens, too.
    pub fn laid_out(&self, ends: bool) -> usize {
        self.unique_tokens() - if ends { 0 } else { self.answers.len() }
    }

    /// Tokens that get log-probs to a token that is laid out.
    pub fn scored_share(&self) -> f64 {
        self.scored_lengths().sum::<usize>() as f64 / self.packed_tokens().max(1) as f64
    }

    /// Prompt and answers, one after the other.
    pub fn parts(&self) -> impl Iterator<Item = &[u32]> {
        std::iter::once(self.prompt()).chain(self.answers.iter().map(|a| a.ids.as_slice()))
    }

    /// What decides its numbers, in bytes: tokens with their lengths, labels, which answers are detached, and whether the prompt is
    /// scored.
    pub fn content(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for ids in self.parts() {
            bytes.extend((ids.len() as u64).to_le_bytes());
            bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        }
        for answer in &self.answers {
            bytes.extend(answer.label.to_le_bytes());
            bytes.push(u8::from(answer.detached));
        }
        bytes.extend((self.answers.len() as u64).to_le_bytes());
        bytes.push(u8::from(self.prompt_scored));
        bytes
    }
}

/// The name of an answer among some: where there are two, one is chosen and the other rejected.
pub fn answer_name(index: usize, count: usize) -> String {
    match (index, count) {
        (0, 1) => "answer".into(),
        (0, 2) => "chosen".into(),
        (1, 2) => "rejected".into(),
        _ => format!("answer {}", index + 1),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    #[test]
    fn what_cannot_be_learned_is_refused() {
        let answer = |n: usize, label: f64, detached: bool| Answer { ids: vec![7; n], label, detached };
        let cases = [
            (0, vec![answer(1, 1.0, false)], "the prompt has no tokens"),
            (1, vec![answer(1, 1.0, false), answer(0, 0.0, false)], "an answer has no tokens"),
            (1, vec![answer(1, f64::NAN, false)], "not a finite number"),
            (1, vec![], "no answer to learn from"),
            (1, vec![answer(1, 1.0, true)], "no answer to learn from"),
            (1, vec![answer(1, 0.0, false), answer(1, 1.0, false)], "best first"),
            (1, vec![answer(1, 1.0, false), answer(1, 0.0, true), answer(1, 0.0, false)], "best first"),
        ];
        for (prompt, answers, part) in cases {
            let error = Example::new(vec![3; prompt], answers, "").unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn tokens_are_counted() {
        let mut answers =
            vec![Answer::new(vec![1, 2, 3], 2.0), Answer::new(vec![4], 1.0), Answer::new(vec![5, 6], 1.0)];
        answers[2].detached = true;
        let mut example = Example::new(vec![8, 9], answers, "").unwrap();
        let counts = |e: &Example| [e.longest(), e.answer_tokens(), e.unique_tokens(), e.packed_tokens()];
        assert_eq!((counts(&example), example.learned().len()), ([5, 6, 8, 5], 2));
        assert!(!example.cut_prompt(2) && example.cut_prompt(1));
        example.cut_answers(2);
        assert_eq!(example.parts().collect::<Vec<_>>(), [&[9][..], &[1, 2], &[4], &[5, 6]]);
        example.keep_best();
        assert_eq!(example.parts().collect::<Vec<_>>(), [&[9][..], &[1, 2], &[5, 6]]);
        assert_eq!(example.learned().len(), 1);
    }
}
