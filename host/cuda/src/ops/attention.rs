//! Causal grouped-query attention over packed pairs, in kernels that are compiled for a width of heads.

use super::super::sum::copy_rows;
use super::attention_decode::Decode;
use super::heads::sum_groups;
use super::{
    Address, Args, Argument, BackwardReads, Cost, CudaOp, Execute, Gpu, Launch, Lowering, Recompute, Slice, Source,
    Step, TensorMap, Variant, View, count, number,
};
use dpo_core::error::{Error, Result};

pub(super) static SOURCE: Source = Source {
    variants: Some(variants),
    ..Source::plain(
        "attention",
        include_str!("attention.cu"),
        &["attention", "attention_delta", "attention_dq", "attention_dkv"],
    )
};

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: true },
    ..CudaOp::new("attention", forward, backward)
};

/// Hopper's own instructions, which take the place of functions of `attention.cu`.
const HOPPER: &str =
    concat!(include_str!("hopper.cuh"), include_str!("attention_hopper.cu"), include_str!("attention_hopper_vjp.cu"));

/// Those of [`HEAD_DIMS`] for which Hopper's are used.
const HOPPER_DIMS: &[(usize, usize)] =
    &[(64, 64), (80, 80), (96, 64), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256)];

/// Kernels of the widest heads, which take the place of functions of `attention.cu`.
const WIDE: &str = include_str!("attention_wide.cu");

/// Widths of heads that attention is written for: of queries and keys, and of values.
const HEAD_DIMS: &[(usize, usize)] = &[
    (16, 16),
    (32, 32),
    (64, 64),
    (80, 80),
    (96, 64),
    (96, 96),
    (112, 112),
    (128, 128),
    (160, 160),
    (192, 128),
    (192, 192),
    (256, 256),
    (512, 512),
];

#[derive(Clone, Copy)]
struct Attention {
    heads: usize,
    kv_heads: usize,
    /// Columns of a head of queries and keys.
    dim: usize,
    /// Columns of a head of values.
    value_dim: usize,
    scale: f32,
    /// 0 is none.
    window: usize,
    /// 0 is none.
    softcap: f32,
    /// The vector of the heads' sinks.
    sinks: Option<usize>,
}

struct AttentionVjp(Attention);

/// `struct Shape` of `attention.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Shape {
    heads: i32,
    share: i32,
    tokens: i32,
    window: i32,
    cached: i32,
    scale: f32,
    softcap: f32,
}

// SAFETY: seven numbers of four bytes.
unsafe impl Argument for Shape {}

/// What the kernels are compiled for: the widths of heads, and whether scores are capped.
#[derive(Clone, Copy)]
struct Heads {
    dim: usize,
    value_dim: usize,
    softcap: bool,
}

fn attention(l: &mut Lowering<'_>, index: usize) -> Result<Attention> {
    let node = &l.nodes[index];
    let heads = count(node, "heads");
    Ok(Attention {
        heads,
        kv_heads: count(node, "kv_heads"),
        dim: count(node, "head_dim"),
        value_dim: node.width / heads,
        scale: number(node, "scale") as f32,
        window: count(node, "window"),
        softcap: number(node, "softcap") as f32,
        sinks: node.weight("sinks").map(|_| l.vector(index, "sinks")).transpose()?,
    })
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let own = attention(l, index)?;
    let dims = (own.dim, own.value_dim);
    if !HEAD_DIMS.contains(&dims) {
        let what =
            format!("heads of {dims:?} columns (of keys, of values) are not supported on CUDA: {HEAD_DIMS:?} are");
        return Err(Error::input(what).help("train with --device cpu"));
    }
    let qkv: [Slice; 3] = l.inputs(index)?;
    let out = l.place(index);
    let lse = l.heads(own.heads);
    l.leave(index, vec![out, lse]);
    let step = Step::new("attention", qkv, [out, lse], own).mixes_rows();
    l.push(step.costs(Cost::Memory, Recompute::Attention))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dout) = l.take_gradient(index) else { return Ok(()) };
    let (own, nodes) = (attention(l, index)?, l.nodes);
    let ([q, k, v], [out, lse]) = (l.inputs(index)?, l.left(index)?);
    let delta = l.heads(own.heads);
    let (mut writes, mut after) = (Vec::new(), Vec::new());
    for value in &nodes[index].inputs {
        let (to, sum) = l.write_gradient(*value);
        writes.push(to);
        after.extend(sum);
    }
    writes.push(delta);
    // What every query head gives to dk and dv, where several share a key head.
    if own.heads > own.kv_heads {
        writes.extend([own.dim, own.value_dim].map(|dim| l.buffer(own.heads * dim, 0)));
    }
    let step = Step::new("attention dq", [q, k, v, out, dout, lse], writes, AttentionVjp(own)).mixes_rows();
    l.push(step.costs(Cost::Memory, Recompute::Attention))?;
    after.into_iter().try_for_each(|step| l.push(step))
}

