//! A mixture of experts: `y = Σ routing[e] · down_e(activation(gate_e · x) · up_e · x)` over the experts that a token is sent to.
//!
//! The tokens of an expert are gathered and go through its matrices together. What experts make of a token is summed in their order, so
//! that no number of threads changes a sum. What is inside of an expert is computed again in the backward pass.

use std::borrow::Cow;

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::Node;
use rayon::prelude::*;

use super::activation::Activation;
use super::product::sum_of_products;
use super::real::Real;
use super::rows::{RowOp, over_rows, values};
use super::{Call, Gradients, Kernel, Lora, Op, add, count, flag, lora, number, product, weight};
use crate::error::{Error, Result};

pub(super) const OP: Op = Op { name: "experts", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

/// gpt-oss's factor in the sigmoid.
const ALPHA: f64 = 1.702;

/// From what the first matrix gives to what the second one reads.
enum Inner {
    /// Of an MLP without a gate.
    Plain(Activation),
    /// `activation(gate) · up`.
    Gated(Activation, Halves),
    /// `(up + 1) · gate · sigmoid(1.702 · gate)`, where the gate is at most the limit, up at most that far from 0.
    SwigluOai(f64, Halves),
}

/// Where gate and up are in a row.
#[derive(Clone, Copy)]
enum Halves {
    /// One behind the other.
    Split,
    /// In turn.
    Interleaved,
}

struct Forward<'a>(&'a Inner);
struct Vjp<'a>(&'a Inner);

impl Halves {
    /// The step from a column to the next one, and where up begins.
    fn places(self, inner: usize) -> (usize, usize) {
        match self {
            Halves::Split => (1, inner),
            Halves::Interleaved => (2, 1),
        }
    }

    fn gate<T: Real>(self, h: &[T], inner: usize) -> Cow<'_, [T]> {
        match self {
            Halves::Split => Cow::Borrowed(&h[..inner]),
            Halves::Interleaved => Cow::Owned(h.iter().copied().step_by(2).collect()),
        }
    }
}

impl Inner {
    fn of(node: &Node) -> Result<Inner> {
        let halves = if flag(node, "interleaved") { Halves::Interleaved } else { Halves::Split };
        if node.attrs.get("activation").is_some_and(|name| name == "swiglu_oai") {
            return Ok(Inner::SwigluOai(number(node, "limit"), halves));
        }
        let activation = Activation::of(node)?;
        Ok(if node.weight("up").is_some() { Inner::Plain(activation) } else { Inner::Gated(activation, halves) })
    }
}

/// Value and derivatives by gate and up of gpt-oss's activation; a clamp has a derivative up to its limit, that included.
#[inline(always)]
fn swiglu_oai<T: Real>(gate: T, up: T, limit: T) -> (T, T, T) {
    let (one, alpha) = (T::one(), T::from_f64(ALPHA));
    let (inside, between) = (gate <= limit, up.magnitude() <= limit);
    let gate = if inside { gate } else { limit };
    let up = if between {
        up
    } else if up < T::zero() {
        T::zero() - limit
    } else {
        limit
    };
    let sigmoid = (alpha * gate).sigmoid();
    let own = gate * sigmoid;
    let by_gate = (up + one) * sigmoid * (one + alpha * gate * (one - sigmoid));
    ((up + one) * own, if inside { by_gate } else { T::zero() }, if between { own } else { T::zero() })
}

impl RowOp<1, 1> for Forward<'_> {
    #[inline(always)]
    fn row<T: Real>(&self, [h]: [&[T]; 1], [a]: [&mut [T]; 1]) {
        let inner = a.len();
        match self.0 {
            Inner::Plain(activation) => activation.each(h, |at, (value, _)| a[at] = value),
            Inner::Gated(activation, halves) => {
                let (step, first) = halves.places(inner);
                let gate = halves.gate(h, inner);
                activation.each(&gate, |at, (value, _)| a[at] = value * h[first + at * step]);
            }
            Inner::SwigluOai(limit, halves) => {
                let (step, first) = halves.places(inner);
                let limit = T::from_f64(*limit);
                let of = |at: usize| swiglu_oai(h[at * step], h[first + at * step], limit).0;
                a.iter_mut().enumerate().for_each(|(at, a)| *a = of(at));
            }
        }
    }
}

