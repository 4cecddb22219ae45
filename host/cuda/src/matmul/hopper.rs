//! The kernel for Hopper, `gemm_hopper.cu`: how it is compiled, and how its tiles are chosen.

use super::super::gpu::{Address, Args, TensorMap, View};
use super::super::kernels::{Source, Variant};
use super::{Fp8, Gemm, Groups, On, Operands, gemm};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    file: "gemm_hopper",
    text: concat!(
        include_str!("../ops/hopper.cuh"),
        include_str!("../ops/activations.cuh"),
        include_str!("groups.cuh"),
        include_str!("gemm_hopper.cu")
    ),
    kernels: &["gemm_hopper"],
    waits: true,
    variants: Some(|capability| {
        let both = |gemm: Gemm| [gemm, Gemm { fp8: !gemm.grouped, ..gemm }];
        let all = gemm::usual().into_iter().flat_map(both).flat_map(variants);
        if is_for(capability) { all.collect() } else { Vec::new() }
    }),
};

/// Tokens of all tiles. The more there are, the closer a number of tokens comes to whole rounds of the card.
const TILES: &[usize] = &[256, 240, 224, 192];

/// Of rows of groups, whose tiles are never whole rounds; of experts smaller ones are slower even where most of a tile is empty.
const GROUPED_TILES: &[usize] = &[256];

/// Columns of bf16 that are multiplied at once, and their bytes; features of a block.
const DEPTH: usize = 64;
const DEPTH_BYTES: usize = 128;
const FEATURES: usize = 128;

/// Bytes of a value, and of a code of e4m3.
const BF16: u32 = 2;
const CODE: u32 = 1;

/// Shared memory of a block.
const SHARED: usize = 227 << 10;

/// What a tile costs beside its tokens, in tokens.
const TILE_COST: usize = 6;

/// Tiles of rows that blocks walk together.
const BAND: usize = 8;

/// Whether a card has its instructions.
pub(super) fn is_for(capability: u32) -> bool {
    capability == 90
}

/// Every way it is compiled.
pub(super) fn variants(gemm: Gemm) -> Vec<Variant> {
    tiles(gemm).iter().map(|tile| variant(gemm, *tile)).collect()
}

fn tiles(gemm: Gemm) -> &'static [usize] {
    if gemm.grouped { GROUPED_TILES } else { TILES }
}

fn variant(gemm: Gemm, tile: usize) -> Variant {
    let (chunk, places) = chunks(gemm, tile);
    let numbers = [
        ("TOKENS", tile),
        ("CHUNK", chunk),
        ("BUFFERS", places),
        ("STAGES", stages(gemm)),
        ("W_ROWS", gemm.weight_rows.into()),
        ("EPILOGUE", gemm.epilogue()),
        ("ACTIVATION", gemm.gate.unwrap_or(0)),
        ("FP8", gemm.fp8.into()),
        ("GROUPED", gemm.grouped.into()),
    ];
    Variant {
        source: &SOURCE,
        key: key(gemm, tile),
        label: format!(
            "{}{}{tile} tokens, epilogue {}",
            if gemm.fp8 { "fp8, " } else { "" },
            if gemm.grouped { "groups, " } else { "" },
            gemm.epilogue()
        ),
        before: numbers.map(|(name, number)| format!("#define {name} {number}\n")).concat(),
        after: "",
        generation: true,
        shared: vec![(SOURCE.kernels[0], shared(gemm, tile))],
    }
}

fn key(gemm: Gemm, tile: usize) -> usize {
    gemm.key() * 512 + tile
}

/// Stages of both matrices in shared memory. A product of bf16 whose end reads a matrix needs four; elsewhere what three leave is better
/// used for larger chunks (docs/performance.md).
fn stages(gemm: Gemm) -> usize {
    if !gemm.fp8 && (gemm.adds || gemm.differentiates) { 4 } else { 3 }
}

/// Tokens of a chunk, which is stored at once, and places for chunks: the largest that leaves room for two. The VJP of an activation, which
/// computes much between what it fetches and what it stores, has smaller ones and more on their way.
fn chunks(gemm: Gemm, tile: usize) -> (usize, usize) {
    let (largest, places) = if gemm.differentiates { (32, 4) } else { (128, 2) };
    // Beside them are barriers, scales, and what lies before an aligned address.
    let scales = if gemm.fp8 { 2 * (tile + 64) * 4 } else { 0 };
    let groups = if gemm.grouped { Groups::SHARED } else { 0 };
    let room = SHARED - stages(gemm) * stage(tile) - 1024 - 256 - scales - groups;
    let fits = |chunk: usize| room / chunk_bytes(gemm, chunk);
    let all = (16..=largest).rev().step_by(16).filter(|chunk| tile.is_multiple_of(*chunk));
    let chunk = all.into_iter().find(|chunk| fits(*chunk) >= 2).unwrap_or(16);
    (chunk, fits(chunk).min(places))
}

fn stage(tile: usize) -> usize {
    (FEATURES + tile) * DEPTH_BYTES
}

