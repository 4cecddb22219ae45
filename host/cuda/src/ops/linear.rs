//! `y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ`.
//!
//! Linears that read the same value are one matmul with stacked weights `[[W, s·B], [A, 0]]`: `u = x·Aᵀ` lies behind x's columns,
//! and `[x, u] · [W, s·B]ᵀ` is the adapted output of all of them. Backward, `v = dy·s·B` lies behind dy's columns, and
//! `[dy, v] · [W; A]` is the gradient of x. A sum after a linear is the matmul's own addition; a gated activation of two is computed
//! where their matmul ends. Where W is kept in nf4, the steps that need it make the stack first. Where it is kept in e4m3, matmuls read x
//! and dy as e4m3 too, which a step before makes of them, and end with LoRA's part, of u and v. A linear whose width is no multiple of 8 is
//! alone, with rows of zeros behind its own.

use dpo_plugin_api::graph::Node;

use super::activation::Activation;
use super::dequantize::{self, dequantized};
use super::glu::Glu;
use super::lora::{Lora, Matrices};
use super::{
    BackwardReads, Cost, CudaOp, Epilogue, Execute, Fp8, Gated, Gemm, Launch, LoadedStack, Lowering, Matmul, Matrix,
    Member, NUMBERS, Operands, Recompute, SKINNY_ROWS, Slice, Stack, Step, Variant, View, whole,
};
use super::{fp8, nf4};
use dpo_core::error::{Error, Result};
use dpo_core::storage::Numbers;
use dpo_core::weights::{BlockId, is_quantized};

pub(super) const OP: CudaOp = CudaOp {
    prepare,
    backward_reads: BackwardReads { inputs: true, value: false },
    any_width: true,
    columns_behind: |nodes, index, rank| {
        (0..nodes.len())
            .filter(|other| same_input(&nodes[*other], &nodes[index]))
            .map(|other| rank(other, WEIGHT))
            .sum()
    },
    ..CudaOp::new("linear", forward, backward)
};

/// The role of a linear's matrix.
const WEIGHT: &str = "weight";

/// Numbers of a stack.
#[derive(Clone, Copy)]
struct Linears {
    stack: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
    bias: bool,
    /// Elements from row to row of what matmuls read.
    ld: usize,
    /// What W is kept as.
    numbers: Numbers,
}

struct LoraA(Linears);
struct Forward {
    own: Linears,
    /// Whether another value is added.
    adds: bool,
}
/// Two linears and the gated activation of what they make; that is left too where it is read.
struct GatedForward(Linears, Activation);
struct Backward {
    own: Linears,
    /// Whether there is a part of the gradient before.
    adds: bool,
    /// The gated activation that the input is: then the gradients are those of gate and up.
    gated: Option<Activation>,
}

fn same_input(a: &Node, b: &Node) -> bool {
    a.op == b.op && a.inputs == b.inputs
}

/// Whether zeros lie behind what it makes.
fn is_filled(node: &Node) -> bool {
    whole(node.width) > node.width
}

fn prepare(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let (node, rank) = (&l.nodes[index], l.rank(index, WEIGHT));
    let numbers = l.numbers();
    if numbers == Numbers::F32 {
        return Err(Error::input(format!("linears kept as {numbers:?} have no CUDA kernel")));
    }
    let Some([_, inputs]) = node.weight("weight").map(|w| w.shape.as_slice()) else {
        return Err(Error::run("a linear without its matrix"));
    };
    let (inputs, nodes) = (*inputs, l.nodes);
    let stacks = &mut l.program.stacks;
    let quantized = node.weight("weight").is_some_and(|weight| is_quantized(numbers, BlockId::Layer(0), node, weight));
    let numbers = if quantized { numbers } else { NUMBERS };
    let read_as = if numbers == Numbers::Fp8 { numbers } else { NUMBERS };
    let joins = |other: &Node| same_input(other, node) && !is_filled(other) && !is_filled(node);
    let known = stacks.iter().position(|s| joins(&nodes[s.members[0].node]) && s.numbers == numbers);
    let at = known.unwrap_or_else(|| {
        stacks.push(Stack { read_as, ..Stack::new(numbers, inputs) });
        stacks.len() - 1
    });
    let stack = &mut stacks[at];
    let (role, column, rank_column) = (WEIGHT, stack.outputs, stack.rank);
    stack.members.push(Member { node: index, role, column, rank_column, width: node.width });
    stack.outputs += whole(node.width);
    stack.rank += rank;
    stack.bias |= node.weight("bias").is_some();
    let rank = stack.rank;
    l.claim_behind(node.inputs[0], rank);
    l.claim_behind_gradient(index + 1);
    Ok(())
}

