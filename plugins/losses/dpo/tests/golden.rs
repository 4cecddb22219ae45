//! Values and derivatives against the peers' own code, and the papers' equations where no peer has a loss: `golden.json` is written by `oracle/loss_goldens.py`.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeSet;

use dpo_losses::{ALL, Loss};
use dpo_plugin_api::loss::{AlignmentLoss, Answer, Answers, Example, LossBatch, LossGrad, MAX_STATISTICS, Options};
use serde_json::Value;

const GOLDEN: &str = include_str!("golden.json");

/// Of every pair the chosen and the rejected answer's values.
type Values = Vec<[Vec<f32>; 2]>;

fn answers(value: &Value) -> Values {
    serde_json::from_value(value.clone()).unwrap()
}

fn named(name: &str) -> &'static dyn AlignmentLoss {
    ALL.iter().find(|l| l.name() == name).unwrap_or_else(|| panic!("no loss '{name}'"))
}

/// Token weights for LD-DPO (Liu et al. 2024): positions beyond the shorter answer's end count in part.
fn length_weights(policy: &Values, ld_alpha: f32) -> Values {
    let weight = |shared: usize, n: usize| (0..n).map(|i| if i < shared { 1.0 } else { ld_alpha }).collect::<Vec<_>>();
    let shared = |p: &[Vec<f32>; 2]| p[0].len().min(p[1].len());
    policy.iter().map(|p| [0, 1].map(|i| weight(shared(p), p[i].len()))).collect()
}

/// All pairs as one batch.
fn batch<'a>(policy: &'a Values, reference: &'a Values, weights: &'a Values) -> LossBatch<'a> {
    let answer = |p: usize, i: usize| Answer {
        policy: &policy[p][i],
        reference: &reference[p][i],
        weights: &weights[p][i],
        label: 1.0 - i as f64,
        detached: false,
        statistics: [&[]; MAX_STATISTICS],
        reference_statistics: [&[]; MAX_STATISTICS],
    };
    LossBatch::whole(
        (0..policy.len()).map(|p| Example { answers: vec![answer(p, 0), answer(p, 1)], prompt: &[] }).collect(),
    )
}

/// The examples of a case: pairs, unless it says which answers, in their order, make which example.
fn examples<'a>(
    case: &Value,
    policy: &'a Values,
    reference: &'a Values,
    weights: &'a Values,
    prompts: &'a [Vec<f32>],
) -> LossBatch<'a> {
    let pairs = batch(policy, reference, weights);
    let Some(examples) = case["examples"].as_array() else { return pairs };
    let flat: Vec<Answer<'a>> = pairs.examples.iter().flat_map(|e| e.answers.clone()).collect();
    let numbers = |value: &Value| serde_json::from_value::<Vec<f64>>(value.clone()).unwrap();
    let of = |(e, example): (usize, &Value)| {
        let labels = numbers(&example["labels"]);
        let answers = numbers(&example["answers"]).into_iter().zip(labels);
        let answers = answers.map(|(i, label)| Answer { label, ..flat[i as usize] }).collect();
        Example { answers, prompt: if case["prompts"].as_bool() == Some(true) { &prompts[e] } else { &[] } }
    };
    LossBatch::whole(examples.iter().enumerate().map(of).collect())
}

fn eval(loss: &dyn AlignmentLoss, batch: &LossBatch<'_>, set: &Value) -> LossGrad {
    eval_from(loss, batch, set, Vec::new())
}

fn eval_from(loss: &dyn AlignmentLoss, batch: &LossBatch<'_>, set: &Value, mut state: Vec<f64>) -> LossGrad {
    let known: BTreeSet<String> = loss.options().into_iter().map(|o| o.name).collect();
    let given = set.as_object().unwrap().iter().filter(|(k, _)| known.contains(*k));
    let options = given.fold(Options::defaults(loss), |o, (k, v)| o.with(k, v.clone()));
    loss.eval(batch, &options, &mut state).unwrap()
}

/// The step's loss and its derivative by every token, as the host makes them of what losses answer.
fn step(batch: &LossBatch<'_>, losses: &[(f64, &dyn AlignmentLoss)], set: &Value, state: &[f64]) -> (f64, Vec<f64>) {
    let mut value = 0.0;
    let mut gradient = vec![0.0; (batch.totals.tokens + batch.totals.prompt_tokens) as usize];
    for (share, loss) in losses {
        let grad = eval_from(*loss, batch, set, state.to_vec());
        value += share * grad.losses().iter().sum::<f64>() / batch.totals.examples;
        gradient.iter_mut().zip(grad.grad()).for_each(|(g, s)| *g += share * f64::from(s) / batch.totals.examples);
    }
    (value, gradient)
}