impl Attention {
    fn kernels(&self) -> Heads {
        Heads { dim: self.dim, value_dim: self.value_dim, softcap: self.softcap > 0.0 }
    }

    /// Of one query.
    fn decode(&self) -> Decode {
        let Attention { heads, kv_heads, dim, value_dim, scale, window, softcap, .. } = *self;
        Decode { heads, kv_heads, dim, value_dim, scale, window, softcap }
    }

    /// Tiles of the batch, their number, and the numbers that kernels take last.
    fn shape(&self, on: &Launch<'_>) -> (Address, usize, Shape) {
        let (tiles, count) = on.batch.tiles_of(self.kernels().tile(on.gpu.kernels));
        let shape = Shape {
            heads: self.heads as i32,
            share: (self.heads / self.kv_heads) as i32,
            tokens: on.batch.tokens as i32,
            window: self.window.min(i32::MAX as usize) as i32,
            cached: on.cache.map_or(0, |cache| cache.tokens) as i32,
            scale: self.scale,
            softcap: self.softcap,
        };
        (tiles, count, shape)
    }

    /// Rows of queries or keys as Hopper's kernels copy them to shared memory: boxes of so many rows and 64 columns.
    fn boxes(&self, of: View, rows: usize, heads: usize, of_box: usize) -> Result<TensorMap> {
        TensorMap::new(of, [rows, heads * self.dim], [of_box, 64])
    }

    /// The same of values.
    fn value_boxes(&self, of: View, rows: usize, heads: usize, of_box: usize) -> Result<TensorMap> {
        TensorMap::new(of, [rows, heads * self.value_dim], [of_box, 64])
    }

    /// Into how many runs the query heads of a key head are cut, where a block sums over a run: as few as give every multiprocessor
    /// four pieces of work, long and short ones.
    fn parts(&self, tiles: usize, multiprocessors: usize) -> usize {
        (4 * multiprocessors).div_ceil((tiles * self.kv_heads).max(1)).clamp(1, self.heads / self.kv_heads)
    }

    /// What `count` parts of the query heads of a key head give to dk and dv, summed.
    fn add_parts(&self, on: &Launch<'_>, count: usize, parts: &[View], sums: [&View; 2]) -> Result<()> {
        let all = parts.iter().zip(sums).zip([self.dim, self.value_dim]);
        let mut all = all.map(|((part, sum), dim)| sum_groups(on, *part, *sum, [self.kv_heads, count, dim]));
        all.try_for_each(|launched| launched)
    }
}

