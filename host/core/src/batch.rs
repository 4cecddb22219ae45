//! Examples laid out in one row of tokens, without padding.
//!
//! An example lies as prompt | answer 1 | … | answer k. The prompt is there once; every answer continues from the prompt's end,
//! so its positions restart there. The last token of an answer predicts nothing and is laid out only where it is asked for.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::example::Example;
use crate::logprobs::AnswerOffsets;

/// Where tokens are. Attention and rope read it; every other op treats tokens alike.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Position of each token in its own sequence, `[tokens]`.
    pub positions: Vec<u32>,
    /// Of each token a number that follows from the text up to it, `[tokens]`; none where a text is continued.
    pub keys: Vec<u64>,
    /// Examples, in order and without gaps.
    pub spans: Vec<Span>,
    /// Of each token, how many texts it is in that have a gradient, `[tokens]`: of a prompt's one for every such answer. None where a text is
    /// continued.
    pub texts: Vec<u32>,
    /// For every token that gets a log-prob, the row whose hidden state predicts it, `[answer tokens]`: of every example, answer by answer,
    /// then the prompt where that is scored. Where a text is continued, the last row.
    pub predictors: Vec<u32>,
    /// Tokens before the row's first one, at positions from 0: of these, ops are given what they
    /// [remember](Op::cached_inputs). Above 0 only where one text is continued.
    pub cached: usize,
}

impl Layout {
    /// Tokens that continue a text of `cached` tokens.
    pub fn after(cached: usize, tokens: usize) -> Layout {
        let positions = (cached..cached + tokens).map(|p| p as u32).collect();
        let spans = vec![Span { start: 0, prompt: tokens, answers: Vec::new() }];
        let predictors = tokens.checked_sub(1).map(|last| last as u32).into_iter().collect();
        Layout { positions, spans, predictors, cached, ..Layout::default() }
    }

    /// Tokens of several sequences that are continued, one after the other, for ops that treat tokens alike.
    pub fn beside(sequences: &[Layout]) -> Layout {
        let mut all = Layout::default();
        for own in sequences {
            let start = all.positions.len();
            all.positions.extend(&own.positions);
            all.predictors.extend(own.predictors.iter().map(|row| row + start as u32));
            all.spans.extend(own.spans.iter().map(|span| Span { start: start + span.start, ..span.clone() }));
        }
        all
    }

    /// That of the rows that predict: such ops as read positions or other rows do not run on them.
    pub fn of_predictors(&self) -> Layout {
        let key = |row: &u32| self.keys.get(*row as usize).copied();
        Layout { keys: self.predictors.iter().filter_map(key).collect(), ..Layout::default() }
    }

    /// Keys of tokens that follow one with this key; returns that of the last.
    fn extend_keys(&mut self, mut key: u64, ids: &[u32]) -> u64 {
        for id in ids {
            key = mix(key, u64::from(*id));
            self.keys.push(key);
        }
        key
    }
}

/// A number from two, of which every bit depends on all of theirs (the finaliser of Steele et al. 2014, figure 16).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut h = a.wrapping_add(b.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    h = (h ^ (h >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    h ^ (h >> 31)
}

/// One example's place in the row.
#[derive(Clone, Debug)]
pub struct Span {
    /// Its first token.
    pub start: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of every answer that are laid out.
    pub answers: Vec<usize>,
}

impl Span {
    /// Tokens of the example.
    #[allow(clippy::len_without_is_empty)] // An example is never empty.
    pub fn len(&self) -> usize {
        self.prompt + self.answers.iter().sum::<usize>()
    }

    /// Its rows.
    pub fn rows(&self) -> Range<usize> {
        self.start..self.start + self.len()
    }
}

/// A micro-batch: what the engine runs at once.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, `[tokens]`.
    pub ids: Vec<u32>,
    /// Where they are.
    pub layout: Layout,
    /// The tokens that get a log-prob, one for each of [`Layout::predictors`].
    pub targets: Vec<u32>,
    /// Whose they are.
    pub answers: AnswerOffsets,
}

impl Batch {
    /// Lays out examples one after the other.
    pub fn of<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Batch {
        Batch::with_ends(examples, false)
    }

