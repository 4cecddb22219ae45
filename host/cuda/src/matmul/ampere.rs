//! The kernel for Ampere and Ada, `gemm_ampere.cu`, and for later cards that have no kernel of their own: how it is compiled, and how its tiles
//! are cut along k.

use super::super::gpu::{Address, Args, Argument, View};
use super::super::kernels::{Source, Variant};
use super::{Fp8, Gemm, Groups, On, Operands, WORKSPACE, gemm};
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    file: "gemm_ampere",
    text: concat!(
        include_str!("../ops/mma.cuh"),
        include_str!("../ops/activations.cuh"),
        include_str!("groups.cuh"),
        include_str!("gemm_ampere.cu")
    ),
    kernels: &["gemm_ampere"],
    waits: false,
    variants: Some(usual),
};

/// Rows, columns and depth of a tile.
const TILE: [usize; 3] = [128, 256, 32];
/// Warps among a tile's rows, and among its columns.
const WARPS: [usize; 2] = [2, 4];
/// Rows of tiles that are computed together.
const BAND: usize = 16;

/// `struct Problem` of `gemm_ampere.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Problem {
    a: View,
    b: View,
    c: View,
    d: View,
    bias: Address,
    both: View,
    sizes: [i32; 3],
    limit: f32,
    whole: i32,
    split: i32,
    parts: Address,
    arrived: Address,
}

// SAFETY: 128 bytes without padding: addresses and distances of eight bytes, then six numbers of four, then two addresses.
unsafe impl Argument for Problem {}

/// `struct Scales` of `gemm_ampere.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Scales {
    of_x: View,
    u: View,
    l: View,
    of_w: Address,
    rank: i64,
}

// SAFETY: without padding: addresses, distances and a number of eight bytes.
unsafe impl Argument for Scales {}

/// How it is compiled for most models, once for each key. A gated activation's VJP is a kernel of its own on its cards.
fn usual(capability: u32) -> Vec<Variant> {
    let all = gemm::usual().into_iter().filter(|gemm| !gemm.differentiates);
    let has = |gemm: &Gemm| !gemm.fp8 || (has_fp8(capability) && !gemm.grouped);
    let all = all.flat_map(|gemm| [gemm, Gemm { fp8: true, ..gemm }]).filter(has);
    all.map(variant).fold(Vec::new(), |mut usual, variant| {
        if usual.iter().all(|v: &Variant| v.key != variant.key) {
            usual.push(variant);
        }
        usual
    })
}

/// Whether a card's tensor cores multiply e4m3: Ada's and later ones.
pub(super) fn has_fp8(capability: u32) -> bool {
    capability >= 89
}

/// How it is compiled.
pub(super) fn variant(gemm: Gemm) -> Variant {
    let numbers = [
        ("TILE_M", TILE[0]),
        ("TILE_N", TILE[1]),
        ("TILE_K", TILE[2]),
        ("WARPS_M", WARPS[0]),
        ("WARPS_N", WARPS[1]),
        ("STAGES", stages(gemm)),
        ("BLOCKS", 1),
        ("BAND", BAND),
        ("B_TRANSPOSED", (gemm.weight_rows || gemm.fp8).into()),
        ("FP8", gemm.fp8.into()),
        ("L_ROWS", gemm.weight_rows.into()),
        ("GATED", gemm.gate.is_some().into()),
        ("ACTIVATION", gemm.gate.unwrap_or(0)),
        ("GROUPED", gemm.grouped.into()),
    ];
    Variant {
        source: &SOURCE,
        key: key(gemm),
        label: format!(
            "{}weights as {}, gated {}, groups {}",
            if gemm.fp8 { "fp8, " } else { "" },
            if gemm.weight_rows { "rows" } else { "columns" },
            gemm.gate.is_some(),
            gemm.grouped
        ),
        before: numbers.map(|(name, number)| format!("#define {name} {number}\n")).concat(),
        after: "",
        generation: false,
        shared: vec![(SOURCE.kernels[0], shared(gemm))],
    }
}

/// What is added, and whether gate and up are left, is said by addresses that are null or not.
fn key(gemm: Gemm) -> usize {
    Gemm { weight_rows: gemm.weight_rows, gate: gemm.gate, fp8: gemm.fp8, grouped: gemm.grouped, ..Gemm::PLAIN }.key()
}

/// Stages of both matrices in shared memory, as many as Ada has room for.
fn stages(gemm: Gemm) -> usize {
    if gemm.grouped { 3 } else { 4 }
}

/// Bytes of shared memory: both tiles of every stage.
fn shared(gemm: Gemm) -> usize {
    stages(gemm) * (TILE[0] + TILE[1]) * TILE[2] * 2
}

/// Of so many tiles, how many are whole, and the parts of each of the others: as many as make the last turn of the blocks the shortest.
fn schedule(tiles: usize, blocks: usize, steps: usize) -> [usize; 2] {
    /// What a part costs beside its steps, in steps, and parts of a tile at most.
    const PART: f64 = 16.0;
    const MOST: usize = 8;
    let rest = tiles % blocks;
    if rest == 0 {
        return [tiles, 1];
    }
    let room = (WORKSPACE / (rest * TILE[0] * TILE[1] * 4)).min(MOST).min(steps);
    let cost = |split: &usize| {
        let extra = if *split > 1 { PART } else { 0.0 };
        (rest * split).div_ceil(blocks) as f64 * (steps as f64 / *split as f64 + extra)
    };
    let split = (1..=room).min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap_or(1);
    if split == 1 { [tiles, 1] } else { [tiles - rest, split] }
}

