//! Routers and routed experts.

use serde_json::{Value, json};

use super::{BlockBuilder, Var, tensor};
use crate::ops::AUX_LOSS_COEF;

/// How a router's logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each (DeepSeek-V3, section 2.1.2).
    Sigmoid,
    /// Softmax over the chosen ones, which the logits choose.
    SoftmaxOfChosen,
}

/// The score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert's (DeepSeek-V2).
    Max,
    /// The sum of its two best ones' (DeepSeek-V3).
    Top2Sum,
}

/// Experts in groups, of which a token takes some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Groups of neighbours, all as large.
    pub count: usize,
    /// How many a token takes experts of.
    pub top: usize,
    /// By what they are chosen.
    pub score: GroupScore,
}

/// How a token's experts are chosen.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Router {
    /// Experts a token takes.
    pub top_k: usize,
    /// What scores are.
    pub scoring: Scoring,
    /// Scores of the chosen ones are divided by their sum plus this; `None` leaves them.
    pub normalize: Option<f64>,
    /// Factor on them.
    pub scale: f64,
    /// Groups, where there are any.
    pub groups: Option<Groups>,
    /// A tensor `[experts]` that is added to scores for the choice alone.
    pub selection_bias: Option<String>,
    /// A tensor `[experts]`, a factor on the score of each that was chosen.
    pub expert_scale: Option<String>,
    /// The coefficient of the auxiliary loss that spreads tokens over experts (Fedus et al. 2021, equations 4 to 6, with `top_k` experts a
    /// token, as transformers' `load_balancing_loss_func` has it); `None` for a family without this loss.
    pub aux_loss_coef: Option<f64>,
}

impl Router {
    /// The `top_k` best ones with the scores that they have.
    pub fn new(scoring: Scoring, top_k: usize) -> Router {
        let (groups, selection_bias, expert_scale, aux_loss_coef) = Default::default();
        Router { top_k, scoring, normalize: None, scale: 1.0, groups, selection_bias, expert_scale, aux_loss_coef }
    }
}

/// Routed experts: their sizes, and the tensors they are in.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token takes at most.
    pub top_k: usize,
    /// Width inside of one.
    pub inner: usize,
    /// The activation: one of [`glu`](BlockBuilder::glu)'s, or `swiglu_oai`.
    pub activation: String,
    /// Where `swiglu_oai` clamps gate and up.
    pub limit: Option<f64>,
    /// Whether rows of gate and up take turns.
    pub interleaved: bool,
    /// The tensor of gate and up, `[count, 2·inner, hidden]`; of experts without a gate that of up, `[count, inner, hidden]`.
    pub up: String,
    /// Whether there is a gate.
    pub gated: bool,
    /// The tensor `[count, hidden, inner]`.
    pub down: String,
    /// Whether both have biases, tensors of these names with `_bias` behind.
    pub bias: bool,
}

impl Experts {
    /// Gated ones in `module.gate_up_proj` and `module.down_proj`.
    pub fn new(module: &str, count: usize, top_k: usize, inner: usize, activation: &str) -> Experts {
        Experts {
            count,
            top_k,
            inner,
            activation: activation.into(),
            limit: None,
            interleaved: false,
            up: format!("{module}.gate_up_proj"),
            gated: true,
            down: format!("{module}.down_proj"),
            bias: false,
        }
    }
}

impl BlockBuilder {
    /// The weight of every expert from a router's logits: 0 of those that are not chosen. Of equal scores the first counts.
    pub fn route(&mut self, logits: Var, router: &Router) -> Var {
        let scoring = match router.scoring {
            Scoring::Softmax => "softmax",
            Scoring::Sigmoid => "sigmoid",
            Scoring::SoftmaxOfChosen => "softmax_of_chosen",
        };
        let mut attrs = vec![("top_k", json!(router.top_k)), ("scoring", json!(scoring))];
        attrs.extend(router.normalize.map(|eps| ("normalize", json!(eps))));
        attrs.extend((router.scale != 1.0).then(|| ("scale", json!(router.scale))));
        attrs.extend(router.aux_loss_coef.map(|coef| (AUX_LOSS_COEF, json!(coef))));
        if let Some(groups) = router.groups {
            let score = if groups.score == GroupScore::Max { "max" } else { "top2_sum" };
            attrs.extend([("groups", json!(groups.count)), ("top_groups", json!(groups.top))]);
            attrs.push(("group_score", json!(score)));
        }
        let roles = [("selection_bias", &router.selection_bias), ("expert_scale", &router.expert_scale)];
        let weights = roles.into_iter().filter_map(|(role, name)| Some(tensor(role, name.as_ref()?, &[logits.width])));
        self.op("route", &[logits], weights.collect(), &attrs, logits.width)
    }

    /// What a token's experts make of it, weighted by what [`route`](Self::route) gives.
    pub fn experts(&mut self, x: Var, routing: Var, experts: &Experts) -> Var {
        let (count, hidden) = (experts.count, x.width);
        if routing.width != count {
            self.fail(format!("experts: a routing of {} columns for {count} of them", routing.width));
        }
        let (role, rows) = if experts.gated { ("gate_up", 2 * experts.inner) } else { ("up", experts.inner) };
        let (up, down) = (&experts.up, &experts.down);
        let mut weights =
            vec![tensor(role, up, &[count, rows, hidden]), tensor("down", down, &[count, hidden, experts.inner])];
        if experts.bias {
            weights.push(tensor(&format!("{role}_bias"), &format!("{up}_bias"), &[count, rows]));
            weights.push(tensor("down_bias", &format!("{down}_bias"), &[count, hidden]));
        }
        let mut attrs: Vec<(&str, Value)> =
            vec![("top_k", json!(experts.top_k)), ("activation", json!(experts.activation))];
        attrs.extend(experts.limit.map(|limit| ("limit", json!(limit))));
        attrs.extend(experts.interleaved.then(|| ("interleaved", json!(true))));
        self.op("experts", &[x, routing], weights, &attrs, hidden)
    }
}