    /// The same; with `ends`, the last token of every answer, too, which predicts nothing but is seen by routers.
    pub fn with_ends<'a>(examples: impl IntoIterator<Item = &'a Example>, ends: bool) -> Batch {
        let mut batch = Batch::default();
        for example in examples {
            batch.push(example, ends);
        }
        batch
    }

    fn push(&mut self, example: &Example, ends: bool) {
        let (start, prompt) = (self.ids.len(), example.prompt().len());
        self.ids.extend(example.prompt());
        self.layout.positions.extend(0..prompt as u32);
        self.layout.texts.extend(std::iter::repeat_n(example.learned().len() as u32, prompt));
        let key = self.layout.extend_keys(0, example.prompt());
        let mut laid_out = Vec::new();
        for answer in example.answers() {
            let first = self.ids.len();
            let inputs = &answer.ids[..answer.ids.len() - usize::from(!ends)];
            self.layout.texts.extend(std::iter::repeat_n(u32::from(!answer.detached), inputs.len()));
            self.ids.extend(inputs);
            self.layout.extend_keys(key, inputs);
            self.layout.positions.extend(prompt as u32..(prompt + inputs.len()) as u32);
            let predictor = |i: usize| if i == 0 { start + prompt - 1 } else { first + i - 1 };
            self.layout.predictors.extend((0..answer.ids.len()).map(|i| predictor(i) as u32));
            self.targets.extend(&answer.ids);
            laid_out.push(inputs.len());
        }
        let scored = example.scored_prompt();
        self.layout.predictors.extend((start..start + scored.len()).map(|row| row as u32));
        self.targets.extend(scored);
        self.answers.push(example.scored_lengths());
        self.layout.spans.push(Span { start, prompt, answers: laid_out });
    }

    /// Tokens in the row.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

/// Puts examples of these lengths into micro-batches of at most `budget` tokens: few ones of about equal size, longest example
/// first into the emptiest (Graham 1969). An example longer than the budget is alone. Each holds the places of its examples, in
/// order.
pub fn micro_batches(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let (long, mut rest): (Vec<usize>, Vec<usize>) = (0..lengths.len()).partition(|p| lengths[*p] >= budget);
    let mut batches: Vec<Vec<usize>> = long.into_iter().map(|p| vec![p]).collect();
    rest.sort_by_key(|p| Reverse(lengths[*p]));
    let total: usize = rest.iter().map(|p| lengths[*p]).sum();
    let mut count = total.div_ceil(budget.max(1));
    while !rest.is_empty() {
        let mut loads: BinaryHeap<Reverse<(usize, usize)>> = (0..count).map(|batch| Reverse((0, batch))).collect();
        let mut packed = vec![Vec::new(); count];
        let fits = rest.iter().all(|example| {
            let Some(Reverse((load, batch))) = loads.pop() else { return false };
            packed[batch].push(*example);
            loads.push(Reverse((load + lengths[*example], batch)));
            load + lengths[*example] <= budget
        });
        if fits {
            packed.iter_mut().for_each(|batch| batch.sort_unstable());
            batches.extend(packed);
            break;
        }
        count += count.div_ceil(64);
    }
    batches
}

