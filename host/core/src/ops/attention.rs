//! Causal grouped-query attention over packed examples, under the mask of [`answer_mask`](super::answer_mask).
//!
//! Scores are computed in blocks: some key heads with all queries, or one key head with some of them, so that no more than
//! [`SCORES`] of them are held at once whatever the length of an example and the number of its heads.
//!
//! Where a text is continued, keys and values begin with those of the tokens before: there are more of them than queries.

use std::ops::Range;

use candle_core::{CpuStorage, D, DType, Device, Layout as Strides, Storage, Tensor};
use rayon::prelude::*;

use super::answer_mask::AnswerMask;
use super::product::{WORK, dot};
use super::{Call, Gradients, Kernel, Op, count, number};
use crate::batch::Span;
use crate::error::{Error, Result};

pub(super) const OP: Op = Op { name: "attention", cached_inputs: &[1, 2], kernel: Kernel::Value { forward, vjp } };

/// Most scores of a block: 32 MiB in f32. A single query of one key head may have more.
const SCORES: usize = 1 << 23;

/// As many numbers as a block has scores are held this many times at once, at most: its scores on their way to weights or to
/// their gradient, and the mask.
const LIVE: usize = 8;

/// Most bytes that attention holds in f32, beside copies of its inputs and its value, forward or backward, over examples of up
/// to `tokens` tokens.
pub fn workspace(tokens: usize, heads: usize, kv_heads: usize) -> usize {
    let of_query = heads / kv_heads.max(1) * tokens;
    let all = of_query.saturating_mul(tokens).saturating_mul(kv_heads);
    all.min(SCORES.max(of_query)) * size_of::<f32>() * LIVE
}

/// Some queries of one example, with some of its key heads.
struct Block {
    /// `[kv heads, queries per key head · tokens, head_dim]`.
    q: Tensor,
    /// Softmax of the scores, `[kv heads, queries per key head · tokens, keys]`.
    p: Tensor,
    /// With a soft cap, the derivative of capped scores by plain ones, shaped as `p`.
    dcap: Option<Tensor>,
}

/// Key heads of one example with all keys that its queries see.
struct Group<'a> {
    span: &'a Span,
    mask: &'a AnswerMask,
    /// Tokens before the example's first.
    cached: usize,
    heads: Range<usize>,
    /// `[kv heads, keys, head_dim]`.
    k: Tensor,
    v: Tensor,
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

    /// Key heads to take at a time for so many queries and keys.
    fn step(&self, tokens: usize, keys: usize) -> usize {
        (SCORES / (self.share * tokens * keys).max(1)).clamp(1, self.kv_heads)
    }

    /// The queries of every block of a group: all, or as many as one key head may have.
    fn blocks(&self, tokens: usize, keys: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = (SCORES / (self.share * keys).max(1)).clamp(1, tokens);
        (0..tokens).step_by(rows).map(move |first| first..(first + rows).min(tokens))
    }

    /// Some rows and the columns of some key heads, head by head: `[kv heads, share · rows, dim]`.
    fn split(&self, x: &Tensor, rows: Range<usize>, heads: &Range<usize>, share: usize) -> Result<Tensor> {
        let (n, dim, heads, first) = (rows.len(), self.dim, heads.len(), heads.start);
        let x = x.narrow(0, rows.start, n)?.narrow(1, first * share * dim, heads * share * dim)?;
        let x = x.contiguous()?.reshape((n, heads * share, dim))?.transpose(0, 1)?.contiguous()?;
        Ok(x.reshape((heads, share * n, dim))?)
    }

    /// The way back: `[tokens, kv heads · share · dim]`.
    fn join(&self, x: &Tensor, tokens: usize, heads: usize, share: usize) -> Result<Tensor> {
        let x = x.reshape((heads * share, tokens, self.dim))?.transpose(0, 1)?.contiguous()?;
        Ok(x.reshape((tokens, heads * share * self.dim))?)
    }
}

impl Group<'_> {
    /// The rows of some of the example's tokens.
    fn rows(&self, queries: &Range<usize>) -> Range<usize> {
        self.span.start + queries.start..self.span.start + queries.end
    }

    /// Weights of some queries over the keys up to the last one's own.
    fn block(&self, call: &Call<'_>, shape: &Shape, queries: &Range<usize>) -> Result<Block> {
        let (n, keys, heads) = (queries.len(), self.cached + queries.end, self.heads.len());
        let q = shape.split(call.inputs[0], self.rows(queries), &self.heads, shape.share)?;
        let k = self.k.narrow(1, 0, keys)?;
        let mut scores = (q.matmul(&k.t()?)? * shape.scale)?;
        let mut dcap = None;
        if shape.softcap > 0.0 {
            let bent = (scores / shape.softcap)?.tanh()?;
            dcap = Some((1.0 - bent.sqr()?)?);
            scores = (bent * shape.softcap)?;
        }
        scores = scores.reshape((heads * shape.share, n, keys))?.broadcast_add(&self.mask(queries, q.dtype())?)?;
        scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        scores = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
        Ok(Block { q, p: scores.reshape((heads, shape.share * n, keys))?, dcap })
    }

    /// 0 where a token sees another, minus infinity elsewhere: `[queries, keys]`.
    fn mask(&self, queries: &Range<usize>, dtype: DType) -> Result<Tensor> {
        let keys = self.cached + queries.end;
        let value = |query: usize, key: usize| if self.mask.sees(query, key) { 0.0 } else { f32::NEG_INFINITY };
        let row = |query: usize| (0..keys).map(move |key| value(self.cached + query, key));
        let values: Vec<f32> = queries.clone().flat_map(row).collect();
        Ok(Tensor::from_vec(values, (queries.len(), keys), &Device::Cpu)?.to_dtype(dtype)?)
    }
}

