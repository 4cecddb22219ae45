//! Graphs around the ops that carry a state from token to token.

use dpo_plugin_api::builder::{GatedDelta, Norm, StateSpace};
use dpo_plugin_api::graph::ModelGraph;

use super::case;
use crate::error::Result;

/// Of causal convolutions, gated delta nets, state spaces, and the norms of groups that come behind these.
pub(super) fn cases() -> Result<Vec<(String, ModelGraph)>> {
    let mut cases = Vec::new();
    for (taps, bias, activation) in
        [(4, false, Some("silu")), (3, true, None), (7, true, Some("silu")), (1, false, None)]
    {
        let name = format!("causal_conv of {taps}{}", if bias { ", bias" } else { "" });
        cases.push((
            name,
            case(&|b, x| {
                let h = b.linear("a", x, 136);
                b.causal_conv("conv", h, taps, bias, activation)
            })?,
        ));
    }
    for (heads, key_heads, key_dim, value_dim) in [(8, 4, 64, 64), (8, 8, 128, 128), (8, 2, 128, 64), (16, 8, 32, 32)] {
        cases.push((
            format!("gated_delta {heads} of {value_dim} on {key_heads} of {key_dim}"),
            case(&|b, x| {
                let h = b.norm(Norm::rms(1e-6), "n", x);
                let (keys, values) = (key_heads * key_dim, heads * value_dim);
                let qkv = b.linear("qkv", h, 2 * keys + values);
                let qkv = b.causal_conv("conv", qkv, 4, false, Some("silu"));
                let [q, k, v] = b.split(qkv, [keys, keys, values]);
                let (alpha, beta) = (b.linear("alpha", h, heads), b.linear("beta", h, heads));
                let numbers = GatedDelta { heads, key_heads, key_dim, value_dim, eps: 1e-6 };
                let y = b.gated_delta("", [q, k, v, alpha, beta], numbers);
                let y = b.head_norm(Norm::rms(1e-6), "norm", y, value_dim);
                let z = b.linear("z", h, values);
                b.glu("silu", z, y)
            })?,
        ));
    }
    let open = (0.0, f64::INFINITY);
    for (heads, head_dim, groups, state, dt_limit) in
        [(8, 64, 2, 128, Some(open)), (8, 32, 1, 64, None), (8, 64, 4, 32, Some((0.4, 1.0)))]
    {
        cases.push((
            format!("ssd {heads} of {head_dim}, {groups} groups of {state}"),
            case(&|b, x| {
                let h = b.norm(Norm::rms(1e-6), "n", x);
                let (wide, shared) = (heads * head_dim, groups * state);
                let all = b.linear("in_proj", h, 2 * wide + 2 * shared + heads);
                let [gate, mixed, dt] = b.split(all, [wide, wide + 2 * shared, heads]);
                let mixed = b.causal_conv("conv1d", mixed, 4, true, Some("silu"));
                let [x, bs, cs] = b.split(mixed, [wide, shared, shared]);
                let y = b.ssd("", [x, bs, cs, dt], StateSpace { heads, head_dim, groups, state, dt_limit });
                let y = b.glu("silu", gate, y);
                b.grouped_norm(Norm::rms(1e-5), "norm", y, groups)
            })?,
        ));
    }
    Ok(cases)
}