/// Bytes of a chunk of both warp groups.
fn chunk_bytes(gemm: Gemm, chunk: usize) -> usize {
    let planes = match gemm {
        Gemm { keeps: true, .. } => 3,
        Gemm { differentiates: true, .. } => 2,
        _ => 1,
    };
    2 * chunk * features(gemm) * 2 * planes
}

/// Features of D that a warp group has.
fn features(gemm: Gemm) -> usize {
    if gemm.gate.is_some() && !gemm.differentiates { 32 } else { 64 }
}

/// Bytes of shared memory: stages, chunks of results for each of two warp groups, and up to an aligned address.
fn shared(gemm: Gemm, tile: usize) -> usize {
    let (chunk, places) = chunks(gemm, tile);
    stages(gemm) * stage(tile) + places * chunk_bytes(gemm, chunk) + 1024
}

/// The tile that takes the least time: rounds of all multiprocessors, two of which share tokens.
fn tile(gemm: Gemm, [m, n]: [usize; 2], multiprocessors: usize) -> usize {
    let (pairs, at_once) = (n.div_ceil(4 * features(gemm)), (multiprocessors / 2).max(1));
    let cost = |tile: &usize| (m.div_ceil(*tile) * pairs).div_ceil(at_once) * (tile + TILE_COST);
    tiles(gemm).iter().copied().min_by_key(cost).unwrap_or(TILES[0])
}

/// Starts a product of sizes `[m, n, k]`.
pub(super) fn launch(gemm: Gemm, on: On<'_>, [m, n, k]: [usize; 3], operands: Operands) -> Result<()> {
    let Operands { a, b, c, d, bias } = operands;
    let weights = match gemm.weight_rows {
        true => TensorMap::new(b, [n, k], [FEATURES, 64])?,
        false => TensorMap::new(b, [k, n], [DEPTH, 64])?,
    };
    let c = if gemm.adds { c } else { d };
    let x = |box_rows| TensorMap::new(a, [m, k], [box_rows, DEPTH]);
    start(gemm, on, [m, n, k], (&x, weights), [(c, n), (d, n)], (bias, 0.0), |args, _| Ok(args))
}

/// Starts a product of sizes `[m, n, k]` for each group.
pub(super) fn launch_grouped(
    gemm: Gemm,
    on: On<'_>,
    [m, n, k]: [usize; 3],
    operands: Operands,
    groups: Groups,
) -> Result<()> {
    let Operands { a, b, d, .. } = operands;
    let weights = match gemm.weight_rows {
        true => TensorMap::new(b, [groups.rows(n), k], [FEATURES, 64])?,
        false => TensorMap::new(b, [groups.rows(k), n], [DEPTH, 64])?,
    };
    let x = |box_rows| TensorMap::new(a, [m, k], [box_rows, DEPTH]);
    start(gemm, on, [m, n, k], (&x, weights), [(d, n), (d, n)], (0, 0.0), |args, _| {
        Ok(args.with(groups.begins).with(groups.count as i32).with(groups.apart as i32).with(d))
    })
}

/// Starts a gated activation of `width` columns, of products of sizes `[m, 2 · width, k]`.
pub(super) fn launch_gated(
    gemm: Gemm,
    on: On<'_>,
    [m, width, k]: [usize; 3],
    [x, weights]: [View; 2],
    both: Option<View>,
    h: View,
    limit: f32,
) -> Result<()> {
    let weights = gate_and_up((weights.at, weights.ld as usize * 2), BF16, [width, k])?;
    let stored = [both.map_or((h, width), |both| (both, 2 * width)), (h, width)];
    let x = |box_rows| TensorMap::new(x, [m, k], [box_rows, DEPTH]);
    start(gemm, on, [m, width, k], (&x, weights), stored, (0, limit), |args, _| Ok(args))
}

/// Rows of gate and of up, so many bytes from one to the next: eight of gate, then eight of up.
fn gate_and_up((at, ld): (Address, usize), element: u32, [width, columns]: [usize; 2]) -> Result<TensorMap> {
    let sizes = [columns, 8, 2, width / 8].map(|n| n as u64);
    let strides = [ld, width * ld, 8 * ld].map(|n| n as u64);
    TensorMap::encode(at, element, &sizes, &strides, &[DEPTH_BYTES as u32 / element, 8, 2, 8])
}

/// Starts the VJP of a gated activation of `width` columns, whose gradient is a product of sizes `[m, width, k]`.
pub(super) fn launch_vjp(
    gemm: Gemm,
    on: On<'_>,
    [m, width, k]: [usize; 3],
    [dy, weights]: [View; 2],
    [both, gradients]: [View; 2],
    limit: f32,
) -> Result<()> {
    let weights = TensorMap::new(weights, [k, width], [DEPTH, 64])?;
    let x = |box_rows| TensorMap::new(dy, [m, k], [box_rows, DEPTH]);
    let stored = [(both, 2 * width), (gradients, 2 * width)];
    start(gemm, on, [m, width, k], (&x, weights), stored, (0, limit), |args, _| Ok(args))
}

