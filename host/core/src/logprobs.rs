//! Log-probs of the answer tokens of some examples, with further statistics of them: what devices compute, losses read, ranks
//! exchange and the reference keeps.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::example::Example;

/// Where the tokens of every answer of every example lie in a flat array; those of its prompt, where it is scored, as of one more answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerOffsets {
    /// Where answers begin, in tokens, and where the last one ends.
    answers: Vec<usize>,
    /// Where examples begin, in answers, and where the last one ends.
    examples: Vec<usize>,
}

impl Default for AnswerOffsets {
    fn default() -> AnswerOffsets {
        AnswerOffsets { answers: vec![0], examples: vec![0] }
    }
}

impl AnswerOffsets {
    /// Those of some examples, one after the other.
    pub fn of<'a>(examples: impl IntoIterator<Item = &'a Example>) -> AnswerOffsets {
        let mut offsets = AnswerOffsets::default();
        examples.into_iter().for_each(|e| offsets.push(e.scored_lengths()));
        offsets
    }

    /// Adds an example whose answers have so many tokens.
    pub fn push(&mut self, lengths: impl IntoIterator<Item = usize>) {
        for length in lengths {
            self.answers.push(self.tokens() + length);
        }
        self.examples.push(self.answers.len() - 1);
    }

    /// Examples.
    pub fn len(&self) -> usize {
        self.examples.len() - 1
    }

    /// Whether there is no example.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of all answers.
    pub fn tokens(&self) -> usize {
        self.answers[self.answers.len() - 1]
    }

    /// The tokens of an example's answers.
    pub fn example(&self, example: usize) -> Range<usize> {
        self.answers[self.examples[example]]..self.answers[self.examples[example + 1]]
    }

    /// The tokens of each of an example's answers.
    pub fn answers(&self, example: usize) -> impl Iterator<Item = Range<usize>> {
        self.answers[self.examples[example]..=self.examples[example + 1]].windows(2).map(|ends| ends[0]..ends[1])
    }

    /// Those of some of the examples, one after the other.
    pub fn select(&self, examples: &[usize]) -> AnswerOffsets {
        let mut offsets = AnswerOffsets::default();
        examples.iter().for_each(|e| offsets.push(self.answers(*e).map(|a| a.len())));
        offsets
    }
}

/// What is known of an answer token beside its log-prob: `ln Σ_v p[v]²`, which WPO calls its alignment term (Zhou et al. 2024,
/// eq. 2).
pub const STATISTICS: [&str; 1] = ["log_sum_sq_probs"];

/// Log-probs of answer tokens, flat, with further [`STATISTICS`] of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnswerLogProbs {
    /// Whose they are.
    pub offsets: AnswerOffsets,
    /// Log-prob of every answer token, `[answer tokens]`.
    pub logps: Vec<f32>,
    /// By name, a number for every answer token.
    pub statistics: BTreeMap<&'static str, Vec<f32>>,
}

impl AnswerLogProbs {
    /// Log-probs with the statistics in the order of [`STATISTICS`].
    pub fn new(offsets: AnswerOffsets, logps: Vec<f32>, statistics: [Vec<f32>; STATISTICS.len()]) -> AnswerLogProbs {
        AnswerLogProbs { offsets, logps, statistics: STATISTICS.into_iter().zip(statistics).collect() }
    }

    /// Zeros, to be filled in.
    pub fn zeros(offsets: AnswerOffsets) -> AnswerLogProbs {
        let zeros = || vec![0.0; offsets.tokens()];
        AnswerLogProbs::new(offsets.clone(), zeros(), std::array::from_fn(|_| zeros()))
    }

    /// From [`values`](Self::values); `None` where there are not as many.
    pub fn from_values(offsets: AnswerOffsets, values: &[f32]) -> Option<AnswerLogProbs> {
        let tokens = offsets.tokens();
        if values.len() != tokens * (1 + STATISTICS.len()) {
            return None;
        }
        let part = |i: usize| values[i * tokens..][..tokens].to_vec();
        Some(AnswerLogProbs::new(offsets, part(0), std::array::from_fn(|i| part(i + 1))))
    }

