//! Causal grouped-query attention over packed examples, under the mask of [`answer_mask`](super::answer_mask).
//!
//! A thread takes an example and a head, or a key head with its queries, a few queries of the prompt or of an answer at a time: their scores
//! with the keys that any of them sees lie in its own memory, and are computed again in the backward pass. Rows and heads are read where
//! they lie.
//!
//! Where a text is continued, keys and values begin with those of the tokens before: there are more of them than queries.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::answer_mask::AnswerMask;
use super::product::{Matrix, WORK, dot, multiply};
use super::real::{Real, largest, sum_by};
use super::rows::{values, widest};
use super::{Call, Gradients, Kernel, Op, count, number};
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
    dim: usize,
    scale: f64,
    /// 0 is none.
    softcap: f64,
}

impl Shape {
    fn of(call: &Call<'_>) -> Shape {
        let (heads, kv_heads) = (count(call.node, "heads"), count(call.node, "kv_heads"));
        let (dim, scale) = (count(call.node, "head_dim"), number(call.node, "scale"));
        Shape { share: heads / kv_heads, kv_heads, dim, scale, softcap: number(call.node, "softcap") }
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
    /// Queries, keys and values as they lie, `[tokens, heads · dim]`.
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
    /// A head's columns of the rows from a query of the example on, of queries, or of gradients of values.
    fn queries(&self, of: &'a [T], query: usize) -> Matrix<'a, T> {
        let (width, row) = (self.shape.heads() * self.shape.dim, self.example.span.start + query - self.example.cached);
        Matrix::rows(of, width, row * width + self.head * self.shape.dim)
    }

    /// As many of keys, or values, from a key of the example on.
    fn keys(&self, of: &'a [T], key: usize) -> Matrix<'a, T> {
        let (width, row) = (self.shape.kv_heads * self.shape.dim, self.example.span.start + key);
        Matrix::rows(of, width, row * width + self.head / self.shape.share * self.shape.dim)
    }

    /// `a · bᵀ` for the block's queries and the keys of its two ranges, side by side.
    fn with_keys(
        &self,
        to: &mut Vec<T>,
        (queries, count): (Matrix<'_, T>, usize),
        of: &'a [T],
        keys: &[Range<usize>; 2],
        scale: f64,
    ) {
        let all = keys[0].len() + keys[1].len();
        to.resize(count * all, T::zero());
        let mut column = 0;
        for range in keys {
            let sizes = [count, range.len(), self.shape.dim];
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
        self.with_keys(&mut to.p, (self.queries(q, queries.start), queries.len()), k, keys, shape.scale);
        if shape.softcap > 0.0 {
            to.bent.resize(to.p.len(), T::zero());
            bend(&mut to.p, &mut to.bent, shape.softcap);
        }
        widest(|| {
            for (query, row) in queries.clone().zip(to.p.chunks_exact_mut(all)) {
                let [prompt, own] = self.example.mask.keys(query);
                let (left, right) = row.split_at_mut(keys[0].len());
                softmax([(left, within(&prompt, &keys[0])), (right, within(&own, &keys[1]))]);
            }
        });
    }

    /// The head's value, `[tokens, dim]`.
    fn forward(&self) -> Vec<T> {
        let (shape, example, [_, _, v]) = (self.shape, self.example, self.qkv);
        let mut y = vec![T::zero(); example.span.len() * shape.dim];
        let mut block = Block::new();
        for queries in example.blocks() {
            let keys = example.keys(&queries);
            self.weights(&queries, &keys, &mut block);
            let all = keys[0].len() + keys[1].len();
            let to = &mut y[(queries.start - example.cached) * shape.dim..];
            let mut column = 0;
            for (at, range) in keys.iter().enumerate() {
                let (p, sizes) = (Matrix::rows(&block.p, all, column), [queries.len(), shape.dim, range.len()]);
                multiply((to, shape.dim), sizes, (p, self.keys(v, range.start)), 1.0, at > 0, false);
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
        let dim = shape.dim;
        let mut dq = vec![T::zero(); example.span.len() * dim];
        let (mut block, mut ds) = (Block::new(), Vec::new());
        for queries in example.blocks() {
            let (count, keys) = (queries.len(), example.keys(&queries));
            let all = keys[0].len() + keys[1].len();
            self.weights(&queries, &keys, &mut block);
            let dy = self.queries(dy, queries.start);
            self.with_keys(&mut ds, (dy, count), v, &keys, 1.0);
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
                    (ds, self.keys(k, range.start)),
                    shape.scale,
                    at > 0,
                    false,
                );
                let sizes = [range.len(), dim, count];
                let own = range.start * dim;
                let q = self.queries(q, queries.start);
                multiply((&mut dk[own..], dim), sizes, (ds.transposed(), q), shape.scale, true, false);
                multiply((&mut dv[own..], dim), sizes, (p.transposed(), dy), 1.0, true, false);
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

/// A row of scores in two parts becomes its softmax over some columns of both; the others become 0.
#[inline(always)]
fn softmax<T: Real>(parts: [(&mut [T], Range<usize>); 2]) {
    let [left, right] = [0, 1].map(|part| largest(&parts[part].0[parts[part].1.clone()]));
    let top = left.maximum(right);
    let mut parts = parts;
    let mut sum = 0.0;
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
    let shape = Shape::of(call);
    let inputs = call.inputs.iter().copied().chain(dy).map(Tensor::contiguous);
    let inputs: Vec<Tensor> = inputs.collect::<candle_core::Result<_>>()?;
    let inputs: Vec<_> = inputs.iter().map(Tensor::storage_and_layout).collect();
    let inputs: Vec<&[T]> = inputs.iter().map(|(storage, layout)| values(storage, layout)).collect::<Result<_>>()?;
    let qkv = [inputs[0], inputs[1], inputs[2]];
    let Some(dy) = inputs.get(3) else {
        let heads =
            over_heads(call, shape.heads(), |example, head| Head { shape: &shape, example, qkv, head }.forward());
        return Ok(vec![join(&heads, shape.dim)?]);
    };
    let groups = over_heads(call, shape.kv_heads, |example, kv_head| {
        let mut dkv = [(); 2].map(|()| vec![T::zero(); example.span.len() * shape.dim]);
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
    gradients.iter().map(|heads| join(heads, shape.dim)).collect()
}

/// A query with all keys that it sees, where they lie: what pays for many queries, copies and candle's products, costs a single
/// one more than it takes.
fn of_one_token(call: &Call<'_>) -> Result<Tensor> {
    let shape = Shape::of(call);
    let (dim, width) = (shape.dim, shape.kv_heads * shape.dim);
    let inputs: Vec<Tensor> = call.inputs.iter().map(|input| input.contiguous()).collect::<candle_core::Result<_>>()?;
    let inputs: Vec<_> = inputs.iter().map(Tensor::storage_and_layout).collect();
    let inputs: Vec<&[f32]> = inputs.iter().map(|(storage, layout)| values(storage, layout)).collect::<Result<_>>()?;
    let (q, k, v) = (inputs[0], inputs[1], inputs[2]);
    let keys = call.layout.cached + 1;
    let window = call.node.attrs.get("window").map_or(keys, |_| count(call.node, "window"));
    let first = keys.saturating_sub(window);
    let (scale, softcap) = (shape.scale as f32, shape.softcap as f32);
    let mut y = vec![0.0; q.len()];
    let heads = y.par_chunks_mut(dim).zip(q.par_chunks(dim)).enumerate().with_min_len(WORK.div_ceil(keys * dim));
    heads.for_each(|(head, (y, q))| {
        let at = |key: usize| key * width + head / shape.share * dim;
        let mut p: Vec<f32> = (first..keys).map(|key| dot(&k[at(key)..][..dim], q) * scale).collect();
        if softcap > 0.0 {
            p.iter_mut().for_each(|p| *p = (*p / softcap).tanh() * softcap);
        }
        let top = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        p.iter_mut().for_each(|p| *p = (*p - top).exp());
        let sum: f32 = p.iter().sum();
        for (p, key) in p.iter().zip(first..keys) {
            let p = p / sum;
            y.iter_mut().zip(&v[at(key)..][..dim]).for_each(|(y, v)| *y += p * v);
        }
    });
    Ok(Tensor::from_vec(y, call.inputs[0].shape(), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use candle_core::{D, Var};
    use dpo_plugin_api::graph::Node;
    use serde_json::{Value, json};

    use super::*;
    use crate::batch::Layout;

    fn node(heads: usize, kv_heads: usize, dim: usize, more: &Value) -> Node {
        let mut attrs = json!({"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "scale": 0.3});
        attrs.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(json!({
            "op": "attention", "inputs": [0, 1, 2], "weights": [], "attrs": attrs, "width": heads * dim,
        }))
        .unwrap()
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
        for more in [json!({}), json!({"window": 3}), json!({"window": 30}), json!({"softcap": 0.7})] {
            let node = node(heads, kv_heads, dim, &more);
            let (q, kv) = (numbers(tokens, heads * dim, 37), kv_heads * dim);
            let (k, v) = (numbers(tokens, kv, 53), numbers(tokens, kv, 29));
            let run = |q: &Tensor, cached: usize| {
                let layout = &Layout::after(cached, tokens - cached);
                let call = Call {
                    node: &node,
                    inputs: vec![q, &k, &v],
                    weights: &[],
                    lora: None,
                    layout,
                    input_gradients: true,
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
        let inputs = [(heads, 37), (kv_heads, 53), (kv_heads, 29)].map(|(h, step)| numbers(n, h * dim, step));
        let dy = numbers(n, heads * dim, 17);
        for more in [json!({}), json!({"window": 40}), json!({"softcap": 0.7})] {
            let node = node(heads, kv_heads, dim, &more);
            let layout = Layout { spans: vec![span.clone()], ..Layout::default() };
            let call = Call {
                node: &node,
                inputs: inputs.iter().collect(),
                weights: &[],
                lora: None,
                layout: &layout,
                input_gradients: true,
            };
            let shape = Shape::of(&call);
            let free = inputs.clone().map(|x| Var::from_tensor(&x).unwrap());
            let of_heads = |x: &Var, h: usize| x.reshape((n, h, dim)).unwrap().transpose(0, 1).unwrap();
            let [q, k, v] = [(0, heads), (1, 1), (2, 1)].map(|(i, h)| of_heads(&free[i], h));
            let wide = |x: &Tensor| x.broadcast_as((heads, n, dim)).unwrap().contiguous().unwrap();
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
            let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1).unwrap()).unwrap();
            let y = weights.matmul(&v).unwrap().transpose(0, 1).unwrap().reshape((n, heads * dim)).unwrap();

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