impl Execute for Attention {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        vec![self.kernels().variant(capability), self.decode().variant()]
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let sinks = self.sinks.map_or(0, |at| on.weights.vectors[at]);
        if let Some(cache) = on.cache.as_ref().filter(|cache| cache.each) {
            return self.decode().launch(on, cache, [reads[0], reads[1], reads[2]], sinks, writes[0]);
        }
        let (tiles, count, shape) = self.shape(on);
        let (mut from, mut keys, mut values) = (reads[0], reads[1], reads[2]);
        let (mut to, mut sums, mut begins) = (writes[0], writes[1].at, on.batch.begins);
        let (heads, new, capability) = (self.kernels(), from, on.gpu.kernels);
        let (kernel, shared) = on.kernels.variant("attention", heads.key())?;
        if let Some(cache) = &on.cache {
            for (new, all, dim) in [(keys, cache.keys, self.dim), (values, cache.values, self.value_dim)] {
                let end = View { at: all.at + cache.tokens as u64 * all.ld as u64 * 2, ld: all.ld };
                copy_rows(on, self.kv_heads * dim, new, end)?;
            }
            (keys, values) = (cache.keys, cache.values);
            (from, to) = (cache.of_sequence(from), cache.of_sequence(to));
            [sums, begins] = [sums, begins].map(|at| at.wrapping_sub(cache.tokens as u64 * 4));
        }
        if heads.hopper(capability) {
            let all = on.batch.tokens + shape.cached as usize;
            let args = Args::default().with(self.boxes(new, on.batch.tokens, self.heads, 64)?);
            let args = args.with(self.boxes(keys, all, self.kv_heads, 64)?);
            let args = args.with(self.value_boxes(values, all, self.kv_heads, 64)?);
            let args = args.with(tiles).with(begins).with(to).with(sums).with(sinks).with(count as i32).with(shape);
            return on.gpu.launch(kernel, walkers(on.gpu, self.heads * count), heads.block(capability), shared, args);
        }
        let args = Args::default().with(tiles).with(begins).with(from).with(keys).with(values).with(to);
        let args = args.with(sums).with(sinks).with(shape);
        on.gpu.launch(kernel, [self.heads, count, 1], heads.block(capability), shared, args)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        for Attended { row, head, weights, log_sum } in attended(self, on, reads) {
            let mut values = vec![0.0; self.value_dim];
            for (key, weight) in weights {
                let v = on.row(&of_head(&reads[2], head * self.kv_heads / self.heads, self.value_dim), key);
                values.iter_mut().zip(v).for_each(|(o, v)| *o += weight * v);
            }
            on.write(&of_head(&writes[0], head, self.value_dim), row, &values);
            *on.number(&writes[1], head, row) = log_sum;
        }
    }
}

