//! Graphs around routers and experts.

use dpo_plugin_api::builder::{BlockBuilder, Experts, GroupScore, Groups, Router, Scoring, Var};
use dpo_plugin_api::graph::ModelGraph;

use super::{Body, case};
use crate::error::Result;

/// Experts behind a router whose logits are a linear's, so that both of its gradients count.
fn mixture(b: &mut BlockBuilder, x: Var, router: &Router, experts: &Experts) -> Var {
    let h = b.rms_norm("n", x, 1e-6);
    let h = b.linear("a", h, 104);
    let logits = b.linear("router", h, experts.count);
    let routing = b.route(logits, router);
    b.experts(h, routing, experts)
}

/// A graph for every kind of router and of expert.
pub(super) fn cases() -> Result<Vec<(String, ModelGraph)>> {
    let mut cases: Vec<(String, ModelGraph)> = Vec::new();
    let mut add = |name: &str, body: Body<'_>| -> Result<()> {
        cases.push((name.to_owned(), case(body)?));
        Ok(())
    };
    let normalized = |scoring, top_k| {
        let mut router = Router::new(scoring, top_k);
        router.normalize = Some(1e-20);
        router
    };
    let gated = |count, top_k| Experts::new("experts", count, top_k, 64, "silu");
    add("experts, 2 of 8 by softmax", &|b, x| mixture(b, x, &normalized(Scoring::Softmax, 2), &gated(8, 2)))?;
    add("experts, all of 8", &|b, x| mixture(b, x, &Router::new(Scoring::Softmax, 8), &gated(8, 8)))?;
    add("experts, 8 of 128 by softmax as it is, of 24 columns", &|b, x| {
        let mut experts = gated(128, 8);
        experts.inner = 24;
        mixture(b, x, &Router::new(Scoring::Softmax, 8), &experts)
    })?;
    add("experts, 3 of 16 by sigmoid, groups, a bias of the choice", &|b, x| {
        let mut router = normalized(Scoring::Sigmoid, 3);
        router.scale = 2.5;
        router.groups = Some(Groups { count: 4, top: 2, score: GroupScore::Top2Sum });
        router.selection_bias = Some("router.choice_bias".into());
        mixture(b, x, &router, &gated(16, 3))
    })?;
    add("experts as gpt-oss has them", &|b, x| {
        let mut experts = gated(8, 4);
        (experts.activation, experts.limit) = ("swiglu_oai".into(), Some(1.0));
        (experts.interleaved, experts.bias) = (true, true);
        mixture(b, x, &Router::new(Scoring::SoftmaxOfChosen, 4), &experts)
    })?;
    for (name, scoring) in [("softmax", Scoring::Softmax), ("sigmoid", Scoring::Sigmoid)] {
        add(&format!("routers with an auxiliary loss, {name}"), &|b, x| {
            let mut router = normalized(scoring, 2);
            router.aux_loss_coef = Some(0.5);
            router.selection_bias = (scoring == Scoring::Sigmoid).then(|| "router.choice_bias".into());
            mixture(b, x, &router, &gated(12, 2))
        })?;
    }
    add("experts without a gate, factors of experts", &|b, x| {
        let mut experts = gated(8, 2);
        (experts.activation, experts.gated, experts.up) = ("relu2".into(), false, "experts.up_proj".into());
        let mut router = normalized(Scoring::Softmax, 2);
        router.expert_scale = Some("router.per_expert_scale".into());
        mixture(b, x, &router, &experts)
    })?;
    add("experts and one that is shared, with a gate of one column", &|b, x| {
        let routed = mixture(b, x, &normalized(Scoring::Softmax, 2), &gated(8, 2));
        let (gate, up) = (b.linear("shared.gate", x, 72), b.linear("shared.up", x, 72));
        let shared = b.glu("silu", gate, up);
        let (shared, gate) = (b.linear("shared.down", shared, 104), b.linear("shared_gate", x, 1));
        let shared = b.glu("sigmoid", gate, shared);
        b.add(routed, shared)
    })?;
    add("a gate of two columns", &|b, x| {
        let (gate, up) = (b.linear("gate", x, 2), b.linear("up", x, 144));
        b.glu("sigmoid", gate, up)
    })?;
    Ok(cases)
}
