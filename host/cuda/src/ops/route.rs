//! Which experts a token is sent to, and what each of them counts; the choice is made anew in the backward pass. A router with an auxiliary
//! loss counts what it does in the forward pass, and adds the loss's gradient in the backward pass.

use dpo_plugin_api::graph::Node;
use serde_json::Value;

#[cfg(test)]
use super::Slice;
use super::{
    Args, Argument, BackwardReads, CudaOp, Execute, Groups, Launch, Lowering, Source, Step, View, count, number, whole,
};
use crate::gpu::Address;
use crate::inputs::ROUTER_PARTS;
use dpo_core::aux_loss::is_balanced;
use dpo_core::error::{Error, Result};

pub(super) static SOURCE: Source =
    Source::plain("route", include_str!("route.cu"), &["route", "route_vjp", "route_load", "route_load_sum"]);

pub(super) const OP: CudaOp = CudaOp {
    backward_reads: BackwardReads { inputs: true, value: false },
    any_width: true,
    ..CudaOp::new("route", forward, backward)
};

/// In the order in which `route.cu` counts them.
const SCORINGS: &[&str] = &["softmax", "sigmoid", "softmax_of_chosen"];

/// Groups that `route.cu` has room for.
const GROUPS: usize = 64;

/// Warps of a block: a token each.
const WARPS: usize = 4;

/// `struct Route` of `route.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Shape {
    experts: i32,
    columns: i32,
    top_k: i32,
    scoring: i32,
    normalizes: i32,
    groups: i32,
    top_groups: i32,
    sums_two: i32,
    eps: f32,
    scale: f32,
}

// SAFETY: ten numbers of four bytes.
unsafe impl Argument for Shape {}

#[derive(Clone, Copy)]
struct Route {
    shape: Shape,
    /// Vectors in f32: the bias of the choice, factors of experts.
    vectors: [Option<usize>; 2],
    /// Whether it has an auxiliary loss.
    balanced: bool,
}

struct Vjp(Route);

impl Route {
    fn of(l: &mut Lowering<'_>, index: usize) -> Result<Route> {
        let node = &l.nodes[index];
        let text = |name: &str| node.attrs.get(name).and_then(Value::as_str).unwrap_or_default();
        let or = |name: &str, otherwise: f64| if has(node, name) { number(node, name) } else { otherwise };
        let scoring = SCORINGS.iter().position(|scoring| *scoring == text("scoring"));
        let scoring =
            scoring.ok_or_else(|| Error::input(format!("scoring '{}' has no CUDA kernel", text("scoring"))))?;
        let groups = if has(node, "groups") { count(node, "groups") } else { 1 };
        if node.width > Groups::MOST || groups > GROUPS {
            let most = Groups::MOST;
            let what = format!("{} experts in {groups} groups; CUDA has room for {most} in {GROUPS}", node.width);
            return Err(Error::input(what).help("train with --device cpu"));
        }
        let shape = Shape {
            experts: node.width as i32,
            columns: whole(node.width) as i32,
            top_k: count(node, "top_k") as i32,
            scoring: scoring as i32,
            normalizes: has(node, "normalize").into(),
            groups: groups as i32,
            top_groups: if has(node, "groups") { count(node, "top_groups") as i32 } else { 1 },
            sums_two: (text("group_score") == "top2_sum").into(),
            eps: or("normalize", 0.0) as f32,
            scale: or("scale", 1.0) as f32,
        };
        let vectors = [l.wide_vector(index, "selection_bias")?, l.wide_vector(index, "expert_scale")?];
        Ok(Route { shape, vectors, balanced: is_balanced(node) })
    }

    /// As the auxiliary loss sees it: a softmax, of which the best ones are chosen, whatever the router makes of its logits.
    fn plain(&self) -> Shape {
        Shape { scoring: 0, normalizes: 0, groups: 1, top_groups: 1, ..self.shape }
    }