impl Execute for AttentionVjp {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        self.0.variants(capability)
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (a, heads, capability) = (&self.0, self.0.kernels(), on.gpu.kernels);
        let kernel = |name| on.kernels.variant(name, heads.key());
        let ([q, k, v, out, dout, lse], [dq, dk, dv, delta, parts @ ..]) = (reads, writes) else {
            return Err(Error::run("an attention lacks values"));
        };
        let args = Args::default().with(*out).with(*dout).with(delta.at).with(on.rows as i32).with(a.heads as i32);
        on.gpu.launch(kernel("attention_delta")?.0, [(on.rows * a.heads).div_ceil(8), 1, 1], [32, 8, 1], 0, args)?;
        if heads.hopper(capability) {
            return self.launch_on_hopper(on, reads, writes);
        }
        let (tiles, count, shape) = a.shape(on);
        let read = || {
            let args = Args::default().with(tiles).with(on.batch.begins).with(*q).with(*k).with(*v);
            args.with(*dout).with(lse.at).with(delta.at)
        };
        let halves = if a.dim > 128 && !heads.widest() { 2 } else { 1 };
        let [to_dk, to_dv] = if let [dk, dv] = parts { [dk, dv] } else { [dk, dv] };
        let (dkv, shared) = kernel("attention_dkv")?;
        let args = read().with(*to_dk).with(*to_dv).with(shape);
        on.gpu.launch(dkv, [a.heads, count, halves], heads.block(capability), shared, args)?;
        a.add_parts(on, a.heads / a.kv_heads, parts, [dk, dv])?;
        on.gpu.mark("attention dk, dv")?;
        let (kernel, shared) = kernel("attention_dq")?;
        on.gpu.launch(kernel, [a.heads, count, 1], heads.block(capability), shared, read().with(*dq).with(shape))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let a = &self.0;
        let [q, k, v, out, dout, lse] = reads else { panic!("an attention lacks values") };
        let mut sums = [q.width, k.width, v.width].map(|width| vec![0.0_f32; width * on.rows()]);
        for Attended { row, head, weights, log_sum } in attended(a, on, reads) {
            assert!((*on.number(lse, head, row) - log_sum).abs() < 1e-4, "the log-sum was lost");
            let kv = head * a.kv_heads / a.heads;
            let dy = on.row(&of_head(dout, head, a.value_dim), row);
            let pull = dot(&dy, &on.row(&of_head(out, head, a.value_dim), row));
            *on.number(&writes[3], head, row) = pull;
            let own = on.row(&of_head(q, head, a.dim), row);
            for (key, weight) in weights {
                let key_row = on.row(&of_head(k, kv, a.dim), key);
                let value_row = on.row(&of_head(v, kv, a.value_dim), key);
                let bend = if a.softcap > 0.0 {
                    1.0 - (dot(&own, &key_row) * a.scale / a.softcap).tanh().powi(2)
                } else {
                    1.0
                };
                let ds = weight * (dot(&dy, &value_row) - pull) * bend * a.scale;
                let mut add = |which: usize, at: usize, by: f32, from: &[f32]| {
                    sums[which][at..at + from.len()].iter_mut().zip(from).for_each(|(s, f)| *s += by * f);
                };
                add(0, row * q.width + head * a.dim, ds, &key_row);
                add(1, key * k.width + kv * a.dim, ds, &own);
                add(2, key * v.width + kv * a.value_dim, weight, &dy);
            }
        }
        // What the kernels leave there is of no further use.
        for part in &writes[4..] {
            (0..on.rows()).for_each(|row| on.write(part, row, &vec![f32::NAN; part.width]));
        }
        for (sums, to) in sums.iter().zip(writes) {
            (0..on.rows()).for_each(|row| on.write(to, row, &sums[row * to.width..][..to.width]));
        }
    }
}

impl AttentionVjp {
    /// dk and dv, then dq, in blocks that walk over pieces of work.
    fn launch_on_hopper(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (a, heads, tokens) = (&self.0, self.0.kernels(), on.batch.tokens);
        let kernel = |name| on.kernels.variant(name, heads.key());
        let ([q, k, v, _, dout, lse], [dq, dk, dv, delta, parts @ ..]) = (reads, writes) else {
            return Err(Error::run("an attention lacks values"));
        };
        let read = |box_rows: usize, tiles: Address| -> Result<Args> {
            let args = Args::default().with(a.boxes(*q, tokens, a.heads, 64)?);
            let args = args.with(a.boxes(*k, tokens, a.kv_heads, box_rows)?);
            let args = args.with(a.value_boxes(*v, tokens, a.kv_heads, box_rows)?);
            let args = args.with(a.value_boxes(*dout, tokens, a.heads, 64)?);
            Ok(args.with(tiles).with(on.batch.begins).with(lse.at).with(delta.at))
        };
        let (tiles, count) = on.batch.key_tiles_of(if heads.wide() { 64 } else { 128 });
        let cuts = a.parts(count, on.gpu.multiprocessors);
        let parts = if cuts > 1 { parts } else { &[] };
        let [to_dk, to_dv] = if let [dk, dv] = parts { [dk, dv] } else { [dk, dv] };
        let (own, pieces, block) = (a.shape(on), count * a.kv_heads * cuts, heads.block(on.gpu.kernels));
        let (dkv, shared) = kernel("attention_dkv")?;
        let args = read(64, tiles)?.with(*to_dk).with(*to_dv).with(count as i32).with(cuts as i32).with(own.2);
        on.gpu.launch(dkv, walkers(on.gpu, pieces), block, shared, args)?;
        a.add_parts(on, cuts, parts, [dk, dv])?;
        on.gpu.mark("attention dk, dv")?;
        let (tiles, count, shape) = own;
        let (kernel, shared) = kernel("attention_dq")?;
        let args = read(heads.dq_keys().min(64), tiles)?.with(*dq).with(count as i32).with(shape);
        on.gpu.launch(kernel, walkers(on.gpu, count * a.heads), block, shared, args)
    }
}

