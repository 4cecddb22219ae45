//! Cases of ops that work on heads: attention, and columns that are taken, put together and repeated.

use dpo_plugin_api::builder::{Attention, Norm};
use dpo_plugin_api::graph::ModelGraph;
use dpo_plugin_api::rope::Rope;

use super::{Body, case};
use crate::error::Result;

pub(super) fn cases() -> Result<Vec<(String, ModelGraph)>> {
    let mut cases: Vec<(String, ModelGraph)> = Vec::new();
    let mut add = |name: String, body: Body<'_>| -> Result<()> {
        cases.push((name, case(body)?));
        Ok(())
    };
    let shapes = [
        (16, 1, 3, None, None),
        (32, 2, 4, None, None),
        (64, 2, 2, Some(40), None),
        (80, 1, 2, None, None),
        (96, 1, 4, Some(9), None),
        (112, 1, 1, None, None),
        (128, 1, 7, None, None),
        (128, 2, 4, Some(100), Some(2.0)),
        (160, 1, 2, Some(12), None),
        (256, 1, 2, None, Some(0.5)),
        (256, 2, 2, Some(33), None),
        (512, 1, 2, None, None),
        (512, 2, 2, Some(21), Some(2.0)),
    ];
    for (dim, kv_heads, share, window, softcap) in shapes {
        let heads = kv_heads * share;
        let mut name = format!("attention {heads} of {dim} on {kv_heads}");
        name.extend(window.map(|w| format!(", window {w}")));
        name.extend(softcap.map(|c| format!(", cap {c}")));
        add(name, &|b, x| {
            let h = b.rms_norm("n", x, 1e-6);
            let (q, k) = (b.linear("q", h, heads * dim), b.linear("k", h, kv_heads * dim));
            let v = b.linear("v", h, kv_heads * dim);
            b.attention(q, k, v, Attention::new(heads, kv_heads, dim).window(window).softcap(softcap))
        })?;
    }
    // Of queries and keys and of values; whether there are sinks.
    let shapes = [
        ((64, 64), 2, 4, Some(40), true),
        ((96, 64), 1, 3, None, false),
        ((96, 64), 2, 1, None, true),
        ((160, 160), 1, 2, None, true),
        ((192, 128), 2, 2, None, false),
        ((192, 128), 1, 2, Some(20), true),
        ((192, 192), 1, 2, None, false),
        ((256, 256), 1, 2, None, true),
        ((512, 512), 1, 2, None, true),
    ];
    for ((dim, value_dim), kv_heads, share, window, sinks) in shapes {
        let heads = kv_heads * share;
        let mut name = format!("attention {heads} of {dim} on {kv_heads}");
        name.extend((value_dim != dim).then(|| format!(", values of {value_dim}")));
        name.extend(window.map(|w| format!(", window {w}")));
        name.extend(sinks.then_some(", sinks"));
        add(name, &|b, x| {
            let h = b.rms_norm("n", x, 1e-6);
            let (q, k) = (b.linear("q", h, heads * dim), b.linear("k", h, kv_heads * dim));
            let v = b.linear("v", h, kv_heads * value_dim);
            let of = Attention::new(heads, kv_heads, dim).value_dim(value_dim).window(window);
            b.attention_with(q, k, v, of, sinks.then_some("sinks"))
        })?;
    }
    let rope = Rope { interleaved: true, ..Rope::of((0..8).map(|j| 0.6_f64.powi(j)).collect()) };
    add("multi-head latent attention".into(), &|b, x| {
        let q = b.linear("q", x, 3 * 32);
        let q = b.rope_from(q, 32, 16, &rope);
        let kv = b.linear("kv_a", x, 40 + 16);
        let [kv, k_turned] = b.split(kv, [40, 16]);
        let kv = b.norm(Norm::rms(1e-6), "n", kv);
        let kv = b.linear("kv_b", kv, 3 * (16 + 32));
        let [k, v] = b.split_heads(kv, 3, [16, 32]);
        let k_turned = b.rope(k_turned, 16, &rope);
        let k_turned = b.expand(k_turned, 3);
        let k = b.cat_heads(k, k_turned, 3);
        b.attention(q, k, v, Attention::new(3, 3, 32))
    })?;
    add("attention with a gate beside the queries of every head".into(), &|b, x| {
        let both = b.linear("q", x, 2 * 64);
        let [q, gate] = b.split_heads(both, 2, [32, 32]);
        let (k, v) = (b.linear("k", x, 32), b.linear("v", x, 32));
        let attended = b.attention(q, k, v, Attention::new(2, 1, 32));
        b.glu("sigmoid", gate, attended)
    })?;
    add("columns of heads that overlap, a value that is read again, one for all heads".into(), &|b, x| {
        let h = b.linear("a", x, 3 * 32);
        let (p, q) = (b.narrow_heads(h, 3, 0, 24), b.narrow_heads(h, 3, 8, 24));
        let both = b.cat_heads(p, q, 3);
        let (one, all) = (b.linear("b", x, 16), b.linear("c", h, 16));
        let one = b.add(one, all);
        let (few, many) = (b.expand(one, 3), b.expand(one, 9));
        let sum = b.add(both, many);
        b.cat_heads(sum, few, 3)
    })?;
    Ok(cases)
}