    /// Adds to the batch's load what it does with the rows at hand: every block leaves its part, then these are added in their order.
    fn count(&self, on: &Launch<'_>, logits: View) -> Result<()> {
        let args = Args::default().with(logits).with(self.plain()).with(self.texts(on));
        let args = args.with(on.batch.router_parts).with(on.rows as i32);
        let block = [32 * WARPS as u32, 1, 1];
        on.gpu.launch(on.kernels.get("route_load")?, [ROUTER_PARTS, 1, 1], block, 0, args)?;
        let values = 2 * self.shape.experts as usize;
        let args = Args::default().with(on.batch.router_parts).with(ROUTER_PARTS as i32).with(values as i32);
        let grid = [values.div_ceil(block[0] as usize), 1, 1];
        on.gpu.launch(on.kernels.get("route_load_sum")?, grid, block, 0, args.with(on.batch.router_load))
    }

    /// Of the rows at hand in how many texts each is.
    fn texts(&self, on: &Launch<'_>) -> Address {
        on.batch.texts + on.first as u64 * 4
    }

    fn start(&self, on: &Launch<'_>, kernel: &str, views: &[View], more: &[Address]) -> Result<()> {
        let args = views.iter().fold(Args::default(), |args, view| args.with(*view)).with(self.shape);
        let at = |vector: Option<usize>| vector.map_or(0, |vector| on.weights.vectors[vector]);
        let args = self.vectors.iter().fold(args, |args, vector| args.with(at(*vector))).with(on.rows as i32);
        let args = more.iter().fold(args, |args, address| args.with(*address));
        let grid = [on.rows.div_ceil(WARPS), 1, 1];
        on.gpu.launch(on.kernels.get(kernel)?, grid, [32 * WARPS as u32, 1, 1], 0, args)
    }
}

fn has(node: &Node, name: &str) -> bool {
    node.attrs.contains_key(name)
}

fn forward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let ([logits], own) = (l.inputs(index)?, Route::of(l, index)?);
    let weights = l.place(index);
    l.push(Step::new("route", [logits], [weights], own))
}

fn backward(l: &mut Lowering<'_>, index: usize) -> Result<()> {
    let Some(dy) = l.take_gradient(index) else { return Ok(()) };
    let ([logits], own) = (l.inputs(index)?, Route::of(l, index)?);
    let (dx, sum) = l.write_gradient(l.nodes[index].inputs[0]);
    l.push(Step::new("route vjp", [logits, dy], [dx], Vjp(own)))?;
    sum.map_or(Ok(()), |step| l.push(step))
}

impl Execute for Route {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        self.start(on, "route", &[reads[0], writes[0]], &[])?;
        match self.balanced && on.batch.router_load != 0 {
            true => self.count(on, reads[0]),
            false => Ok(()),
        }
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let vectors = emulated::vectors(self, on);
        on.each_row(reads, writes, |_, read, write| {
            let experts = self.shape.experts as usize;
            let of = emulated::choose(&self.shape, &read[0][..experts], &vectors[0]);
            write[0] = (0..experts).map(|e| of.counts(e) * self.shape.scale * vectors[1][e]).collect();
            write[0].resize(self.shape.columns as usize, 0.0);
        });
        for row in (0..on.rows()).filter(|_| self.balanced) {
            let logits = on.row(&reads[0], row);
            let of = emulated::plain(self, &logits);
            on.count_load(row, &of.scores, &of.chosen);
        }
    }
}

impl Execute for Vjp {
    fn launch(&self, on: &Launch<'_>, reads: &[View], writes: &[View]) -> Result<()> {
        let dprobs = if self.0.balanced { on.batch.router_dprobs } else { 0 };
        self.0.start(on, "route_vjp", &[reads[0], reads[1], writes[0]], &[dprobs, self.0.texts(on)])
    }

