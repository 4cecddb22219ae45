//! Recurrences over packed examples: a state runs through an example's prompt, and every answer goes on from a copy of it.
//!
//! A thread takes an example and some heads, one after another, a chunk of tokens at a time. The backward pass runs through a part of
//! an example once more, keeps the states before its chunks, then goes back through them. What the answers give as the gradient of the
//! state at the prompt's end is summed, in their order.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::Node;
use rayon::prelude::*;

use super::attention::join;
use super::linear_attention::CHUNK;
use super::real::Real;
use super::rows::values;
use super::{Call, ValueAndState, count, weight};
use crate::batch::{Layout, Span};
use crate::error::{Error, Result};

/// Most heads that a thread takes one after another: gradients of what heads share are kept for each such block.
const BLOCK: usize = 8;

/// Heads with a state `[key_dim, value_dim]` each.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    /// Heads with values of their own.
    pub heads: usize,
    /// Heads of queries and keys, of which as many heads share one as there are more.
    pub key_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
}

impl Heads {
    fn share(&self) -> usize {
        self.heads / self.key_heads
    }

    /// The key head of a head.
    pub(super) fn key_head(&self, head: usize) -> usize {
        head / self.share()
    }

    /// Blocks of heads of one key head.
    fn blocks(&self) -> Vec<Range<usize>> {
        let of = |key_head: usize| {
            let (first, end) = (key_head * self.share(), (key_head + 1) * self.share());
            (first..end).step_by(BLOCK).map(move |at| at..(at + BLOCK).min(end))
        };
        (0..self.key_heads).flat_map(of).collect()
    }

    fn state(&self) -> usize {
        self.key_dim * self.value_dim
    }
}

/// Most bytes that a node that is a recurrence holds in f32, beside copies of its inputs and its value, over examples of up to `tokens`
/// tokens: of every thread the states before the chunks, and the matrices of a chunk. 0 of other nodes.
pub fn workspace(node: &Node, tokens: usize) -> usize {
    let (key_dim, value_dim) = match node.op.as_str() {
        "gated_delta" => (count(node, "key_dim"), count(node, "value_dim")),
        "ssd" => (count(node, "state"), count(node, "head_dim")),
        _ => return 0,
    };
    let chunk = CHUNK * (6 * key_dim + 6 * value_dim + 4 * CHUNK);
    rayon::current_num_threads() * ((tokens.div_ceil(CHUNK) + 5) * key_dim * value_dim + chunk) * size_of::<f32>()
}

/// A head of an example, chunk by chunk. Rows are those of the whole batch, at most [`CHUNK`] that follow each other.
pub(super) trait Scan<T> {
    /// Computes the rows' values, where they are wanted, from the state before them, which becomes the one behind them.
    fn forward(&mut self, rows: Range<usize>, state: &mut [T], value: Option<&mut [T]>);

    /// Adds to the gradients of the rows' inputs, given the state before them and the gradient of the state behind them, which
    /// becomes that of the state before.
    fn backward(&mut self, rows: Range<usize>, state: &[T], dstate: &mut [T], to: &mut Gradients<T>);
}

/// An op that is a recurrence, with its numbers and weights.
pub(super) trait Rule: Sync + Sized {
    /// The inputs of which heads share columns; of all others every head has its own.
    const SHARED: [usize; 2];
    /// A head of an example.
    type Head<'a, T: Real>: Scan<T>;

