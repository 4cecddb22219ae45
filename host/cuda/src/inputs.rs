//! What a batch brings to the GPU: its tokens, their places, tiles for attention, and room for tables and results.

use super::gpu::{Address, Gpu, Memory, Pinned};
use super::segments::{self, Chunks};
use dpo_core::batch::{Batch, Layout};
use dpo_core::error::{Error, Result};
use dpo_core::ops::answer_mask::AnswerMask;

/// What a batch brings, staged in pinned memory and sent in one copy.
pub(super) struct Inputs {
    staged: Pinned,
    memory: Memory,
    used: usize,
    pub(super) at: BatchAddresses,
}

/// Where a batch's arrays lie on the GPU.
#[derive(Clone, Copy, Default)]
pub(super) struct BatchAddresses {
    pub(super) ids: Address,
    pub(super) positions: Address,
    pub(super) predictors: Address,
    pub(super) targets: Address,
    /// Of every token, the first answer row that was taken from it; of every answer row, the next one from the same token.
    /// The last one's is `u32::MAX`.
    pub(super) taken: Address,
    pub(super) next_taken: Address,
    /// Of every token, where its answer begins in its example.
    pub(super) begins: Address,
    /// Tiles of so many queries as [`TILES`] says, and how many there are.
    tiles: [(Address, usize); TILES.len()],
    /// The same of keys, as [`KEY_TILES`] says.
    key_tiles: [(Address, usize); KEY_TILES.len()],
    /// Chunks for ops that carry a state, and how many there are; of every example, which are its own.
    pub(super) chunks: (Address, usize),
    pub(super) walks: (Address, usize),
    /// Of every token, where it is in its prompt or answer.
    pub(super) segments: Address,
    pub(super) results: Address,
    /// The loss's gradient by log-probs.
    pub(super) dlogps: Address,
    /// Where routers have an auxiliary loss: of every token in how many texts with a gradient it is, the load of all layers' experts (of every
    /// expert in f64 the tokens that are sent to it, then the sums of their probabilities), the parts that a layer's is added from, and the
    /// loss's derivatives by those probabilities. 0 where there is none.
    pub(super) texts: Address,
    pub(super) router_load: Address,
    pub(super) router_parts: Address,
    pub(super) router_dprobs: Address,
    /// What is computed of positions, for every layer.
    pub(super) tables: Address,
    pub(super) tokens: usize,
    pub(super) answers: usize,
}

/// The rows that a step runs on, as many as its values have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rows {
    /// All tokens.
    #[default]
    Tokens,
    /// Those that predict scored tokens.
    Predictors,
}

/// Queries of a tile, of the kinds that attention has.
const TILES: [usize; 4] = [128, 64, 32, 16];

/// Keys of a tile, where tiles of keys are not those of queries.
const KEY_TILES: [usize; 2] = [128, 64];

/// Blocks that count what a router does, each of which leaves its part of the load.
pub(super) const ROUTER_PARTS: usize = 64;

/// Bytes of an expert's load: two numbers in f64.
pub(super) const LOAD_BYTES: usize = 16;

/// Bytes that the load of so many experts takes, with its parts and the derivatives by it.
pub(super) fn router_bytes(experts: usize) -> usize {
    experts * (LOAD_BYTES + ROUTER_PARTS * 2 * 4 + 4) + 3 * 256
}

/// Bytes of tiles for each token at most: every kind may have one a token.
pub(super) const TILE_BYTES: usize = (TILES.len() + KEY_TILES.len()) * 16;

impl BatchAddresses {
    /// How many there are of such rows.
    pub(super) fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens,
            Rows::Predictors => self.answers,
        }
    }

    /// Tiles of at most so many queries, and how many there are.
    pub(super) fn tiles_of(&self, queries: usize) -> (Address, usize) {
        self.tiles[TILES.iter().position(|t| *t == queries).unwrap_or(0)]
    }

    /// Tiles of at most so many keys, and how many there are.
    pub(super) fn key_tiles_of(&self, keys: usize) -> (Address, usize) {
        self.key_tiles[KEY_TILES.iter().position(|t| *t == keys).unwrap_or(0)]
    }
}

impl Inputs {
    /// Room for as many bytes as were planned.
    pub(super) fn new(gpu: &Gpu, bytes: usize) -> Result<Inputs> {
        let (staged, memory) = (gpu.pinned(bytes)?, gpu.allocate(bytes)?);
        Ok(Inputs { staged, memory, used: 0, at: BatchAddresses::default() })
    }

