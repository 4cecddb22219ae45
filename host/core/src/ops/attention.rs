//! Causal grouped-query attention over packed examples, under the mask of [`answer_mask`](super::answer_mask).
//!
//! A thread takes an example and a head, or a key head with its queries, a few queries of the prompt or of an answer at a time: their scores
//! with the keys that any of them sees lie in its own memory, and are computed again in the backward pass. Rows and heads are read where
//! they lie.
//!
//! Where a text is continued, keys and values begin with those of the tokens before: there are more of them than queries.
//!
//! A sink (gpt-oss) is a logit of a head that has a part in the softmax's sum and no value: the weights of the keys sum to less than 1.
//! It is frozen, and bends the gradients of scores through these weights alone.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::answer_mask::AnswerMask;
use super::product::{Matrix, WORK, dot, multiply};
use super::real::{Real, largest, sum_by};
use super::rows::{values, widest};
use super::{Call, Gradients, Kernel, Op, count, number, weight};
use crate::batch::Span;
use crate::error::Result;

pub(super) const OP: Op = Op { name: "attention", cached_inputs: &[1, 2], kernel: Kernel::Value { forward, vjp } };

/// Queries whose scores are computed at once.
const QUERIES: usize = 64;

/// Most bytes that attention holds in f32, beside copies of its inputs and its value, forward or backward, over examples of up
/// to `tokens` tokens: of every thread scores, their derivatives, and with a soft cap what it bends.
pub fn workspace(tokens: usize) -> usize {
    rayon::current_num_threads() * 3 * QUERIES.min(tokens) * tokens * size_of::<f32>()
}

struct Shape {
    share: usize,
    kv_heads: usize,
    /// Columns of a head of queries and keys.
    dim: usize,
    /// Columns of a head of values.
    value_dim: usize,
    scale: f64,
    /// 0 is none.
    softcap: f64,
    /// Of every query head, the logit that joins its softmax; empty where there are none.
    sinks: Vec<f64>,
}

impl Shape {
    fn of(call: &Call<'_>) -> Result<Shape> {
        let node = call.node;
        let (heads, kv_heads) = (count(node, "heads"), count(node, "kv_heads"));
        let sinks = match weight(call, "sinks") {
            Some(sinks) => sinks.to_dtype(DType::F64)?.to_vec1()?,
            None => Vec::new(),
        };
        Ok(Shape {
            share: heads / kv_heads,
            kv_heads,
            dim: count(node, "head_dim"),
            value_dim: node.width / heads,
            scale: number(node, "scale"),
            softcap: number(node, "softcap"),
            sinks,
        })
    }

    /// The sink of a head; that of none has no part in a sum.
    fn sink(&self, head: usize) -> f64 {
        self.sinks.get(head).copied().unwrap_or(f64::NEG_INFINITY)
    }

    fn heads(&self) -> usize {
        self.share * self.kv_heads
    }
}

/// An example, its mask, and the tokens before its first.
struct Example<'a> {
    span: &'a Span,
    mask: AnswerMask,
    cached: usize,
}

impl Example<'_> {
    /// Queries that are computed at once, as places in the example: of the prompt, or of one answer.
    fn blocks(&self) -> Vec<Range<usize>> {
        let mut blocks = Vec::new();
        let mut first = self.cached;
        for length in [self.span.prompt].iter().chain(&self.span.answers) {
            let end = first + length;
            blocks.extend((first..end).step_by(QUERIES).map(|at| at..(at + QUERIES).min(end)));
            first = end;
        }
        blocks
    }

    /// The keys that any of a block's queries sees, of the prompt and of their own answer.
    fn keys(&self, block: &Range<usize>) -> [Range<usize>; 2] {
        let ([prompt, own], [last_prompt, last_own]) = (self.mask.keys(block.start), self.mask.keys(block.end - 1));
        [prompt.start..last_prompt.end, own.start..last_own.end]
    }
}

/// A head of an example.
struct Head<'a, T> {
    shape: &'a Shape,
    example: &'a Example<'a>,
    /// Queries, keys and values as they lie, `[tokens, heads · columns of a head]`.
    qkv: [&'a [T]; 3],
    head: usize,
}