/// The stack of a linear, where that is its first member: the others are computed with it.
fn first_of(l: &Lowering<'_>, index: usize) -> Result<Option<(Linears, Vec<usize>)>> {
    let (at, stack) = l.stack(index)?;
    let members: Vec<usize> = stack.members.iter().map(|m| m.node).collect();
    let Stack { inputs, outputs, rank, bias, numbers, .. } = *stack;
    let own = Linears { stack: at, inputs, outputs, rank, bias, ld: stack.ld(), numbers };
    Ok((members[0] == index).then_some((own, members)))
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some((own, members)) = first_of(l, index)? else { return Ok(()) };
    let x = l.home(l.nodes[index].inputs[0])?;
    if !own.inputs.is_multiple_of(8) {
        return Err(Error::input(format!("a linear reads {} columns; CUDA needs a multiple of 8", own.inputs))
            .help("train with --device cpu"));
    }
    // What lies behind x may be the LoRA columns of a stack before, of other numbers or of a width that is no multiple of 8.
    let (node, nodes) = (&l.nodes[index], l.nodes);
    let reads_x = |s: &Stack| s.rank > 0 && same_input(&nodes[s.members[0].node], node);
    let taken = l.program.stacks[..own.stack].iter().any(reads_x);
    let x = if taken { l.copy_with_behind(x, own.rank)? } else { l.with_behind(x, own.rank)? };
    let lora = (own.rank > 0).then(|| Step::new("LoRA A", [x], [x.behind(own.rank)], LoraA(own)));
    if let Some((glu, activation)) = gated(l, &own, &members)? {
        let both = l.place_together(&members, own.rank);
        l.compute_with(glu, index);
        let h = l.place(glu);
        l.leave(index, vec![x]);
        lora.into_iter().try_for_each(|step| l.push(step))?;
        let [gate, up] = [0, activation.width].map(|column| both.part(column, activation.width));
        let step = Step::new("matmul", own.operands(l, x)?, [both, h], GatedForward(own, activation));
        let step = step.optional(&[0]).or_cheaper(Step::new("glu", [gate, up], [h], Glu(activation, 1)));
        return l.push(step.costs(own.cost(), Recompute::Matmul));
    }
    let sum = l.epilogue(index, Epilogue::Sum).filter(|_| members.len() == 1);
    let (y, residual) = match sum {
        Some((add, other)) => {
            l.compute_with(add, index);
            (l.place(add), Some(l.home(other)?))
        }
        None if members.len() == 1 => (l.place(index), None),
        // Behind the outputs there is room for what lies behind their gradients.
        None => (l.place_together(&members, own.rank), None),
    };
    l.leave(index, vec![x]);
    lora.into_iter().try_for_each(|step| l.push(step))?;
    let mut reads = own.operands(l, x)?;
    reads.extend(residual);
    let run = Forward { own, adds: residual.is_some() };
    l.push(Step::new("matmul", reads, [y], run).costs(own.cost(), Recompute::Matmul))
}

