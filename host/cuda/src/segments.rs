//! What ops with a state that runs from token to token are told of a batch: where a token is in its prompt or answer, and pieces of those,
//! with the order in which a state runs through them.

use dpo_core::batch::{Layout, Span};

/// Tokens of a chunk at most: `CHUNK` of `recurrence.cuh`.
pub(super) const CHUNK: usize = 64;

/// Tokens of a batch for each state that lies between two chunks, at least: only of examples longer than a chunk there are any.
pub(super) const TOKENS_PER_STATE: usize = CHUNK / 2;

/// Bytes for each token at most: a segment's place, and a chunk and a walk where each has one token.
pub(super) const SEGMENT_BYTES: usize = 4 * 4 + 8 * 4 + 2 * 4;

/// No state is kept there.
const NONE: u32 = u32::MAX;

/// How a chunk begins: with zeros, with the state at the prompt's end, with that of the chunk before, with that of the text before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Zero,
    Prompt,
    Before,
    Text,
}

/// Tokens of one example that follow on each other: of the prompt, or of one answer; of a whole example, where that is not longer. `struct
/// Chunk` of `recurrence.cuh`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    /// The batch's row of its first token.
    pub row: usize,
    /// That token's place in the example, and the prompt's end there.
    pub first: usize,
    pub prompt: usize,
    pub rows: usize,
    pub from: From,
    /// Numbers of the states before it and behind it, where they are kept.
    pub enter: Option<usize>,
    pub leave: Option<usize>,
}

/// Chunks of a batch, and of every example the first one and how many there are, most first.
pub(super) struct Chunks {
    pub all: Vec<Chunk>,
    pub walks: Vec<[usize; 2]>,
}

impl Chunks {
    pub(super) fn of(layout: &Layout) -> Chunks {
        let mut chunks = Chunks { all: Vec::new(), walks: Vec::new() };
        let mut states = 0..;
        for span in layout.spans.iter().filter(|span| span.len() > 0) {
            let first = chunks.all.len();
            chunks.example(span, layout.cached, &mut states);
            chunks.walks.push([first, chunks.all.len() - first]);
        }
        chunks.walks.sort_by_key(|[_, count]| std::cmp::Reverse(*count));
        chunks
    }

    fn example(&mut self, span: &Span, cached: usize, states: &mut impl Iterator<Item = usize>) {
        let (prompt, start) = (cached + span.prompt, if cached > 0 { From::Text } else { From::Zero });
        let whole =
            |rows| Chunk { row: span.start, first: cached, prompt, rows, from: start, enter: None, leave: None };
        if span.len() <= CHUNK {
            return self.all.push(whole(span.len()));
        }
        // Of a segment of so many tokens, the chunks; the state before the first one, and whether the one behind the last is read.
        let mut segment = |place: usize, length: usize, from: From, mut enter: Option<usize>, forks: bool| {
            for first in (0..length).step_by(CHUNK) {
                let rows = CHUNK.min(length - first);
                let leave = if first + rows < length || forks { states.next() } else { None };
                let from = if first == 0 { from } else { From::Before };
                self.all.push(Chunk {
                    row: span.start + place + first,
                    first: cached + place + first,
                    rows,
                    from,
                    enter,
                    leave,
                    ..whole(0)
                });
                enter = leave;
            }
            enter
        };
        let fork = segment(0, span.prompt, start, None, span.len() > span.prompt);
        let mut place = span.prompt;
        for length in &span.answers {
            segment(place, *length, From::Prompt, fork, false);
            place += length;
        }
    }

    /// As kernels read them: eight words a chunk, two a walk.
    pub(super) fn words(&self) -> [Vec<u32>; 2] {
        let state = |number: Option<usize>| number.map_or(NONE, |n| n as u32);
        let chunk = |c: &Chunk| {
            let [row, first, prompt, rows] = [c.row, c.first, c.prompt, c.rows].map(|n| n as u32);
            [row, first, prompt, rows, c.from as u32, state(c.enter), state(c.leave), 0]
        };
        let walks = self.walks.iter().flat_map(|walk| walk.map(|n| n as u32));
        [self.all.iter().flat_map(chunk).collect(), walks.collect()]
    }
}

/// Of every token, how many of its prompt or answer are before it and behind it, rows between the prompt and its answer, and its position:
/// `struct Segment` of `causal_conv.cu`.
pub(super) fn places(layout: &Layout) -> Vec<u32> {
    let mut all = Vec::new();
    for span in &layout.spans {
        let mut segment = |before: usize, length: usize, jump: usize, position: usize| {
            let of = |i: usize| [before + i, length - 1 - i, jump, position + i].map(|n| n as u32);
            all.extend((0..length).flat_map(of));
        };
        segment(layout.cached, span.prompt, 0, layout.cached);
        let mut jump = 0;
        for length in &span.answers {
            segment(0, *length, jump, layout.cached + span.prompt);
            jump += length;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use dpo_core::ops::answer_mask::AnswerMask;

    /// Every token is in one chunk, states have room, and each is written before it is read.
    #[test]
    fn chunks_cover_every_token() {
        for (prompt, answers) in [
            (200, vec![150, 40]),
            (1, vec![64]),
            (1, vec![65, 1, 1]),
            (20, vec![30, 14]),
            (64, vec![]),
            (130, vec![0, 7]),
        ] {
            let spans = vec![Span { start: 0, prompt, answers }];
            let layout = Layout { spans, ..Layout::default() };
            let (chunks, tokens) = (Chunks::of(&layout), layout.spans[0].len());
            let rows: Vec<usize> = chunks.all.iter().flat_map(|c| c.row..c.row + c.rows).collect();
            assert_eq!(rows, (0..tokens).collect::<Vec<_>>());
            let mask = AnswerMask::of(&layout.spans[0], 0, 0);
            let mut left = Vec::new();
            for chunk in &chunks.all {
                assert!(chunk.rows <= CHUNK && chunk.enter.is_none_or(|state| left.contains(&state)));
                assert_eq!(chunk.enter.is_none(), chunk.from == From::Zero);
                // What a token sees outside of its chunk, the state has.
                if chunk.from == From::Zero {
                    let last = chunk.first + chunk.rows - 1;
                    assert!((0..=last).filter(|key| mask.sees(last, *key)).all(|key| key >= chunk.first));
                }
                left.extend(chunk.leave);
            }
            assert!(left.len() * TOKENS_PER_STATE <= tokens, "{} states of {tokens} tokens", left.len());
            assert_eq!(chunks.words()[0].len(), chunks.all.len() * 8);
        }
    }

    #[test]
    fn an_answer_goes_on_from_the_prompt() {
        let layout = Layout { spans: vec![Span { start: 3, prompt: 2, answers: vec![1, 2] }], ..Layout::default() };
        let words = places(&layout);
        let expected = [[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 2], [0, 1, 1, 2], [1, 0, 1, 3]];
        assert_eq!(words, expected.concat());
        let words = places(&Layout::after(5, 2));
        assert_eq!(words, [[5, 1, 0, 5], [6, 0, 0, 6]].concat());
    }
}
