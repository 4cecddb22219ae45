//! Pieces of memory one after the other, each at an aligned place.

use super::gpu::{Address, Memory};
use dpo_core::error::{Error, Result};

/// Bytes up to the next place that anything may begin at.
pub(super) fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}

/// Columns are padded so that rows begin at sectors of the device's memory.
pub(super) fn padded(columns: usize) -> usize {
    columns.next_multiple_of(16)
}

/// Takes pieces of memory.
pub(super) struct Arena {
    next: Address,
    end: Address,
}

impl Arena {
    pub(super) fn of(memory: &Memory) -> Arena {
        Arena { next: memory.address, end: memory.address + memory.bytes as u64 }
    }

    pub(super) fn take(&mut self, bytes: usize) -> Result<Address> {
        let at = self.next;
        self.next += aligned(bytes) as u64;
        if self.next > self.end {
            return Err(Error::run("weights take more memory than was planned"));
        }
        Ok(at)
    }
}
