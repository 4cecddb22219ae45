//! Causal grouped-query attention over packed pairs.
//!
//! A pair lies as prompt | chosen | rejected. A token sees those of its own pair that come before it, and a rejected one
//! sees nothing of the chosen answer, so that both answers continue the same prompt. With a window, distances are those
//! of positions, not of places in the row.
//!
//! Where a text is continued, keys and values begin with those of the tokens before: there are more of them than queries.

use std::ops::Range;

use candle_core::{CpuStorage, D, DType, Device, Layout, Storage, Tensor};
use rayon::prelude::*;

use super::product::{WORK, dot};
use super::{Attr, AttrKind, Call, Gradients, Kernel, Op, Presence, count, number, same};
use crate::batch::Span;
use crate::error::{Error, Result};

pub(super) const OP: Op = Op {
    name: "attention",
    formula: "softmax(scale · q · kᵀ) · v, causal within a pair, rejected does not see chosen",
    inputs: 3,
    weights: &[],
    attrs: &[
        Attr { name: "heads", kind: AttrKind::Count, presence: Presence::Required },
        Attr { name: "kv_heads", kind: AttrKind::Count, presence: Presence::Required },
        Attr { name: "head_dim", kind: AttrKind::Count, presence: Presence::Required },
        Attr { name: "scale", kind: AttrKind::Number, presence: Presence::Required },
        Attr { name: "window", kind: AttrKind::Count, presence: Presence::Optional },
        Attr { name: "softcap", kind: AttrKind::Number, presence: Presence::Optional },
    ],
    check: |node, widths| {
        let (heads, kv, dim) = (count(node, "heads"), count(node, "kv_heads"), count(node, "head_dim"));
        if !heads.is_multiple_of(kv) {
            return Err(format!("{heads} heads cannot share {kv} key heads"));
        }
        if node.attrs.contains_key("softcap") && number(node, "softcap") <= 0.0 {
            return Err("softcap is not positive".into());
        }
        same("q", widths[0], heads * dim)?;
        same("k", widths[1], kv * dim)?;
        same("v", widths[2], kv * dim)?;
        same("the value", node.width, heads * dim)
    },
    reads_layout: true,
    remembers: &[1, 2],
    kernel: Kernel::Value { forward, vjp },
};

/// Most scores held at once: 128 MiB in f32.
const SCORES: usize = 1 << 25;

/// Key heads `first..first + heads` of one pair, as matrices.
struct Group {
    /// `[kv heads, queries per key head · tokens, head_dim]`.
    q: Tensor,
    /// `[kv heads, keys, head_dim]`.
    k: Tensor,
    v: Tensor,
    /// Softmax of the scores, shaped `[kv heads, queries per key head · tokens, keys]`.
    p: Tensor,
    /// With a soft cap, the derivative of capped scores by plain ones, shaped as `p`.
    slopes: Option<Tensor>,
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

    /// Key heads to take at a time for so many queries and keys, so that scores stay bounded.
    fn step(&self, tokens: usize, keys: usize) -> usize {
        (SCORES / (self.share * tokens * keys).max(1)).clamp(1, self.kv_heads)
    }