/// The gated activation that the matmul of two linears, gate and then up, can compute.
fn gated(l: &Lowering<'_>, own: &Linears, members: &[usize]) -> Result<Option<(usize, Activation)>> {
    let [gate, up] = members else { return Ok(None) };
    let Some(glu) = l.epilogue_of_two([gate + 1, up + 1], Epilogue::Gated) else { return Ok(None) };
    let activation = Activation::of(&l.nodes[glu])?;
    if l.nodes[*gate].width < activation.width {
        return Ok(None);
    }
    Ok((l.gates().forward && !own.bias && Gated::is_supported(activation.width)).then_some((glu, activation)))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some((own, members)) = first_of(l, index)? else { return Ok(()) };
    let gradients: Vec<Slice> = members.iter().filter_map(|m| l.take_gradient(*m)).collect();
    if gradients.is_empty() {
        return Ok(());
    }
    if gradients.len() < members.len() {
        return Err(Error::input("a linear's output is not read, but that of another with the same input is"));
    }
    let dy = match (gradients.as_slice(), l.gradients_together(index + 1)) {
        ([only], _) => l.with_behind(*only, own.rank)?,
        (_, Some(all)) => all,
        _ => return Err(Error::run("linears with one input have no place for their gradients")),
    };
    let ([x], gated) = (l.left(index)?, gated_input(l, index, &members)?);
    let (last, dx, adds) = match gated {
        // Of gate and up, in their places.
        Some((glu, _)) => {
            let (gate, values) = (l.home(l.nodes[glu].inputs[0])?, &l.nodes[glu].inputs);
            l.differentiate(glu);
            l.reuse_places(values);
            for value in values {
                if l.write_gradient(*value).1.is_some() {
                    return Err(Error::run("gate or up is read by more than their activation"));
                }
            }
            let gradients = l.gradients_together(values[0]);
            let gradients = gradients.ok_or_else(|| Error::run("gate and up have no place for their gradients"))?;
            (Some(Slice { width: gradients.width, ..gate }), gradients, false)
        }
        None => {
            let (before, dx) = l.accumulate(l.nodes[index].inputs[0], Some(dy));
            (before, dx, before.is_some())
        }
    };
    // Without an adapter only dy is read.
    let mut reads = vec![dy];
    reads.extend((own.rank > 0).then(|| x.with(own.rank)));
    reads.extend(last);
    if own.is_fp8() {
        reads.push(fp8::quantized(l, dy, Some(own.stack))?);
    }
    let mut writes = vec![dx];
    writes.extend((own.rank > 0).then(|| dy.behind(own.rank)));
    let in_place = if own.rank > 0 { &[(0, 2)] } else { &[(0, 1)] };
    let run = Backward { own, adds, gated: gated.map(|(_, activation)| activation) };
    l.push(Step::new("matmul vjp", reads, writes, run).in_place(in_place).costs(own.cost(), Recompute::Matmul))
}

/// The gated activation that a linear alone reads, where its matmul can make the gradients of gate and up.
fn gated_input(l: &Lowering<'_>, index: usize, members: &[usize]) -> Result<Option<(usize, Activation)>> {
    let Some(glu) = l.nodes[index].inputs[0].checked_sub(1) else { return Ok(None) };
    if members.len() > 1 || !l.gates().backward || !l.is_gate_of(glu, index) {
        return Ok(None);
    }
    let activation = Activation::of(&l.nodes[glu])?;
    Ok(Gated::is_vjp_supported(activation.width).then_some((glu, activation)))
}

impl Linears {
    fn cost(&self) -> Cost {
        let all = (self.inputs + self.rank) * (self.outputs + self.rank);
        // Tensor cores multiply e4m3 twice as fast.
        Cost::Matmul(if self.is_fp8() { all / 2 } else { all })
    }

    fn is_fp8(&self) -> bool {
        self.numbers == Numbers::Fp8
    }

    /// What a matmul reads of x, with u behind it: both in one, or, in e4m3, codes and then u, where there is an adapter.
    fn operands(&self, l: &mut Lowering<'_>, x: Slice) -> Result<Vec<Slice>> {
        if !self.is_fp8() {
            return Ok(vec![x.with(self.rank)]);
        }
        let codes = fp8::quantized(l, x, None)?;
        Ok([codes].into_iter().chain((self.rank > 0).then(|| x.behind(self.rank))).collect())
    }

    /// How many those are.
    fn count(&self) -> usize {
        1 + usize::from(self.is_fp8() && self.rank > 0)
    }

