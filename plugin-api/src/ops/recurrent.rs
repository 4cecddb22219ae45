//! Schemas of the ops that carry a state from token to token: a short convolution, the gated delta rule, Mamba 2's state space.

use super::AttrKind::{Count, Number, OneOf};
use super::Presence::{Optional, Required};
use super::{Attr, OpSchema, attr, count, number, same, weight_shape};

const HEADS: [Attr; 4] = [
    attr("heads", Count, Required),
    attr("key_heads", Count, Required),
    attr("key_dim", Count, Required),
    attr("value_dim", Count, Required),
];

/// A depthwise convolution over the text so far.
pub(super) const CAUSAL_CONV: OpSchema = OpSchema {
    name: "causal_conv",
    formula: "activation(Σ_j weight[K-1-j] · x[t-j] + bias) of every column; before the prompt are zeros, before an answer the prompt",
    inputs: 1,
    weights: &[("weight", Required), ("bias", Optional)],
    attrs: &[attr("activation", OneOf(&["silu"]), Optional)],
    check: |node, widths| {
        let taps = node.weight("weight").and_then(|w| w.shape.last()).copied().unwrap_or(0);
        if taps == 0 {
            return Err("a convolution over no token".into());
        }
        weight_shape(node, "weight", &[node.width, 1, taps])?;
        weight_shape(node, "bias", &[node.width])?;
        same("the value", node.width, widths[0])
    },
    reads_layout: true,
};

/// The recurrence of gated delta nets (Yang et al. 2024, "Gated Delta Networks", eq. 10).
pub(super) const GATED_DELTA: OpSchema = OpSchema {
    name: "gated_delta",
    formula: "S = e^g·S; S += k·(beta·(v - Sᵀk))ᵀ; Sᵀq of every head; beta = sigmoid(b), g = -exp(A_log)·softplus(a + dt_bias)",
    inputs: 5,
    weights: &[("A_log", Required), ("dt_bias", Required)],
    attrs: &[HEADS[0], HEADS[1], HEADS[2], HEADS[3], attr("eps", Number, Required)],
    check: |node, widths| {
        let [heads, key_heads, key_dim, value_dim] = HEADS.each_ref().map(|a| count(node, a.name));
        share("key heads", heads, key_heads)?;
        let (keys, values) = (key_heads.saturating_mul(key_dim), heads.saturating_mul(value_dim));
        let inputs = [("q", keys), ("k", keys), ("v", values), ("a", heads), ("b", heads)];
        inputs.iter().zip(widths).try_for_each(|((name, needs), is)| same(name, *is, *needs))?;
        ["A_log", "dt_bias"].iter().try_for_each(|role| weight_shape(node, role, &[heads]))?;
        same("the value", node.width, values)
    },
    reads_layout: true,
};

/// The state space of Mamba 2 (Dao and Gu 2024, "Transformers are SSMs", section 2).
pub(super) const SSD: OpSchema = OpSchema {
    name: "ssd",
    formula: "S = e^(-exp(A_log)·d)·S + d·x·Bᵀ; S·C + D·x of every head; d = softplus(dt + dt_bias), between dt_min and dt_max",
    inputs: 4,
    weights: &[("A_log", Required), ("D", Required), ("dt_bias", Required)],
    attrs: &[
        attr("heads", Count, Required),
        attr("head_dim", Count, Required),
        attr("groups", Count, Required),
        attr("state", Count, Required),
        attr("dt_min", Number, Optional),
        attr("dt_max", Number, Optional),
    ],
    check: |node, widths| {
        let [heads, dim, groups, state] = ["heads", "head_dim", "groups", "state"].map(|name| count(node, name));
        share("groups", heads, groups)?;
        let (wide, keys) = (heads.saturating_mul(dim), groups.saturating_mul(state));
        let inputs = [("x", wide), ("B", keys), ("C", keys), ("dt", heads)];
        inputs.iter().zip(widths).try_for_each(|((name, needs), is)| same(name, *is, *needs))?;
        ["A_log", "D", "dt_bias"].iter().try_for_each(|role| weight_shape(node, role, &[heads]))?;
        if node.attrs.contains_key("dt_max") && number(node, "dt_max") < number(node, "dt_min") {
            return Err("dt_max is less than dt_min".into());
        }
        same("the value", node.width, wide)
    },
    reads_layout: true,
};

fn share(what: &str, heads: usize, of: usize) -> Result<(), String> {
    match of > 0 && heads.is_multiple_of(of) {
        true => Ok(()),
        false => Err(format!("{heads} heads cannot share {of} {what}")),
    }
}
