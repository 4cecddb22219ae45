//! What tests read of a token's rows.

use super::super::Emulation;
use super::{Activation, Experts, SWIGLU_OAI};

/// A token's rows, and the expert of each.
pub(super) fn rows(own: &Experts, plan: &[f32]) -> Vec<(usize, usize)> {
    let rows = plan[..own.top_k].iter().enumerate();
    rows.filter(|(_, expert)| **expert >= 0.0).map(|(at, expert)| (at, *expert as usize)).collect()
}

pub(super) fn biases(own: &Experts, on: &Emulation<'_>) -> [Vec<f32>; 2] {
    let of = |which: usize, width: usize| {
        own.biases[which].map_or_else(|| vec![0.0; own.count * width], |vector| on.vector(vector))
    };
    [of(0, own.into), of(1, own.hidden)]
}

/// The columns of gate and up.
pub(super) fn columns(own: &Experts, i: usize) -> (usize, Option<usize>) {
    match (own.into > own.inner, own.interleaved) {
        (false, _) => (i, None),
        (_, true) => (2 * i, Some(2 * i + 1)),
        (_, false) => (i, Some(own.inner + i)),
    }
}

/// Gate and up of a column of a row, of its expert; up is 1 without a gate.
pub(super) fn both(own: &Experts, x: &[f32], bias: &[f32], (at, expert): (usize, usize), i: usize) -> [f32; 2] {
    let value = |column: usize| x[at * own.lds(0)[1] + column] + bias[expert * own.into + column];
    let (gate, up) = columns(own, i);
    [value(gate), up.map_or(1.0, value)]
}

/// Value, and derivatives by gate and up.
pub(super) fn unit(own: &Experts, gate: f32, up: f32) -> [f32; 3] {
    if own.activation != SWIGLU_OAI {
        let (value, slope) = Activation { width: own.inner, kind: own.activation, limit: 0.0 }.at(gate);
        return [value * up, slope * up, value];
    }
    let inside = [gate <= own.limit, up.abs() <= own.limit].map(|inside| if inside { 1.0 } else { 0.0 });
    let (gate, up) = (gate.min(own.limit), up.clamp(-own.limit, own.limit));
    let s = 1.0 / (1.0 + (-1.702 * gate).exp());
    let slope = s + 1.702 * gate * s * (1.0 - s);
    [(up + 1.0) * gate * s, (up + 1.0) * slope * inside[0], gate * s * inside[1]]
}
