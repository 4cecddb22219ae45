//! Which experts a token is sent to, and what each of them counts: the scores of the best ones, 0 of the others.
//!
//! Scores are softmax or sigmoid of the logits. The choice has no derivative; what a chosen expert counts has one by its own logit and, where
//! scores are a softmax or are divided by their sum, by the others'. All of it is computed in f64: a row has as many numbers as there
//! are experts.

use candle_core::{DType, Device, Tensor};
use dpo_plugin_api::graph::Node;
use serde_json::Value;

use super::real::Real;
use super::rows::{RowOp, over_rows};
use super::{Call, Gradients, Kernel, Op, add, count, number, weight};
use crate::aux_loss::{RouterLoad, is_balanced};
use crate::error::Result;

pub(super) const OP: Op = Op { name: "route", cached_inputs: &[], kernel: Kernel::Value { forward, vjp } };

#[derive(Clone, Copy, PartialEq)]
enum Scoring {
    Softmax,
    Sigmoid,
    SoftmaxOfChosen,
}

struct Route {
    top_k: usize,
    scoring: Scoring,
    /// Scores are divided by their sum plus this.
    normalize: Option<f64>,
    scale: f64,
    groups: Option<Groups>,
}

/// Groups of experts, of which the best ones are taken.
struct Groups {
    count: usize,
    top: usize,
    /// How many of a group's best scores are its own.
    best: usize,
}

/// From logits, the bias of the choice and factors of experts.
struct Forward(Route);
/// From these and the gradient of the value.
struct Vjp(Route);

/// What was chosen of a row: experts in their order, with what they count before factors, and the divisor of that.
struct Chosen {
    experts: Vec<usize>,
    /// Of every expert.
    scores: Vec<f64>,
    divisor: f64,
}

impl Route {
    fn of(node: &Node) -> Route {
        let text = |name: &str| node.attrs.get(name).and_then(Value::as_str);
        let has = |name: &str| node.attrs.contains_key(name);
        Route {
            top_k: count(node, "top_k"),
            scoring: match text("scoring") {
                Some("sigmoid") => Scoring::Sigmoid,
                Some("softmax_of_chosen") => Scoring::SoftmaxOfChosen,
                _ => Scoring::Softmax,
            },
            normalize: has("normalize").then(|| number(node, "normalize")),
            scale: if has("scale") { number(node, "scale") } else { 1.0 },
            groups: has("groups").then(|| Groups {
                count: count(node, "groups"),
                top: count(node, "top_groups"),
                best: if text("group_score") == Some("top2_sum") { 2 } else { 1 },
            }),
        }
    }

    fn choose<T: Real>(&self, logits: &[T], bias: &[T]) -> Chosen {
        let mut scores: Vec<f64> = logits.iter().map(|v| v.to_f64()).collect();
        match self.scoring {
            Scoring::Softmax => softmax(&mut scores),
            Scoring::Sigmoid => scores.iter_mut().for_each(|v| *v = 1.0 / (1.0 + (-*v).exp())),
            Scoring::SoftmaxOfChosen => {}
        }
        let mut choice: Vec<f64> = scores.iter().zip(bias).map(|(score, bias)| score + bias.to_f64()).collect();
        if let Some(groups) = &self.groups {
            let size = choice.len() / groups.count.max(1);
            let of_group = |group: &[f64]| best(group, groups.best).iter().map(|at| group[*at]).sum();
            let of_groups: Vec<f64> = choice.chunks(size.max(1)).map(of_group).collect();
            let taken = best(&of_groups, groups.top);
            let others = choice.chunks_mut(size.max(1)).enumerate().filter(|(group, _)| !taken.contains(group));
            others.for_each(|(_, group)| group.fill(f64::NEG_INFINITY));
        }
        let mut experts = best(&choice, self.top_k);
        experts.sort_unstable();
        if self.scoring == Scoring::SoftmaxOfChosen {
            let mut own: Vec<f64> = experts.iter().map(|at| scores[*at]).collect();
            softmax(&mut own);
            scores.fill(0.0);
            experts.iter().zip(own).for_each(|(at, score)| scores[*at] = score);
        }
        let sum = || experts.iter().map(|at| scores[*at]).sum::<f64>();
        let divisor = self.normalize.map_or(1.0, |eps| sum() + eps);
        Chosen { experts, scores, divisor }
    }
}

/// The places of the largest values, from the largest on; of equal ones the first come first.
fn best(values: &[f64], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    places.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    places.truncate(count);
    places
}

fn softmax(values: &mut [f64]) {
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    values.iter_mut().for_each(|v| *v = (*v - top).exp());
    let sum: f64 = values.iter().sum();
    values.iter_mut().for_each(|v| *v /= sum);
}