/// Starts a product of sizes `[m, n, k]`, or a gated activation of it, which with `both` leaves gate and up there too.
pub(super) fn launch(
    gemm: Gemm,
    on: On<'_>,
    sizes: [usize; 3],
    operands: Operands,
    both: Option<View>,
    limit: f32,
) -> Result<()> {
    let (problem, blocks) = whole(gemm, on, sizes, operands, both, limit);
    start(gemm, on, blocks, Args::default().with(problem))
}

/// The same of a product of e4m3, whose A and B `operands` leaves out.
pub(super) fn launch_fp8(
    gemm: Gemm,
    on: On<'_>,
    [m, n, k]: [usize; 3],
    fp8: Fp8,
    operands: Operands,
    both: Option<View>,
    limit: f32,
) -> Result<()> {
    if m == 0 {
        return Ok(());
    }
    let (w, ld) = fp8.w;
    let operands = Operands { a: fp8.x, b: View { at: w, ld: ld as i64 / 2 }, ..operands };
    let (problem, blocks) = whole(gemm, on, [m, n, k / 2], operands, both, limit);
    let of_x = View { at: fp8.x.at + k as u64, ld: fp8.x.ld };
    let scales = Scales { of_x, u: fp8.u, l: fp8.l, of_w: fp8.scales, rank: fp8.rank as i64 };
    start(gemm, on, blocks, Args::default().with(problem).with(scales))
}

/// A problem that is no group's, and the blocks that compute it.
fn whole(
    gemm: Gemm,
    on: On<'_>,
    [m, n, k]: [usize; 3],
    operands: Operands,
    both: Option<View>,
    limit: f32,
) -> (Problem, usize) {
    let (tiles, blocks) = (m.div_ceil(TILE[0]) * n.div_ceil(TILE[1]), on.gpu.multiprocessors);
    let [whole, split] = schedule(tiles, blocks, k.div_ceil(TILE[2]));
    let cut = problem(gemm, on, [m, n, k], operands, [whole as i32, split as i32]);
    (Problem { both: both.unwrap_or(NONE), limit, ..cut }, blocks.min(whole + (tiles - whole) * split))
}

/// Starts a product of sizes `[m, n, k]` for each group, whose tiles are all whole.
pub(super) fn launch_grouped(
    gemm: Gemm,
    on: On<'_>,
    sizes: [usize; 3],
    operands: Operands,
    groups: Groups,
) -> Result<()> {
    let args = Args::default().with(problem(gemm, on, sizes, operands, [i32::MAX, 1]));
    let args = args.with(groups.begins).with(groups.count as i32).with(groups.apart as i32);
    start(gemm, on, on.gpu.multiprocessors, args)
}

const NONE: View = View { at: 0, ld: 0 };

fn problem(gemm: Gemm, on: On<'_>, sizes: [usize; 3], operands: Operands, [whole, split]: [i32; 2]) -> Problem {
    Problem {
        a: operands.a,
        b: operands.b,
        c: if gemm.adds { operands.c } else { NONE },
        d: operands.d,
        bias: if gemm.biased { operands.bias } else { 0 },
        both: NONE,
        sizes: sizes.map(|n| n as i32),
        limit: 0.0,
        whole,
        split,
        parts: on.matmuls.workspace(),
        arrived: on.matmuls.arrived(),
    }
}

fn start(gemm: Gemm, on: On<'_>, blocks: usize, args: Args) -> Result<()> {
    let (kernel, shared) = on.kernels.variant(SOURCE.kernels[0], key(gemm))?;
    let block = [(32 * WARPS[0] * WARPS[1]) as u32, 1, 1];
    on.gpu.launch(kernel, [blocks, 1, 1], block, shared, args)
}

#[cfg(test)]
mod tests {
    use super::{Gemm, Groups, TILE, WORKSPACE, schedule, shared};

    #[test]
    fn it_fits_into_the_shared_memory_of_an_ada_card() {
        assert!(shared(Gemm::PLAIN) <= 99 << 10);
        assert!(shared(Groups::gemm(true)) + Groups::SHARED <= 99 << 10);
    }

    /// 280 tiles on 132 multiprocessors leave 16, each of which is cut for eight blocks.
    #[test]
    fn the_last_tiles_are_cut() {
        assert_eq!(schedule(280, 132, 593), [264, 8]);
        assert_eq!(schedule(264, 132, 593), [264, 1]);
        for (tiles, blocks) in [(1, 132), (131, 132), (500, 128), (17, 46)] {
            let [whole, split] = schedule(tiles, blocks, 112);
            assert!(whole % blocks == 0 || split == 1);
            assert!(split == 1 || (tiles - whole) * split * TILE[0] * TILE[1] * 4 <= WORKSPACE);
        }
    }
}