    /// That of a call.
    fn of(call: &Call<'_>) -> Result<Self>;
    fn heads(&self) -> Heads;
    /// A head, given all inputs as they lie, and the gradient of the value where that is known.
    fn head<'a, T: Real>(&self, head: usize, inputs: &'a [&'a [T]], dy: &'a [T]) -> Self::Head<'a, T>;
}

/// Gradients of a head's inputs, `[tokens, columns]` each; of shared columns they are sums over the heads that share them.
pub(super) struct Gradients<T> {
    /// The example's first row.
    pub start: usize,
    pub inputs: Vec<Vec<T>>,
}

/// Chunks of a part of an example.
fn chunks(part: Range<usize>) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator {
    let end = part.end;
    part.step_by(CHUNK).map(move |at| at..(at + CHUNK).min(end))
}

/// Rows of the prompt, and of every answer.
fn parts(span: &Span) -> (Range<usize>, Vec<Range<usize>>) {
    let end = span.start + span.prompt;
    let mut first = end;
    let answers = span.answers.iter().map(|length| {
        first += length;
        first - length..first
    });
    (span.start..end, answers.collect())
}

/// Values of a head, `[tokens, value_dim]`; `state` becomes that of the prompt's end.
fn run<T: Real>(scan: &mut impl Scan<T>, span: &Span, width: usize, state: &mut [T]) -> Vec<T> {
    let mut y = vec![T::zero(); span.len() * width];
    let mut part = |part: Range<usize>, state: &mut [T]| {
        for rows in chunks(part) {
            let own = (rows.start - span.start) * width..(rows.end - span.start) * width;
            scan.forward(rows, state, Some(&mut y[own]));
        }
    };
    let (prompt, answers) = parts(span);
    part(prompt, state);
    let mut own = Vec::new();
    for answer in answers {
        own.clear();
        own.extend_from_slice(state);
        part(answer, &mut own);
    }
    y
}

/// The states before the chunks of a part, and the one behind it.
fn states<T: Real>(scan: &mut impl Scan<T>, part: Range<usize>, first: &[T], all: &mut Vec<T>) {
    let size = first.len();
    all.clear();
    all.extend_from_slice(first);
    for rows in chunks(part) {
        let before = all.len() - size;
        all.extend_from_within(before..);
        scan.forward(rows, &mut all[before + size..], None);
    }
}

/// Back through a part whose first state is given, from the gradient of the state behind it to that of the one before it.
fn back<T: Real>(scan: &mut impl Scan<T>, part: Range<usize>, states: &[T], dstate: &mut [T], to: &mut Gradients<T>) {
    for (rows, state) in chunks(part).zip(states.chunks_exact(dstate.len())).rev() {
        scan.backward(rows, state, dstate, to);
    }
}

/// Gradients of a head's inputs.
fn pull<T: Real>(scan: &mut impl Scan<T>, span: &Span, size: usize, to: &mut Gradients<T>) {
    let (prompt, answers) = parts(span);
    let (mut of_prompt, mut of_answer) = (Vec::new(), Vec::new());
    let (mut dend, mut dstate) = (vec![T::zero(); size], vec![T::zero(); size]);
    states(scan, prompt.clone(), &dend, &mut of_prompt);
    let end = of_prompt.len() - size;
    for answer in answers {
        states(scan, answer.clone(), &of_prompt[end..], &mut of_answer);
        // Nobody reads the state behind an answer.
        dstate.fill(T::zero());
        back(scan, answer, &of_answer, &mut dstate, to);
        dend.iter_mut().zip(&dstate).for_each(|(sum, own)| *sum += *own);
    }
    back(scan, prompt, &of_prompt, &mut dend, to);
}

/// Tasks of all threads: an example and a block of heads; what each returns, by example, then by block.
fn over_blocks<R: Send>(layout: &Layout, heads: &Heads, run: impl Fn(&Span, Range<usize>) -> R + Sync) -> Vec<Vec<R>> {
    let blocks = heads.blocks();
    let tasks = (0..layout.spans.len() * blocks.len()).into_par_iter().with_max_len(1);
    let all: Vec<R> =
        tasks.map(|at| run(&layout.spans[at / blocks.len()], blocks[at % blocks.len()].clone())).collect();
    let mut all = all.into_iter();
    layout.spans.iter().map(|_| all.by_ref().take(blocks.len()).collect()).collect()
}

/// Runs over the numbers of a call's inputs, and of one more tensor.
fn with_values<T: Real, R>(
    call: &Call<'_>,
    more: Option<&Tensor>,
    run: impl FnOnce(&[&[T]], &[T]) -> Result<R>,
) -> Result<R> {
    let tensors = call.inputs.iter().copied().chain(more).map(Tensor::contiguous);
    let tensors: Vec<Tensor> = tensors.collect::<candle_core::Result<_>>()?;
    let stored: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let slices: Vec<&[T]> = stored.iter().map(|(storage, layout)| values(storage, layout)).collect::<Result<_>>()?;
    let (inputs, more) = slices.split_at(call.inputs.len());
    run(inputs, more.first().copied().unwrap_or_default())
}

/// The value, from these states `[heads, key_dim · value_dim]` or zeros, and the states at the end of the (last) example's prompt.
pub(super) fn forward<R: Rule>(call: &Call<'_>, before: Option<&Tensor>) -> Result<ValueAndState> {
    match call.inputs[0].dtype() {
        DType::F32 => forward_as::<R, f32>(call, before),
        _ => forward_as::<R, f64>(call, before),
    }
}

/// Gradients of the inputs.
pub(super) fn vjp<R: Rule>(call: &Call<'_>, dy: &Tensor) -> Result<super::Gradients> {
    match dy.dtype() {
        DType::F32 => vjp_as::<R, f32>(call, dy),
        _ => vjp_as::<R, f64>(call, dy),
    }
}

fn forward_as<R: Rule, T: Real>(call: &Call<'_>, before: Option<&Tensor>) -> Result<ValueAndState> {
    let rule = R::of(call)?;
    let heads = rule.heads();
    let (size, width) = (heads.state(), heads.value_dim);
    let blocks = with_values(call, before, |inputs, before| {
        Ok(over_blocks(call.layout, &heads, |span, block| {
            let of_head = |head: usize| {
                let mut state = before.get(head * size..(head + 1) * size).map_or(vec![T::zero(); size], <[T]>::to_vec);
                (run(&mut rule.head(head, inputs, &[]), span, width, &mut state), state)
            };
            block.map(of_head).collect::<Vec<_>>()
        }))
    })?;
    let (mut values, mut behind) = (Vec::new(), Vec::new());
    for example in blocks {
        let (own, states): (Vec<_>, Vec<_>) = example.into_iter().flatten().unzip();
        values.push(own);
        behind = states.concat();
    }
    Ok((join(&values, width)?, Tensor::from_vec(behind, (heads.heads, size), &Device::Cpu)?))
}

fn vjp_as<R: Rule, T: Real>(call: &Call<'_>, dy: &Tensor) -> Result<super::Gradients> {
    let rule = R::of(call)?;
    let heads = rule.heads();
    let shares = |input: usize| R::SHARED.contains(&input);
    let columns = |(at, x): (usize, &&Tensor)| -> Result<usize> {
        Ok(x.dim(1)? / if shares(at) { heads.key_heads } else { heads.heads })
    };
    let columns: Vec<usize> = call.inputs.iter().enumerate().map(columns).collect::<Result<_>>()?;
    // Of every example, of every block: its gradients of shared columns, then those of every head.
    let blocks = with_values(call, Some(dy), |inputs, dy| {
        Ok(over_blocks(call.layout, &heads, |span, block| {
            let zeros = |input: usize| vec![T::zero(); span.len() * columns[input]];
            let mut to = Gradients { start: span.start, inputs: (0..columns.len()).map(zeros).collect() };
            let of_head = |head: usize| {
                (0..columns.len()).filter(|at| !shares(*at)).for_each(|at| to.inputs[at] = zeros(at));
                pull(&mut rule.head(head, inputs, dy), span, heads.state(), &mut to);
                let own = |(at, of): (usize, &mut Vec<T>)| if shares(at) { Vec::new() } else { std::mem::take(of) };
                to.inputs.iter_mut().enumerate().map(own).collect::<Vec<_>>()
            };
            let own: Vec<Vec<Vec<T>>> = block.clone().map(of_head).collect();
            (heads.key_head(block.start), to.inputs, own)
        }))
    })?;
    // Of every input, of every example, its heads.
    let mut all: Vec<Vec<Vec<Vec<T>>>> = vec![Vec::new(); columns.len()];
    for example in blocks {
        let mut parts: Vec<Vec<Vec<T>>> = vec![Vec::new(); columns.len()];
        for (key_head, shared, own) in example {
            for (at, shared) in shared.into_iter().enumerate().filter(|(at, _)| shares(*at)) {
                match parts[at].get_mut(key_head) {
                    Some(sum) => sum.iter_mut().zip(shared).for_each(|(sum, more)| *sum += more),
                    None => parts[at].push(shared),
                }
            }
            for (at, own) in
                own.into_iter().flat_map(|head| head.into_iter().enumerate()).filter(|(at, _)| !shares(*at))
            {
                parts[at].push(own);
            }
        }
        all.iter_mut().zip(parts).for_each(|(all, part)| all.push(part));
    }
    let gradients = all.iter().zip(&columns).map(|(heads, width)| join(heads, *width));
    Ok(super::Gradients::of(gradients.collect::<Result<_>>()?))
}

/// Numbers of a weight, one for each head.
pub(super) fn of_heads(call: &Call<'_>, role: &str) -> Result<Vec<f64>> {
    let none = || Error::run(format!("op '{}' runs without its {role}", call.node.op));
    Ok(weight(call, role).ok_or_else(none)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use std::collections::BTreeMap;

    use dpo_plugin_api::graph::Weight;
    use serde_json::{Value, json};

    use super::super::{Kernel, find};
    use super::*;

    /// A node of an op, its weights, and columns of its inputs.
    struct Case {
        node: Node,
        weights: Vec<Tensor>,
        widths: Vec<usize>,
    }

    fn case(op: &str, widths: &[usize], width: usize, weights: &[(&str, &[usize])], attrs: Value) -> Case {
        let attrs: BTreeMap<String, Value> = serde_json::from_value(attrs).unwrap();
        let weight = |(role, shape): &(&str, &[usize])| Weight {
            role: (*role).into(),
            tensor: format!("m.{role}"),
            shape: shape.to_vec(),
        };
        let of = weights.iter().map(weight).collect();
        let node = Node { op: op.into(), inputs: (0..widths.len()).collect(), weights: of, attrs, width };
        let weights = weights.iter().enumerate().map(|(at, (_, shape))| numbers(shape, 31 + 2 * at)).collect();
        Case { node, weights, widths: widths.to_vec() }
    }

    fn cases() -> Vec<Case> {
        let (heads, groups) = (20, 2);
        let of_heads: [(&str, &[usize]); 3] = [("A_log", &[heads]), ("dt_bias", &[heads]), ("D", &[heads])];
        let delta = json!({"heads": heads, "key_heads": groups, "key_dim": 8, "value_dim": 4, "eps": 1e-6});
        let ssd = json!({"heads": heads, "head_dim": 4, "groups": groups, "state": 8});
        vec![
            case("causal_conv", &[6], 6, &[("weight", &[6, 1, 4]), ("bias", &[6])], json!({"activation": "silu"})),
            case("gated_delta", &[16, 16, 80, heads, heads], 80, &of_heads[..2], delta),
            case("ssd", &[80, 16, 16, heads], 80, &of_heads, ssd),
        ]
    }

    /// Of about -1 to 1, in f64.
    fn numbers(shape: &[usize], step: usize) -> Tensor {
        let count = shape.iter().product::<usize>();
        let values: Vec<f64> = (0..count).map(|i| ((i * step) % 211) as f64 / 105.0 - 1.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn layout(spans: &[Span]) -> Layout {
        Layout { spans: spans.to_vec(), ..Layout::default() }
    }

    impl Case {
        fn inputs(&self, rows: usize) -> Vec<Tensor> {
            self.widths.iter().enumerate().map(|(at, width)| numbers(&[rows, *width], 37 + 16 * at)).collect()
        }

        fn with<R>(&self, layout: &Layout, inputs: &[Tensor], run: impl FnOnce(&Kernel, &Call<'_>) -> R) -> R {
            let inputs = inputs.iter().collect();
            let call = Call {
                node: &self.node,
                inputs,
                weights: &self.weights,
                loras: &[],
                layout,
                input_gradients: true,
                router_dprobs: &[],
            };
            run(&find(&self.node.op).unwrap().kernel, &call)
        }

        fn forward(&self, layout: &Layout, inputs: &[Tensor]) -> Tensor {
            self.with(layout, inputs, |kernel, call| kernel.forward(call).unwrap())
        }

        fn vjp(&self, layout: &Layout, inputs: &[Tensor], dy: &Tensor) -> Vec<Tensor> {
            let gradients = self.with(layout, inputs, |kernel, call| kernel.vjp(call, dy).unwrap());
            gradients.inputs.into_iter().flatten().collect()
        }
    }

    fn apart(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    /// Two examples, of several chunks, as one batch and as rows of a prompt with one answer each.
    #[test]
    fn answers_of_a_prompt_are_rows_of_their_own() {
        let spans = [
            Span { start: 0, prompt: 150, answers: vec![70, 0, 130, 2] },
            Span { start: 352, prompt: 2, answers: vec![1, 90] },
        ];
        let rows = 352 + 93;
        for case in cases() {
            let (inputs, dy) = (case.inputs(rows), numbers(&[rows, case.node.width], 71));
            let together = layout(&spans);
            let (y, gradients) = (case.forward(&together, &inputs), case.vjp(&together, &inputs, &dy));
            let mut sums: Vec<Tensor> = inputs.iter().map(|x| x.zeros_like().unwrap()).collect();
            for span in &spans {
                let mut first = span.start + span.prompt;
                for (at, length) in span.answers.iter().enumerate() {
                    // The gradient of the prompt's own value is counted once.
                    let own = |x: &Tensor, of_prompt: f64| {
                        let prompt = (x.narrow(0, span.start, span.prompt).unwrap() * of_prompt).unwrap();
                        Tensor::cat(&[&prompt, &x.narrow(0, first, *length).unwrap()], 0).unwrap()
                    };
                    let alone = layout(&[Span { start: 0, prompt: span.prompt + length, answers: Vec::new() }]);
                    let x: Vec<Tensor> = inputs.iter().map(|x| own(x, 1.0)).collect();
                    let value = case.forward(&alone, &x);
                    assert!(apart(&value, &own(&y, 1.0)) < 1e-12, "{}: {}", case.node.op, apart(&value, &own(&y, 1.0)));
                    let dx = case.vjp(&alone, &x, &own(&dy, if at == 0 { 1.0 } else { 0.0 }));
                    for (sum, dx) in sums.iter_mut().zip(dx) {
                        let part = |from: usize, count: usize, at: usize| {
                            dx.narrow(0, from, count).unwrap().pad_with_zeros(0, at, rows - at - count).unwrap()
                        };
                        *sum = (&*sum + part(0, span.prompt, span.start)).unwrap();
                        *sum = (&*sum + part(span.prompt, *length, first)).unwrap();
                    }
                    first += length;
                }
            }
            for (at, (sum, gradient)) in sums.iter().zip(&gradients).enumerate() {
                assert!(apart(sum, gradient) < 1e-12, "{}, input {at}: {}", case.node.op, apart(sum, gradient));
            }
        }
    }

    /// A text at once, and from where an earlier part of it ended: several tokens, then one by one.
    #[test]
    fn a_text_is_continued_from_its_state() {
        for case in cases() {
            let rows = 140;
            let inputs = case.inputs(rows);
            let whole = case.forward(&layout(&[Span { start: 0, prompt: rows, answers: Vec::new() }]), &inputs);
            let (mut state, mut from) = (None, 0);
            for count in [1, 1, 1, 90, 1, 40, 1, 1, 4] {
                let part: Vec<Tensor> = inputs.iter().map(|x| x.narrow(0, from, count).unwrap()).collect();
                let (y, behind) = case.with(&Layout::after(from, count), &part, |kernel, call| match kernel {
                    Kernel::Recurrence { forward, .. } => forward(call, state.as_ref()).unwrap(),
                    _ => panic!("{} has no state", case.node.op),
                });
                assert!(apart(&y, &whole.narrow(0, from, count).unwrap()) < 1e-12, "{} at {from}", case.node.op);
                (state, from) = (Some(behind), from + count);
            }
            assert_eq!(from, rows);
        }
    }

    /// Chunks, in f32 and in f64, give what the formula gives token by token.
    #[test]
    fn chunks_compute_what_the_recurrences_say() {
        for case in cases().split_off(1) {
            let rows = 200;
            let inputs = case.inputs(rows);
            let text = layout(&[Span { start: 0, prompt: rows, answers: Vec::new() }]);
            let expected = by_token(&case, &inputs);
            let error = apart(&case.forward(&text, &inputs), &expected);
            assert!(error < 1e-12, "{}: {error}", case.node.op);
            let single = |tensors: &[Tensor]| -> Vec<Tensor> {
                tensors.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect()
            };
            let of_single = Case { weights: single(&case.weights), ..case };
            let error = apart(&of_single.forward(&text, &single(&inputs)).to_dtype(DType::F64).unwrap(), &expected);
            assert!(error < 1e-5, "{}: {error}", of_single.node.op);
        }
    }

    /// The formulas of the ops' schemas.
    fn by_token(case: &Case, inputs: &[Tensor]) -> Tensor {
        let rows = inputs[0].dim(0).unwrap();
        let inputs: Vec<Vec<f64>> = inputs.iter().map(|x| x.flatten_all().unwrap().to_vec1().unwrap()).collect();
        let weights: Vec<Vec<f64>> = case.weights.iter().map(|x| x.to_vec1().unwrap()).collect();
        let (heads, groups, key_dim, dim) = (20, 2, 8, 4);
        let softplus = |x: f64| (1.0 + x.exp()).ln();
        let mut value = Vec::new();
        let mut states = vec![[[0.0; 4]; 8]; heads];
        for row in 0..rows {
            for (head, state) in states.iter_mut().enumerate() {
                let part = |input: usize, of: usize, width: usize| {
                    let row = row * case.widths[input];
                    inputs[input][row + of * width..][..width].to_vec()
                };
                let shared = |input: usize| part(input, head / (heads / groups), key_dim);
                let (q, k, u, decay, skip);
                if case.node.op == "ssd" {
                    let step = softplus(part(3, head, 1)[0] + weights[1][head]);
                    decay = (-weights[0][head].exp() * step).exp();
                    u = part(0, head, dim).iter().map(|x| x * step).collect::<Vec<_>>();
                    (q, k) = (shared(2), shared(1));
                    skip = part(0, head, dim).iter().map(|x| x * weights[2][head]).collect();
                } else {
                    let unit = |x: Vec<f64>, scale: f64| -> Vec<f64> {
                        let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                        x.iter().map(|x| x / length * scale).collect()
                    };
                    (q, k) = (unit(shared(0), 8.0_f64.powf(-0.5)), unit(shared(1), 1.0));
                    decay = (-weights[0][head].exp() * softplus(part(3, head, 1)[0] + weights[1][head])).exp();
                    let beta = 1.0 / (1.0 + (-part(4, head, 1)[0]).exp());
                    let read = |at: usize| k.iter().zip(&*state).map(|(k, s)| k * s[at] * decay).sum::<f64>();
                    u = part(2, head, dim).iter().enumerate().map(|(at, v)| beta * (v - read(at))).collect();
                    skip = vec![0.0; dim];
                }
                for (k, state) in k.iter().zip(state.iter_mut()) {
                    state.iter_mut().zip(&u).for_each(|(s, u)| *s = *s * decay + k * u);
                }
                let read = |at: usize| q.iter().zip(&*state).map(|(q, s)| q * s[at]).sum::<f64>() + skip[at];
                value.extend((0..dim).map(read));
            }
        }
        Tensor::from_vec(value, (rows, heads * dim), &Device::Cpu).unwrap()
    }
}