impl RowOp<3, 1> for Forward {
    fn row<T: Real>(&self, [logits, bias, factors]: [&[T]; 3], [y]: [&mut [T]; 1]) {
        let Chosen { experts, scores, divisor } = self.0.choose(logits, bias);
        y.fill(T::zero());
        for at in experts {
            y[at] = T::from_f64(scores[at] / divisor * self.0.scale * factors[at].to_f64());
        }
    }
}

/// Of `w = s / (Σ s + eps)` over the chosen: `ds = (dw - Σ dw · w) / (Σ s + eps)`. Of a softmax: `dz = s · (ds - Σ ds · s)`.
impl RowOp<4, 1> for Vjp {
    fn row<T: Real>(&self, [logits, bias, factors, dy]: [&[T]; 4], [dx]: [&mut [T]; 1]) {
        let Chosen { experts, scores, divisor } = self.0.choose(logits, bias);
        let by_weight = |at: &usize| dy[*at].to_f64() * self.0.scale * factors[*at].to_f64();
        let mut ds: Vec<f64> = experts.iter().map(by_weight).collect();
        let along = |ds: &[f64]| experts.iter().zip(ds).map(|(at, ds)| scores[*at] * ds).sum::<f64>();
        if self.0.normalize.is_some() {
            let mean = along(&ds) / divisor;
            ds.iter_mut().for_each(|ds| *ds = (*ds - mean) / divisor);
        }
        dx.fill(T::zero());
        let inside = along(&ds);
        match self.0.scoring {
            Scoring::Sigmoid => {}
            Scoring::Softmax => {
                dx.iter_mut().zip(&scores).for_each(|(dx, score)| *dx = T::from_f64(-score * inside));
            }
            Scoring::SoftmaxOfChosen => {
                experts.iter().for_each(|at| dx[*at] = T::from_f64(-scores[*at] * inside));
            }
        }
        for (at, ds) in experts.iter().zip(ds) {
            let score = scores[*at];
            let slope = if self.0.scoring == Scoring::Sigmoid { score * (1.0 - score) } else { score };
            dx[*at] += T::from_f64(slope * ds);
        }
    }
}

/// Of `Σ_t texts_t · Σ_e dprob_e · p_te`, `p` a softmax of the logits: `dz = texts · p · (dprob - Σ dprob · p)`.
struct Balance;

impl RowOp<3, 1> for Balance {
    fn row<T: Real>(&self, [logits, dprobs, texts]: [&[T]; 3], [dx]: [&mut [T]; 1]) {
        let mut probs: Vec<f64> = logits.iter().map(|v| v.to_f64()).collect();
        softmax(&mut probs);
        let mean: f64 = probs.iter().zip(dprobs).map(|(prob, dprob)| prob * dprob.to_f64()).sum();
        for ((dx, prob), dprob) in dx.iter_mut().zip(probs).zip(dprobs) {
            *dx = T::from_f64(texts[0].to_f64() * prob * (dprob.to_f64() - mean));
        }
    }
}

/// Adds what a router with logits `[tokens, experts]` does with tokens, of which each is in so many texts. Probabilities are a softmax and
/// the best ones are chosen, whatever the router makes of its logits.
pub fn count_load(node: &Node, logits: &Tensor, texts: &[u32], load: &mut RouterLoad) -> Result<()> {
    let (top_k, logits) = (count(node, "top_k"), logits.to_dtype(DType::F64)?.to_vec2::<f64>()?);
    for (mut probs, texts) in logits.into_iter().zip(texts.iter().map(|texts| f64::from(*texts))) {
        softmax(&mut probs);
        best(&probs, top_k).into_iter().for_each(|expert| load.counts[expert] += texts);
        load.probs.iter_mut().zip(&probs).for_each(|(sum, prob)| *sum += texts * prob);
        load.tokens += texts;
    }
    Ok(())
}

/// The weight of a role as a row, or so many times a number.
fn row(call: &Call<'_>, role: &str, without: f64) -> Result<Tensor> {
    let dtype = call.inputs[0].dtype();
    match weight(call, role) {
        Some(weight) => Ok(weight.to_dtype(dtype)?),
        None => Ok(Tensor::full(without, call.node.width, &Device::Cpu)?.to_dtype(dtype)?),
    }
}

fn forward(call: &Call<'_>) -> Result<Tensor> {
    let (bias, factors) = (row(call, "selection_bias", 0.0)?, row(call, "expert_scale", 1.0)?);
    let [y] = over_rows(&Forward(Route::of(call.node)), [call.inputs[0], &bias, &factors], [call.node.width])?;
    Ok(y)
}

