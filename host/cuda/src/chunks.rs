//! Long batches in chunks of rows (transformers' `chunk_size_feed_forward`): steps that do not mix rows run one after the other on a chunk
//! before the next one's turn, so that what only they read and write has room for a chunk alone.
//!
//! Every such step runs in chunks where a batch has more rows than one, whatever of it is saved or computed again: which rows are
//! computed at once follows from a run's packing and the batch.

use super::inputs::Rows;
use super::program::Step;
use dpo_core::error::Result;

/// Rows that chunks are a multiple of: buffers of so many rows begin at aligned places.
pub(super) const TILE: usize = 64;

/// Steps that run together on one chunk after the other: none mixes rows, and all run on the same. One that mixes rows is alone.
pub(super) fn chains(steps: &[Step]) -> impl Iterator<Item = &[Step]> {
    steps.chunk_by(|a, b| !a.mixes_rows && !b.mixes_rows && a.rows == b.rows)
}

/// Chunks of about equal size and of at most so many rows, a multiple of [`TILE`] or `usize::MAX`: where each begins, and its rows.
fn chunks(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let size = rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(TILE).max(TILE);
    (0..rows).step_by(size).map(move |first| (first, size.min(rows - first)))
}

/// Runs steps in chunks of at most so many of the `rows` that there are: each with its first row and how many it has.
pub(super) fn run(
    steps: &[Step],
    rows: impl Fn(Rows) -> usize,
    most: usize,
    mut start: impl FnMut(&Step, usize, usize) -> Result<()>,
) -> Result<()> {
    for chain in chains(steps) {
        let most = if chain[0].mixes_rows { usize::MAX } else { most };
        for (first, count) in chunks(rows(chain[0].rows), most) {
            chain.iter().try_for_each(|step| start(step, first, count))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::chunks;

    #[test]
    fn chunks_are_about_equal() {
        let of = |rows, most| chunks(rows, most).collect::<Vec<_>>();
        assert_eq!(of(4096, 4096), [(0, 4096)]);
        assert_eq!(of(4097, 4096), [(0, 2112), (2112, 1985)]);
        assert_eq!(of(30000, usize::MAX), [(0, 30000)]);
        assert!(of(0, 64).is_empty());
        for rows in (1..20000).step_by(37) {
            let all = of(rows, 2048);
            assert_eq!((all.iter().map(|c| c.1).sum::<usize>(), all.len()), (rows, rows.div_ceil(2048)), "{rows}");
            assert!(all.iter().all(|(first, count)| first.is_multiple_of(64) && *count <= 2048), "{all:?}");
        }
    }
}