/// Runs over all examples and groups of key heads, and puts what each returns side by side: `count` values `[tokens, …]`.
fn over_groups(
    call: &Call<'_>,
    count: usize,
    mut run: impl FnMut(&Shape, &Group<'_>) -> Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    let (shape, cached) = (Shape::of(call), call.layout.cached);
    let mut examples: Vec<Vec<Tensor>> = vec![Vec::new(); count];
    for span in &call.layout.spans {
        let mask = &AnswerMask::of(span, cached, super::count(call.node, "window"));
        let keys = span.start..span.start + cached + span.len();
        let step = shape.step(span.len(), keys.len());
        let mut groups: Vec<Vec<Tensor>> = vec![Vec::new(); count];
        for first in (0..shape.kv_heads).step_by(step) {
            let heads = first..(first + step).min(shape.kv_heads);
            let k = shape.split(call.inputs[1], keys.clone(), &heads, 1)?;
            let v = shape.split(call.inputs[2], keys.clone(), &heads, 1)?;
            let values = run(&shape, &Group { span, mask, cached, heads, k, v })?;
            groups.iter_mut().zip(values).for_each(|(to, value)| to.push(value));
        }
        for (to, from) in examples.iter_mut().zip(groups) {
            to.push(Tensor::cat(&from, 1)?);
        }
    }
    examples.iter().map(|e| Ok(Tensor::cat(e, 0)?)).collect()
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

/// The numbers of a contiguous tensor in f32.
fn values<'a>(storage: &'a Storage, layout: &Strides) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((from, to))) => Ok(&values[from..to]),
        _ => Err(Error::run("the CPU's attention got a tensor that is not its own")),
    }
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    if call.inputs[0].dim(0)? == 1 && call.inputs[0].dtype() == DType::F32 {
        return of_one_token(call);
    }
    let mut values = over_groups(call, 1, |shape, group| {
        let (n, heads) = (group.span.len(), group.heads.len());
        let blocks = shape.blocks(n, group.cached + n).map(|queries| {
            let Block { p, .. } = group.block(call, shape, &queries)?;
            let y = p.matmul(&group.v.narrow(1, 0, p.dim(2)?)?)?;
            shape.join(&y, queries.len(), heads, shape.share)
        });
        Ok(vec![Tensor::cat(&blocks.collect::<Result<Vec<_>>>()?, 0)?])
    })?;
    Ok(values.remove(0))
}

/// `dv = pᵀ·dy`, `ds = p·(dy·vᵀ - rowsum(p·(dy·vᵀ)))`, `dq = scale·ds·k`, `dk = scale·dsᵀ·q`; with a soft cap, `ds` times
/// `1 - tanh²(s / softcap)`.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let values = over_groups(call, 3, |shape, group| {
        let (n, heads) = (group.span.len(), group.heads.len());
        let (mut dq, mut dkv): (Vec<Tensor>, [Option<Tensor>; 2]) = (Vec::new(), [None, None]);
        for queries in shape.blocks(n, n) {
            let Block { q, p, dcap } = group.block(call, shape, &queries)?;
            let keys = queries.end;
            let dy = shape.split(dy, group.rows(&queries), &group.heads, shape.share)?;
            let dv = p.t()?.matmul(&dy)?;
            let dp = dy.matmul(&group.v.narrow(1, 0, keys)?.t()?)?;
            let mean = (&p * &dp)?.sum_keepdim(D::Minus1)?;
            let mut ds = ((p * dp.broadcast_sub(&mean)?)? * shape.scale)?;
            if let Some(dcap) = dcap {
                ds = (ds * dcap)?;
            }
            let dk = ds.t()?.matmul(&q)?;
            dq.push(shape.join(&ds.matmul(&group.k.narrow(1, 0, keys)?)?, queries.len(), heads, shape.share)?);
            for (sum, part) in dkv.iter_mut().zip([dk, dv]) {
                // Later keys have no part in this block.
                let part = part.pad_with_zeros(1, 0, n - keys)?;
                *sum = Some(match sum.take() {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
        }
        let dkv = dkv.into_iter().flatten().map(|sum| shape.join(&sum, n, heads, 1));
        std::iter::once(Ok(Tensor::cat(&dq, 0)?)).chain(dkv).collect()
    })?;
    Ok(Gradients::of(values))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use candle_core::Var;
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

    /// An example whose scores are several blocks, against its formula over all scores at once, with candle's own gradients.
    #[test]
    fn blocks_compute_what_all_scores_at_once_do() {
        let (heads, kv_heads, dim) = (8, 1, 4);
        let span = Span { start: 0, prompt: 500, answers: vec![300, 0, 250, 60] };
        let n = span.len();
        assert!(heads * n * n > SCORES);
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
            assert!(shape.blocks(n, n).count() > 1);

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