    /// A product of W in e4m3 and of x's codes, with u behind.
    fn fp8(&self, on: &Launch<'_>, reads: &[View]) -> Option<Fp8> {
        let (stack, rank) = (self.stack(on), if on.adapted { self.rank } else { 0 });
        let Matrix::Fp8(w) = &stack.w else { return None };
        let u = reads.get(1).copied().unwrap_or(reads[0]);
        Some(Fp8 { x: reads[0], w: (w.codes, w.ld), scales: w.scales, u, l: stack.sb, rank })
    }

    /// One of its transpose and of dy's codes, which were multiplied by its scales, with v.
    fn fp8_vjp(&self, on: &Launch<'_>, codes: View, v: View) -> Result<Fp8> {
        let stack = self.stack(on);
        let Matrix::Fp8(w) = &stack.w else { return Err(Error::run("W is not in e4m3")) };
        let w = fp8::transposed(on, w, [self.outputs, self.inputs])?;
        Ok(Fp8 { x: codes, w, scales: 0, u: v, l: stack.a, rank: self.rank })
    }

    /// Of what a backward step reads, dy's codes, and what it reads whatever W is kept as.
    fn codes<'a, T>(&self, reads: &'a [T]) -> (Option<&'a T>, &'a [T]) {
        match reads {
            [reads @ .., codes] if self.is_fp8() => (Some(codes), reads),
            _ => (None, reads),
        }
    }

    /// A row of the product, of what the step reads of x.
    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], row: usize) -> Vec<f32> {
        let mut x = on.row(&reads[0], row);
        if self.is_fp8() {
            x = fp8::emulated::unpack(&x, self.inputs);
            x.extend((1..self.count()).flat_map(|u| on.row(&reads[u], row)));
        }
        let stack = on.stack(self.stack);
        (0..self.outputs).map(|o| dot(stack.row(o), &x)).collect()
    }

    fn lora(&self) -> Lora {
        Lora { inputs: self.inputs, outputs: self.outputs, rank: self.rank }
    }

    fn stack<'a>(&self, on: &'a Launch<'_>) -> &'a LoadedStack {
        &on.weights.stacks[self.stack]
    }

    /// `[[W, s·B], [A, 0]]` as matmuls read it, or W alone without the adapter. It is there until the next one is asked for.
    fn stacked(&self, on: &Launch<'_>) -> Result<View> {
        let stack = self.stack(on);
        let rank = if on.adapted { self.rank } else { 0 };
        dequantized(on, stack, (self.outputs, rank, 1), self.ld)
    }

    /// Kernels that make it.
    fn variants(&self) -> Option<Variant> {
        (!self.is_fp8()).then(|| dequantize::variant(self.numbers)).flatten()
    }
}

impl Execute for LoraA {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        if !on.adapted {
            return Ok(());
        }
        let (own, d) = (&self.0, writes[0]);
        let mut matmul = Matmul::new(on.rows, own.rank, own.inputs);
        matmul.b_transposed = true;
        let b = own.stack(on).a;
        on.matmul(matmul, Operands { a: reads[0], b, c: d, d, bias: 0 })
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let own = self.0;
        for row in 0..on.rows() {
            let x = on.row(&reads[0], row);
            let stack = on.stack(own.stack);
            let u: Vec<f32> = (0..own.rank).map(|r| dot(&stack.row(own.outputs + r)[..own.inputs], &x)).collect();
            on.write(&writes[0], row, &u);
        }
    }
}