impl Heads {
    /// Queries or keys of a tile, as the kernels have them.
    fn tile(self, capability: u32) -> usize {
        match self.dim {
            _ if self.hopper(capability) => 128,
            ..=128 => 64,
            129..=256 => 32,
            _ => 16,
        }
    }

    /// Whether Hopper's tiles are smaller, so that they fit into shared memory and their sums into registers.
    fn wide(self) -> bool {
        self.dim > 128
    }

    /// Keys of a tile that passes by for dq, on Hopper.
    fn dq_keys(self) -> usize {
        match self.dim {
            ..=128 => 128,
            129..=192 => 64,
            _ => 32,
        }
    }

    /// Whether four warps share a tile.
    fn widest(self) -> bool {
        self.dim > 256
    }

    fn block(self, capability: u32) -> [u32; 3] {
        let threads = match self.dim {
            _ if self.hopper(capability) => 384,
            129..=256 => 64,
            _ => 128,
        };
        [threads, 1, 1]
    }

    /// What tells its kernels from others.
    fn key(self) -> usize {
        (self.dim << 16 | self.value_dim) * 2 + usize::from(self.softcap)
    }

    fn hopper(self, capability: u32) -> bool {
        capability == 90 && HOPPER_DIMS.contains(&(self.dim, self.value_dim))
    }

    fn variant(self, capability: u32) -> Variant {
        let (dim, hopper, stages) = (self.dim, self.hopper(capability), self.value_stages(capability));
        let [softcap, wgmma] = [self.softcap, hopper].map(usize::from);
        let numbers =
            [("DIM", dim), ("VALUE_DIM", self.value_dim), ("SOFTCAP", softcap), ("WGMMA", wgmma), ("V_STAGES", stages)];
        Variant {
            source: &SOURCE,
            key: self.key(),
            label: match (self.value_dim == dim, if self.softcap { ", capped" } else { "" }) {
                (true, capped) => format!("{dim}{capped}"),
                (false, capped) => format!("{dim}, values {}{capped}", self.value_dim),
            },
            before: numbers.map(|(name, number)| format!("#define {name} {number}\n")).concat(),
            after: match hopper {
                true => HOPPER,
                false if self.widest() => WIDE,
                false => "",
            },
            generation: hopper,
            shared: ["attention", "attention_dq", "attention_dkv"].into_iter().zip(self.shared(capability)).collect(),
        }
    }

    /// Bytes of `rows` rows of a head in shared memory, where rows are not swizzled.
    fn rows(self, rows: usize) -> usize {
        rows * (self.dim + 8) * 2
    }

    /// Tiles of values that the kernel of dq holds: two, where shared memory has room for them.
    fn value_stages(self, capability: u32) -> usize {
        if self.dim > 128 && self.rows(6 * self.tile(capability)) + STATIC > most_shared(capability) { 1 } else { 2 }
    }

    /// Bytes of shared memory that forward, dq and dkv take.
    fn shared(self, capability: u32) -> [usize; 3] {
        let (dim, tile) = (self.dim, self.tile(capability));
        if self.hopper(capability) {
            // Rows in panels of 64 columns, from an aligned address on: a tile's own, and two places of those that pass by. For dk and dv
            // numbers of queries lie behind them, and weights of wide heads.
            let (key, value) = (dim.div_ceil(64) * 128, self.value_dim.div_ceil(64) * 128);
            let (own, own_keys, places, weights) = if self.wide() { (1, 64, 2, 64 * 64 * 4) } else { (2, 128, 4, 0) };
            let keys = if self.value_dim > 128 { 64 } else { 128 };
            let forward = own * tile * key + 2 * keys * (key + value);
            let dq = (tile + 2 * self.dq_keys()) * (key + value);
            let dkv = (own_keys + places * 64) * (key + value) + places * 2 * 64 * 4 + weights;
            return [forward, dq, dkv].map(|bytes| bytes + 1024);
        }
        if self.widest() {
            // Parts of scores behind the rows, and of their gradients.
            let parts = 4 * tile * tile * 4;
            return [self.rows(3 * tile) + parts, self.rows(4 * tile) + 2 * parts, self.rows(4 * tile) + 2 * parts];
        }
        // Rows that a warp does not hold in registers.
        let held = |tiles: usize| if dim > 128 { tiles * tile } else { 0 };
        let queries = tile / 2;
        let dq = (2 + self.value_stages(capability)) * tile + held(2);
        [self.rows(4 * tile + held(1)), self.rows(dq), self.rows(4 * queries + held(2)) + 4 * queries * 4]
    }
}

