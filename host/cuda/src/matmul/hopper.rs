//! The kernel for Hopper, `gemm_hopper.cu`: how it is compiled, and how its tiles are chosen.

use super::super::gpu::{Address, Args, TensorMap, View};
use super::super::kernels::{Source, Variant};
use super::{Gemm, On, Operands, gemm};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    file: "gemm_hopper",
    text: concat!(
        include_str!("../ops/hopper.cuh"),
        include_str!("../ops/activations.cuh"),
        include_str!("gemm_hopper.cu")
    ),
    kernels: &["gemm_hopper"],
    waits: true,
    variants: Some(|capability| {
        if is_for(capability) { gemm::usual().into_iter().flat_map(variants).collect() } else { Vec::new() }
    }),
};

/// Tokens of a tile, and of what is stored of it at once, which is less where gate and up are stored too, or their gradients.
struct Tile {
    tokens: usize,
    chunk: usize,
    kept_chunk: usize,
    vjp_chunk: usize,
}

/// All tiles. The more there are, the closer a number of tokens comes to whole rounds of the card.
const TILES: &[Tile] = &[
    Tile { tokens: 256, chunk: 64, kept_chunk: 32, vjp_chunk: 32 },
    Tile { tokens: 240, chunk: 48, kept_chunk: 48, vjp_chunk: 16 },
    Tile { tokens: 224, chunk: 32, kept_chunk: 32, vjp_chunk: 32 },
    Tile { tokens: 192, chunk: 64, kept_chunk: 64, vjp_chunk: 32 },
];

/// Columns of A that are multiplied at once, features of a block, and stages of both in shared memory.
const DEPTH: usize = 64;
const FEATURES: usize = 128;
const STAGES: usize = 4;

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
    TILES.iter().map(|tile| variant(gemm, tile)).collect()
}

fn variant(gemm: Gemm, tile: &Tile) -> Variant {
    let numbers = [
        ("TOKENS", tile.tokens),
        ("CHUNK", chunk(gemm, tile)),
        ("BUFFERS", buffers(gemm, tile)),
        ("STAGES", STAGES),
        ("W_ROWS", gemm.weight_rows.into()),
        ("EPILOGUE", gemm.epilogue()),
        ("ACTIVATION", gemm.gate.unwrap_or(0)),
    ];
    Variant {
        source: &SOURCE,
        key: key(gemm, tile),
        label: format!("{} tokens, epilogue {}", tile.tokens, gemm.epilogue()),
        before: numbers.map(|(name, number)| format!("#define {name} {number}\n")).concat(),
        after: "",
        generation: true,
        shared: vec![(SOURCE.kernels[0], shared(gemm, tile))],
    }
}

fn key(gemm: Gemm, tile: &Tile) -> usize {
    gemm.key() * 512 + tile.tokens
}

fn chunk(gemm: Gemm, tile: &Tile) -> usize {
    match gemm {
        Gemm { differentiates: true, .. } => tile.vjp_chunk,
        Gemm { keeps: true, .. } => tile.kept_chunk,
        _ => tile.chunk,
    }
}

/// Places for chunks: of small ones more have to be on their way.
fn buffers(gemm: Gemm, tile: &Tile) -> usize {
    if chunk(gemm, tile) == 16 { 4 } else { 2 }
}

/// Features of D that a warp group has.
fn features(gemm: Gemm) -> usize {
    if gemm.gate.is_some() && !gemm.differentiates { 32 } else { 64 }
}

/// Bytes of shared memory: stages, buffers of results for each of two warp groups, and up to an aligned address.
fn shared(gemm: Gemm, tile: &Tile) -> usize {
    let planes = match gemm {
        Gemm { keeps: true, .. } => 3,
        Gemm { differentiates: true, .. } => 2,
        _ => 1,
    };
    let results = 2 * buffers(gemm, tile) * chunk(gemm, tile) * features(gemm) * 2 * planes;
    STAGES * (FEATURES + tile.tokens) * DEPTH * 2 + results + 1024
}