impl Execute for Forward {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        self.gemm().variants(capability).into_iter().chain(self.own.variants()).collect()
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (own, stack, d) = (&self.own, self.own.stack(on), writes[0]);
        let rank = if on.adapted { own.rank } else { 0 };
        // A token of an answer.
        if let (1, Some(_), Matrix::Nf4(w)) = (on.rows, &on.cache, &stack.w) {
            let c = reads.get(1).copied().unwrap_or(View { at: 0, ld: 0 });
            return nf4::gemv(on, (stack, w), (own.outputs, rank), [reads[0], c, d]);
        }
        let mut matmul = Matmul::new(on.rows, own.outputs, own.inputs + rank);
        matmul.b_transposed = true;
        matmul.add = self.adds;
        matmul.bias = own.bias;
        let c = reads.get(own.count()).copied().unwrap_or(d);
        if let Some(product) = own.fp8(on, reads) {
            return product.launch(
                self.gemm(),
                on.for_matmuls(),
                [on.rows, own.outputs, own.inputs],
                [c, d],
                stack.bias,
            );
        }
        on.matmul(matmul, Operands { a: reads[0], b: own.stacked(on)?, c, d, bias: stack.bias })
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let own = self.own;
        for row in 0..on.rows() {
            let mut y = own.emulate(on, reads, row);
            let residual = reads.get(own.count()).map(|r| on.row(r, row));
            let bias = &on.stack(own.stack).bias;
            y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            y.iter_mut().zip(residual.iter().flatten()).for_each(|(y, add)| *y += add);
            on.write(&writes[0], row, &y);
        }
    }
}

impl Execute for GatedForward {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        self.1.gated().variants(self.0.is_fp8(), capability).into_iter().chain(self.0.variants()).collect()
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (own, stack) = (&self.0, self.0.stack(on));
        let rank = if on.adapted { own.rank } else { 0 };
        if let Some(product) = own.fp8(on, reads) {
            let (both, gated) = (writes[0].wanted(), self.1.gated());
            return product.launch_gated(gated, on.for_matmuls(), [on.rows, own.inputs], both, writes[1]);
        }
        let k = own.inputs + rank;
        // A token of an answer. A batch of one row that is trained is computed as it is again, with gate and up: with the same bits.
        if on.rows == 1 && on.cache.is_some() {
            match &stack.w {
                Matrix::Bf16(w) => return self.1.gated().start_gemv(on.for_matmuls(), k, [reads[0], *w], writes[1]),
                Matrix::Nf4(w) => return nf4::gemv_gated(on, (stack, w), (self.1, rank), [reads[0], writes[1]]),
                Matrix::Fp8(_) | Matrix::Mxfp4(_) => {}
            }
        }
        let (x, weights) = (reads[0], own.stacked(on)?);
        if on.rows <= SKINNY_ROWS && on.cache.is_some() {
            return self.1.gated().start_skinny(on.for_matmuls(), [on.rows, k], [x, weights], writes[1]);
        }
        self.1.gated().launch(on.for_matmuls(), [on.rows, k], [x, weights], writes[0].wanted(), writes[1])
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let (own, width) = (self.0, self.1.width);
        for row in 0..on.rows() {
            let both = own.emulate(on, reads, row);
            let h: Vec<f32> = (0..width).map(|i| self.1.at(both[i]).0 * both[width + i]).collect();
            on.write(&writes[0], row, &both);
            on.write(&writes[1], row, &h);
        }
    }
}

impl Forward {
    fn gemm(&self) -> Gemm {
        Gemm { adds: self.adds, biased: self.own.bias, fp8: self.own.is_fp8(), ..Gemm::PLAIN }
    }
}

impl Backward {
    fn gemm(&self) -> Gemm {
        Gemm { weight_rows: false, adds: self.adds, fp8: self.own.is_fp8(), ..Gemm::PLAIN }
    }
}