/// Splits examples of these lengths over ranks so that each has about as many tokens: longest example first to the rank with
/// the least (Graham 1969). Every rank finds the same split. Each holds the places of its examples, in order.
pub fn shares(lengths: &[usize], ranks: usize) -> Vec<Vec<usize>> {
    let mut longest: Vec<usize> = (0..lengths.len()).collect();
    longest.sort_by_key(|p| Reverse(lengths[*p]));
    let mut loads: BinaryHeap<Reverse<(usize, usize)>> = (0..ranks).map(|rank| Reverse((0, rank))).collect();
    let mut shares = vec![Vec::new(); ranks];
    for example in longest {
        let Some(Reverse((load, rank))) = loads.pop() else { break };
        shares[rank].push(example);
        loads.push(Reverse((load + lengths[example], rank)));
    }
    shares.iter_mut().for_each(|share| share.sort_unstable());
    shares
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;
    use crate::example::Answer;

    fn example(prompt: &[u32], answers: &[&[u32]]) -> Example {
        Example::new(prompt.into(), answers.iter().map(|ids| Answer::new((*ids).into(), 0.0)).collect(), "").unwrap()
    }

    #[test]
    fn every_answer_follows_the_prompt() {
        let batch = Batch::of(&[
            example(&[1, 2], &[&[3, 4, 5], &[6]]),
            example(&[7], &[&[8]]),
            example(&[7], &[&[8], &[9, 10], &[11, 12]]),
            example(&[7, 8, 9], &[&[10]]).with_prompt_scored(),
        ]);
        assert_eq!(batch.ids, [1, 2, 3, 4, 7, 7, 9, 11, 7, 8, 9]);
        assert_eq!(batch.layout.positions, [0, 1, 2, 3, 0, 0, 1, 1, 0, 1, 2]);
        assert_eq!(batch.targets, [3, 4, 5, 6, 8, 8, 9, 10, 11, 12, 10, 8, 9]);
        assert_eq!(batch.layout.predictors, [1, 2, 3, 1, 4, 5, 5, 6, 5, 7, 10, 8, 9]);
        let spans: Vec<_> = batch.layout.spans.iter().map(|s| (s.rows(), s.prompt, s.answers.clone())).collect();
        assert_eq!(spans, [(0..4, 2, vec![2, 0]), (4..5, 1, vec![0]), (5..8, 1, vec![0, 1, 1]), (8..11, 3, vec![0])]);
        assert_eq!((0..4).map(|e| batch.answers.example(e)).collect::<Vec<_>>(), [0..4, 4..5, 5..10, 10..13]);
    }

    #[test]
    fn ends_are_laid_out_where_routers_see_them() {
        let pair = example(&[1, 2], &[&[3, 4, 5], &[6]]).with_detached(vec![7, 8]).unwrap();
        let (short, whole) = (Batch::of([&pair]), Batch::with_ends([&pair], true));
        assert_eq!(short.ids, [1, 2, 3, 4, 7]);
        assert_eq!(whole.ids, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(whole.layout.positions, [0, 1, 2, 3, 4, 2, 2, 3]);
        assert_eq!(whole.layout.predictors, [1, 2, 3, 1, 1, 6]);
        assert_eq!((short.layout.texts, whole.layout.texts), (vec![2, 2, 1, 1, 0], vec![2, 2, 1, 1, 1, 1, 0, 0]));
        assert_eq!((whole.ids.len(), whole.targets), (pair.unique_tokens(), short.targets));
    }

    #[test]
    fn micro_batches_are_few_and_alike() {
        assert_eq!(micro_batches(&[4, 4, 9, 1, 2], 8), [vec![2], vec![0, 4], vec![1, 3]]);
        assert!(micro_batches(&[], 8).is_empty());
        let lengths: Vec<usize> = (0..500).map(|i| 20 + i * 7919 % 700).collect();
        let batches = micro_batches(&lengths, 2048);
        let loads: Vec<usize> = batches.iter().map(|b| b.iter().map(|p| lengths[*p]).sum()).collect();
        assert!(loads.iter().all(|l| *l <= 2048));
        assert!(batches.len() <= lengths.iter().sum::<usize>().div_ceil(2048) + 2, "{loads:?}");
        let mut all = batches.concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..500));
    }

    #[test]
    fn shares_have_equal_tokens() {
        assert_eq!(shares(&[5, 9, 4, 1], 2), [vec![1, 3], vec![0, 2]]);
        assert_eq!(shares(&[7], 3), [vec![0], vec![], vec![]]);
        assert!(shares(&[], 2).iter().all(Vec::is_empty));
        let lengths: Vec<usize> = (0..64).map(|i| 100 + i * 7919 % 700).collect();
        let loads = shares(&lengths, 4).iter().map(|s| s.iter().map(|p| lengths[*p]).sum()).collect::<Vec<usize>>();
        assert!(loads.iter().max().unwrap_or(&0) - loads.iter().min().unwrap_or(&0) < 100, "{loads:?}");
    }
}
