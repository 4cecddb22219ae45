//! What heads share, for each of them.

use super::AttrKind::Count;
use super::Presence::Required;
use super::{OpSchema, attr, count, same};

pub(super) const SCHEMA: OpSchema = OpSchema {
    name: "expand",
    formula: "x for every head, side by side",
    inputs: 1,
    weights: &[],
    attrs: &[attr("heads", Count, Required)],
    check: |node, widths| same("the value", node.width, widths[0].saturating_mul(count(node, "heads"))),
    reads_layout: false,
};