    /// All numbers in one array: log-probs, then the statistics.
    pub fn values(&self) -> Vec<f32> {
        let statistics = STATISTICS.iter().filter_map(|name| self.statistics.get(name));
        std::iter::once(&self.logps).chain(statistics).flatten().copied().collect()
    }

    /// Those of some of the examples, one after the other.
    pub fn gather(&self, examples: &[usize]) -> AnswerLogProbs {
        let of = |flat: &Vec<f32>| gather(&self.offsets, flat, examples);
        AnswerLogProbs {
            offsets: self.offsets.select(examples),
            logps: of(&self.logps),
            statistics: self.statistics.iter().map(|(name, flat)| (*name, of(flat))).collect(),
        }
    }

    /// Puts back what [`gather`](Self::gather) takes out.
    pub fn scatter(&mut self, part: &AnswerLogProbs, examples: &[usize]) {
        for (i, example) in examples.iter().enumerate() {
            let (to, from) = (self.offsets.example(*example), part.offsets.example(i));
            self.logps[to.clone()].copy_from_slice(&part.logps[from.clone()]);
            for (name, values) in &part.statistics {
                if let Some(own) = self.statistics.get_mut(name) {
                    own[to.clone()].copy_from_slice(&values[from.clone()]);
                }
            }
        }
    }

    /// Adds those of further examples.
    pub fn append(&mut self, other: &AnswerLogProbs) {
        (0..other.offsets.len()).for_each(|e| self.offsets.push(other.offsets.answers(e).map(|a| a.len())));
        self.logps.extend(&other.logps);
        other.statistics.iter().for_each(|(name, values)| self.statistics.entry(name).or_default().extend(values));
    }
}

/// The values of some examples' answer tokens, one after the other.
pub fn gather(offsets: &AnswerOffsets, flat: &[f32], examples: &[usize]) -> Vec<f32> {
    examples.iter().flat_map(|e| &flat[offsets.example(*e)]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(lengths: &[&[usize]]) -> AnswerLogProbs {
        let mut offsets = AnswerOffsets::default();
        lengths.iter().for_each(|l| offsets.push(l.iter().copied()));
        let numbers = |from: usize| (0..offsets.tokens()).map(|i| (from + i) as f32).collect();
        AnswerLogProbs::new(offsets.clone(), numbers(0), std::array::from_fn(|s| numbers(100 * (s + 1))))
    }

    #[test]
    fn tokens_have_places() {
        let offsets = numbered(&[&[3], &[1, 2], &[2, 1, 4]]).offsets;
        assert_eq!((offsets.len(), offsets.tokens()), (3, 13));
        assert_eq!([0, 1, 2].map(|e| offsets.example(e)), [0..3, 3..6, 6..13]);
        assert_eq!(offsets.answers(2).collect::<Vec<_>>(), [6..8, 8..9, 9..13]);
        assert_eq!(AnswerOffsets::default().tokens(), 0);
    }

    #[test]
    fn what_is_gathered_is_put_back() {
        let all = numbered(&[&[3], &[1, 2], &[2, 1, 4]]);
        let some = all.gather(&[2, 0]);
        assert_eq!(some.logps, [6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 0.0, 1.0, 2.0]);
        assert_eq!(some.statistics[STATISTICS[0]][0], 106.0);
        let mut back = AnswerLogProbs::zeros(all.offsets.clone());
        back.scatter(&some, &[2, 0]);
        back.scatter(&all.gather(&[1]), &[1]);
        assert_eq!(back, all);
        assert_eq!(AnswerLogProbs::from_values(all.offsets.clone(), &all.values()), Some(all.clone()));
        assert_eq!(AnswerLogProbs::from_values(all.offsets.clone(), &all.values()[1..]), None);
        let mut joined = AnswerLogProbs::default();
        [&all.gather(&[0]), &all.gather(&[1, 2])].into_iter().for_each(|part| joined.append(part));
        assert_eq!(joined, all);
    }
}
