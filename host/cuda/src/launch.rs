//! What a step is started with: the device, the weights of its block, the batch; and the shapes in which kernels are started.

use super::gpu::{Address, Args, Gpu, Memory, View};
use super::inputs::BatchAddresses;
use super::kernels::Kernels;
use super::matmul::{Matmul, Matmuls, On, Operands};
use super::weights::BlockWeights;
use dpo_core::error::{Error, Result};

/// Everything that a step runs on, but for its values.
#[derive(Clone, Copy)]
pub(crate) struct Launch<'a> {
    pub gpu: &'a Gpu,
    pub matmuls: &'a Matmuls,
    pub kernels: &'a Kernels,
    pub batch: &'a BatchAddresses,
    pub tables: &'a [LoadedTable],
    pub weights: &'a BlockWeights,
    /// Where a stack is made that is not kept as matmuls read it.
    pub dequantized: Address,
    pub rows: usize,
    /// The first of them among the rows of the batch.
    pub first: usize,
    /// Whether the adapter takes part: without it a linear is its frozen weights alone.
    pub adapted: bool,
    /// Where sequences are continued: keys and values of the tokens before.
    pub cache: Option<KvCache>,
}

/// Keys and values of the tokens before, in rows with room for the new ones behind them; and states behind the tokens before. Several new
/// tokens are all of one sequence, whose rows these are; or each is of a sequence of its own, as it is where there is one.
#[derive(Clone, Copy)]
pub(crate) struct KvCache {
    /// Tokens before; of several sequences, those of the longest.
    pub tokens: usize,
    /// Whether each new token is of a sequence of its own: then the rows are those of the first place.
    pub each: bool,
    pub keys: View,
    pub values: View,
    /// Elements from one place to the next.
    pub apart: i64,
    /// Of each row its place, and the tokens before it: [`SEQUENCE`](Self::SEQUENCE) bytes.
    pub sequences: Address,
    /// What the layer's ops carry from token to token, of one sequence.
    pub carried: Address,
    /// [`SCRATCH`](Self::SCRATCH) bytes, zero before the first pass.
    pub scratch: Address,
}

/// Numbers of every token that an op's steps read in every layer, computed once for a batch: cosines and sines of a rope.
#[derive(Clone)]
pub(crate) struct BatchTable {
    /// What it is computed from; equal ones are one table.
    pub constants: Vec<f32>,
    pub numbers: [f32; 3],
    /// Bytes a token.
    pub bytes: usize,
    /// Computes it from its constants on the GPU.
    pub fill: fn(&Launch<'_>, &BatchTable, Address, Address) -> Result<()>,
}

/// A table of every batch, on the GPU.
pub(crate) struct LoadedTable {
    table: BatchTable,
    constants: Memory,
    /// Where it begins among the tables, in bytes a token.
    offset: usize,
}

impl KvCache {
    /// Bytes for the parts of an attention, which are joined.
    pub(crate) const SCRATCH: usize = 16 << 20;

    /// Bytes that tell of a row's sequence.
    pub(crate) const SEQUENCE: usize = 8;

    /// The view whose row of a sequence's token is that token's: it begins as many rows before the new ones as there are old ones.
    pub(crate) fn of_sequence(&self, new: View) -> View {
        View { at: new.at.wrapping_sub(self.tokens as u64 * new.ld as u64 * 2), ld: new.ld }
    }
}

impl BatchTable {
    fn same(&self, other: &BatchTable) -> bool {
        self.constants == other.constants && self.numbers == other.numbers
    }

    /// Every table once.
    pub(super) fn distinct(tables: impl Iterator<Item = BatchTable>) -> Vec<BatchTable> {
        tables.fold(Vec::new(), |mut all, table| {
            if !all.iter().any(|t: &BatchTable| t.same(&table)) {
                all.push(table);
            }
            all
        })
    }
}

impl LoadedTable {
    /// Sends the constants of tables, and gives the tables places one after the other.
    pub(super) fn load(gpu: &Gpu, tables: Vec<BatchTable>) -> Result<Vec<LoadedTable>> {
        let mut offset = 0;
        let load = |table: BatchTable| {
            let constants = gpu.allocate(table.constants.len() * 4)?;
            gpu.upload(&table.constants, constants.address)?;
            gpu.finish()?;
            offset += table.bytes;
            Ok(LoadedTable { offset: offset - table.bytes, table, constants })
        };
        tables.into_iter().map(load).collect()
    }

    /// Bytes a token.
    pub(super) fn bytes(&self) -> usize {
        self.table.bytes
    }
}

impl Launch<'_> {
    /// Starts a matmul.
    pub(crate) fn matmul(&self, matmul: Matmul, on: Operands) -> Result<()> {
        self.matmuls.run(self.for_matmuls(), matmul, on)
    }

    /// What matmuls are started with.
    pub(crate) fn for_matmuls(&self) -> On<'_> {
        On { gpu: self.gpu, kernels: self.kernels, matmuls: self.matmuls }
    }

    /// Computes the batch's tables.
    pub(super) fn fill_tables(&self) -> Result<()> {
        let fill = |t: &LoadedTable| (t.table.fill)(self, &t.table, t.constants.address, self.place(t));
        self.tables.iter().try_for_each(fill)
    }

    /// Where the numbers of its rows lie in the batch's table.
    pub(crate) fn table(&self, table: &BatchTable) -> Result<Address> {
        let found = self.tables.iter().find(|t| t.table.same(table));
        let found = found.ok_or_else(|| Error::run("a batch's table was not made"))?;
        Ok(self.place(found) + (self.first * table.bytes) as u64)
    }

    fn place(&self, table: &LoadedTable) -> Address {
        self.batch.tables + (table.offset * self.batch.tokens) as u64
    }

    /// A kernel with some lanes for every run of `dim` columns; their number is its last argument. A run has a warp at most, or a block
    /// where that leaves no multiprocessor more than one.
    pub(crate) fn by_rows(&self, kernel: &str, rows: usize, dim: usize, args: Args) -> Result<()> {
        let most = if rows <= self.gpu.multiprocessors { 256 } else { 32 };
        let lanes = (dim / 8).next_power_of_two().min(most);
        let grid = [rows.div_ceil(256 / lanes), 1, 1];
        self.gpu.launch(self.kernels.get(kernel)?, grid, [32, 8, 1], 0, args.with(lanes as i32))
    }

    /// A kernel with a thread for every eight columns, which finds its own by `place` of `common.cuh`: rows are no dimension of
    /// the grid, since only the first may have more than 65,535.
    pub(crate) fn by_columns(&self, kernel: &str, rows: usize, width: usize, args: Args) -> Result<()> {
        let threads = (width / 8).next_multiple_of(32).min(256);
        let grid = [(width / 8).div_ceil(threads) * rows, 1, 1];
        self.gpu.launch(self.kernels.get(kernel)?, grid, [threads as u32, 1, 1], 0, args)
    }
}