fn vjp(call: &Call<'_>, dy: &Tensor) -> Result<Gradients> {
    let (bias, factors) = (row(call, "selection_bias", 0.0)?, row(call, "expert_scale", 1.0)?);
    let [dx] = over_rows(&Vjp(Route::of(call.node)), [call.inputs[0], &bias, &factors, dy], [call.node.width])?;
    if call.router_dprobs.is_empty() || !is_balanced(call.node) {
        return Ok(Gradients::of(vec![dx]));
    }
    let dtype = dx.dtype();
    let dprobs = Tensor::new(call.router_dprobs, &Device::Cpu)?.to_dtype(dtype)?;
    let texts: Vec<f64> = call.layout.texts.iter().map(|texts| f64::from(*texts)).collect();
    let texts = Tensor::from_vec(texts, (call.layout.texts.len(), 1), &Device::Cpu)?.to_dtype(dtype)?;
    let [of_loss] = over_rows(&Balance, [call.inputs[0], &dprobs, &texts], [call.node.width])?;
    Ok(Gradients::of(vec![add(&dx, &of_loss)?]))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use serde_json::json;

    use super::*;

    const LOGITS: [[f32; 8]; 2] = [
        [-0.109375, 0.546875, -1.171875, 0.109375, 1.0, -0.4375, 2.4375, -2.390625],
        [-0.078125, -0.453125, 0.375, -0.328125, 1.375, 0.3125, 0.859375, 0.625],
    ];
    const BIAS: [f32; 8] = [-0.4375, 0.296875, 0.15625, 0.375, -0.265625, 0.09375, 0.125, -0.03125];

    /// Of both rows the experts that are chosen, and what they count.
    fn routed(attrs: Value, bias: &[f32]) -> Vec<Vec<(usize, f32)>> {
        let node = Node {
            op: "route".into(),
            inputs: vec![0],
            weights: Vec::new(),
            attrs: serde_json::from_value(attrs).unwrap(),
            width: 8,
        };
        let op = Forward(Route::of(&node));
        let of_row = |logits: &[f32; 8]| {
            let mut y = [0.0; 8];
            op.row([&logits[..], bias, &[1.0; 8]], [&mut y[..]]);
            y.into_iter().enumerate().filter(|(_, weight)| *weight != 0.0).collect()
        };
        LOGITS.iter().map(of_row).collect()
    }

    /// The numbers are torch's, by the formulas of transformers' routers (Qwen3 MoE, gpt-oss, DeepSeek-V3 and V2).
    #[test]
    fn weights_are_those_of_torch() {
        type Rows = [[(usize, f32); 3]; 2];
        let cases: [(Value, bool, Rows); 5] = [
            (
                json!({"top_k": 3, "scoring": "softmax"}),
                false,
                [[(1, 0.0911815), (4, 0.1434487), (6, 0.6039416)], [(4, 0.2976518), (6, 0.177736), (7, 0.1406007)]],
            ),
            (
                json!({"top_k": 3, "scoring": "softmax", "normalize": 0.0}),
                false,
                [[(1, 0.1087343), (4, 0.1710631), (6, 0.7202026)], [(4, 0.4832099), (6, 0.2885378), (7, 0.2282522)]],
            ),
            (
                json!({"top_k": 3, "scoring": "softmax_of_chosen"}),
                false,
                [[(1, 0.1087343), (4, 0.1710631), (6, 0.7202026)], [(4, 0.48321), (6, 0.2885378), (7, 0.2282522)]],
            ),
            (
                json!({"top_k": 3, "scoring": "sigmoid", "normalize": 1e-20, "scale": 2.5, "groups": 4, "top_groups": 2,
                    "group_score": "top2_sum"}),
                true,
                [[(2, 0.3512321), (3, 0.7830774), (6, 1.3656907)], [(2, 0.8645033), (3, 0.6107394), (6, 1.0247574)]],
            ),
            (
                json!({"top_k": 3, "scoring": "softmax", "scale": 1.5, "groups": 4, "top_groups": 2, "group_score": "max"}),
                false,
                [[(4, 0.2151731), (5, 0.0511081), (6, 0.9059124)], [(4, 0.4464777), (6, 0.266604), (7, 0.2109011)]],
            ),
        ];
        for (attrs, biased, expected) in cases {
            let rows = routed(attrs.clone(), if biased { &BIAS } else { &[0.0; 8] });
            for (row, expected) in rows.iter().zip(expected) {
                assert_eq!(row.len(), 3, "{attrs}");
                for ((expert, weight), (wanted, torch)) in row.iter().zip(expected) {
                    assert!(*expert == wanted && (weight - torch).abs() < 1e-6, "{attrs}: {row:?}, not {expected:?}");
                }
            }
        }
    }

    #[test]
    fn of_equal_scores_the_first_counts() {
        assert_eq!(best(&[0.5, 1.0, 0.5, 1.0, 0.5], 3), [1, 3, 0]);
    }
}