impl Execute for Backward {
    fn variants(&self, capability: u32) -> Vec<Variant> {
        let gemm = match self.gated {
            Some(activation) => activation.gated().vjp_variants(self.own.is_fp8(), capability),
            None => self.gemm().variants(capability),
        };
        gemm.into_iter().chain(self.own.lora().variant(capability)).chain(self.own.variants()).collect()
    }

    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let (own, stack) = (&self.own, self.own.stack(on));
        let (codes, reads) = own.codes(reads);
        let (dy, dx) = (reads[0], writes[0]);
        let last = if let [_, v] = writes {
            let (x, v) = (reads[1], *v);
            let (lora, sb) = (own.lora(), stack.sb);
            if lora.has_kernels(on.gpu.kernels) {
                lora.vjp(on, &Matrices { x, dy, sb, gradients: stack.gradients })?;
            } else {
                let matmul = Matmul::new(on.rows, own.rank, own.outputs);
                on.matmul(matmul, Operands { a: dy, b: sb, c: v, d: v, bias: 0 })?;
                let u = x.column(own.inputs);
                // The gradients of A and B.
                for (narrow, wide, width, to) in
                    [(v, x, own.inputs, stack.gradients[0]), (u, dy, own.outputs, stack.gradients[1])]
                {
                    let mut matmul = Matmul::new(own.rank, width, on.rows);
                    (matmul.a_transposed, matmul.wide, matmul.add) = (true, true, true);
                    let d = View { at: to, ld: width as i64 };
                    on.matmul(matmul, Operands { a: narrow, b: wide, c: d, d, bias: 0 })?;
                }
            }
            on.gpu.mark("LoRA vjp")?;
            reads.get(2)
        } else {
            reads.get(1)
        };
        if let Some(codes) = codes {
            let product = own.fp8_vjp(on, *codes, writes.get(1).copied().unwrap_or(dy))?;
            let (matmuls, c) = (on.for_matmuls(), last.copied().unwrap_or(dx));
            return match self.gated {
                Some(activation) => {
                    product.launch_gated_vjp(activation.gated(), matmuls, [on.rows, own.outputs], [c, dx])
                }
                None => product.launch(self.gemm(), matmuls, [on.rows, own.inputs, own.outputs], [c, dx], 0),
            };
        }
        let weights = own.stacked(on)?;
        if let (Some(activation), Some(both)) = (self.gated, last) {
            return activation.gated().launch_vjp(
                on.for_matmuls(),
                [on.rows, own.outputs + own.rank],
                [dy, weights],
                [*both, dx],
            );
        }
        let mut matmul = Matmul::new(on.rows, own.inputs, own.outputs + own.rank);
        matmul.add = self.adds;
        let c = last.copied().unwrap_or(dx);
        on.matmul(matmul, Operands { a: dy, b: weights, c, d: dx, bias: 0 })
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let own = self.own;
        let (codes, reads) = own.codes(reads);
        let last = if own.rank > 0 { reads.get(2) } else { reads.get(1) };
        for row in 0..on.rows() {
            let mut dy = on.row(&reads[0], row);
            let codes = codes.map(|codes| fp8::emulated::unpack(&on.row(codes, row), own.outputs));
            let x = if own.rank > 0 { on.row(&reads[1], row) } else { Vec::new() };
            let before = last.filter(|_| self.adds);
            let mut dx = before.map_or_else(|| vec![0.0; own.inputs], |b| on.row(b, row));
            let stack = on.stack(own.stack);
            let v: Vec<f32> =
                (0..own.rank).map(|r| (0..own.outputs).map(|o| dy[o] * stack.row(o)[own.inputs + r]).sum()).collect();
            for r in 0..own.rank {
                (0..own.inputs).for_each(|i| stack.gradients[0][r * own.inputs + i] += v[r] * x[i]);
                let u = x[own.inputs + r];
                (0..own.outputs).for_each(|o| stack.gradients[1][r * own.outputs + o] += u * dy[o]);
            }
            // Codes are of dy times the scales of W.
            if let Some(codes) = codes {
                dy = codes.iter().zip(&stack.scales).map(|(code, scale)| code / scale).collect();
            }
            dy.extend(&v);
            for (o, d) in dy.iter().enumerate() {
                dx.iter_mut().zip(stack.row(o)).for_each(|(dx, w)| *dx += d * w);
            }
            if let (Some(activation), Some(both)) = (self.gated, last) {
                let (both, width) = (on.row(both, row), own.inputs);
                let acts: Vec<(f32, f32)> = both[..width].iter().map(|gate| activation.at(*gate)).collect();
                let up = (0..width).map(|i| dx[i] * acts[i].0);
                let gate = (0..width).map(|i| dx[i] * both[width + i] * acts[i].1);
                dx = gate.chain(up).collect();
            }
            on.write(&writes[0], row, &dx);
            if let Some(behind) = writes.get(1) {
                on.write(behind, row, &v);
            }
        }
    }
}

#[cfg(test)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
