//! Every loss against central differences, every option away from its default, and what losses refuse.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use dpo_losses::ALL;
use dpo_plugin_api::loss::{AlignmentLoss, LossBatch, Options};
use dpo_plugin_api::testing::{check_loss, check_loss_from, check_loss_with};
use serde_json::{Value, json};

/// Values tried for an option; an option without an entry fails the test.
fn trials(option: &str) -> Vec<Value> {
    match option {
        "beta" => vec![json!(0.05), json!(0.5)],
        "label_smoothing" => vec![json!(0.1), json!(0.3)],
        "f_divergence" => ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"].map(Value::from).to_vec(),
        "f_alpha" => vec![json!(0.2), json!(1.0), json!(2.0)],
        "discopop_tau" => vec![json!(0.2), json!(1.0)],
        "simpo_gamma" => vec![json!(0.0), json!(0.5)],
        "cpo_alpha" => vec![json!(0.0), json!(0.7)],
        "cpo_type" => ["sigmoid", "hinge", "ipo"].map(Value::from).to_vec(),
        "nll_mean" => ["tokens", "answers"].map(Value::from).to_vec(),
        "dpop_lambda" => vec![json!(0.0), json!(5.0)],
        "length_alpha" => vec![json!(0.0), json!(0.5)],
        "alphapo_alpha" => vec![json!(-0.5), json!(0.7)],
        "score_margin" | "score_scale" => vec![json!(0.3), json!(1.5)],
        "desirable_weight" | "undesirable_weight" => vec![json!(0.4), json!(1.3)],
        other => panic!("no values to try for option '{other}'"),
    }
}

fn eval(loss: &dyn AlignmentLoss, options: &Options) -> Result<Vec<f64>, String> {
    loss.eval(&LossBatch::whole(Vec::new()), options, &mut Vec::new())
        .map(|g| g.losses().to_vec())
        .map_err(|e| e.to_string())
}

#[test]
fn derivatives_are_central_differences() {
    for loss in ALL {
        if loss.name() == "bco" {
            // So much has been seen that the shift, through which no gradient flows, stays where it is.
            check_loss_from(loss, &Options::defaults(loss).with("beta", 0.5), &[1e12, -0.3e12]);
            continue;
        }
        check_loss(loss);
        for option in loss.options() {
            for value in trials(&option.name) {
                let mut options = Options::defaults(loss).with(&option.name, value);
                if option.name == "f_alpha" {
                    options = options.with("f_divergence", "alpha_divergence");
                }
                check_loss_with(loss, &options);
            }
        }
    }
}

#[test]
fn names_are_unique_and_formulas_explain_themselves() {
    let names = [
        ("ls(", "ls(x) ="),
        ("e ", "e = label_smoothing"),
        ("D", "D ="),
        ("s(r", "s(r) ="),
        ("rw", "rw, rl ="),
        ("Lw", "Lw, Ll ="),
        ("|yw|", "|yw|, |yl| ="),
        ("NLL ", "NLL ="),
        ("NLLP", "NLLP ="),
        ("s(j)", "s(j) ="),
        ("shift", "shift ="),
        ("r(j)", "r(j) ="),
        (" z", "z ="),
        ("wd", "wd, wu ="),
    ];
    for (i, loss) in ALL.iter().enumerate() {
        assert!(ALL[..i].iter().all(|other| other.name() != loss.name()), "{} is there twice", loss.name());
        assert!(!loss.summary().is_empty() && !loss.peers().is_empty(), "{}", loss.name());
        let (formula, legend) = loss.formula().split_once('\n').unwrap();
        for (used, explained) in names {
            // Not as the end of another word, such as the 'e' of 'pi_ref e'.
            let apart = |at: usize| !formula[..at].ends_with(|c: char| c.is_alphanumeric());
            if formula.match_indices(used).any(|(at, _)| apart(at)) {
                assert!(legend.contains(explained), "{}: '{used}' is not explained", loss.name());
            }
        }
        let of_options: Vec<String> = loss.options().into_iter().map(|o| o.name).collect();
        for name in [
            "beta",
            "simpo_gamma",
            "cpo_alpha",
            "discopop_tau",
            "dpop_lambda",
            "length_alpha",
            "alphapo_alpha",
            "score_margin",
            "score_scale",
        ] {
            let offered = of_options.iter().any(|o| o == name);
            assert_eq!(formula.contains(name), offered, "{}: '{name}'", loss.name());
        }
    }
}

#[test]
fn options_out_of_range_are_refused() {
    for loss in ALL {
        let refuses = |option: &str, value: Value, part: &str| {
            if loss.options().iter().any(|o| o.name == option) {
                let error = eval(loss, &Options::defaults(loss).with(option, value)).expect_err(loss.name());
                assert!(error.contains(part), "{}: {error}", loss.name());
            }
        };
        refuses("beta", json!(0.0), "'beta' should be above 0");
        refuses("beta", json!("x"), "'beta' should be a number");
        refuses("label_smoothing", json!(-0.1), "'label_smoothing' should be at least 0");
        refuses("label_smoothing", json!(1.0), "'label_smoothing' should be at least 0 and below");
        refuses("f_divergence", json!("kl"), "unknown f_divergence 'kl'");
        refuses("nll_mean", json!("rows"), "unknown nll_mean 'rows'");
        refuses("cpo_type", json!("kto"), "unknown cpo_type 'kto'");
        refuses("alphapo_alpha", json!(0), "'alphapo_alpha' should not be 0");
        refuses("discopop_tau", json!(0), "'discopop_tau' should be above 0");
    }
    let named = |name: &str| ALL.iter().find(|l| l.name() == name).unwrap();
    let half = eval(named("robust"), &Options::defaults(named("robust")).with("label_smoothing", 0.5)).unwrap_err();
    assert!(half.contains("below 0.5"), "{half}");
    let none = eval(named("exo_pair"), &Options::defaults(named("exo_pair")).with("label_smoothing", 0.0)).unwrap_err();
    assert!(none.contains("above 0") && none.contains("1e-3"), "{none}");
}