    #[cfg(test)]
    fn emulate(&self, on: &mut super::Emulation<'_>, reads: &[Slice], writes: &[Slice]) {
        let (shape, vectors) = (self.0.shape, emulated::vectors(&self.0, on));
        let (dprobs, texts) = (on.router_dprobs(), on.batch().layout.texts.clone());
        on.each_row(reads, writes, |row, read, write| {
            let of = emulated::choose(&shape, &read[0][..shape.experts as usize], &vectors[0]);
            let mut d: Vec<f32> = (0..shape.experts as usize)
                .map(|e| if of.chosen[e] { read[1][e] * shape.scale * vectors[1][e] / of.sum } else { 0.0 })
                .collect();
            let mean = |d: &[f32]| d.iter().zip(&of.scores).map(|(d, s)| d * s).sum::<f32>();
            if shape.normalizes == 1 {
                let own = mean(&d) / of.sum;
                d.iter_mut().zip(&of.chosen).filter(|(_, chosen)| **chosen).for_each(|(d, _)| *d -= own);
            }
            let own = mean(&d);
            let by_logit = |(d, s): (&f32, &f32)| if shape.scoring == 1 { d * s * (1.0 - s) } else { s * (d - own) };
            write[0] = d.iter().zip(&of.scores).map(by_logit).collect();
            if self.0.balanced && !dprobs.is_empty() {
                let probs = emulated::plain(&self.0, &read[0]).scores;
                let mean: f32 = probs.iter().zip(&dprobs).map(|(prob, dprob)| prob * dprob).sum();
                let of_loss = probs.iter().zip(&dprobs).map(|(prob, dprob)| texts[row] as f32 * prob * (dprob - mean));
                write[0].iter_mut().zip(of_loss).for_each(|(dx, of_loss)| *dx += of_loss);
            }
            write[0].resize(shape.columns as usize, 0.0);
        });
    }
}

#[cfg(test)]
mod emulated {
    use super::super::Emulation;
    use super::{Route, Shape};

    pub(super) struct Scores {
        pub scores: Vec<f32>,
        pub chosen: Vec<bool>,
        pub sum: f32,
    }

    impl Scores {
        pub(super) fn counts(&self, expert: usize) -> f32 {
            if self.chosen[expert] { self.scores[expert] / self.sum } else { 0.0 }
        }
    }

    /// The bias of the choice and factors of experts.
    pub(super) fn vectors(own: &Route, on: &Emulation<'_>) -> [Vec<f32>; 2] {
        let otherwise = |value: f32| vec![value; own.shape.experts as usize];
        let of = |vector: Option<usize>, value| vector.map_or(otherwise(value), |vector| on.vector(vector));
        [of(own.vectors[0], 0.0), of(own.vectors[1], 1.0)]
    }

    /// Of a row's columns, as the auxiliary loss sees them.
    pub(super) fn plain(own: &Route, columns: &[f32]) -> Scores {
        let experts = own.shape.experts as usize;
        choose(&own.plain(), &columns[..experts], &vec![0.0; experts])
    }

    pub(super) fn choose(shape: &Shape, logits: &[f32], bias: &[f32]) -> Scores {
        let top = logits.iter().copied().fold(f32::MIN, f32::max);
        let softmax = |of: &dyn Fn(usize) -> bool| {
            let raised = |e: usize| if of(e) { (logits[e] - top).exp() } else { 0.0 };
            let sum: f32 = (0..logits.len()).map(raised).sum();
            (0..logits.len()).map(|e| raised(e) / sum).collect::<Vec<f32>>()
        };
        let mut scores = match shape.scoring {
            0 => softmax(&|_| true),
            1 => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            _ => logits.to_vec(),
        };
        let mut values: Vec<f32> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
        let size = logits.len() / shape.groups as usize;
        let of_group = |group: &[f32]| {
            let best = best(group, 1 + shape.sums_two as usize);
            best.into_iter().map(|e| group[e]).sum::<f32>()
        };
        let taken = best(&values.chunks(size).map(of_group).collect::<Vec<f32>>(), shape.top_groups as usize);
        let others = values.chunks_mut(size).enumerate().filter(|(group, _)| !taken.contains(group));
        others.for_each(|(_, group)| group.fill(f32::NEG_INFINITY));
        let experts = best(&values, shape.top_k as usize);
        let chosen: Vec<bool> = (0..logits.len()).map(|e| experts.contains(&e)).collect();
        if shape.scoring == 2 {
            scores = softmax(&|e| chosen[e]);
        }
        let sum: f32 = experts.iter().map(|e| scores[*e]).sum();
        Scores { scores, chosen, sum: if shape.normalizes == 1 { sum + shape.eps } else { 1.0 } }
    }

    /// The places of the largest values.
    fn best(values: &[f32], count: usize) -> Vec<usize> {
        let mut places: Vec<usize> = (0..values.len()).collect();
        places.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
        places.truncate(count);
        places
    }
}
