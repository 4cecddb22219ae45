//! The KV cache: what ops keep of earlier tokens, so that a sequence grows by a token without computing the others again.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::weights::BlockId;

/// Where a cached value is read: block, node, input.
pub(crate) type Reader = (BlockId, usize, usize);

/// Whose state it is: block, node.
pub(crate) type Holder = (BlockId, usize);

/// Keys and values of earlier tokens, and the states behind them.
#[derive(Default)]
pub struct KvCache {
    tokens: usize,
    /// By reader, `[room, width]`, of which as many rows are filled as there are tokens.
    rows: HashMap<Reader, Tensor>,
    states: HashMap<Holder, Tensor>,
}

impl KvCache {
    /// Tokens that are cached.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Forgets all but the first tokens.
    pub fn truncate(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens);
    }

    /// Tokens have been computed, and every reader was given their rows.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.tokens += tokens;
    }

    /// The state of a recurrence behind all tokens; none before the first one.
    pub(crate) fn state(&self, holder: Holder) -> Option<&Tensor> {
        self.states.get(&holder)
    }

    /// Keeps the state behind new tokens.
    pub(crate) fn set_state(&mut self, holder: Holder, state: Tensor) {
        self.states.insert(holder, state);
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