impl RowOp<2, 1> for Vjp<'_> {
    #[inline(always)]
    fn row<T: Real>(&self, [h, da]: [&[T]; 2], [dh]: [&mut [T]; 1]) {
        let inner = da.len();
        match self.0 {
            Inner::Plain(activation) => activation.each(h, |at, (_, derivative)| dh[at] = da[at] * derivative),
            Inner::Gated(activation, halves) => {
                let (step, first) = halves.places(inner);
                let gate = halves.gate(h, inner);
                activation.each(&gate, |at, (value, derivative)| {
                    let up = first + at * step;
                    dh[at * step] = da[at] * h[up] * derivative;
                    dh[up] = da[at] * value;
                });
            }
            Inner::SwigluOai(limit, halves) => {
                let (step, first) = halves.places(inner);
                let limit = T::from_f64(*limit);
                for (at, da) in da.iter().enumerate() {
                    let (gate, up) = (at * step, first + at * step);
                    let (_, by_gate, by_up) = swiglu_oai(h[gate], h[up], limit);
                    (dh[gate], dh[up]) = (*da * by_gate, *da * by_up);
                }
            }
        }
    }
}

/// A matrix of every expert, its bias, its low-rank update.
struct Projections<'a> {
    weights: &'a Tensor,
    biases: Option<&'a Tensor>,
    lora: Option<&'a Lora>,
}

/// The matrix of one expert.
struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
    /// A, B and the factor on their product.
    lora: Option<(Tensor, Tensor, f64)>,
}

impl<'a> Projections<'a> {
    fn of(call: &'a Call<'_>, role: &str) -> Result<Projections<'a>> {
        let weights = weight(call, role).ok_or_else(|| Error::run(format!("experts run without their '{role}'")))?;
        Ok(Projections { weights, biases: weight(call, &format!("{role}_bias")), lora: lora(call, role) })
    }

    fn of_expert(&self, expert: usize) -> Result<Projection> {
        let bias = self.biases.map(|biases| biases.get(expert)).transpose()?;
        let own = |all: &Tensor| {
            let rows = all.dim(0)? / self.weights.dim(0)?.max(1);
            all.narrow(0, expert * rows, rows)
        };
        let lora = self.lora.map(|lora| Ok::<_, Error>((own(&lora.a)?, own(&lora.b)?, lora.scale))).transpose()?;
        Ok(Projection { weight: self.weights.get(expert)?, bias, lora })
    }

    /// Gradients by A and B of all experts from those of each; zero of one that no token is sent to.
    fn stacked(&self, parts: Vec<Option<[Tensor; 2]>>) -> Result<Option<Vec<Tensor>>> {
        let Some(lora) = self.lora else { return Ok(None) };
        let experts = parts.len().max(1);
        let zero = |all: &Tensor| Ok::<_, Error>(all.narrow(0, 0, all.dim(0)? / experts)?.zeros_like()?);
        let [none_a, none_b] = [zero(&lora.a)?, zero(&lora.b)?];
        let (a, b): (Vec<Tensor>, Vec<Tensor>) = parts
            .into_iter()
            .map(|part| part.map_or_else(|| (none_a.clone(), none_b.clone()), |[a, b]| (a, b)))
            .unzip();
        Ok(Some(vec![Tensor::cat(&a, 0)?, Tensor::cat(&b, 0)?]))
    }
}

