//! The engine as a whole: what it computes does not depend on packing, recomputation or chunks, and its gradient is that
//! of its forward pass.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use dpo_core::batch::Batch;
use dpo_core::engine::Engine;
use dpo_core::example::{Answer, Example};
use dpo_core::lora::{AdapterConfig, Targets};
use dpo_tests::{CONFIGS, Numbers, engine, engine_with, examples, graph, weights};

/// From one answer to five: a prompt of one token, answers of one token, answers of equal length.
const LENGTHS: &[&[usize]] = &[
    &[5, 3, 4],
    &[1, 1, 1],
    &[9, 7, 1],
    &[2, 6],
    &[1, 1],
    &[13, 5, 5, 5],
    &[3, 2, 8, 1],
    &[4, 1, 6, 3, 1, 7],
    &[1, 1, 1, 1, 1, 1],
];

/// Log-probs and the gradient of `Σ c · logp` with fixed numbers c, over some micro-batches.
fn pass(engine: &Engine, batches: &[&[Example]]) -> (Vec<f32>, Vec<f32>) {
    let mut gradient = vec![0.0; engine.adapter().params.len()];
    let (mut logps, mut numbers) = (Vec::new(), Numbers::new(77));
    for examples in batches {
        let batch = Batch::of(*examples);
        let forward = engine.forward(&batch, true).unwrap();
        logps.extend(&forward.logps.logps);
        let grads: Vec<f32> = batch.targets.iter().map(|_| numbers.draw() as f32).collect();
        engine.backward(&batch, forward, &grads, &mut gradient).unwrap();
    }
    (logps, gradient)
}

fn close(what: &str, a: &[f32], b: &[f32], bound: f32) {
    assert_eq!(a.len(), b.len(), "{what}");
    let size = a.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let off = a.iter().zip(b).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(off <= bound * size, "{what}: off by {off} of {size}");
}

#[test]
fn packing_and_recomputing_change_nothing() {
    for (family, config) in CONFIGS {
        let graph = graph(family, config);
        let mut engine = engine(&graph, &weights(&graph, 1), 2);
        let examples = examples(graph.vocab_size, 4, LENGTHS);
        let packed = pass(&engine, &[&examples]);
        let single: Vec<&[Example]> = examples.chunks(1).collect();
        let alone = pass(&engine, &single);
        close(&format!("{family}: log-probs packed and alone"), &packed.0, &alone.0, 1e-5);
        close(&format!("{family}: gradient packed and alone"), &packed.1, &alone.1, 1e-5);
        for layers in 1..=graph.layers.len() {
            engine.recompute(layers);
            let recomputed = pass(&engine, &[&examples]);
            assert_eq!(packed, recomputed, "{family}: {layers} layers recomputed");
        }
    }
}

/// Which numbers are dropped follows from the key and from the text up to a token: not from what else is in a batch, and it is the same when
/// a layer is computed again.
#[test]
fn dropout_follows_from_the_key_and_the_text() {
    let (family, config) = CONFIGS[0];
    let graph = graph(family, config);
    let dropping = AdapterConfig { dropout: 0.3, ..AdapterConfig::new(3, 6.0) };
    let mut engine = engine_with(&graph, &weights(&graph, 1), 2, dropping);
    let examples = examples(graph.vocab_size, 4, LENGTHS);
    let without = pass(&engine, &[&examples]);
    engine.set_dropout(Some(1));
    let packed = pass(&engine, &[&examples]);
    let single: Vec<&[Example]> = examples.chunks(1).collect();
    let alone = pass(&engine, &single);
    close("log-probs packed and alone", &packed.0, &alone.0, 1e-5);
    close("gradient packed and alone", &packed.1, &alone.1, 1e-5);
    engine.recompute(graph.layers.len());
    assert_eq!(packed, pass(&engine, &[&examples]));
    engine.set_dropout(Some(2));
    let other = pass(&engine, &[&examples]);
    assert!(other.0 != packed.0 && other.1 != packed.1 && packed.0 != without.0);
    engine.set_dropout(None);
    assert_eq!(without, pass(&engine, &[&examples]));
}

