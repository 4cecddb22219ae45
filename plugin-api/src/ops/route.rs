//! Which experts a token is sent to, and what each of them counts.

use super::AttrKind::{Count, Number, OneOf};
use super::Presence::{Optional, Required};
use super::{Fits, OpSchema, attr, count, number, same, weight_shape};
use crate::graph::Node;

/// The attribute of the coefficient of the auxiliary loss. It changes no value of the graph.
pub const AUX_LOSS_COEF: &str = "router_aux_loss_coef";

pub(super) const SCHEMA: OpSchema = OpSchema {
    name: "route",
    formula: "scores of the top_k experts, 0 of the others; softmax or sigmoid of the logits, divided by their sum + normalize, times scale",
    inputs: 1,
    weights: &[("selection_bias", Optional), ("expert_scale", Optional)],
    attrs: &[
        attr("top_k", Count, Required),
        attr("scoring", OneOf(&["softmax", "sigmoid", "softmax_of_chosen"]), Required),
        attr("normalize", Number, Optional),
        attr("scale", Number, Optional),
        attr("groups", Count, Optional),
        attr("top_groups", Count, Optional),
        attr("group_score", OneOf(&["max", "top2_sum"]), Optional),
        attr(AUX_LOSS_COEF, Number, Optional),
    ],
    check,
    reads_layout: false,
};

fn check(node: &Node, widths: &[usize]) -> Fits {
    let (experts, top_k) = (widths[0], count(node, "top_k"));
    same("the value", node.width, experts)?;
    weight_shape(node, "selection_bias", &[experts])?;
    weight_shape(node, "expert_scale", &[experts])?;
    let has = |name: &str| node.attrs.contains_key(name);
    if has(AUX_LOSS_COEF) && number(node, AUX_LOSS_COEF) < 0.0 {
        return Err(format!("{AUX_LOSS_COEF} is negative"));
    }
    if ["groups", "top_groups", "group_score"].iter().any(|name| has(name) != has("groups")) {
        return Err("groups, top_groups and group_score go together".into());
    }
    let (groups, chosen) = if has("groups") { (count(node, "groups"), count(node, "top_groups")) } else { (1, 1) };
    if !experts.is_multiple_of(groups) || chosen > groups {
        return Err(format!("{chosen} of {groups} groups of {experts} experts"));
    }
    match top_k > experts / groups * chosen {
        true => Err(format!("{top_k} experts of the {} in {chosen} of {groups} groups", experts / groups * chosen)),
        false => Ok(()),
    }
}