    /// Some rows and the columns of some key heads, head by head: `[kv heads, share · rows, dim]`.
    fn split(&self, x: &Tensor, rows: Range<usize>, first: usize, heads: usize, share: usize) -> Result<Tensor> {
        let (n, dim) = (rows.len(), self.dim);
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

fn group(call: &Call<'_>, shape: &Shape, span: &Span, mask: &Tensor, first: usize, heads: usize) -> Result<Group> {
    let (n, keys) = (span.len(), keys(call, span));
    let q = shape.split(call.inputs[0], span.rows(), first, heads, shape.share)?;
    let k = shape.split(call.inputs[1], keys.clone(), first, heads, 1)?;
    let v = shape.split(call.inputs[2], keys.clone(), first, heads, 1)?;
    let mut scores = (q.matmul(&k.t()?)? * shape.scale)?;
    let mut slopes = None;
    if shape.softcap > 0.0 {
        let bent = (scores / shape.softcap)?.tanh()?;
        slopes = Some((1.0 - bent.sqr()?)?);
        scores = (bent * shape.softcap)?;
    }
    let scores = scores.reshape((heads * shape.share, n, keys.len()))?.broadcast_add(mask)?;
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let p = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?.reshape((heads, shape.share * n, keys.len()))?;
    Ok(Group { q, k, v, p, slopes })
}

/// The rows of keys and values that a span reads.
fn keys(call: &Call<'_>, span: &Span) -> Range<usize> {
    span.start..span.start + call.layout.past + span.len()
}

/// 0 where a token sees another, minus infinity elsewhere: `[tokens, keys]`.
fn mask(call: &Call<'_>, span: &Span, dtype: DType) -> Result<Tensor> {
    let window = match count(call.node, "window") {
        0 => u32::MAX,
        window => window as u32,
    };
    let past = call.layout.past;
    let position: Vec<u32> = (0..past as u32).chain(call.layout.positions[span.rows()].iter().copied()).collect();
    let (prompt, rejected) = (past + span.prompt, past + span.prompt + span.chosen);
    let sees = |q: usize, k: usize| {
        k <= q && !(q >= rejected && (prompt..rejected).contains(&k)) && position[q] - position[k] < window
    };
    let (n, keys) = (span.len(), position.len());
    let value = |i: usize| if sees(past + i / keys, i % keys) { 0.0 } else { f32::NEG_INFINITY };
    let values: Vec<f32> = (0..n * keys).map(value).collect();
    Ok(Tensor::from_vec(values, (n, keys), &Device::Cpu)?.to_dtype(dtype)?)
}

/// Runs over all pairs and groups of key heads, and puts what each returns side by side: `count` values `[tokens, …]`.
fn over_groups(
    call: &Call<'_>,
    count: usize,
    mut run: impl FnMut(&Shape, &Span, &Group, usize, usize) -> Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    let shape = Shape::of(call);
    let mut pairs: Vec<Vec<Tensor>> = vec![Vec::new(); count];
    for span in &call.layout.spans {
        let mask = mask(call, span, call.inputs[0].dtype())?;
        let step = shape.step(span.len(), keys(call, span).len());
        let mut groups: Vec<Vec<Tensor>> = vec![Vec::new(); count];
        for first in (0..shape.kv_heads).step_by(step) {
            let heads = step.min(shape.kv_heads - first);
            let group = group(call, &shape, span, &mask, first, heads)?;
            let values = run(&shape, span, &group, first, heads)?;
            groups.iter_mut().zip(values).for_each(|(to, value)| to.push(value));
        }
        for (to, from) in pairs.iter_mut().zip(groups) {
            to.push(Tensor::cat(&from, 1)?);
        }
    }
    pairs.iter().map(|p| Ok(Tensor::cat(p, 0)?)).collect()
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
    let keys = call.layout.past + 1;
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
fn values<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((from, to))) => Ok(&values[from..to]),
        _ => Err(Error::run("the CPU's attention got a tensor that is not its own")),
    }
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    if call.inputs[0].dim(0)? == 1 && call.inputs[0].dtype() == DType::F32 {
        return of_one_token(call);
    }
    let mut values = over_groups(call, 1, |shape, span, g, _, heads| {
        Ok(vec![shape.join(&g.p.matmul(&g.v)?, span.len(), heads, shape.share)?])
    })?;
    Ok(values.remove(0))
}

/// `dv = pᵀ·dy`, `ds = p·(dy·vᵀ - rowsum(p·(dy·vᵀ)))`, `dq = scale·ds·k`, `dk = scale·dsᵀ·q`; with a soft cap, `ds` times
/// `1 - tanh²(s / softcap)`.
fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let values = over_groups(call, 3, |shape, span, g, first, heads| {
        let dy = shape.split(dy, span.rows(), first, heads, shape.share)?;
        let dv = g.p.t()?.matmul(&dy)?;
        let dp = dy.matmul(&g.v.t()?)?;
        let mean = (&g.p * &dp)?.sum_keepdim(D::Minus1)?;
        let mut ds = ((&g.p * dp.broadcast_sub(&mean)?)? * shape.scale)?;
        if let Some(slopes) = &g.slopes {
            ds = (ds * slopes)?;
        }
        let (dq, dk) = (ds.matmul(&g.k)?, ds.t()?.matmul(&g.q)?);
        let n = span.len();
        Ok(vec![shape.join(&dq, n, heads, shape.share)?, shape.join(&dk, n, heads, 1)?, shape.join(&dv, n, heads, 1)?])
    })?;
    Ok(Gradients::of(values))
}

#[cfg(test)]
mod tests {
    use dpo_plugin_api::graph::Node;
    use serde_json::json;

    use super::*;

    /// The last token of a text by itself, and among all others.
    #[test]
    fn one_token_gets_what_many_get() {
        let numbers = |rows: usize, width: usize, step: usize| {
            let values: Vec<f32> = (0..rows * width).map(|i| ((i * step) % 101) as f32 / 25.0 - 2.0).collect();
            Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
        };
        let (tokens, heads, kv_heads, dim) = (9, 4, 2, 20);
        for more in [json!({}), json!({"window": 3}), json!({"window": 30}), json!({"softcap": 0.7})] {
            let mut attrs = json!({"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "scale": 0.3});
            attrs.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let node: Node = serde_json::from_value(json!({
                "op": "attention", "inputs": [0, 1, 2], "weights": [], "attrs": attrs, "width": heads * dim,
            }))
            .unwrap();
            let (q, kv) = (numbers(tokens, heads * dim, 37), kv_heads * dim);
            let (k, v) = (numbers(tokens, kv, 53), numbers(tokens, kv, 29));
            let run = |q: &Tensor, past: usize| {
                let layout = &crate::batch::Layout::after(past, tokens - past);
                let call = Call { node: &node, inputs: vec![q, &k, &v], weights: &[], lora: None, layout };
                forward(&call).unwrap()
            };
            let all = run(&q, 0).narrow(0, tokens - 1, 1).unwrap();
            let one = run(&q.narrow(0, tokens - 1, 1).unwrap(), tokens - 1);
            let error = (all - one).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(error < 1e-5, "{more}: {error}");
        }
    }
}