#[test]
fn peers_and_papers_agree() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let (policy, reference) = (answers(&golden["policy"]), answers(&golden["reference"]));
    let prompts: Vec<Vec<f32>> = serde_json::from_value(golden["prompts"].clone()).unwrap();
    let mut seen = BTreeSet::new();
    for case in golden["cases"].as_array().unwrap() {
        let names: Vec<&str> = case["losses"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
        let shares = case["weights"].as_array().unwrap().iter().map(|w| w.as_f64().unwrap());
        let losses: Vec<_> = shares.zip(names.iter().map(|n| named(n))).collect();
        let weights = length_weights(&policy, case["options"]["ld_alpha"].as_f64().unwrap_or(1.0) as f32);
        let batch = examples(case, &policy, &reference, &weights, &prompts);
        let state: Vec<f64> = serde_json::from_value(case["state"].clone()).unwrap_or_default();
        let (value, gradient) = step(&batch, &losses, &case["options"], &state);
        let what = format!("{names:?} {}", case["options"]);
        let expected = case["value"].as_f64().unwrap();
        assert!((value - expected).abs() <= 1e-5 * expected.abs(), "{what}: {value}, should be {expected}");
        let expected: Vec<f64> = serde_json::from_value(case["gradient"].clone()).unwrap();
        assert_eq!(gradient.len(), expected.len(), "{what}");
        // Where derivatives cancel to nearly nothing, what is left is compared on the scale of the others.
        let floor = 1e-3 * expected.iter().fold(0.0_f64, |m, g| m.max(g.abs()));
        for (token, (ours, theirs)) in gradient.iter().zip(&expected).enumerate() {
            let bound = 1e-5 * theirs.abs().max(floor);
            assert!((ours - theirs).abs() <= bound, "{what}: token {token}: {ours}, should be {theirs}");
        }
        seen.extend(names.iter().map(|n| (*n).to_owned()));
    }
    // Whole steps of TRL's KTOTrainer are among the trajectories of `tests/tests/trajectories.rs`.
    let stepped = ["kto", "apo_zero_unpaired"];
    let all = ALL.iter().map(|l| l.name()).filter(|name| !stepped.contains(name));
    let all: BTreeSet<String> = all.map(str::to_owned).collect();
    assert_eq!(seen, all, "losses without a golden case");
}

/// What each loss is before the first step, where policy and reference agree; known in closed form.
#[test]
fn values_where_policy_and_reference_agree() {
    let ln2 = std::f64::consts::LN_2;
    let expected = [
        ("sigmoid", ln2),
        ("hinge", 1.0),
        ("ipo", 25.0),
        ("exo_pair", -0.5 * (0.999_f64.ln() + 0.001_f64.ln()) - ln2),
        ("nca_pair", 2.0 * ln2),
        ("robust", ln2),
        ("bco_pair", 2.0 * ln2),
        ("sppo_hard", 50.0),
        ("aot", ln2),
        ("aot_unpaired", ln2),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", 0.5 * ln2 + 0.5),
        ("sigmoid_norm", ln2),
        ("dpop", ln2),
        ("cal_dpo", ln2 + 50.0),
        ("plackett_luce", ln2),
        ("sdpo", ln2),
        ("all_pairs", ln2),
        ("rebel", 1.0),
    ];
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let policy = answers(&golden["policy"]);
    for (name, expected) in expected {
        let weights = length_weights(&policy, 1.0);
        let (value, _) = step(&batch(&policy, &policy, &weights), &[(1.0, named(name))], &serde_json::json!({}), &[]);
        assert!((value - expected).abs() <= 1e-12 * expected, "{name}: {value}, should be {expected}");
    }
    let known = |name: &str| expected.iter().any(|(n, _)| *n == name);
    let compares = |l: &&Loss| l.needs().reference && l.needs().answers != Answers::Labelled;
    let unknown = ALL.iter().filter(compares).map(|l| l.name()).filter(|name| !known(name));
    // Its value depends on lengths.
    assert_eq!(unknown.collect::<Vec<_>>(), ["r_dpo"], "losses with a reference that have no value here");
}

/// A loss over pairs that stands for one over another number of answers.
#[test]
fn two_answers_are_a_pair_and_one_is_its_likelihood() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let (policy, reference) = (answers(&golden["policy"]), answers(&golden["reference"]));
    let weights = length_weights(&policy, 0.5);
    let pairs = batch(&policy, &reference, &weights);
    let set = serde_json::json!({"beta": 0.3});
    let (ranked, pair) = (eval(named("plackett_luce"), &pairs, &set), eval(named("sigmoid"), &pairs, &set));
    let close = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
    assert!(close(ranked.losses(), pair.losses()), "{:?} {:?}", ranked.losses(), pair.losses());
    let wide = |grad: &LossGrad| grad.grad().iter().map(|g| f64::from(*g)).collect::<Vec<_>>();
    assert!(wide(&ranked).iter().zip(wide(&pair)).all(|(a, b)| (a - b).abs() < 1e-7));

    let best = pairs.examples.iter().map(|e| Example { answers: e.answers[..1].to_vec(), prompt: &[] });
    let alone = eval(named("sft"), &LossBatch::whole(best.collect()), &set);
    let beside = eval(named("sft"), &pairs, &set);
    assert_eq!(alone.losses(), beside.losses());
    let mean = alone.losses().iter().sum::<f64>() / policy.len() as f64;
    let tokens: Vec<f64> = policy.iter().flat_map(|p| &p[0]).map(|l| f64::from(*l)).collect();
    assert!((mean + tokens.iter().sum::<f64>() / tokens.len() as f64).abs() < 1e-12, "{mean}");
}

