//! Rows of a table, one for each token id. The table may lie in host memory.

use super::{Args, CudaOp, Execute, Launch, Lowering, Source, Step, View};
use dpo_core::error::{Error, Result};

pub(super) static SOURCE: Source = Source::plain("embedding", include_str!("embedding.cu"), &["gather"]);

pub(super) const OP: CudaOp = CudaOp::new("embedding", forward, |_, _| Ok(()));

struct Gather {
    table: usize,
    width: usize,
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    // Token ids lie with the batch, not in a buffer.
    if l.nodes[index].inputs != [0] {
        return Err(Error::input("an embedding reads something else than token ids"));
    }
    l.program.tables.push(index);
    let run = Gather { table: l.program.tables.len() - 1, width: l.nodes[index].width };
    let y = l.place(index);
    l.push(Step::new("embedding", [], [y], run))
}

impl Execute for Gather {
    fn launch(&self, on: &Launch<'_>, _: &[View], writes: &[View]) -> Result<()> {
        let args = Args::default().with(on.weights.tables[self.table]).with(on.batch.ids).with(writes[0]);
        on.by_columns("gather", on.rows, self.width, args.with(on.rows as i32).with(self.width as i32))
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, _: &[super::Slice], writes: &[super::Slice]) {
        let (table, ids) = (on.table(self.table), on.batch().ids.clone());
        for (row, id) in ids.into_iter().enumerate() {
            on.write(&writes[0], row, &table[id as usize * self.width..][..self.width]);
        }
    }
}
