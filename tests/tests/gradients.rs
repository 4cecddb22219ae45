//! Every op of the table: its VJP against central differences in f64. An op without a case here fails.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use dpo_core::aux_loss::{AuxLoss, RouterLoad};
use dpo_core::batch::{Batch, Layout};
use dpo_core::ops::lm_head::{self, Projection};
use dpo_core::ops::{self, Call, Dropout, GATHER, INTERNAL, Kernel, Lora, OPS};
use dpo_plugin_api::graph::{Node, Weight};
use dpo_plugin_api::ops::check_node;
use dpo_tests::{Numbers, examples};
use serde_json::{Value, json};

struct Case {
    op: &'static str,
    /// Columns of the inputs, and of the value.
    widths: Vec<usize>,
    width: usize,
    weights: Vec<(&'static str, Vec<usize>)>,
    attrs: Value,
    lora: Kind,
}

/// What kind of update a linear has.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    None,
    Plain,
    /// Minus what it began with, with numbers dropped.
    Subtracted,
    /// DoRA, and the same with numbers dropped.
    Dora,
    DroppedDora,
}

fn case(op: &'static str, widths: &[usize], width: usize, weights: &[(&'static str, &[usize])], attrs: Value) -> Case {
    let weights = weights.iter().map(|(role, shape)| (*role, shape.to_vec())).collect();
    Case { op, widths: widths.to_vec(), width, weights, attrs, lora: Kind::None }
}