/// A grid whose blocks walk over pieces of work, one on every multiprocessor.
fn walkers(gpu: &Gpu, pieces: usize) -> [usize; 3] {
    [pieces.min(gpu.multiprocessors), 1, 1]
}

/// Bytes of shared memory that kernels take beside what is asked for, at most.
const STATIC: usize = 3072;

/// Bytes of shared memory that a block may have on a card (CUDA C++ Programming Guide, technical specifications per compute
/// capability).
pub(super) fn most_shared(capability: u32) -> usize {
    match capability {
        80 | 87 => 163 << 10,
        90 | 100 | 103 => 227 << 10,
        _ => 99 << 10,
    }
}

/// All kinds of heads.
fn variants(capability: u32) -> Vec<Variant> {
    let dims = HEAD_DIMS.iter().copied();
    let heads = dims.flat_map(|(dim, value_dim)| [false, true].map(|softcap| Heads { dim, value_dim, softcap }));
    heads.map(|h| h.variant(capability)).collect()
}

/// Of a row and a head: the weights of the keys it sees, and the logarithm of their sum.
#[cfg(test)]
struct Attended {
    row: usize,
    head: usize,
    weights: Vec<(usize, f32)>,
    log_sum: f32,
}

#[cfg(test)]
fn attended(a: &Attention, on: &super::Emulation<'_>, reads: &[Slice]) -> Vec<Attended> {
    let (q, k, sinks) = (&reads[0], &reads[1], a.sinks.map(|at| on.vector(at)));
    let attend = |(row, head): (usize, usize)| {
        let own = on.row(&of_head(q, head, a.dim), row);
        let score = |key: usize| {
            let score = dot(&own, &on.row(&of_head(k, head * a.kv_heads / a.heads, a.dim), key)) * a.scale;
            if a.softcap > 0.0 { a.softcap * (score / a.softcap).tanh() } else { score }
        };
        let scores: Vec<(usize, f32)> = on.seen_by(row, a.window).into_iter().map(|key| (key, score(key))).collect();
        let sink = sinks.as_ref().map_or(0.0, |sinks| sinks[head].exp());
        let log_sum = (sink + scores.iter().map(|(_, s)| s.exp()).sum::<f32>()).ln();
        let weights = scores.into_iter().map(|(key, s)| (key, (s - log_sum).exp())).collect();
        Attended { row, head, weights, log_sum }
    };
    (0..on.rows()).flat_map(|row| (0..a.heads).map(move |head| (row, head))).map(attend).collect()
}

#[cfg(test)]
fn of_head(slice: &Slice, head: usize, dim: usize) -> Slice {
    Slice { column: slice.column + head * dim, width: dim, ..*slice }
}

#[cfg(test)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::super::super::kernels::ARCHITECTURES;
    use super::{STATIC, most_shared, variants};

    #[test]
    fn kernels_fit_into_the_shared_memory_of_every_card() {
        for capability in ARCHITECTURES {
            for variant in variants(*capability) {
                for (kernel, bytes) in variant.shared {
                    let (most, label) = (most_shared(*capability), &variant.label);
                    assert!(bytes + STATIC <= most, "{kernel} of {label} takes {bytes} of {most} on {capability}");
                }
            }
        }
    }
}