    /// Sends a batch's arrays in one copy, with room behind them for what is computed of it, `tables` bytes a token among that, and the load of
    /// so many experts.
    pub(super) fn send(&mut self, gpu: &Gpu, batch: &Batch, tables: usize, experts: usize) -> Result<()> {
        let (tokens, answers) = (batch.tokens(), batch.targets.len());
        let (mut taken, mut next_taken) = (vec![u32::MAX; tokens], vec![u32::MAX; answers]);
        for (row, predictor) in batch.layout.predictors.iter().enumerate().rev() {
            next_taken[row] = std::mem::replace(&mut taken[*predictor as usize], row as u32);
        }
        self.used = 0;
        let mut at = BatchAddresses { tokens, answers, ..BatchAddresses::default() };
        at.ids = self.put(&batch.ids);
        at.positions = self.put(&batch.layout.positions);
        at.predictors = self.put(&batch.layout.predictors);
        at.targets = self.put(&batch.targets);
        at.taken = self.put(&taken);
        at.next_taken = self.put(&next_taken);
        let layout = &batch.layout;
        let masks: Vec<AnswerMask> = layout.spans.iter().map(|s| AnswerMask::of(s, layout.cached, 0)).collect();
        at.begins = self.put(&masks.iter().flat_map(|m| m.begins[layout.cached..].to_vec()).collect::<Vec<u32>>());
        for (place, size) in at.tiles.iter_mut().zip(TILES) {
            let words = tiles(layout, &masks, size);
            *place = (self.put(&words), words.len() / 4);
        }
        for (place, size) in at.key_tiles.iter_mut().zip(KEY_TILES) {
            let words = key_tiles(layout, &masks, size);
            *place = (self.put(&words), words.len() / 4);
        }
        let chunks = Chunks::of(layout);
        let [words, walks] = chunks.words();
        at.chunks = (self.put(&words), chunks.all.len());
        at.walks = (self.put(&walks), chunks.walks.len());
        at.segments = self.put(&segments::places(layout));
        // Where a text is continued nothing is counted.
        let experts = if layout.texts.is_empty() { 0 } else { experts };
        if experts > 0 {
            at.texts = self.put(&layout.texts);
        }
        let sent = self.used;
        at.results = self.reserve(answers * 2 * 4);
        at.dlogps = self.reserve(answers * 4);
        if experts > 0 {
            at.router_load = self.reserve(experts * LOAD_BYTES);
            at.router_parts = self.reserve(experts * ROUTER_PARTS * 2 * 4);
            at.router_dprobs = self.reserve(experts * 4);
        }
        at.tables = self.reserve(tables * tokens);
        if self.used > self.memory.bytes {
            return Err(Error::run("a batch's arrays take more memory than was planned"));
        }
        self.at = at;
        gpu.upload(&self.staged.bytes()[..sent], self.memory.address)
    }

    /// Stages words; returns where they will lie. What does not fit is only counted, and then refused.
    fn put(&mut self, words: &[u32]) -> Address {
        let (at, bytes) = (self.used, words.len() * 4);
        if let Some(to) = self.staged.bytes_mut().get_mut(at..at + bytes) {
            to.iter_mut().zip(words.iter().flat_map(|w| w.to_le_bytes())).for_each(|(to, byte)| *to = byte);
        }
        self.reserve(bytes)
    }

    fn reserve(&mut self, bytes: usize) -> Address {
        let at = self.memory.address + self.used as u64;
        self.used += bytes.next_multiple_of(256);
        at
    }
}

/// Tiles of queries of a batch's examples, four words each as `struct Tile` of `attention.cu`; those that see most keys first. Where a
/// text is continued, they are counted from its first token.
fn tiles(layout: &Layout, masks: &[AnswerMask], size: usize) -> Vec<u32> {
    let (cached, mut all) = (layout.cached, Vec::<(usize, [u32; 4])>::new());
    for (span, mask) in layout.spans.iter().zip(masks) {
        let (prompt, length) = (cached + span.prompt, cached + span.len());
        for first in (cached..length).step_by(size) {
            let hidden = if first < prompt { 0 } else { mask.begins[first] as usize - prompt };
            all.push((first - hidden, [span.start, first, prompt, length].map(|n| n as u32)));
        }
    }
    all.sort_by_key(|(seen, _)| std::cmp::Reverse(*seen));
    all.into_iter().flat_map(|(_, tile)| tile).collect()
}

/// The same of keys; those that most queries see first. Their length ends with the last query that sees one of them.
fn key_tiles(layout: &Layout, masks: &[AnswerMask], size: usize) -> Vec<u32> {
    let (cached, mut all) = (layout.cached, Vec::<[u32; 4]>::new());
    for (span, mask) in layout.spans.iter().zip(masks) {
        let (prompt, length) = (cached + span.prompt, cached + span.len());
        for first in (cached..length).step_by(size) {
            let answer = mask.begins[(first + size).min(length) - 1];
            let end = if first < prompt { length } else { mask.begins.partition_point(|begin| *begin <= answer) };
            all.push([span.start, first, prompt, end].map(|n| n as u32));
        }
    }
    all.sort_by_key(|tile| std::cmp::Reverse(tile[3] - tile[1]));
    all.concat()
}

#[cfg(test)]
mod tests {
    use super::{AnswerMask, Layout, key_tiles, tiles};
    use dpo_core::batch::Span;

    /// Every token is in one tile of every kind, and a tile of keys ends where the last query does that sees one of them.
    #[test]
    fn tiles_cover_every_token() {
        let spans = vec![
            Span { start: 0, prompt: 200, answers: vec![150, 40] },
            Span { start: 390, prompt: 1, answers: vec![5, 300] },
        ];
        let layout = Layout { spans, ..Layout::default() };
        let masks: Vec<AnswerMask> = layout.spans.iter().map(|s| AnswerMask::of(s, 0, 0)).collect();
        for size in [128, 16] {
            let words = tiles(&layout, &masks, size);
            let mut firsts: Vec<u32> = words.chunks(4).map(|t| t[0] + t[1]).collect();
            firsts.sort_unstable();
            let expected =
                [(0, 390), (390, 306)].map(|(start, length)| (0..length).step_by(size).map(move |f| start + f as u32));
            assert_eq!(firsts, expected.into_iter().flatten().collect::<Vec<u32>>());
        }
        for tile in key_tiles(&layout, &masks, 64).chunks(4) {
            let of = layout.spans.iter().position(|s| s.start == tile[0] as usize).unwrap();
            let (first, length) = (tile[1] as usize, layout.spans[of].len());
            let sees = |query: &usize| (first..(first + 64).min(length)).any(|key| masks[of].sees(*query, key));
            assert_eq!(tile[3] as usize, (0..length).filter(sees).max().unwrap() + 1, "{tile:?}");
        }
    }
}
