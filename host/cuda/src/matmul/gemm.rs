//! Matmuls in kernels of our own: `gemm_hopper.cu` for Hopper. Their ends add a value, add a bias, or compute a gated activation.

use super::super::gpu::{Address, Args, Gpu, TensorMap, View};
use super::super::kernels::{Kernels, Source, Variant};
use super::{Matmul, Operands};
use dpo_core::cache;
use dpo_core::error::Result;

pub(crate) static SOURCE: Source = Source {
    file: "gemm_hopper",
    text: concat!(include_str!("../ops/activations.cuh"), include_str!("gemm_hopper.cu")),
    kernels: &["gemm_hopper"],
    variants: Some(all_variants),
};

/// What a kernel is compiled for: how the weights lie, and what happens to a product before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gemm {
    /// Whether the weights lie as `[features, k]`, as a linear has them; else as `[k, features]`.
    pub weight_rows: bool,
    /// Whether a value is added.
    pub adds: bool,
    /// Whether a bias is added.
    pub biased: bool,
    /// The activation of a gated one, as `activations.cuh` counts them.
    pub gate: Option<usize>,
    /// Whether a gated activation leaves gate and up.
    pub keeps: bool,
}

/// A gated activation of a product: the weights are those of gate and of up, `width` rows each.
#[derive(Clone, Copy)]
pub(crate) struct Gated {
    /// As `activations.cuh` counts them.
    pub activation: usize,
    pub limit: f32,
    pub width: usize,
}

/// Tokens of a tile, and of what is stored of it at once, which is less where gate and up are stored too.
struct Tile {
    tokens: usize,
    chunk: usize,
    kept_chunk: usize,
}

/// All tiles. The more there are, the closer a number of tokens comes to whole rounds of the card.
const TILES: &[Tile] = &[
    Tile { tokens: 256, chunk: 64, kept_chunk: 32 },
    Tile { tokens: 240, chunk: 48, kept_chunk: 48 },
    Tile { tokens: 224, chunk: 32, kept_chunk: 32 },
    Tile { tokens: 192, chunk: 64, kept_chunk: 64 },
];

/// Columns of A that are multiplied at once, features of a block, and stages of both in shared memory.
const DEPTH: usize = 64;
const FEATURES: usize = 128;
const STAGES: usize = 4;

/// What a tile costs beside its tokens, in tokens.
const TILE_COST: usize = 6;

/// Tiles of rows that blocks walk together.
const BAND: usize = 8;

impl Gemm {
    /// What computes a matmul.
    pub(super) fn of(matmul: &Matmul) -> Gemm {
        Gemm { weight_rows: matmul.b_transposed, adds: matmul.add, biased: matmul.bias, gate: None, keeps: false }
    }

    /// Every way it is compiled for a card; none on cards that it is not written for.
    pub(crate) fn variants(self, capability: u32) -> Vec<Variant> {
        if computes_gates(capability) { TILES.iter().map(|tile| self.variant(tile)).collect() } else { Vec::new() }
    }

    fn variant(self, tile: &Tile) -> Variant {
        let numbers = [
            ("TOKENS", tile.tokens),
            ("CHUNK", self.chunk(tile)),
            ("STAGES", STAGES),
            ("W_ROWS", self.weight_rows.into()),
            ("EPILOGUE", self.epilogue()),
            ("ACTIVATION", self.gate.unwrap_or(0)),
        ];
        Variant {
            source: &SOURCE,
            key: self.key(tile),
            label: format!("{self:?}, {} tokens", tile.tokens),
            before: numbers.map(|(name, number)| format!("#define {name} {number}\n")).concat(),
            after: "",
            generation: true,
            shared: vec![("gemm_hopper", self.shared(tile))],
        }
    }

    /// As `gemm_hopper.cu` has it.
    fn epilogue(self) -> usize {
        [self.adds, self.biased, self.gate.is_some(), self.keeps]
            .iter()
            .rev()
            .fold(0, |all, on| all * 2 + usize::from(*on))
    }

    fn key(self, tile: &Tile) -> usize {
        ((tile.tokens * 2 + usize::from(self.weight_rows)) * 16 + self.epilogue()) * 16 + self.gate.unwrap_or(0)
    }

    fn chunk(self, tile: &Tile) -> usize {
        if self.keeps { tile.kept_chunk } else { tile.chunk }
    }

    /// Features of D that a warp group has.
    fn columns(self) -> usize {
        if self.gate.is_some() { 32 } else { 64 }
    }

    /// Bytes of shared memory: stages, two buffers of results for each warp group, and up to an aligned address.
    fn shared(self, tile: &Tile) -> usize {
        let planes = if self.keeps { 3 } else { 1 };
        STAGES * (FEATURES + tile.tokens) * DEPTH * 2 + 4 * self.chunk(tile) * self.columns() * 2 * planes + 1024
    }