impl Projection {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = product(x, &self.weight)?;
        if let Some((a, b, scale)) = &self.lora {
            y = add(&y, &sum_of_products(&[(&product(x, a)?, &b.t()?, *scale)])?)?;
        }
        match &self.bias {
            // Biases of all experts are a matrix, which an engine that answers keeps in bf16.
            Some(bias) => Ok(y.broadcast_add(&bias.to_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }

    /// The gradient of what it reads.
    fn pull(&self, dy: &Tensor) -> Result<Tensor> {
        match &self.lora {
            None => sum_of_products(&[(dy, &self.weight, 1.0)]),
            Some((a, b, scale)) => {
                let v = sum_of_products(&[(dy, b, *scale)])?;
                sum_of_products(&[(dy, &self.weight, 1.0), (&v, a, 1.0)])
            }
        }
    }

    /// The gradients of A and B: `scale · (dy · B)ᵀ · x` and `scale · dyᵀ · (x · Aᵀ)`.
    fn by_lora(&self, x: &Tensor, dy: &Tensor) -> Result<Option<[Tensor; 2]>> {
        let Some((a, b, scale)) = &self.lora else { return Ok(None) };
        let v = sum_of_products(&[(dy, b, *scale)])?;
        let u = sum_of_products(&[(x, &a.t()?, *scale)])?;
        Ok(Some([sum_of_products(&[(&v.t()?, x, 1.0)])?, sum_of_products(&[(&dy.t()?, &u, 1.0)])?]))
    }
}

/// The experts of a call, and which tokens each of them has.
struct Mixture<'a> {
    inner: Inner,
    into: Projections<'a>,
    down: Projections<'a>,
    /// Of every expert the rows of its tokens.
    rows: Vec<Vec<u32>>,
    /// Of every token what each expert counts, `[tokens, experts]`.
    routing: Vec<f64>,
}

/// The tokens of an expert.
struct Own {
    rows: Tensor,
    /// What the expert counts, `[rows, 1]`.
    routing: Tensor,
    x: Tensor,
}

impl<'a> Mixture<'a> {
    fn of(call: &'a Call<'_>) -> Result<Mixture<'a>> {
        let (tokens, experts) = call.inputs[1].dims2()?;
        let routing: Vec<f64> = call.inputs[1].to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
        let takes = |token: &u32, expert: usize| routing[*token as usize * experts + expert] != 0.0;
        let rows = (0..experts).map(|expert| (0..tokens as u32).filter(|token| takes(token, expert)).collect());
        let rows = rows.collect();
        let into = if call.node.weight("up").is_some() { "up" } else { "gate_up" };
        let (into, down) = (Projections::of(call, into)?, Projections::of(call, "down")?);
        Ok(Mixture { inner: Inner::of(call.node)?, into, down, rows, routing })
    }

    fn own(&self, expert: usize, x: &Tensor) -> Result<Option<Own>> {
        let rows = &self.rows[expert];
        if rows.is_empty() {
            return Ok(None);
        }
        let (count, experts) = (rows.len(), self.rows.len());
        let routing = rows.iter().map(|row| self.routing[*row as usize * experts + expert]).collect::<Vec<f64>>();
        let routing = Tensor::from_vec(routing, (count, 1), &Device::Cpu)?.to_dtype(x.dtype())?;
        let rows = Tensor::new(rows.as_slice(), &Device::Cpu)?;
        let x = x.index_select(&rows, 0)?;
        Ok(Some(Own { rows, routing, x }))
    }

    /// What goes into an expert's activation, and what comes out.
    fn inside(&self, into: &Projection, x: &Tensor) -> Result<[Tensor; 2]> {
        let h = into.forward(x)?;
        let [a] = over_rows(&Forward(&self.inner), [&h], [self.down.weights.dim(2)?])?;
        Ok([h, a])
    }

    /// `[rows, hidden]` of every expert, summed by token.
    fn summed(&self, parts: &[Option<Tensor>], like: &Tensor) -> Result<Tensor> {
        match like.dtype() {
            DType::F64 => self.summed_as::<f64>(parts, like.dims2()?),
            _ => self.summed_as::<f32>(parts, like.dims2()?),
        }
    }

    fn summed_as<T: Real>(&self, parts: &[Option<Tensor>], (tokens, width): (usize, usize)) -> Result<Tensor> {
        let mut places: Vec<Vec<(usize, usize)>> = vec![Vec::new(); tokens];
        for (expert, rows) in self.rows.iter().enumerate() {
            rows.iter().enumerate().for_each(|(at, row)| places[*row as usize].push((expert, at)));
        }
        let stored: Vec<_> = parts.iter().map(|part| part.as_ref().map(Tensor::storage_and_layout)).collect();
        let slices = stored.iter().map(|part| match part {
            Some((storage, layout)) => values::<T>(storage, layout),
            None => Ok(&[][..]),
        });
        let slices: Vec<&[T]> = slices.collect::<Result<_>>()?;
        let mut sums = vec![T::zero(); tokens * width];
        sums.par_chunks_mut(width.max(1)).zip(&places).for_each(|(sum, places)| {
            for (expert, at) in places {
                let part = &slices[*expert][at * width..][..width];
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += *part);
            }
        });
        Ok(Tensor::from_vec(sums, (tokens, width), &Device::Cpu)?)
    }
}

