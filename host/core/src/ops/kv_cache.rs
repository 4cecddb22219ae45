//! The KV cache: what ops keep of earlier tokens, so that a sequence grows by a token without computing the others again.
//!
//! Rows of keys and values are cut where a sequence is truncated. A state of a recurrence cannot be: it is one for all tokens before. So states
//! are kept as they were where several tokens were appended at once, which is where a part of a prompt begins, and a sequence is truncated to
//! such a place.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::weights::BlockId;

/// Where a cached value is read: block, node, input.
pub(crate) type Reader = (BlockId, usize, usize);

/// Whose state it is: block, node.
pub(crate) type Holder = (BlockId, usize);

/// States of all recurrences behind some tokens.
type States = HashMap<Holder, Tensor>;

/// How many places before the end a sequence can be truncated to, where it has states.
const KEPT: usize = 2;

/// Keys and values of earlier tokens, and the states behind them.
#[derive(Default)]
pub struct KvCache {
    tokens: usize,
    /// By reader, `[room, width]`, of which as many rows are filled as there are tokens.
    rows: HashMap<Reader, Tensor>,
    states: States,
    /// Those behind new tokens, until all layers have computed them.
    next: States,
    /// Earlier ones, and how many tokens lie before each.
    kept: Vec<(usize, States)>,
}

impl KvCache {
    /// Tokens that are cached.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Forgets all but the first tokens, or all but fewer where it has states; returns how many are left.
    pub fn truncate(&mut self, tokens: usize) -> usize {
        if tokens >= self.tokens {
            return self.tokens;
        }
        self.tokens = tokens;
        if !self.states.is_empty() {
            while self.kept.last().is_some_and(|(before, _)| *before > tokens) {
                self.kept.pop();
            }
            (self.tokens, self.states) = self.kept.last().cloned().unwrap_or_default();
        }
        self.tokens
    }

    /// So many tokens are going to be computed.
    pub(crate) fn begin(&mut self, tokens: usize) {
        self.next.clear();
        if tokens > 1 && !self.states.is_empty() && self.kept.last().is_none_or(|(before, _)| *before < self.tokens) {
            self.kept.push((self.tokens, self.states.clone()));
            self.kept.drain(..self.kept.len().saturating_sub(KEPT));
        }
    }

    /// Tokens have been computed, and every reader was given their rows.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.tokens += tokens;
        self.states.extend(self.next.drain());
    }

    /// The state of a recurrence behind all tokens; none before the first one.
    pub(crate) fn state(&self, holder: Holder) -> Option<&Tensor> {
        self.states.get(&holder)
    }

    /// Keeps the state behind new tokens.
    pub(crate) fn set_state(&mut self, holder: Holder, state: Tensor) {
        self.next.insert(holder, state);
    }

    /// Adds rows of new tokens; returns those of all, old ones first.
    pub(crate) fn extend(&mut self, reader: Reader, new: &Tensor) -> Result<Tensor> {
        let (count, width) = new.dims2()?;
        let end = self.tokens + count;
        let old = self.rows.get(&reader);
        let room = old.map_or(Ok(0), |rows| rows.dim(0))?;
        if end > room {
            let grown = Tensor::zeros((end.next_power_of_two(), width), new.dtype(), &Device::Cpu)?;
            if let Some(old) = old.filter(|_| self.tokens > 0) {
                grown.slice_set(&old.narrow(0, 0, self.tokens)?, 0, 0)?;
            }
            self.rows.insert(reader, grown);
        }
        let rows = &self.rows[&reader];
        rows.slice_set(&new.contiguous()?, 0, self.tokens)?;
        Ok(rows.narrow(0, 0, end)?)
    }
}