/// Nothing before the first adapted layer has a gradient; those of the others are what they are where it has one.
#[test]
fn layers_below_the_adapter_are_left_out() {
    for (family, config) in CONFIGS {
        let graph = graph(family, config);
        let below = Some(Targets::parse(&[r".*layers\.0\..*".into()]).unwrap());
        let upper = AdapterConfig { exclude: below, ..AdapterConfig::new(3, 6.0) };
        let upper = engine_with(&graph, &weights(&graph, 1), 2, upper);
        let mut whole = engine(&graph, &weights(&graph, 1), 2);
        let from = whole.adapter().parameters() - upper.adapter().parameters();
        assert!(from > 0 && whole.adapter().sites.iter().any(|s| s.offset == from));
        let params = [vec![0.0; from], upper.adapter().params.clone()].concat();
        whole.update(|all| all.copy_from_slice(&params)).unwrap();
        let examples = examples(graph.vocab_size, 4, LENGTHS);
        let (of_upper, of_whole) = (pass(&upper, &[&examples]), pass(&whole, &[&examples]));
        close(&format!("{family}: log-probs"), &of_upper.0, &of_whole.0, 1e-6);
        assert_eq!(of_upper.1, of_whole.1[from..], "{family}");
    }
}

/// The shared prompt gives every answer the log-probs that it has alone, and the gradient of all is the sum of theirs.
#[test]
fn answers_do_not_see_each_other() {
    for (family, config) in CONFIGS {
        let graph = graph(family, config);
        let engine = engine(&graph, &weights(&graph, 1), 2);
        let examples = examples(graph.vocab_size, 8, LENGTHS);
        let alone = |e: &Example| {
            let one = |a: &Answer| Example::new(e.prompt().to_vec(), vec![a.clone()], e.place.as_str()).unwrap();
            e.answers().iter().map(one).collect::<Vec<Example>>()
        };
        let alone: Vec<Example> = examples.iter().flat_map(alone).collect();
        let (together, apart) = (pass(&engine, &[&examples]), pass(&engine, &[&alone]));
        close(&format!("{family}: log-probs together and alone"), &together.0, &apart.0, 1e-5);
        close(&format!("{family}: gradient together and alone"), &together.1, &apart.1, 1e-5);
    }
}

/// The adapter's gradient against differences of the forward pass, along random directions: f32 forbids single weights.
#[test]
fn gradient_is_that_of_the_forward_pass() {
    for (family, config) in CONFIGS {
        let graph = graph(family, config);
        let mut engine = engine(&graph, &weights(&graph, 3), 5);
        let examples = examples(graph.vocab_size, 6, LENGTHS);
        let (_, gradient) = pass(&engine, &[&examples]);
        let start = engine.adapter().params.clone();
        let mut numbers = Numbers::new(21);
        for direction in 0..4 {
            let along: Vec<f32> = start.iter().map(|_| numbers.draw() as f32).collect();
            let exact: f64 = gradient.iter().zip(&along).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
            let mut value = |by: f32| {
                let moved: Vec<f32> = start.iter().zip(&along).map(|(p, d)| p + by * d).collect();
                engine.update(|params| params.copy_from_slice(&moved)).unwrap();
                let (logps, mut numbers) = (pass(&engine, &[&examples]).0, Numbers::new(77));
                logps.iter().map(|l| f64::from(*l) * numbers.draw() as f32 as f64).sum::<f64>()
            };
            // Twice, so that what is off by the square of the step goes away (Richardson): a state's gradients are bent.
            let mut difference = |h: f32| (value(h) - value(-h)) / (2.0 * f64::from(h));
            let (wide, narrow) = (difference(2e-3), difference(1e-3));
            let numeric = (4.0 * narrow - wide) / 3.0;
            assert!((exact - numeric).abs() < 5e-3 * numeric.abs().max(1.0), "{family} {direction}: {exact} {numeric}");
        }
    }
}
