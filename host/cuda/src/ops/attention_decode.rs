//! Attention of one query over a KV cache: `attention_decode.cu`. Where a token at a time is answered, it is the keys that are many: blocks
//! have parts of them.

use super::super::launch::KvCache;
use super::{Address, Args, Argument, Launch, Source, Variant, View};
use dpo_core::error::Result;

pub(super) static SOURCE: Source = Source {
    waits: true,
    variants: Some(|_| RUNS.map(variant).to_vec()),
    ..Source::plain(
        "attention_decode",
        concat!(include_str!("mma.cuh"), include_str!("attention_decode.cu")),
        &["attention_decode"],
    )
};

/// As `attention_decode.cu` has them: threads of a block, and query heads of a block at most.
const THREADS: usize = 256;
const HEADS: usize = 16;

/// Runs of eight columns that each of a block's eight warps has at most: what the kernel is compiled for.
const RUNS: [usize; 3] = [2, 4, 8];

/// Numbers before the parts in the scratch.
const TICKETS: usize = 1024;

/// Blocks for each multiprocessor.
const BLOCKS: usize = 2;

/// An attention's own numbers, and those of the text.
#[derive(Clone, Copy)]
pub(super) struct Decode {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    /// Columns of a head of values, `dim` at most.
    pub value_dim: usize,
    /// 0 is none.
    pub window: usize,
    pub scale: f32,
    /// 0 is none.
    pub softcap: f32,
}

/// `struct Decode` of `attention_decode.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Numbers {
    share: i32,
    own: i32,
    dim: i32,
    value_dim: i32,
    keys: i32,
    first: i32,
    cached: i32,
    tiles: i32,
    scale: f32,
    softcap: f32,
}

// SAFETY: ten numbers of four bytes.
unsafe impl Argument for Numbers {}

/// How many blocks there are: parts of the keys, and for each of them and each key head so many of `own` query heads; a part has `tiles`.
struct Partition {
    own: usize,
    groups: usize,
    tiles: usize,
    parts: usize,
}

/// Keys of a tile.
fn keys(dim: usize) -> usize {
    if dim > 256 { 32 } else { 64 }
}

/// Bytes of shared memory: two tiles of rows, and the queries.
fn shared(dim: usize) -> usize {
    (2 * keys(dim) + HEADS) * (dim + 8) * 2
}

/// For heads of at most so many runs of columns a warp.
fn variant(runs: usize) -> Variant {
    let dim = runs * 64;
    Variant {
        key: runs,
        label: format!("at most {dim} columns"),
        before: format!("#define RUNS {runs}\n"),
        shared: vec![("attention_decode", shared(dim))],
        ..Variant::plain(&SOURCE)
    }
}

impl Decode {
    fn runs(&self) -> usize {
        RUNS.into_iter().find(|runs| self.dim <= runs * 64).unwrap_or(RUNS[RUNS.len() - 1])
    }

    /// What it is compiled for.
    pub(super) fn variant(&self) -> Variant {
        variant(self.runs())
    }

    /// Of so many keys, for blocks that are about twice as many as multiprocessors. It follows from the numbers alone, so that two runs sum
    /// alike.
    fn partition(&self, keys: usize, multiprocessors: usize) -> Partition {
        let share = self.heads / self.kv_heads;
        let own = share.min(HEADS);
        let groups = share.div_ceil(own);
        let all = keys.div_ceil(self::keys(self.dim));
        // What a part leaves in the scratch: its output, and two numbers a head.
        let room = (KvCache::SCRATCH / 4 - TICKETS) / (self.kv_heads * groups * own * (self.dim + 4));
        let most = (BLOCKS * multiprocessors / (self.kv_heads * groups)).clamp(1, room.max(1));
        let tiles = all.div_ceil(all.min(most));
        Partition { own, groups, tiles, parts: all.div_ceil(tiles) }
    }

    /// Whether it has a place in the scratch.
    pub(super) fn is_supported(&self) -> bool {
        let Partition { own, groups, .. } = self.partition(1, 1);
        let blocks = self.kv_heads * groups;
        blocks <= TICKETS && (TICKETS + blocks * own * (self.dim + 4)) * 4 <= KvCache::SCRATCH
    }

    /// Starts it for the row of q, k and v; keys and values become the cache's.
    /// `sinks` is 0 where there are none.
    pub(super) fn launch(
        &self,
        on: &Launch<'_>,
        cache: &KvCache,
        [q, k, v]: [View; 3],
        sinks: Address,
        to: View,
    ) -> Result<()> {
        let all = cache.tokens + 1;
        let first = if self.window > 0 { all.saturating_sub(self.window) } else { 0 };
        let Partition { own, groups, tiles, parts } = self.partition(all - first, on.gpu.multiprocessors);
        let numbers = Numbers {
            share: (self.heads / self.kv_heads) as i32,
            own: own as i32,
            dim: self.dim as i32,
            value_dim: self.value_dim as i32,
            keys: keys(self.dim) as i32,
            first: first as i32,
            cached: cache.tokens as i32,
            tiles: tiles as i32,
            scale: self.scale,
            softcap: self.softcap,
        };
        let args = Args::default().with(q.at).with(k.at).with(v.at).with(cache.keys).with(cache.values);
        let args = args.with(to.at).with(cache.scratch).with(sinks).with(numbers);
        let (kernel, _) = on.kernels.variant("attention_decode", self.runs())?;
        let grid = [parts, self.kv_heads, groups];
        on.gpu.launch(kernel, grid, [THREADS as u32, 1, 1], shared(self.dim), args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(heads: usize, kv_heads: usize, dim: usize) -> Decode {
        Decode { heads, kv_heads, dim, value_dim: dim, window: 0, scale: 1.0, softcap: 0.0 }
    }

    /// Parts have every key once, none of them is empty, and the scratch has room for them.
    #[test]
    fn parts_are_all_keys() {
        for (heads, kv_heads, dim) in [(28, 4, 128), (71, 1, 64), (128, 8, 128), (16, 1, 512), (32, 32, 80), (8, 8, 16)]
        {
            let of = decode(heads, kv_heads, dim);
            assert!(of.is_supported());
            for keys in (1..300).chain([900, 4096, 32 << 10]) {
                let Partition { own, groups, tiles, parts } = of.partition(keys, 132);
                let part = tiles * super::keys(dim);
                assert!(parts * part >= keys && (parts - 1) * part < keys, "{keys}: {parts} of {tiles}");
                assert!(own * groups >= heads / kv_heads);
                let floats = TICKETS + kv_heads * groups * parts * own * (dim + 4);
                assert!(kv_heads * groups <= TICKETS && floats * 4 <= KvCache::SCRATCH, "{keys}: {parts} parts");
            }
        }
        assert!(!decode(4096, 4096, 128).is_supported());
    }

    /// Cards have 99 KiB for a block at least, of which the kernel takes less than 8 beside what is asked for.
    #[test]
    fn tiles_fit_into_the_shared_memory_of_every_card() {
        for dim in [16, 64, 80, 128, 160, 256, 512] {
            let variant = decode(8, 2, dim).variant();
            assert!(shared(dim) <= variant.shared[0].1 && dim <= variant.key * 64, "{dim}");
            assert!(variant.shared[0].1 + (8 << 10) <= 99 << 10, "{dim}: {} bytes", variant.shared[0].1);
        }
    }
}