/// Numbers a token that experts hold beside what they read and make, in a backward pass: of each expert that it is sent to what goes in,
/// what is inside, and the gradients of both.
pub fn workspace(node: &Node) -> usize {
    let inside = node.weights.first().and_then(|w| w.shape.get(1)).copied().unwrap_or(0);
    let routing = 2 * node.weights.first().and_then(|w| w.shape.first()).copied().unwrap_or(0);
    count(node, "top_k") * (5 * node.width + 4 * inside) + routing
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let (x, mixture) = (call.inputs[0], Mixture::of(call)?);
    let of_expert = |expert: usize| -> Result<Option<Tensor>> {
        let Some(own) = mixture.own(expert, x)? else { return Ok(None) };
        let [_, a] = mixture.inside(&mixture.into.of_expert(expert)?, &own.x)?;
        let y = mixture.down.of_expert(expert)?.forward(&a)?;
        Ok(Some(y.broadcast_mul(&own.routing)?))
    };
    let parts = (0..mixture.rows.len()).into_par_iter().map(of_expert).collect::<Result<Vec<_>>>()?;
    mixture.summed(&parts, x)
}

/// Gradients of one expert: by what it reads, by the routing, by A and B of both matrices.
struct ByExpert {
    x: Tensor,
    routing: Tensor,
    loras: [Option<[Tensor; 2]>; 2],
}

/// With `g = dy · down_e`: `d routing = g · a + dy · bias`, `da = routing · g`, then through the activation and the first matrix.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (x, mixture) = (call.inputs[0], Mixture::of(call)?);
    let of_expert = |expert: usize| -> Result<Option<ByExpert>> {
        let Some(own) = mixture.own(expert, x)? else { return Ok(None) };
        let dy = dy.index_select(&own.rows, 0)?;
        let (into, down) = (mixture.into.of_expert(expert)?, mixture.down.of_expert(expert)?);
        let [h, a] = mixture.inside(&into, &own.x)?;
        let g = down.pull(&dy)?;
        let mut routing = (&g * &a)?.sum(1)?;
        if let Some(bias) = &down.bias {
            routing = (routing + dy.broadcast_mul(bias)?.sum(1)?)?;
        }
        let da = g.broadcast_mul(&own.routing)?;
        let [dh] = over_rows(&Vjp(&mixture.inner), [&h, &da], [h.dim(1)?])?;
        let loras = [into.by_lora(&own.x, &dh)?, down.by_lora(&a, &dy.broadcast_mul(&own.routing)?)?];
        Ok(Some(ByExpert { x: into.pull(&dh)?, routing, loras }))
    };
    let parts = (0..mixture.rows.len()).into_par_iter().map(of_expert).collect::<Result<Vec<_>>>()?;
    let (mut by_x, mut by_into, mut by_down) = (Vec::new(), Vec::new(), Vec::new());
    let mut by_routing = vec![0.0; mixture.routing.len()];
    for (expert, part) in parts.into_iter().enumerate() {
        let Some(ByExpert { x, routing, loras: [into, down] }) = part else {
            by_x.push(None);
            by_into.push(None);
            by_down.push(None);
            continue;
        };
        let routing: Vec<f64> = routing.to_dtype(DType::F64)?.to_vec1()?;
        let rows = mixture.rows[expert].iter().zip(routing);
        rows.for_each(|(row, value)| by_routing[*row as usize * mixture.rows.len() + expert] = value);
        by_x.push(Some(x));
        by_into.push(into);
        by_down.push(down);
    }
    let by_routing = Tensor::from_vec(by_routing, call.inputs[1].shape(), &Device::Cpu)?.to_dtype(x.dtype())?;
    let inputs = vec![Some(mixture.summed(&by_x, x)?), Some(by_routing)];
    let loras = [mixture.into.stacked(by_into)?, mixture.down.stacked(by_down)?];
    Ok(Gradients { inputs, loras: loras.into_iter().flatten().collect() })
}