/// The tile that takes the least time: rounds of all multiprocessors, two of which share tokens.
fn tile(gemm: Gemm, [m, n]: [usize; 2], multiprocessors: usize) -> &'static Tile {
    let (pairs, at_once) = (n.div_ceil(4 * features(gemm)), (multiprocessors / 2).max(1));
    let cost = |tile: &&Tile| (m.div_ceil(tile.tokens) * pairs).div_ceil(at_once) * (tile.tokens + TILE_COST);
    TILES.iter().min_by_key(cost).unwrap_or(&TILES[0])
}

/// Starts a product of sizes `[m, n, k]`.
pub(super) fn launch(gemm: Gemm, on: On<'_>, [m, n, k]: [usize; 3], operands: Operands) -> Result<()> {
    let Operands { a, b, c, d, bias } = operands;
    let weights = match gemm.weight_rows {
        true => TensorMap::new(b, [n, k], [FEATURES, 64])?,
        false => TensorMap::new(b, [k, n], [DEPTH, 64])?,
    };
    let c = if gemm.adds { c } else { d };
    start(gemm, on, [m, n, k], (a, weights), [(c, n), (d, n)], bias, 0.0)
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
    let ld = weights.ld as u64 * 2;
    // Eight rows of gate, then eight of up.
    let sizes = [k as u64, 8, 2, width as u64 / 8];
    let weights = TensorMap::encode(weights.at, &sizes, &[ld, width as u64 * ld, 8 * ld], &[64, 8, 2, 8])?;
    let stored = [both.map_or((h, width), |both| (both, 2 * width)), (h, width)];
    start(gemm, on, [m, width, k], (x, weights), stored, 0, limit)
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
    start(gemm, on, [m, width, k], (dy, weights), [(both, 2 * width), (gradients, 2 * width)], 0, limit)
}

fn start(
    gemm: Gemm,
    on: On<'_>,
    [m, n, k]: [usize; 3],
    (x, weights): (View, TensorMap),
    stored: [(View, usize); 2],
    bias: Address,
    limit: f32,
) -> Result<()> {
    let tile = tile(gemm, [m, n], on.gpu.multiprocessors);
    let (kernel, shared) = on.kernels.variant(SOURCE.kernels[0], key(gemm, tile))?;
    let x = TensorMap::new(x, [m, k], [tile.tokens / 2, DEPTH])?;
    let [c, d] = stored.map(|(view, width)| TensorMap::new(view, [m, width], [chunk(gemm, tile), features(gemm)]));
    let args = Args::default().with(x).with(weights).with(c?).with(d?).with(bias);
    let args = args.with(m as i32).with(n as i32).with(k as i32).with(BAND as i32).with(limit);
    let block = [(FEATURES * 2 + 128) as u32, 1, 1];
    on.gpu.launch(kernel, [on.gpu.multiprocessors / 2 * 2, 1, 1], block, shared, args)
}

#[cfg(test)]
mod tests {
    use super::{Gemm, TILES, shared, tile};

    const PLAIN: Gemm = Gemm::PLAIN;

    #[test]
    fn kernels_fit_into_shared_memory() {
        for tile in TILES {
            let gated = Gemm { gate: Some(0), ..PLAIN };
            for gemm in [PLAIN, gated, Gemm { keeps: true, ..gated }, Gemm { differentiates: true, ..gated }] {
                let bytes = shared(gemm, tile);
                assert!(bytes + 256 <= 227 << 10, "{bytes} for {} tokens, {gemm:?}", tile.tokens);
            }
        }
    }

    /// 8,448 tokens are 33 tiles of 256, and 66 pairs of multiprocessors take whole rounds of them; 6,676 fit tiles of 240, 2,560 tiles of 192.
    #[test]
    fn tiles_fill_whole_rounds() {
        for (tokens, expected) in [(8448, 256), (6676, 240), (4096, 240), (2560, 192)] {
            assert_eq!(tile(PLAIN, [tokens, 3584], 132).tokens, expected, "{tokens}");
        }
    }
}
