//! What ranks of a run exchange, as devices and weights see it. Its implementation over sockets is the crate `dpo-ranks`.

use std::ops::Range;

use crate::error::{Error, Result};

/// The ranks of a run, seen from one of them: a process group in the sense of torch.distributed. Every rank calls the same
/// methods in the same order. An error is a rank that is lost.
pub trait ProcessGroup {
    /// From 0.
    fn rank(&self) -> usize;

    /// How many.
    fn size(&self) -> usize;

    /// Puts the sum over ranks into every rank's values, with the same bits everywhere.
    fn all_reduce(&mut self, values: &mut [f32]) -> Result<()>;

    /// Every rank's bytes, in the order of ranks.
    fn all_gather(&mut self, own: Vec<u8>) -> Result<Vec<Vec<u8>>>;

    /// Rank 0's bytes, at every rank.
    fn broadcast(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>>;

    /// What a message calls a rank, such as `host:1234`.
    fn name(&self, rank: usize) -> &str;

    /// A way to shard weights over these ranks, which only one user can have; `None` on one rank.
    fn shards(&mut self) -> Option<Box<dyn Shards>>;

    /// Whether this is rank 0, which alone writes and prints.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Waits until all ranks are here.
    fn barrier(&mut self) -> Result<()> {
        self.all_gather(Vec::new()).map(|_| ())
    }

    /// The largest of the ranks' numbers.
    fn all_reduce_max(&mut self, value: u64) -> Result<u64> {
        let all = self.all_gather(value.to_le_bytes().to_vec())?;
        let number = |bytes: &Vec<u8>| bytes.as_slice().try_into().map_or(0, u64::from_le_bytes);
        Ok(all.iter().map(number).max().unwrap_or(value))
    }

    /// Refuses to go on if a rank has something else than rank 0; `value` is small, a hash of what is compared.
    fn assert_equal(&mut self, what: &str, value: &[u8]) -> Result<()> {
        let all = self.all_gather(value.to_vec())?;
        let other: Vec<String> =
            (0..all.len()).filter(|r| all[*r] != all[0]).map(|r| format!("rank {r} ({})", self.name(r))).collect();
        if other.is_empty() {
            return Ok(());
        }
        // Nobody leaves before all know.
        let _ = self.barrier();
        let has = if other.len() == 1 { "has" } else { "have" };
        Err(Error::input(format!("{} {has} another {what} than rank 0 ({})", other.join(", "), self.name(0)))
            .help("every rank needs the same files, the same flags and the same dpo-host"))
    }
}

/// Values of which every rank keeps a part, filled in from the others when they are needed, beside whatever else ranks
/// exchange. What is filled in, and in which order, is the same on all of them.
pub trait Shards: Send {
    /// This rank's part of so many values.
    fn own(&self, length: usize) -> Range<usize>;

    /// Fills in the other ranks' parts. An error is a rank that is lost.
    fn fill(&mut self, values: &mut [f32]) -> Result<()>;
}

/// A run of one rank.
pub struct Alone;

impl ProcessGroup for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&mut self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn all_gather(&mut self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        Ok(vec![own])
    }

    fn broadcast(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        Ok(bytes)
    }

    fn name(&self, _: usize) -> &str {
        "this process"
    }

    fn shards(&mut self) -> Option<Box<dyn Shards>> {
        None
    }
}

impl dyn ProcessGroup + '_ {
    /// Puts the sums of a few numbers in f64, added in the order of ranks, into every rank's.
    pub fn all_reduce_f64(&mut self, values: &mut [f64]) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        let own: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        values.fill(0.0);
        for bytes in &self.all_gather(own)? {
            for (sum, b) in values.iter_mut().zip(bytes.as_chunks().0) {
                *sum += f64::from_le_bytes(*b);
            }
        }
        Ok(())
    }

    /// What rank 0 finds, at every rank; the others do not look.
    pub fn broadcast_from_first<T>(&mut self, find: impl FnOnce() -> Result<T>) -> Result<T>
    where
        T: serde::Serialize + serde::de::DeserializeOwned,
    {
        let failed = |e: serde_json::Error| Error::run(format!("between ranks: {e}"));
        let found = if self.is_first() { Some(find()?) } else { None };
        let bytes = found.as_ref().map(serde_json::to_vec).transpose().map_err(failed)?;
        let bytes = self.broadcast(bytes.unwrap_or_default())?;
        match found {
            Some(found) => Ok(found),
            None => serde_json::from_slice(&bytes).map_err(failed),
        }
    }
}