fn cases() -> Vec<Case> {
    let attention = |window: Option<usize>, softcap: Option<f64>| {
        let mut attrs = json!({"heads": 4, "kv_heads": 2, "head_dim": 6, "scale": 0.37});
        window.iter().for_each(|w| attrs["window"] = json!(w));
        softcap.iter().for_each(|c| attrs["softcap"] = json!(c));
        case("attention", &[24, 12, 12], 24, &[], attrs)
    };
    let glu = |activation: &str| case("glu", &[7, 7], 7, &[], json!({"activation": activation}));
    let gated_delta = |heads: usize, key_heads: usize| {
        let attrs = json!({"heads": heads, "key_heads": key_heads, "key_dim": 3, "value_dim": 4, "eps": 1e-6});
        let (keys, values) = (key_heads * 3, heads * 4);
        let weights: &[(&str, &[usize])] = &[("A_log", &[heads]), ("dt_bias", &[heads])];
        case("gated_delta", &[keys, keys, values, heads, heads], values, weights, attrs)
    };
    let ssd = |heads: usize, groups: usize, more: Value| {
        let mut attrs = json!({"heads": heads, "head_dim": 4, "groups": groups, "state": 3});
        attrs.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let weights: &[(&str, &[usize])] = &[("A_log", &[heads]), ("D", &[heads]), ("dt_bias", &[heads])];
        case("ssd", &[heads * 4, groups * 3, groups * 3, heads], heads * 4, weights, attrs)
    };
    let route = |weights: &[(&'static str, &[usize])], attrs: Value| case("route", &[12], 12, weights, attrs);
    let experts = |weights: &[(&'static str, &[usize])], attrs: Value| case("experts", &[5, 3], 5, weights, attrs);
    let linear = |bias: bool, lora: Kind| {
        let weights: &[(&str, &[usize])] = &[("weight", &[5, 7]), ("bias", &[5])];
        Case { lora, ..case("linear", &[7], 5, &weights[..1 + usize::from(bias)], json!({})) }
    };
    vec![
        case("add", &[5, 5], 5, &[], json!({})),
        attention(None, None),
        attention(Some(4), None),
        attention(None, Some(0.8)),
        case(
            "attention",
            &[24, 12, 8],
            16,
            &[("sinks", &[4])],
            json!({"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 4, "scale": 0.37, "window": 5}),
        ),
        glu("silu"),
        glu("gelu"),
        glu("gelu_tanh"),
        glu("relu2"),
        glu("sigmoid"),
        glu("identity"),
        case("glu", &[1, 9], 9, &[], json!({"activation": "sigmoid"})),
        case("glu", &[2, 6], 6, &[], json!({"activation": "silu"})),
        route(&[], json!({"top_k": 3, "scoring": "softmax"})),
        route(&[], json!({"top_k": 4, "scoring": "softmax", "normalize": 0.0})),
        route(&[], json!({"top_k": 4, "scoring": "softmax_of_chosen", "scale": 1.3})),
        route(
            &[("selection_bias", &[12]), ("expert_scale", &[12])],
            json!({"top_k": 4, "scoring": "sigmoid", "normalize": 0.1, "scale": 2.5}),
        ),
        route(
            &[("selection_bias", &[12])],
            json!({"top_k": 3, "scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "top2_sum"}),
        ),
        route(&[], json!({"top_k": 2, "scoring": "softmax", "groups": 3, "top_groups": 1, "group_score": "max"})),
        experts(&[("gate_up", &[3, 8, 5]), ("down", &[3, 5, 4])], json!({"top_k": 3, "activation": "silu"})),
        experts(
            &[("gate_up", &[3, 8, 5]), ("down", &[3, 5, 4]), ("gate_up_bias", &[3, 8]), ("down_bias", &[3, 5])],
            json!({"top_k": 3, "activation": "swiglu_oai", "limit": 0.9, "interleaved": true}),
        ),
        experts(
            &[("gate_up", &[3, 8, 5]), ("down", &[3, 5, 4])],
            json!({"top_k": 3, "activation": "gelu_tanh", "interleaved": true}),
        ),
        experts(
            &[("up", &[3, 4, 5]), ("down", &[3, 5, 4]), ("up_bias", &[3, 4])],
            json!({"top_k": 3, "activation": "relu2"}),
        ),
        case("activation", &[7], 7, &[], json!({"activation": "gelu_tanh"})),
        case("activation", &[7], 7, &[], json!({"activation": "relu2"})),
        case("activation", &[7], 7, &[], json!({"activation": "clamp", "limit": 0.4})),
        case("xielu", &[7], 7, &[("alpha_p", &[1]), ("alpha_n", &[1]), ("beta", &[]), ("eps", &[])], json!({})),
        case("narrow", &[9], 4, &[], json!({"start": 3, "length": 4})),
        case("narrow", &[9], 9, &[], json!({"length": 9})),
        case("narrow", &[15], 6, &[], json!({"start": 1, "length": 2, "heads": 3})),
        case("cat", &[3, 5], 8, &[], json!({})),
        case("cat", &[6, 9], 15, &[], json!({"heads": 3})),
        case("expand", &[4], 12, &[], json!({"heads": 3})),
        case("layer_norm", &[10], 10, &[("weight", &[10]), ("bias", &[10])], json!({"eps": 1e-5})),
        case("layer_norm", &[9], 9, &[("weight", &[9])], json!({"eps": 1e-3})),
        case("layer_norm", &[12], 12, &[("weight", &[3, 4])], json!({"eps": 1e-5, "offset": 1.0})),
        case("layer_norm", &[12], 12, &[("weight", &[4]), ("bias", &[4])], json!({"eps": 1e-5})),
        case("layer_norm", &[8], 8, &[], json!({"eps": 1e-5})),
        linear(false, Kind::None),
        linear(true, Kind::None),
        linear(true, Kind::Plain),
        linear(true, Kind::Subtracted),
        linear(true, Kind::Dora),
        linear(false, Kind::DroppedDora),
        case("rms_norm", &[10], 10, &[("weight", &[10])], json!({"eps": 1e-5})),
        case("rms_norm", &[12], 12, &[("weight", &[4])], json!({"eps": 1e-6})),
        case("rms_norm", &[12], 12, &[("weight", &[4])], json!({"eps": 1e-6, "offset": 1.0})),
        case("rms_norm", &[12], 12, &[], json!({"eps": 1e-6, "run": 3})),
        case("rms_norm", &[12], 12, &[("weight", &[12])], json!({"eps": 1e-6, "run": 4})),
        case("causal_conv", &[5], 5, &[("weight", &[5, 1, 4]), ("bias", &[5])], json!({"activation": "silu"})),
        case("causal_conv", &[5], 5, &[("weight", &[5, 1, 3])], json!({})),
        case("causal_conv", &[5], 5, &[("weight", &[5, 1, 1])], json!({})),
        gated_delta(4, 2),
        gated_delta(3, 3),
        ssd(4, 2, json!({})),
        ssd(3, 1, json!({"dt_min": 0.6, "dt_max": 0.9})),
        case("rope", &[12], 12, &[], json!({"head_dim": 6, "inv_freq": [1.0, 0.3, 0.05], "scale": 1.2})),
        case(
            "rope",
            &[16],
            16,
            &[],
            json!({"head_dim": 8, "inv_freq": [1.0, 0.3], "scale": 1.2, "layout": "interleaved"}),
        ),
        case("rope", &[16], 16, &[], json!({"head_dim": 8, "inv_freq": [1.0, 0.3], "scale": 1.0, "layout": "half"})),
        case(
            "rope",
            &[12],
            12,
            &[],
            json!({"head_dim": 6, "inv_freq": [1.0, 0.3, 0.05], "scale": 1.2, "position_beta": 0.4, "position_period": 3}),
        ),
        case("rope", &[16], 16, &[], json!({"head_dim": 8, "start": 3, "inv_freq": [1.0, 0.3], "scale": 1.1})),
        case(GATHER, &[5], 5, &[], json!({})),
        case("scale", &[7], 7, &[], json!({"factor": -1.7})),
        case("scale", &[7], 7, &[("factor", &[1])], json!({"factor": 0.5})),
    ]
}

/// Of a router without weights.
fn routed<'a>((node, layout): (&'a Node, &'a Layout), logits: &'a Tensor, router_dprobs: &'a [f64]) -> Call<'a> {
    Call { node, inputs: vec![logits], weights: &[], loras: &[], layout, input_gradients: true, router_dprobs }
}

/// The auxiliary loss of routers: of their logits alone, since it sees no other numbers, and with the gradient of what experts make of them.
#[test]
fn the_loss_of_routers_has_its_gradient() {
    let batch = Batch::with_ends(&examples(11, 3, &[&[5, 3, 4], &[1, 1, 1], &[3, 4, 1, 3], &[2, 6]]), true);
    let (experts, mut numbers) = (6, Numbers::new(23));
    for attrs in [
        json!({"top_k": 2, "scoring": "softmax", "normalize": 0.0, "router_aux_loss_coef": 0.7}),
        json!({"top_k": 2, "scoring": "softmax_of_chosen", "router_aux_loss_coef": 0.7}),
        json!({"top_k": 3, "scoring": "sigmoid", "router_aux_loss_coef": 0.7}),
    ] {
        let attrs = serde_json::from_value(attrs).unwrap();
        let node = Node { op: "route".into(), inputs: vec![0], weights: vec![], attrs, width: experts };
        check_node(&node, &[experts]).unwrap();
        let (loss, of) = (AuxLoss { coefficient: 0.7, experts }, (&node, &batch.layout));
        let load = |logits: &Tensor| {
            let mut load = RouterLoad::new(experts);
            ops::count_load(&node, logits, &batch.layout.texts, &mut load).unwrap();
            load
        };
        let kernel = &ops::find("route").unwrap().kernel;
        let (logits, dy) = (numbers.tensor(&[batch.tokens(), experts]), numbers.tensor(&[batch.tokens(), experts]));
        let value = |logits: &Tensor| {
            let y = kernel.forward(&routed(of, logits, &[])).unwrap();
            let sum = (y * &dy).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            // How many tokens an expert has does not change with a nudge.
            sum + loss.coefficient * loss.value(&load(logits))
        };
        let dprobs = loss.dprobs(&load(&logits));
        let gradient = kernel.vjp(&routed(of, &logits, &dprobs), &dy).unwrap().inputs.remove(0).unwrap();
        let without = kernel.vjp(&routed(of, &logits, &[]), &dy).unwrap().inputs.remove(0).unwrap();
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (exact, without, point) = (flat(&gradient), flat(&without), flat(&logits));
        assert!(exact.iter().zip(&without).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) > 1e-3);
        for i in 0..point.len() {
            let h = 1e-5;
            let nudged = |by: f64| {
                let mut values = point.clone();
                values[i] += by;
                value(&Tensor::from_vec(values, (batch.tokens(), experts), &Device::Cpu).unwrap())
            };
            let difference = (nudged(h) - nudged(-h)) / (2.0 * h);
            assert!((difference - exact[i]).abs() < 1e-7, "{:?} at {i}: {} is {difference}", node.attrs, exact[i]);
        }
    }
}

/// Ops whose only input is token ids, or whose VJP has another form; tested below by name.
const BY_NAME: &[&str] = &["embedding", "lm_head"];

#[test]
fn every_op_has_a_case() {
    let cases = cases();
    for op in OPS.iter().chain(INTERNAL) {
        assert!(BY_NAME.contains(&op.name) || cases.iter().any(|c| c.op == op.name), "op '{}' has no case", op.name);
    }
}

#[test]
fn vjp_is_central_difference() {
    let batch = Batch::of(&examples(11, 3, &[&[5, 3, 4], &[1, 1, 1], &[3, 4, 1, 3], &[2, 6]]));
    for (number, case) in cases().into_iter().enumerate() {
        check(&case, &batch.layout, batch.tokens(), number as u64);
    }
}

fn check(case: &Case, layout: &Layout, tokens: usize, seed: u64) {
    let mut numbers = Numbers::new(seed + 17);
    let weight = |(role, shape): &(&'static str, Vec<usize>)| Weight {
        role: (*role).into(),
        tensor: format!("m.{role}"),
        shape: shape.clone(),
    };
    let attrs: BTreeMap<String, Value> = serde_json::from_value(case.attrs.clone()).unwrap();
    let weights = case.weights.iter().map(weight).collect();
    let inputs = (0..case.widths.len()).collect();
    let node = Node { op: case.op.into(), inputs, weights, attrs, width: case.width };
    if OPS.iter().any(|op| op.name == case.op) {
        check_node(&node, &case.widths).unwrap();
    }
    // Of a prompt's last row, the first token of every answer.
    let rows = if case.op == GATHER { layout.predictors.len() } else { tokens };
    let frozen: Vec<Tensor> = case.weights.iter().map(|(_, shape)| numbers.tensor(shape)).collect();
    // What is differentiated by: the inputs, then A and B.
    let mut free: Vec<Tensor> = case.widths.iter().map(|w| numbers.tensor(&[tokens, *w])).collect();
    let mut matrices = || [numbers.tensor(&[2, case.widths[0]]), numbers.tensor(&[case.width, 2])];
    let subtracted = matrices();
    if case.lora != Kind::None {
        free.extend(matrices());
    }
    if matches!(case.lora, Kind::Dora | Kind::DroppedDora) {
        free.push((numbers.tensor(&[case.width]) + 2.0).unwrap());
    }
    let begun = free.clone();
    let dy = numbers.tensor(&[rows, case.width]);
    let kernel = &ops::find(case.op).unwrap().kernel;
    let with_call = |free: &[Tensor], run: &mut dyn FnMut(&Call<'_>)| {
        let plain = |free: &[Tensor]| Lora::new(free[1].clone(), free[2].clone(), 1.7);
        let lora = (case.lora != Kind::None).then(|| {
            let mut lora = plain(free);
            lora.subtracted = (case.lora == Kind::Subtracted).then(|| subtracted.clone());
            // DoRA's norm has no gradient: it is held where it is while A and B are nudged.
            lora.magnitude = free.get(3).map(|magnitude| {
                let norms = |free: &[Tensor]| ops::row_norms(&frozen[0], &plain(free)).unwrap();
                (magnitude * (norms(free) / norms(&begun)).unwrap()).unwrap()
            });
            let dropped = matches!(case.lora, Kind::Subtracted | Kind::DroppedDora);
            lora.dropout = dropped.then_some(Dropout { p: 0.3, key: seed });
            lora
        });
        let inputs = free[..case.widths.len()].iter().collect();
        run(&Call {
            node: &node,
            inputs,
            weights: &frozen,
            loras: lora.as_slice(),
            layout,
            input_gradients: true,
            router_dprobs: &[],
        });
    };
    let value = |free: &[Tensor]| {
        let mut sum = 0.0;
        with_call(free, &mut |call| {
            let y = kernel.forward(call).unwrap();
            assert_eq!(y.dims(), [rows, case.width], "{}", case.op);
            sum = (y * &dy).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        });
        sum
    };
    let mut gradients: Vec<Tensor> = Vec::new();
    with_call(&free, &mut |call| {
        let result = kernel.vjp(call, &dy).unwrap();
        gradients = result.inputs.into_iter().map(|g| g.unwrap()).chain(result.loras.into_iter().flatten()).collect();
    });
    assert_eq!(gradients.len(), free.len(), "{}", case.op);
    for (at, gradient) in gradients.iter().enumerate() {
        let shape = free[at].dims().to_vec();
        assert_eq!(gradient.dims(), shape, "{} gradient {at}", case.op);
        let exact: Vec<f64> = gradient.flatten_all().unwrap().to_vec1().unwrap();
        let point: Vec<f64> = free[at].flatten_all().unwrap().to_vec1().unwrap();
        for i in 0..point.len() {
            let h = 1e-5;
            let nudged = |by: f64| {
                let mut values = point.clone();
                values[i] += by;
                let mut free = free.clone();
                free[at] = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap();
                value(&free)
            };
            let numeric = (nudged(h) - nudged(-h)) / (2.0 * h);
            // Central differences in f64 are off by about h² and 1e-16 / h.
            let bound = 1e-7 * numeric.abs().max(1.0);
            assert!((exact[i] - numeric).abs() < bound, "{} input {at}[{i}]: {} {numeric}", case.op, exact[i]);
        }
    }
}

/// Tokens that are sent to some experts of many: by the router's logits, by what the experts read, by A and B of both matrices.
#[test]
fn experts_of_a_choice_have_the_gradients_of_central_differences() {
    let (tokens, hidden, experts, inner) = (7, 4, 6, 3);
    let mut numbers = Numbers::new(3);
    let node = |op: &str, weights: &[(&str, &[usize])], attrs: Value, inputs: &[usize], width: usize| {
        let weight = |(role, shape): &(&str, &[usize])| Weight {
            role: (*role).into(),
            tensor: format!("m.{role}"),
            shape: shape.to_vec(),
        };
        let (weights, attrs) = (weights.iter().map(weight).collect(), serde_json::from_value(attrs).unwrap());
        Node { op: op.into(), inputs: inputs.to_vec(), weights, attrs, width }
    };
    let attrs = json!({"top_k": 2, "scoring": "softmax", "normalize": 0.0});
    let route = node("route", &[], attrs, &[0], experts);
    let shapes: [(&str, &[usize]); 2] =
        [("gate_up", &[experts, 2 * inner, hidden]), ("down", &[experts, hidden, inner])];
    let own = node("experts", &shapes, json!({"top_k": 2, "activation": "silu"}), &[0, 1], hidden);
    check_node(&own, &[hidden, experts]).unwrap();
    let weights: Vec<Tensor> = shapes.iter().map(|(_, shape)| numbers.tensor(shape)).collect();
    let rank = 2;
    let begun = [
        numbers.tensor(&[tokens, experts]),
        numbers.tensor(&[tokens, hidden]),
        numbers.tensor(&[experts * rank, hidden]),
        numbers.tensor(&[experts * 2 * inner, rank]),
        numbers.tensor(&[experts * rank, inner]),
        numbers.tensor(&[experts * hidden, rank]),
    ];
    let loras = |free: &[Tensor; 6]| {
        let [_, _, a, b, c, d] = free.clone();
        let mut second = Lora::new(c, d, 0.7);
        second.weight = 1;
        [Lora::new(a, b, 1.3), second]
    };
    let (dy, layout) = (numbers.tensor(&[tokens, hidden]), Layout::default());
    let Kernel::Value { forward: choose, vjp: of_choice } = ops::find("route").unwrap().kernel else { panic!() };
    let Kernel::Value { forward, vjp } = ops::find("experts").unwrap().kernel else { panic!() };
    let call = |node: &'static str| -> &Node { if node == "route" { &route } else { &own } };
    let of = |at: &'static str, inputs: Vec<&Tensor>, loras: &[Lora], run: &mut dyn FnMut(&Call<'_>)| {
        let weights: &[Tensor] = if at == "route" { &[] } else { &weights };
        run(&Call {
            node: call(at),
            inputs,
            weights,
            loras,
            layout: &layout,
            input_gradients: true,
            router_dprobs: &[],
        });
    };
    let value = |free: &[Tensor; 6]| -> f64 {
        let (mut routing, mut sum) = (None, 0.0);
        of("route", vec![&free[0]], &[], &mut |call| routing = Some(choose(call).unwrap()));
        of("experts", vec![&free[1], routing.as_ref().unwrap()], &loras(free), &mut |call| {
            sum = (forward(call).unwrap() * &dy).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        });
        sum
    };
    let (mut routing, mut exact) = (None, Vec::new());
    of("route", vec![&begun[0]], &[], &mut |call| routing = Some(choose(call).unwrap()));
    let routing: Tensor = routing.unwrap();
    let chosen: Vec<Vec<f64>> = routing.to_vec2().unwrap();
    assert!(chosen.iter().all(|row| row.iter().filter(|w| **w != 0.0).count() == 2));
    of("experts", vec![&begun[1], &routing], &loras(&begun), &mut |call| {
        let found = vjp(call, &dy).unwrap();
        exact = found.inputs.into_iter().flatten().chain(found.loras.into_iter().flatten()).collect::<Vec<Tensor>>();
    });
    of("route", vec![&begun[0]], &[], &mut |call| {
        let by_logits = of_choice(call, &exact[1]).unwrap().inputs.remove(0).unwrap();
        exact.splice(..2, [by_logits, exact[0].clone()]);
    });
    for (which, (exact, point)) in exact.iter().zip(&begun).enumerate() {
        assert_eq!(exact.dims(), point.dims());
        let exact: Vec<f64> = exact.flatten_all().unwrap().to_vec1().unwrap();
        let values: Vec<f64> = point.flatten_all().unwrap().to_vec1().unwrap();
        for i in 0..values.len() {
            let nudged = |by: f64| {
                let mut values = values.clone();
                values[i] += by;
                let mut free = begun.clone();
                free[which] = Tensor::from_vec(values, point.shape(), &Device::Cpu).unwrap();
                value(&free)
            };
            let numeric = (nudged(1e-5) - nudged(-1e-5)) / 2e-5;
            assert!((exact[i] - numeric).abs() < 1e-7 * numeric.abs().max(1.0), "{which}[{i}]: {} {numeric}", exact[i]);
        }
    }
}

#[test]
fn embedding_takes_rows_and_passes_nothing_on() {
    let table = Numbers::new(5).tensor(&[6, 3]);
    let weight = Weight { role: "weight".into(), tensor: "e.weight".into(), shape: vec![6, 3] };
    let node =
        Node { op: "embedding".into(), inputs: vec![0], weights: vec![weight], attrs: BTreeMap::new(), width: 3 };
    check_node(&node, &[1]).unwrap();
    let ids = Tensor::new(&[4_u32, 0, 4], &Device::Cpu).unwrap();
    let layout = Layout::default();
    let weights = [table.clone()];
    let call = Call {
        node: &node,
        inputs: vec![&ids],
        weights: &weights,
        loras: &[],
        layout: &layout,
        input_gradients: true,
        router_dprobs: &[],
    };
    let Kernel::Value { forward, vjp } = ops::find("embedding").unwrap().kernel else { panic!() };
    let rows: Vec<Vec<f64>> = forward(&call).unwrap().to_vec2().unwrap();
    let table: Vec<Vec<f64>> = table.to_vec2().unwrap();
    assert_eq!(rows, [table[4].clone(), table[0].clone(), table[4].clone()]);
    let gradients = vjp(&call, &Tensor::ones((3, 3), candle_core::DType::F64, &Device::Cpu).unwrap()).unwrap();
    assert!(gradients.inputs.iter().all(Option::is_none) && gradients.loras.is_empty());
}

#[test]
fn lm_head_gradients_are_central_differences() {
    for (bias, softcap) in [(false, None), (true, None), (false, Some(1.3)), (true, Some(0.4))] {
        let mut numbers = Numbers::new(9);
        let (rows, width, vocab) = (5, 4, 300);
        let (hidden, weight) = (numbers.tensor(&[rows, width]), numbers.tensor(&[vocab, width]));
        let bias = bias.then(|| numbers.tensor(&[vocab]));
        let projection = Projection { weight: &weight, bias: bias.as_ref(), softcap };
        let targets: Vec<u32> = (0..rows).map(|_| numbers.below(vocab) as u32).collect();
        let logps = |h: &Tensor| lm_head::log_probs(h, &projection, &targets, false).unwrap();
        let exact: Vec<Vec<f64>> =
            lm_head::log_probs(&hidden, &projection, &targets, true).unwrap().grads.unwrap().to_vec2().unwrap();
        let point: Vec<Vec<f64>> = hidden.to_vec2().unwrap();
        for r in 0..rows {
            for c in 0..width {
                let h = 1e-5;
                let nudged = |by: f64| {
                    let mut values = point.clone();
                    values[r][c] += by;
                    logps(&Tensor::new(values, &Device::Cpu).unwrap()).logps[r]
                };
                let numeric = (nudged(h) - nudged(-h)) / (2.0 * h);
                assert!((exact[r][c] - numeric).abs() < 1e-8, "row {r} column {c}: {} {numeric}", exact[r][c]);
            }
        }
        // Against the definition, and ln Σ p² with it.
        let products: Vec<Vec<f64>> = hidden.matmul(&weight.t().unwrap()).unwrap().to_vec2().unwrap();
        let bias: Vec<f64> = bias.as_ref().map_or(vec![0.0; vocab], |b| b.to_vec1().unwrap());
        let out = logps(&hidden);
        for (r, row) in products.iter().enumerate() {
            let bent = |z: f64| softcap.map_or(z, |cap| cap * (z / cap).tanh());
            let logits: Vec<f64> = row.iter().zip(&bias).map(|(z, b)| bent(z + b)).collect();
            let norm = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            assert!((out.logps[r] - (logits[targets[r] as usize] - norm)).abs() < 1e-12);
            let squares = logits.iter().map(|l| (2.0 * (l - norm)).exp()).sum::<f64>().ln();
            assert!((out.statistics[0][r] - squares).abs() < 1e-12);
        }
    }
}