/// What is computed of a block.
struct Block<T> {
    /// Softmax of the scores, `[queries, keys]`: the keys of the prompt, then those of the answer; 0 where a query does not see a key.
    p: Vec<T>,
    /// With a soft cap, the derivative of capped scores by plain ones, shaped as `p`.
    bent: Vec<T>,
}

impl<T> Block<T> {
    fn new() -> Block<T> {
        Block { p: Vec::new(), bent: Vec::new() }
    }
}

impl<'a, T: Real> Head<'a, T> {
    /// A head's `dim` columns of the rows from a query of the example on, of queries, or of gradients of the head's value.
    fn queries(&self, (of, dim): (&'a [T], usize), query: usize) -> Matrix<'a, T> {
        let (width, row) = (self.shape.heads() * dim, self.example.span.start + query - self.example.cached);
        Matrix::rows(of, width, row * width + self.head * dim)
    }

    /// As many of keys, or values, from a key of the example on.
    fn keys(&self, (of, dim): (&'a [T], usize), key: usize) -> Matrix<'a, T> {
        let (width, row) = (self.shape.kv_heads * dim, self.example.span.start + key);
        Matrix::rows(of, width, row * width + self.head / self.shape.share * dim)
    }

    /// `a · bᵀ` for the block's queries and the keys of its two ranges, side by side.
    fn with_keys(
        &self,
        to: &mut Vec<T>,
        (queries, count): (Matrix<'_, T>, usize),
        of: (&'a [T], usize),
        keys: &[Range<usize>; 2],
        scale: f64,
    ) {
        let all = keys[0].len() + keys[1].len();
        to.resize(count * all, T::zero());
        let mut column = 0;
        for range in keys {
            let sizes = [count, range.len(), of.1];
            multiply(
                (&mut to[column..], all),
                sizes,
                (queries, self.keys(of, range.start).transposed()),
                scale,
                false,
                false,
            );
            column += range.len();
        }
    }

    /// Weights of a block's queries over the keys that they see.
    fn weights(&self, queries: &Range<usize>, keys: &[Range<usize>; 2], to: &mut Block<T>) {
        let (shape, [q, k, _]) = (self.shape, self.qkv);
        let all = keys[0].len() + keys[1].len();
        let (q, k) = ((q, shape.dim), (k, shape.dim));
        self.with_keys(&mut to.p, (self.queries(q, queries.start), queries.len()), k, keys, shape.scale);
        if shape.softcap > 0.0 {
            to.bent.resize(to.p.len(), T::zero());
            bend(&mut to.p, &mut to.bent, shape.softcap);
        }
        let sink = shape.sink(self.head);
        widest(|| {
            for (query, row) in queries.clone().zip(to.p.chunks_exact_mut(all)) {
                let [prompt, own] = self.example.mask.keys(query);
                let (left, right) = row.split_at_mut(keys[0].len());
                softmax([(left, within(&prompt, &keys[0])), (right, within(&own, &keys[1]))], sink);
            }
        });
    }

    /// The head's value, `[tokens, value_dim]`.
    fn forward(&self) -> Vec<T> {
        let (example, dim, [_, _, v]) = (self.example, self.shape.value_dim, self.qkv);
        let mut y = vec![T::zero(); example.span.len() * dim];
        let mut block = Block::new();
        for queries in example.blocks() {
            let keys = example.keys(&queries);
            self.weights(&queries, &keys, &mut block);
            let all = keys[0].len() + keys[1].len();
            let to = &mut y[(queries.start - example.cached) * dim..];
            let mut column = 0;
            for (at, range) in keys.iter().enumerate() {
                let (p, sizes) = (Matrix::rows(&block.p, all, column), [queries.len(), dim, range.len()]);
                multiply((to, dim), sizes, (p, self.keys((v, dim), range.start)), 1.0, at > 0, false);
                column += range.len();
            }
        }
        y
    }

    /// Gradients of the head's queries `[tokens, dim]`; those of its keys and values are added.
    ///
    /// `dv = pᵀ·dy`, `ds = p·(dy·vᵀ - rowsum(p·(dy·vᵀ)))`, `dq = scale·ds·k`, `dk = scale·dsᵀ·q`; with a soft cap, `ds` times
    /// `1 - tanh²(s / softcap)`.
    fn vjp(&self, dy: &'a [T], dkv: &mut [Vec<T>; 2]) -> Vec<T> {
        let (shape, example, [q, k, v]) = (self.shape, self.example, self.qkv);
        let (dim, value_dim) = (shape.dim, shape.value_dim);
        let mut dq = vec![T::zero(); example.span.len() * dim];
        let (mut block, mut ds) = (Block::new(), Vec::new());
        for queries in example.blocks() {
            let (count, keys) = (queries.len(), example.keys(&queries));
            let all = keys[0].len() + keys[1].len();
            self.weights(&queries, &keys, &mut block);
            let dy = self.queries((dy, value_dim), queries.start);
            self.with_keys(&mut ds, (dy, count), (v, value_dim), &keys, 1.0);
            widest(|| {
                for (p, ds) in block.p.chunks_exact(all).zip(ds.chunks_exact_mut(all)) {
                    let mean = T::from_f64(sum_by([p, ds], |[p, ds]| p * ds));
                    ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = *p * (*ds - mean));
                }
            });
            if shape.softcap > 0.0 {
                ds.iter_mut().zip(&block.bent).for_each(|(ds, bent)| *ds *= *bent);
            }
            let to = &mut dq[queries.start * dim..];
            let [dk, dv] = &mut *dkv;
            let mut column = 0;
            for (at, range) in keys.iter().enumerate() {
                let (p, ds) = (Matrix::rows(&block.p, all, column), Matrix::rows(&ds, all, column));
                multiply(
                    (&mut *to, dim),
                    [count, dim, range.len()],
                    (ds, self.keys((k, dim), range.start)),
                    shape.scale,
                    at > 0,
                    false,
                );
                let q = self.queries((q, dim), queries.start);
                let (to_dk, to_dv) = (&mut dk[range.start * dim..], &mut dv[range.start * value_dim..]);
                let sizes = |columns: usize| [range.len(), columns, count];
                multiply((to_dk, dim), sizes(dim), (ds.transposed(), q), shape.scale, true, false);
                multiply((to_dv, value_dim), sizes(value_dim), (p.transposed(), dy), 1.0, true, false);
                column += range.len();
            }
        }
        dq
    }
}

/// Where keys lie among those of a block.
fn within(keys: &Range<usize>, all: &Range<usize>) -> Range<usize> {
    keys.start.clamp(all.start, all.end) - all.start..keys.end.clamp(all.start, all.end) - all.start
}

/// Scores become `softcap · tanh(score / softcap)`, with their derivatives.
fn bend<T: Real>(scores: &mut [T], derivatives: &mut [T], softcap: f64) {
    for (score, derivative) in scores.iter_mut().zip(derivatives) {
        let bent = (score.to_f64() / softcap).tanh();
        (*score, *derivative) = (T::from_f64(bent * softcap), T::from_f64(1.0 - bent * bent));
    }
}

/// A row of scores in two parts becomes its softmax over some columns of both and a sink; the others become 0.
#[inline(always)]
fn softmax<T: Real>(parts: [(&mut [T], Range<usize>); 2], sink: f64) {
    let [left, right] = [0, 1].map(|part| largest(&parts[part].0[parts[part].1.clone()]));
    let top = left.maximum(right).maximum(T::from_f64(sink));
    let mut parts = parts;
    let mut sum = (sink - top.to_f64()).exp();
    for (scores, seen) in &mut parts {
        scores[..seen.start].fill(T::zero());
        scores[seen.end..].fill(T::zero());
        let seen = &mut scores[seen.clone()];
        seen.iter_mut().for_each(|score| *score = (*score - top).fast_exp());
        sum += T::sum_of(seen);
    }
    let inverse = T::from_f64(1.0 / sum);
    for (scores, seen) in parts {
        scores[seen].iter_mut().for_each(|p| *p *= inverse);
    }
}

/// Runs over `heads` of all examples on all threads, and gives what each returns: by example, then by head.
fn over_heads<R: Send>(call: &Call<'_>, heads: usize, run: impl Fn(&Example<'_>, usize) -> R + Sync) -> Vec<Vec<R>> {
    let (cached, window) = (call.layout.cached, count(call.node, "window"));
    let example = |span| Example { span, mask: AnswerMask::of(span, cached, window), cached };
    let examples: Vec<Example<'_>> = call.layout.spans.iter().map(example).collect();
    let tasks = (0..examples.len() * heads).into_par_iter().with_max_len(1);
    let all: Vec<R> = tasks.map(|at| run(&examples[at / heads], at % heads)).collect();
    let mut all = all.into_iter();
    examples.iter().map(|_| all.by_ref().take(heads).collect()).collect()
}

/// Heads of all examples, `[tokens, dim]` each, side by side: `[tokens, heads · dim]`.
pub(super) fn join<T: Real>(examples: &[Vec<Vec<T>>], dim: usize) -> Result<Tensor> {
    let width = examples.first().map_or(0, Vec::len) * dim;
    let numbers: usize = examples.iter().flatten().map(Vec::len).sum();
    let mut all = vec![T::zero(); numbers];
    let mut rest = all.as_mut_slice();
    for heads in examples {
        let (own, behind) = rest.split_at_mut(heads.iter().map(Vec::len).sum());
        rest = behind;
        own.par_chunks_mut(width).enumerate().for_each(|(row, to)| {
            to.chunks_mut(dim).zip(heads).for_each(|(to, head)| to.copy_from_slice(&head[row * dim..][..dim]));
        });
    }
    Ok(Tensor::from_vec(all, (numbers / width.max(1), width), &Device::Cpu)?)
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    match call.inputs[0].dtype() {
        DType::F32 if call.inputs[0].dim(0)? == 1 => of_one_token(call),
        DType::F32 => typed::<f32>(call, None).map(|mut all| all.swap_remove(0)),
        _ => typed::<f64>(call, None).map(|mut all| all.swap_remove(0)),
    }
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let gradients = match dy.dtype() {
        DType::F32 => typed::<f32>(call, Some(dy)),
        _ => typed::<f64>(call, Some(dy)),
    };
    Ok(Gradients::of(gradients?))
}

/// The value; where its gradient is given, the gradients of queries, keys and values.
fn typed<T: Real>(call: &Call<'_>, dy: Option<&Tensor>) -> Result<Vec<Tensor>> {
    let shape = Shape::of(call)?;
    let inputs = call.inputs.iter().copied().chain(dy).map(Tensor::contiguous);
    let inputs: Vec<Tensor> = inputs.collect::<candle_core::Result<_>>()?;
    let inputs: Vec<_> = inputs.iter().map(Tensor::storage_and_layout).collect();
    let inputs: Vec<&[T]> = inputs.iter().map(|(storage, layout)| values(storage, layout)).collect::<Result<_>>()?;
    let qkv = [inputs[0], inputs[1], inputs[2]];
    let Some(dy) = inputs.get(3) else {
        let heads =
            over_heads(call, shape.heads(), |example, head| Head { shape: &shape, example, qkv, head }.forward());
        return Ok(vec![join(&heads, shape.value_dim)?]);
    };
    let groups = over_heads(call, shape.kv_heads, |example, kv_head| {
        let mut dkv = [shape.dim, shape.value_dim].map(|dim| vec![T::zero(); example.span.len() * dim]);
        let heads = kv_head * shape.share..(kv_head + 1) * shape.share;
        let dq = heads.map(|head| Head { shape: &shape, example, qkv, head }.vjp(dy, &mut dkv));
        (dq.collect::<Vec<_>>(), dkv)
    });
    let mut gradients = [(); 3].map(|()| Vec::new());
    for example in groups {
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| Vec::new());
        for (queries, [keys, values]) in example {
            dq.extend(queries);
            dk.push(keys);
            dv.push(values);
        }
        gradients.iter_mut().zip([dq, dk, dv]).for_each(|(all, of_example)| all.push(of_example));
    }
    let dims = [shape.dim, shape.dim, shape.value_dim];
    gradients.iter().zip(dims).map(|(heads, dim)| join(heads, dim)).collect()
}

/// A query with all keys that it sees, where they lie: what pays for many queries, copies and candle's products, costs a single
/// one more than it takes.
fn of_one_token(call: &Call<'_>) -> Result<Tensor> {
    let shape = Shape::of(call)?;
    let (dim, value_dim) = (shape.dim, shape.value_dim);
    let inputs: Vec<Tensor> = call.inputs.iter().map(|input| input.contiguous()).collect::<candle_core::Result<_>>()?;
    let inputs: Vec<_> = inputs.iter().map(Tensor::storage_and_layout).collect();
    let inputs: Vec<&[f32]> = inputs.iter().map(|(storage, layout)| values(storage, layout)).collect::<Result<_>>()?;
    let (q, k, v) = (inputs[0], inputs[1], inputs[2]);
    let keys = call.layout.cached + 1;
    let window = call.node.attrs.get("window").map_or(keys, |_| count(call.node, "window"));
    let first = keys.saturating_sub(window);
    let (scale, softcap) = (shape.scale as f32, shape.softcap as f32);
    let mut y = vec![0.0; call.node.width];
    let heads = y.par_chunks_mut(value_dim).zip(q.par_chunks(dim)).enumerate().with_min_len(WORK.div_ceil(keys * dim));
    heads.for_each(|(head, (y, q))| {
        let at = |key: usize, dim: usize| (key * shape.kv_heads + head / shape.share) * dim..;
        let mut p: Vec<f32> = (first..keys).map(|key| dot(&k[at(key, dim)][..dim], q) * scale).collect();
        if softcap > 0.0 {
            p.iter_mut().for_each(|p| *p = (*p / softcap).tanh() * softcap);
        }
        let sink = shape.sink(head) as f32;
        let top = p.iter().copied().fold(sink, f32::max);
        p.iter_mut().for_each(|p| *p = (*p - top).exp());
        let sum = p.iter().sum::<f32>() + (sink - top).exp();
        for (p, key) in p.iter().zip(first..keys) {
            let p = p / sum;
            y.iter_mut().zip(&v[at(key, value_dim)][..value_dim]).for_each(|(y, v)| *y += p * v);
        }
    });
    Ok(Tensor::from_vec(y, (1, call.node.width), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use candle_core::{D, Var};
    use dpo_plugin_api::graph::Node;
    use serde_json::{Value, json};

    use super::*;
    use crate::batch::Layout;

    /// Values have heads of `value_dim` columns, where `more` has it.
    fn node(heads: usize, kv_heads: usize, dim: usize, more: &Value) -> Node {
        let mut attrs = json!({"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "scale": 0.3});
        attrs.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(json!({
            "op": "attention", "inputs": [0, 1, 2], "attrs": attrs, "width": heads * value_dim(more, dim),
            "weights": [{"role": "sinks", "tensor": "sinks", "shape": [heads]}],
        }))
        .unwrap()
    }

    fn value_dim(more: &Value, dim: usize) -> usize {
        more["value_dim"].as_u64().map_or(dim, |n| n as usize)
    }

    /// Kinds of attention of so many heads, some with sinks, whose logits are below all scores and above them.
    fn kinds(heads: usize) -> [(Value, Vec<Tensor>); 5] {
        let sinks: Vec<f32> = (0..heads).map(|head| head as f32 * 1.5 - 2.0).collect();
        let sinks = vec![Tensor::from_vec(sinks, heads, &Device::Cpu).unwrap()];
        [
            (json!({}), vec![]),
            (json!({"window": 3}), sinks.clone()),
            (json!({"window": 40}), vec![]),
            (json!({"softcap": 0.7}), vec![]),
            (json!({"value_dim": 8}), sinks),
        ]
    }

    fn numbers(rows: usize, width: usize, step: usize) -> Tensor {
        let values: Vec<f32> = (0..rows * width).map(|i| ((i * step) % 101) as f32 / 25.0 - 2.0).collect();
        Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
    }

    fn apart(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    /// The last token of a text by itself, and among all others.
    #[test]
    fn one_token_gets_what_many_get() {
        let (tokens, heads, kv_heads, dim) = (9, 4, 2, 20);
        for (more, sinks) in kinds(heads) {
            let node = node(heads, kv_heads, dim, &more);
            let (q, k) = (numbers(tokens, heads * dim, 37), numbers(tokens, kv_heads * dim, 53));
            let v = numbers(tokens, kv_heads * value_dim(&more, dim), 29);
            let run = |q: &Tensor, cached: usize| {
                let layout = &Layout::after(cached, tokens - cached);
                let call = Call {
                    node: &node,
                    inputs: vec![q, &k, &v],
                    weights: &sinks,
                    loras: &[],
                    layout,
                    input_gradients: true,
                    router_dprobs: &[],
                };
                forward(&call).unwrap()
            };
            let all = run(&q, 0).narrow(0, tokens - 1, 1).unwrap();
            let one = run(&q.narrow(0, tokens - 1, 1).unwrap(), tokens - 1);
            let error = apart(&all, &one);
            assert!(error < 1e-5, "{more}: {error}");
        }
    }

    /// An example of several blocks, against its formula over all scores at once, with candle's own gradients.
    #[test]
    fn blocks_compute_what_all_scores_at_once_do() {
        let (heads, kv_heads, dim) = (8, 1, 4);
        let span = Span { start: 0, prompt: 500, answers: vec![300, 0, 250, 60] };
        let n = span.len();
        assert!(n > 4 * QUERIES);
        for (more, sinks) in kinds(heads) {
            let (node, value_dim) = (node(heads, kv_heads, dim, &more), value_dim(&more, dim));
            let of = [(heads * dim, 37), (kv_heads * dim, 53), (kv_heads * value_dim, 29)];
            let (inputs, dy) = (of.map(|(width, step)| numbers(n, width, step)), numbers(n, heads * value_dim, 17));
            let layout = Layout { spans: vec![span.clone()], ..Layout::default() };
            let call = Call {
                node: &node,
                inputs: inputs.iter().collect(),
                weights: &sinks,
                loras: &[],
                layout: &layout,
                input_gradients: true,
                router_dprobs: &[],
            };
            let shape = Shape::of(&call).unwrap();
            let free = inputs.clone().map(|x| Var::from_tensor(&x).unwrap());
            let of_heads = |x: &Var, h: usize| x.reshape((n, h, ())).unwrap().transpose(0, 1).unwrap();
            let [q, k, v] = [(0, heads), (1, 1), (2, 1)].map(|(i, h)| of_heads(&free[i], h));
            let wide = |x: &Tensor| x.broadcast_as((heads, n, x.dim(2).unwrap())).unwrap().contiguous().unwrap();
            let (q, k, v) = (q.contiguous().unwrap(), wide(&k), wide(&v));
            let mut scores = (q.matmul(&k.t().unwrap()).unwrap() * shape.scale).unwrap();
            if shape.softcap > 0.0 {
                scores = ((scores / shape.softcap).unwrap().tanh().unwrap() * shape.softcap).unwrap();
            }
            let mask = AnswerMask::of(&span, 0, count(&node, "window"));
            let hidden = |i: usize| if mask.sees(i / n, i % n) { 0.0 } else { f32::NEG_INFINITY };
            let hidden: Vec<f32> = (0..n * n).map(hidden).collect();
            let scores = scores.broadcast_add(&Tensor::from_vec(hidden, (n, n), &Device::Cpu).unwrap()).unwrap();
            let weights = scores.exp().unwrap();
            let mut sum = weights.sum_keepdim(D::Minus1).unwrap();
            if let Some(sinks) = sinks.first() {
                sum = sum.broadcast_add(&sinks.exp().unwrap().reshape((heads, 1, 1)).unwrap()).unwrap();
            }
            let weights = weights.broadcast_div(&sum).unwrap();
            let y = weights.matmul(&v).unwrap().transpose(0, 1).unwrap().reshape((n, heads * value_dim)).unwrap();

            assert!(apart(&forward(&call).unwrap(), &y) < 1e-5, "{more}");
            let exact = (y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
            let own = vjp(&call, &dy).unwrap().inputs;
            for (at, (own, free)) in own.iter().zip(&free).enumerate() {
                let (own, exact) = (own.as_ref().unwrap(), exact.get(free).unwrap());
                let most = exact.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(
                    apart(own, exact) < 1e-4 * most.max(1.0),
                    "{more}, input {at}: {} of {most}",
                    apart(own, exact)
                );
            }
        }
    }
}