/// Eq. 20 written out: the chance of a ranking is that of its best answer among all, of the next among the rest, and so on.
#[test]
fn a_ranking_is_a_product_of_choices() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let (policy, reference) = (answers(&golden["policy"]), answers(&golden["reference"]));
    let weights = length_weights(&policy, 1.0);
    let pairs = batch(&policy, &reference, &weights);
    let set = serde_json::json!({"beta": 0.3});
    let rank = |labels: &[f64]| {
        let answers = pairs.examples.iter().flat_map(|e| e.answers.clone()).zip(labels);
        let answers: Vec<Answer<'_>> = answers.map(|(answer, label)| Answer { label: *label, ..answer }).collect();
        let example = Example { answers, prompt: &[] };
        let rewards: Vec<f64> = (0..labels.len()).map(|j| 0.3 * example.ratio(j).value).collect();
        (eval(named("plackett_luce"), &LossBatch::whole(vec![example]), &set).losses()[0], rewards)
    };
    let (loss, r) = rank(&[3.0, 2.0, 1.0, 0.0]);
    let choice = |j: usize| r[j] - r[j..].iter().map(|r| r.exp()).sum::<f64>().ln();
    assert!((loss + (0..4).map(choice).sum::<f64>()).abs() < 1e-12, "{loss}");
    // Answers that are liked alike are compared with those that are liked less, and not with each other.
    let (loss, r) = rank(&[1.0, 1.0, 0.0, 0.0]);
    let among = |j: usize| r[j] - (r[j].exp() + r[2].exp() + r[3].exp()).ln();
    assert!((loss + among(0) + among(1)).abs() < 1e-12, "{loss}");
    assert_eq!(rank(&[1.0; 4]).0, 0.0);
}

/// Single answers, liked and not, with and without one of another prompt. KTO's equation written out; whole steps of TRL's trainer are among the
/// trajectories of `tests/tests/trajectories.rs`.
#[test]
fn single_answers_are_scored_by_their_label() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let (policy, reference) = (answers(&golden["policy"]), answers(&golden["reference"]));
    let weights = length_weights(&policy, 1.0);
    let pairs = batch(&policy, &reference, &weights);
    let set = serde_json::json!({"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5});
    let single = |mismatched: bool| {
        let examples = pairs.examples.iter().enumerate().map(|(i, e)| {
            let own = Answer { label: (i % 2) as f64, ..e.answers[0] };
            let other = Answer { detached: true, ..e.answers[1] };
            Example { answers: if mismatched { vec![own, other] } else { vec![own] }, prompt: &[] }
        });
        LossBatch::whole(examples.collect())
    };
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let batch = single(true);
    let ratios = |answer: usize| batch.examples.iter().map(move |e| e.answers[answer].ratio());
    let z = (ratios(1).sum::<f64>() / batch.examples.len() as f64).max(0.0);
    let expected = |(i, r): (usize, f64)| match i % 2 {
        1 => 1.5 * (1.0 - sigmoid(0.3 * (r - z))),
        _ => 0.5 * (1.0 - sigmoid(0.3 * (z - r))),
    };
    let kto: Vec<f64> = ratios(0).enumerate().map(expected).collect();
    let grad = eval(named("kto"), &batch, &set);
    let close = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
    assert!(close(grad.losses(), &kto), "{:?}, should be {kto:?}", grad.losses());
    assert!(named("kto").eval(&single(false), &Options::defaults(named("kto")), &mut Vec::new()).is_err());
    let zero = |(i, r): (usize, f64)| if i % 2 == 1 { 1.0 - sigmoid(0.3 * r) } else { sigmoid(0.3 * r) };
    let apo: Vec<f64> = ratios(0).enumerate().map(zero).collect();
    let grad = eval(named("apo_zero_unpaired"), &single(false), &set);
    assert!(close(grad.losses(), &apo), "{:?}, should be {apo:?}", grad.losses());
}

/// What a step means does not depend on how its examples are split into micro-batches.
#[test]
fn micro_batches_make_the_same_step() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let (policy, reference) = (answers(&golden["policy"]), answers(&golden["reference"]));
    let weights = length_weights(&policy, 0.5);
    for loss in ALL.iter().filter(|l| !l.needs().whole_batch) {
        let mut whole = batch(&policy, &reference, &weights);
        if [Answers::One, Answers::Labelled].contains(&loss.needs().answers) {
            whole.examples.iter_mut().for_each(|e| e.answers.truncate(1));
        }
        let set = serde_json::json!({});
        let together = eval(loss, &whole, &set);
        let alone = |e: &Example<'_>| eval(loss, &LossBatch { examples: vec![e.clone()], totals: whole.totals }, &set);
        let (losses, grads): (Vec<_>, Vec<_>) =
            whole.examples.iter().map(alone).map(|g| (g.losses().to_vec(), g.grad())).unzip();
        assert_eq!(losses.concat(), together.losses(), "{}", loss.name());
        assert_eq!(grads.concat(), together.grad(), "{}", loss.name());
    }
}
