//! Attention of one query of each sequence over its KV cache: `attention_decode.cu`. Where a token at a time is answered, it is the keys that
//! are many: blocks have parts of them.

use super::super::launch::KvCache;
use super::{Address, Args, Argument, Launch, Source, Variant, View};
use dpo_core::error::{Error, Result};

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
const TICKETS: usize = 4096;

/// Blocks for each multiprocessor.
const BLOCKS: usize = 2;

/// An attention's own numbers.
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
    groups: i32,
    tiles: i32,
    window: i32,
    apart: i64,
    scale: f32,
    softcap: f32,
}

// SAFETY: eight numbers of four bytes, one of eight, two of four.
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

    /// Query heads of a block, and how many blocks those of a key head are.
    fn groups(&self) -> (usize, usize) {
        let share = self.heads / self.kv_heads;
        let own = share.min(HEADS);
        (own, share.div_ceil(own))
    }

    /// What a part leaves in the scratch: the output of each of its heads, and two numbers.
    fn part(&self) -> usize {
        self.groups().0 * (self.dim + 4)
    }

    /// Of so many keys of each of some sequences, for blocks that are about twice as many as multiprocessors. It follows from the numbers
    /// alone, so that two runs sum alike.
    fn partition(&self, keys: usize, sequences: usize, multiprocessors: usize) -> Partition {
        let (own, groups) = self.groups();
        let all = keys.div_ceil(self::keys(self.dim));
        let blocks = sequences * self.kv_heads * groups;
        let room = (KvCache::SCRATCH / 4 - TICKETS) / (blocks * self.part());
        let most = (BLOCKS * multiprocessors / blocks).clamp(1, room.max(1));
        let tiles = all.div_ceil(all.min(most));
        Partition { own, groups, tiles, parts: all.div_ceil(tiles) }
    }

    /// Sequences that the scratch has a place for.
    fn at_once(&self) -> usize {
        let blocks = self.kv_heads * self.groups().1;
        (TICKETS / blocks).min((KvCache::SCRATCH / 4 - TICKETS) / (blocks * self.part()))
    }

    /// Starts it for rows of q, k and v, each of a sequence of its own; keys and values become the caches'.
    /// `sinks` is 0 where there are none.
    pub(super) fn launch(
        &self,
        on: &Launch<'_>,
        cache: &KvCache,
        [q, k, v]: [View; 3],
        sinks: Address,
        to: View,
    ) -> Result<()> {
        let most = self.at_once();
        if most == 0 {
            return Err(Error::input(format!("an attention of {} key heads is not supported on CUDA", self.kv_heads))
                .help("answer with --device cpu"));
        }
        for first in (0..on.rows).step_by(most) {
            let count = most.min(on.rows - first);
            let all = cache.tokens + 1;
            let seen = if self.window > 0 { all.min(self.window) } else { all };
            let Partition { own, groups, tiles, parts } = self.partition(seen, count, on.gpu.multiprocessors);
            let numbers = Numbers {
                share: (self.heads / self.kv_heads) as i32,
                own: own as i32,
                dim: self.dim as i32,
                value_dim: self.value_dim as i32,
                keys: keys(self.dim) as i32,
                groups: groups as i32,
                tiles: tiles as i32,
                window: self.window.min(i32::MAX as usize) as i32,
                apart: cache.apart,
                scale: self.scale,
                softcap: self.softcap,
            };
            let [q, k, v, to] = [q, k, v, to].map(|view| view.row(first));
            let args = Args::default().with(q).with(k).with(v).with(cache.keys).with(cache.values).with(to);
            let args = args.with(cache.sequences + (first * KvCache::SEQUENCE) as u64).with(cache.scratch);
            let (kernel, _) = on.kernels.variant("attention_decode", self.runs())?;
            let grid = [parts, self.kv_heads, groups * count];
            let args = args.with(sinks).with(numbers);
            on.gpu.launch(kernel, grid, [THREADS as u32, 1, 1], shared(self.dim), args)?;
        }
        Ok(())
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
            assert!(of.at_once() >= 32, "{heads} {kv_heads}: {}", of.at_once());
            for (keys, sequences) in (1..300).chain([900, 4096, 32 << 10]).flat_map(|keys| [(keys, 1), (keys, 32)]) {
                let Partition { own, groups, tiles, parts } = of.partition(keys, sequences, 132);
                let part = tiles * super::keys(dim);
                assert!(parts * part >= keys && (parts - 1) * part < keys, "{keys}: {parts} of {tiles}");
                assert!(own * groups >= heads / kv_heads);
                let blocks = sequences * kv_heads * groups;
                let floats = TICKETS + blocks * parts * own * (dim + 4);
                assert!(blocks <= TICKETS && floats * 4 <= KvCache::SCRATCH, "{keys}: {parts} parts");
            }
        }
        assert_eq!(decode(8192, 8192, 128).at_once(), 0);
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
