//! An MLP of which every token takes some of many: a mixture of experts.

use super::AttrKind::{Count, Flag, Number, OneOf};
use super::Presence::{Optional, Required};
use super::{EXPERT_ACTIVATIONS, Fits, OpSchema, attr, count, number, same, weight_shape};
use crate::graph::Node;

pub(super) const SCHEMA: OpSchema = OpSchema {
    name: "experts",
    formula: "sum over chosen experts e of routing[e] · down_e(activation(gate_e · x) · up_e · x) (+ LoRA)",
    inputs: 2,
    weights: &[
        ("gate_up", Optional),
        ("up", Optional),
        ("down", Required),
        ("gate_up_bias", Optional),
        ("up_bias", Optional),
        ("down_bias", Optional),
    ],
    attrs: &[
        attr("top_k", Count, Required),
        attr("activation", OneOf(EXPERT_ACTIVATIONS), Required),
        attr("limit", Number, Optional),
        attr("interleaved", Flag, Optional),
    ],
    check,
    reads_layout: false,
};

fn check(node: &Node, widths: &[usize]) -> Fits {
    let (hidden, experts) = (widths[0], widths[1]);
    same("the value", node.width, hidden)?;
    let (into, gated) = match (node.weight("gate_up"), node.weight("up")) {
        (Some(weight), None) => (weight, true),
        (None, Some(weight)) => (weight, false),
        _ => return Err("needs a weight of role 'gate_up', or one of role 'up'".into()),
    };
    let [_, rows, _] = into.shape[..] else {
        return Err(format!("{} '{}' is {:?}, needs three dimensions", into.role, into.tensor, into.shape));
    };
    if gated && rows % 2 != 0 {
        return Err(format!("gate_up '{}' has {rows} rows an expert, gate and up are as many", into.tensor));
    }
    let inner = if gated { rows / 2 } else { rows };
    weight_shape(node, &into.role, &[experts, rows, hidden])?;
    weight_shape(node, "down", &[experts, hidden, inner])?;
    let (own, other) = if gated { ("gate_up_bias", "up_bias") } else { ("up_bias", "gate_up_bias") };
    weight_shape(node, own, &[experts, rows])?;
    weight_shape(node, "down_bias", &[experts, hidden])?;
    if node.weight(other).is_some() {
        return Err(format!("{other} beside the weight '{}'", into.role));
    }
    let has = |name: &str| node.attrs.contains_key(name);
    let bends = node.attrs.get("activation").is_some_and(|name| name == "swiglu_oai");
    if bends && !gated {
        return Err("swiglu_oai is of a gate and up".into());
    }
    if bends != has("limit") || (bends && number(node, "limit") <= 0.0) {
        return Err("swiglu_oai has a positive 'limit', the other activations have none".into());
    }
    if !gated && has("interleaved") {
        return Err("'interleaved' is of gate_up".into());
    }
    match count(node, "top_k") > experts {
        true => Err(format!("{} experts a token of {experts}", count(node, "top_k"))),
        false => Ok(()),
    }
}