/// Starts a product of e4m3 of sizes `[m, n, k]`, where a gated activation has n columns. C and D have columns of their own.
pub(super) fn launch_fp8(
    gemm: Gemm,
    on: On<'_>,
    [m, n, k]: [usize; 3],
    operands: Fp8,
    stored: [(View, usize); 2],
    (bias, limit): (Address, f32),
) -> Result<()> {
    if m == 0 {
        return Ok(());
    }
    let Fp8 { x, w: (w, ld), scales, u, l, rank } = operands;
    let gated = gemm.gate.is_some() && !gemm.differentiates;
    let rows = |at, ld: usize, rows: usize, box_rows: usize| {
        let (sizes, boxes) = ([k as u64, rows as u64], [DEPTH_BYTES as u32, box_rows as u32]);
        TensorMap::encode(at, CODE, &sizes, &[ld as u64], &boxes)
    };
    let ld_x = x.ld as usize * 2;
    let codes = |box_rows| rows(x.at, ld_x, m, box_rows);
    let weights = if gated { gate_and_up((w, ld), CODE, [n, k])? } else { rows(w, ld, n, FEATURES)? };
    let low_rank = match gemm {
        _ if rank == 0 => weights,
        _ if gated => gate_and_up((l.at, l.ld as usize * 2), BF16, [n, rank])?,
        Gemm { weight_rows: true, .. } => TensorMap::new(l, [n, rank], [FEATURES, DEPTH])?,
        _ => TensorMap::new(l, [rank, n], [DEPTH, 64])?,
    };
    start(gemm, on, [m, n, k], (&codes, weights), stored, (bias, limit), |args, box_rows| {
        let u = if rank == 0 { weights } else { TensorMap::new(u, [m, rank], [box_rows, DEPTH])? };
        let of_x = View { at: x.at + k as u64, ld: x.ld };
        Ok(args.with(u).with(low_rank).with(rank as i32).with(of_x).with(scales))
    })
}

/// Starts it with the map of X for so many rows of a box, and with what `more` adds to the kernel's arguments.
fn start(
    gemm: Gemm,
    on: On<'_>,
    [m, n, k]: [usize; 3],
    (x, weights): (&dyn Fn(usize) -> Result<TensorMap>, TensorMap),
    stored: [(View, usize); 2],
    (bias, limit): (Address, f32),
    more: impl FnOnce(Args, usize) -> Result<Args>,
) -> Result<()> {
    let tile = tile(gemm, [m, n], on.gpu.multiprocessors);
    let (kernel, shared) = on.kernels.variant(SOURCE.kernels[0], key(gemm, tile))?;
    let x = x(tile / 2)?;
    let [c, d] = stored.map(|(view, width)| TensorMap::new(view, [m, width], [chunks(gemm, tile).0, features(gemm)]));
    let args = Args::default().with(x).with(weights).with(c?).with(d?).with(bias);
    let args = more(args.with(m as i32).with(n as i32).with(k as i32).with(BAND as i32).with(limit), tile / 2)?;
    let block = [(FEATURES * 2 + 128) as u32, 1, 1];
    on.gpu.launch(kernel, [on.gpu.multiprocessors / 2 * 2, 1, 1], block, shared, args)
}

#[cfg(test)]
mod tests {
    use super::{Gemm, Groups, SHARED, TILES, chunks, shared, tile};

    const PLAIN: Gemm = Gemm::PLAIN;

    #[test]
    fn kernels_fit_into_shared_memory() {
        let gated = Gemm { gate: Some(0), ..PLAIN };
        let (adds, differentiates) = (Gemm { adds: true, ..PLAIN }, Gemm { differentiates: true, ..gated });
        let grouped = Gemm { grouped: true, ..PLAIN };
        for gemm in [PLAIN, adds, gated, Gemm { keeps: true, ..gated }, differentiates, grouped] {
            for (fp8, tile) in [false, true].into_iter().flat_map(|fp8| TILES.iter().map(move |tile| (fp8, *tile))) {
                let gemm = Gemm { fp8, ..gemm };
                let scales = if fp8 { 2 * (tile + 64) * 4 } else { 0 };
                let bytes = shared(gemm, tile) + 256 + scales + if gemm.grouped { Groups::SHARED } else { 0 };
                assert!(bytes <= SHARED, "{bytes} for {tile} tokens, {gemm:?}");
                let (chunk, places) = chunks(gemm, tile);
                assert!(places >= 2 && tile % chunk == 0 && chunk >= 16, "{chunk} of {tile} tokens, {gemm:?}");
            }
        }
    }

    /// 8,448 tokens are 33 tiles of 256, and 66 pairs of multiprocessors take whole rounds of them; 6,676 fit tiles of 240, 2,560 tiles of 192.
    #[test]
    fn tiles_fill_whole_rounds() {
        for (tokens, expected) in [(8448, 256), (6676, 240), (4096, 240), (2560, 192)] {
            assert_eq!(tile(PLAIN, [tokens, 3584], 132), expected, "{tokens}");
        }
    }
}