    /// The tile that takes the least time: rounds of all multiprocessors, two of which share tokens.
    fn tile(self, tokens: usize, features: usize, multiprocessors: usize) -> &'static Tile {
        let pairs = features.div_ceil(4 * self.columns());
        let cost = |tile: &&Tile| {
            (tokens.div_ceil(tile.tokens) * pairs).div_ceil((multiprocessors / 2).max(1)) * (tile.tokens + TILE_COST)
        };
        TILES.iter().min_by_key(cost).unwrap_or(&TILES[0])
    }

    /// Whether its kernels were compiled.
    pub(super) fn is_loaded(self, gpu: &Gpu, kernels: &Kernels) -> bool {
        !self.variants(gpu.capability).is_empty() && kernels.variant("gemm_hopper", self.key(&TILES[0])).is_ok()
    }

    /// Starts a product of sizes `[m, n, k]`.
    pub(super) fn launch(self, gpu: &Gpu, kernels: &Kernels, [m, n, k]: [usize; 3], on: Operands) -> Result<()> {
        let weights = match self.weight_rows {
            true => TensorMap::new(on.b, [n, k], [FEATURES, 64])?,
            false => TensorMap::new(on.b, [k, n], [DEPTH, 64])?,
        };
        let c = if self.adds { on.c } else { on.d };
        self.start(gpu, kernels, [m, n, k], (on.a, weights), [(c, n), (on.d, n)], on.bias, 0.0)
    }

    fn start(
        self,
        gpu: &Gpu,
        kernels: &Kernels,
        [m, n, k]: [usize; 3],
        (x, weights): (View, TensorMap),
        stored: [(View, usize); 2],
        bias: Address,
        limit: f32,
    ) -> Result<()> {
        let tile = self.tile(m, n, gpu.multiprocessors);
        let (kernel, shared) = kernels.variant("gemm_hopper", self.key(tile))?;
        let x = TensorMap::new(x, [m, k], [tile.tokens / 2, DEPTH])?;
        let [c, d] = stored.map(|(view, width)| TensorMap::new(view, [m, width], [self.chunk(tile), self.columns()]));
        let args = Args::default().with(x).with(weights).with(c?).with(d?).with(bias);
        let args = args.with(m as i32).with(n as i32).with(k as i32).with(BAND as i32).with(limit);
        let block = [(FEATURES * 2 + 128) as u32, 1, 1];
        gpu.launch(kernel, [gpu.multiprocessors / 2 * 2, 1, 1], block, shared, args)
    }
}

impl Gated {
    /// Whether a kernel computes it: stores of gate must not reach into up.
    pub(crate) fn is_supported(width: usize) -> bool {
        width.is_multiple_of(32)
    }

    fn gemm(self, keeps: bool) -> Gemm {
        Gemm { weight_rows: true, adds: false, biased: false, gate: Some(self.activation), keeps }
    }

    /// Its kernels on a card, with gate and up stored and without.
    pub(crate) fn variants(self, capability: u32) -> Vec<Variant> {
        [false, true].iter().flat_map(|keeps| self.gemm(*keeps).variants(capability)).collect()
    }

    /// Starts `h = act(x · Gᵀ) · (x · Uᵀ)` for `m` rows of `k` columns; with `both`, leaves gate and up there too, side by side.
    pub(crate) fn launch(
        self,
        gpu: &Gpu,
        kernels: &Kernels,
        [m, k]: [usize; 2],
        [x, weights]: [View; 2],
        both: Option<View>,
        h: View,
    ) -> Result<()> {
        let (width, ld) = (self.width, weights.ld as u64 * 2);
        // Eight rows of gate, then eight of up.
        let sizes = [k as u64, 8, 2, width as u64 / 8];
        let weights = TensorMap::encode(weights.at, &sizes, &[ld, width as u64 * ld, 8 * ld], &[64, 8, 2, 8])?;
        let stored = [both.map_or((h, width), |both| (both, 2 * width)), (h, width)];
        self.gemm(both.is_some()).start(gpu, kernels, [m, width, k], (x, weights), stored, 0, self.limit)
    }
}

/// Whether a card's matmuls compute gated activations.
pub(crate) fn computes_gates(capability: u32) -> bool {
    capability == 90
}

/// Tells kernels of one build from those of another, as far as they round otherwise.
pub(super) fn version() -> String {
    cache::name(&[SOURCE.text.as_bytes()])
}

/// Those that most models need.
fn all_variants(capability: u32) -> Vec<Variant> {
    let plain = Gemm { weight_rows: true, adds: false, biased: false, gate: None, keeps: false };
    let gated = Gated { activation: 0, limit: 0.0, width: 0 };
    let all = [
        plain,
        Gemm { biased: true, ..plain },
        Gemm { adds: true, ..plain },
        Gemm { adds: true, biased: true, ..plain },
        Gemm { weight_rows: false, ..plain },
        Gemm { weight_rows: false, adds: true, ..plain },
    ];
    all.iter().flat_map(|gemm| gemm.variants(capability)).chain(gated.variants(capability)).collect()
}
