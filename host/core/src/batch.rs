//! Pairs laid out in one row of tokens, without padding.
//!
//! A pair lies as prompt | chosen | rejected. The prompt is there once; the rejected answer continues from the prompt's
//! end, so its positions restart there. The last token of an answer predicts nothing and is not laid out.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::pair::TokenPair;

/// Where tokens are. Attention and rope read it; every other op treats tokens alike.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Position of each token in its own sequence, `[tokens]`.
    pub positions: Vec<u32>,
    /// Pairs, in order and without gaps.
    pub spans: Vec<Span>,
    /// Tokens before the row's first one, at positions from 0: of these, ops are given what they
    /// [remember](crate::ops::Op::remembers). Above 0 only where one text is continued.
    pub past: usize,
}

impl Layout {
    /// Tokens that continue a text of `past` tokens.
    pub fn after(past: usize, tokens: usize) -> Layout {
        let positions = (past..past + tokens).map(|p| p as u32).collect();
        Layout { positions, spans: vec![Span { start: 0, prompt: tokens, chosen: 0, rejected: 0 }], past }
    }
}

/// One pair's place in the row.
#[derive(Clone, Debug)]
pub struct Span {
    /// Its first token.
    pub start: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of the chosen answer that are laid out.
    pub chosen: usize,
    /// Tokens of the rejected answer that are laid out.
    pub rejected: usize,
}

impl Span {
    /// Tokens of the pair.
    #[allow(clippy::len_without_is_empty)] // A pair is never empty.
    pub fn len(&self) -> usize {
        self.prompt + self.chosen + self.rejected
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
    /// For every answer token, the row whose hidden state predicts it, `[answer tokens]`: of every pair the chosen
    /// answer's, then the rejected one's.
    pub predictors: Vec<u32>,
    /// Those answer tokens, `[answer tokens]`.
    pub targets: Vec<u32>,
    /// Answer tokens of every pair: chosen, rejected.
    pub answers: Vec<[usize; 2]>,
}

impl Batch {
    /// Lays out pairs one after the other.
    pub fn of<'a>(pairs: impl IntoIterator<Item = &'a TokenPair>) -> Batch {
        let mut batch = Batch::default();
        for pair in pairs {
            batch.push(pair);
        }
        batch
    }

    fn push(&mut self, pair: &TokenPair) {
        let start = self.ids.len();
        let prompt = pair.prompt.len();
        self.ids.extend(&pair.prompt);
        self.layout.positions.extend(0..prompt as u32);
        let mut answers = [0; 2];
        let mut laid_out = [0; 2];
        for (side, answer) in [&pair.chosen, &pair.rejected].into_iter().enumerate() {
            let first = self.ids.len();
            let inputs = &answer[..answer.len() - 1];
            self.ids.extend(inputs);
            self.layout.positions.extend(prompt as u32..(prompt + inputs.len()) as u32);
            // Without a prompt nothing predicts an answer's first token; TRL's shift by one drops it too.
            let unpredicted = usize::from(prompt == 0);
            for (i, target) in answer.iter().enumerate().skip(unpredicted) {
                self.predictors.push(if i == 0 { start + prompt - 1 } else { first + i - 1 } as u32);
                self.targets.push(*target);
            }
            answers[side] = answer.len() - unpredicted;
            laid_out[side] = inputs.len();
        }
        self.answers.push(answers);
        self.layout.spans.push(Span { start, prompt, chosen: laid_out[0], rejected: laid_out[1] });
    }

    /// Tokens in the row.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

/// Tokens a pair takes in a row.
pub fn laid_out(pair: &TokenPair) -> usize {
    pair.prompt.len() + pair.chosen.len() + pair.rejected.len() - 2
}

/// Answer tokens of a pair that are predicted, as a [`Batch`] counts them.
pub fn answer_tokens(pair: &TokenPair) -> usize {
    let unpredicted = usize::from(pair.prompt.is_empty());
    pair.chosen.len() + pair.rejected.len() - 2 * unpredicted
}

/// Puts pairs of these lengths into micro-batches of at most `budget` tokens: few ones of about equal size, longest pair
/// first into the emptiest (Graham 1969). A pair longer than the budget is alone. Each holds the places of its pairs, in
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
        let fits = rest.iter().all(|pair| {
            let Some(Reverse((load, batch))) = loads.pop() else { return false };
            packed[batch].push(*pair);
            loads.push(Reverse((load + lengths[*pair], batch)));
            load + lengths[*pair] <= budget
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

/// Splits pairs of these lengths over ranks so that each has about as many tokens: longest pair first to the rank with the
/// least (Graham 1969). Every rank finds the same split. Each holds the places of its pairs, in order.
pub fn shares(lengths: &[usize], ranks: usize) -> Vec<Vec<usize>> {
    let mut longest: Vec<usize> = (0..lengths.len()).collect();
    longest.sort_by_key(|p| Reverse(lengths[*p]));
    let mut loads: BinaryHeap<Reverse<(usize, usize)>> = (0..ranks).map(|rank| Reverse((0, rank))).collect();
    let mut shares = vec![Vec::new(); ranks];
    for pair in longest {
        let Some(Reverse((load, rank))) = loads.pop() else { break };
        shares[rank].push(pair);
        loads.push(Reverse((load + lengths[pair], rank)));
    }
    shares.iter_mut().for_each(|share| share.sort_unstable());
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> TokenPair {
        TokenPair { prompt: prompt.into(), chosen: chosen.into(), rejected: rejected.into(), place: String::new() }
    }

    #[test]
    fn both_answers_follow_the_prompt() {
        let batch = Batch::of(&[pair(&[1, 2], &[3, 4, 5], &[6]), pair(&[7], &[8], &[9, 10])]);
        assert_eq!(batch.ids, [1, 2, 3, 4, 7, 9]);
        assert_eq!(batch.layout.positions, [0, 1, 2, 3, 0, 1]);
        assert_eq!(batch.targets, [3, 4, 5, 6, 8, 9, 10]);
        assert_eq!(batch.predictors, [1, 2, 3, 1, 4, 4, 5]);
        assert_eq!(batch.answers, [[3, 1], [1, 2]]);
    }

    #[test]
    fn without_a_prompt_the_first_token_is_given() {
        let batch = Batch::of(&[pair(&[], &[3, 4], &[5, 6, 7])]);
        assert_eq!(batch.targets, [4, 6, 7]);
        assert_eq!(batch.predictors, [0, 1, 2]);
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
