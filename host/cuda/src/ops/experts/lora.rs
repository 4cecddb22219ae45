//! LoRA of experts: `u` behind the rows that a matrix reads, `v` behind the gradient of those it makes, and the gradients of every A and B.

#[cfg(test)]
use super::emulated;
use super::{Args, Execute, Experts, Groups, Launch, Lowering, Slice, Step, Variant, View, rows_of};
use dpo_core::error::Result;

/// Columns of a block of `experts_lora_vjp`, and its threads.
const LORA_COLUMNS: usize = 256;
const LORA_THREADS: u32 = 512;

/// `u = x·Aᵀ` behind what a matrix reads.
struct LoraA(Experts, usize);
/// `v = dy·s·B` behind the gradient of what a matrix makes, and the gradients of A and B.
struct LoraVjp(Experts, usize);

impl Experts {
    /// Pushes what is computed behind the values that a matrix reads.
    pub(super) fn lora(&self, l: &mut Lowering<'_>, matrix: usize, [x, plan]: [Slice; 2]) -> Result<()> {
        if self.ranks[matrix] == 0 {
            return Ok(());
        }
        l.push(Step::new("LoRA A of experts", [x, plan], [x], LoraA(*self, matrix)).in_place(&[(0, 0)]))
    }

    /// The same behind the gradient of what it makes; and the gradients of A and B. What it makes counts as `routing` says, where that is given.
    pub(super) fn lora_vjp(
        &self,
        l: &mut Lowering<'_>,
        matrix: usize,
        [x, dy, plan]: [Slice; 3],
        routing: Option<Slice>,
    ) -> Result<()> {
        if self.ranks[matrix] == 0 {
            return Ok(());
        }
        let reads: Vec<Slice> = [x, dy, plan].into_iter().chain(routing).collect();
        l.push(Step::new("LoRA vjp of experts", reads, [dy], LoraVjp(*self, matrix)).in_place(&[(0, 1)]))
    }
}

impl Execute for LoraA {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        Groups::gemm(true).variants(capability)
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        if !on.adapted {
            return Ok(());
        }
        let LoraA(own, matrix) = self;
        let (stack, [width, _], [ld, _]) = (own.stack(on, *matrix), own.sizes(*matrix, false), own.lds(*matrix));
        let views = [rows_of(reads[0], ld), stack.a, rows_of(writes[0], ld).column(width)];
        own.start(on, (reads[1], stack.steps[0]), true, [width, own.ranks[*matrix]], views)
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let LoraA(own, matrix) = self;
        let ([width, makes], [ld, _], rank) = (own.sizes(*matrix, false), own.lds(*matrix), own.ranks[*matrix]);
        for token in 0..on.rows() {
            let (mut x, plan) = (on.row(&reads[0], token), on.row(&reads[1], token));
            let stack = on.stack(own.stacks[*matrix]);
            for (at, expert) in emulated::rows(own, &plan) {
                let (values, u) = x[at * ld..][..ld].split_at_mut(width);
                for (r, u) in u.iter_mut().enumerate() {
                    let a = stack.row(expert * (makes + rank) + makes + r);
                    *u = values.iter().zip(a).map(|(x, a)| x * a).sum();
                }
            }
            on.write(&writes[0], token, &x);
        }
    }
}

impl Execute for LoraVjp {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        Groups::gemm(false).variants(capability)
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let LoraVjp(own, matrix) = self;
        let (stack, [inputs, outputs], rank) = (own.stack(on, *matrix), own.sizes(*matrix, false), own.ranks[*matrix]);
        let ([x_ld, dy_ld], plan) = (own.lds(*matrix), reads[2]);
        let (x, dy) = (rows_of(reads[0], x_ld), rows_of(writes[0], dy_ld));
        let (u, v) = (x.column(inputs), dy.column(outputs));
        own.start(on, (plan, stack.steps[1]), false, [outputs, rank], [dy, stack.sb, v])?;
        on.gpu.mark("LoRA v of experts")?;
        let routing = reads.get(3).copied().unwrap_or(View { at: 0, ld: 0 });
        for (narrow, wide, width, to) in [(v, x, inputs, stack.gradients[0]), (u, dy, outputs, stack.gradients[1])] {
            let args = Args::default().with(narrow).with(wide).with(plan.at).with(routing).with(to);
            let args = own.sized(on, args).with(width as i32).with(rank as i32);
            let grid = [width.div_ceil(LORA_COLUMNS), own.count, rank / 8];
            on.gpu.launch(on.kernels.get("experts_lora_vjp")?, grid, [LORA_THREADS, 1, 1], 0, args)?;
        }
        Ok(())
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let LoraVjp(own, matrix) = self;
        let ([inputs, outputs], [x_ld, dy_ld], rank) =
            (own.sizes(*matrix, false), own.lds(*matrix), own.ranks[*matrix]);
        for token in 0..on.rows() {
            let (x, mut dy, plan) = (on.row(&reads[0], token), on.row(&reads[1], token), on.row(&reads[2], token));
            let routing = reads.get(3).map(|routing| on.row(routing, token));
            let stack = on.stack(own.stacks[*matrix]);
            for (at, expert) in emulated::rows(own, &plan) {
                let weight = routing.as_ref().map_or(1.0, |routing| routing[expert]);
                let ((x, u), (dy, v)) =
                    (x[at * x_ld..][..x_ld].split_at(inputs), dy[at * dy_ld..][..dy_ld].split_at_mut(outputs));
                for r in 0..rank {
                    let sb = |o: usize| stack.row(expert * (outputs + rank) + o)[inputs + r];
                    v[r] = (0..outputs).map(|o| dy[o] * sb(o)).sum();
                    let [a, b] = &mut stack.gradients;
                    let (a, b) = (&mut a[(expert * rank + r) * inputs..], &mut b[(expert * rank + r) * outputs..]);
                    a.iter_mut().zip(x).for_each(|(a, x)| *a += weight * v[r] * x);
                    b.iter_mut().zip(&*dy).for_each(|(b, dy)| *b += weight * u[r] * dy);
                }
            }
            on.write(&writes[0], token, &dy);
        }
    }
}
