//! What a batch brings to the GPU: its tokens, their places, tiles for attention, and room for tables and results.

use super::gpu::{Address, Gpu, Memory, Pinned};
use dpo_core::batch::{Batch, Layout, Span};
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
    /// Tiles of so many tokens as [`TILES`] says, and how many there are.
    tiles: [(Address, usize); TILES.len()],
    pub(super) results: Address,
    /// The loss's gradient by log-probs.
    pub(super) dlogps: Address,
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

/// Tokens of a tile, of the kinds that attention has.
const TILES: [usize; 3] = [64, 32, 16];

impl BatchAddresses {
    /// How many there are of such rows.
    pub(super) fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens,
            Rows::Predictors => self.answers,
        }
    }

    /// Tiles of at most so many tokens, and how many there are.
    pub(super) fn tiles_of(&self, tokens: usize) -> (Address, usize) {
        self.tiles[TILES.iter().position(|t| *t == tokens).unwrap_or(0)]
    }
}

impl Inputs {
    /// Room for as many bytes as were planned.
    pub(super) fn new(gpu: &Gpu, bytes: usize) -> Result<Inputs> {
        let (staged, memory) = (gpu.pinned(bytes)?, gpu.allocate(bytes)?);
        Ok(Inputs { staged, memory, used: 0, at: BatchAddresses::default() })
    }

    /// Sends a batch's arrays in one copy, with room behind them for what is computed of it, `tables` bytes a token among that.
    pub(super) fn send(&mut self, gpu: &Gpu, batch: &Batch, tables: usize) -> Result<()> {
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
        at.begins = self.put(&begins(&batch.layout));
        for (place, size) in at.tiles.iter_mut().zip(TILES) {
            let words = tiles(&batch.layout, size);
            *place = (self.put(&words), words.len() / 4);
        }
        let sent = self.used;
        at.results = self.reserve(answers * 2 * 4);
        at.dlogps = self.reserve(answers * 4);
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

/// Tiles of a batch's examples, four words each as `struct Tile` of `attention.cu`; those that see most keys first. Where a
/// text is continued, they are counted from its first token.
fn tiles(layout: &Layout, size: usize) -> Vec<u32> {
    let mut all: Vec<[u32; 4]> = Vec::new();
    let cached = layout.cached;
    for span in &layout.spans {
        let [start, prompt, length] = [span.start, cached + span.prompt, cached + span.len()].map(|n| n as u32);
        let firsts = (cached..cached + span.len()).step_by(size);
        all.extend(firsts.map(|first| [start, first as u32, prompt, length]));
    }
    all.sort_by_key(|t| std::cmp::Reverse(t[1]));
    all.concat()
}

/// Of every token of a batch, where its answer begins in its example.
fn begins(layout: &Layout) -> Vec<u32> {
    let of_span = |span: &Span| AnswerMask::of(span, layout.cached, 0).begins.split_off(layout.cached);
    layout.spans.iter().flat_map(of_span).collect()
}
