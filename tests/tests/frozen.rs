//! Plugins built against plugin-api 1.0.0 go on loading: `frozen/` holds its sources and a plugin, which are never
//! changed.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::{Path, PathBuf};

use abi_stable::StableAbi;
use abi_stable::std_types::RSlice;
use abi_stable::std_types::utypeid::UTypeId;
use abi_stable::type_layout::TypeLayout;
use dpo_plugin_api::abi::{PluginModule_Ref, RawAnswer, RawExample, RawLossCall, RawLossResult, RawTotals};
use dpo_plugin_api::dataset::Row;
use dpo_plugin_api::loss::Answers;
use dpo_plugins::{LossCall, Registry};
use dpo_tests::nested::{cargo, target_folder};
use serde_json::{Value, json};

fn frozen() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("frozen")
}

/// Today's host with the old plugin beside its own.
fn registry() -> Registry {
    cargo(&frozen(), "build");
    let folder = tempfile::tempdir().unwrap();
    let file = format!("{}frozen_plugin{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    std::fs::copy(target_folder().join("release").join(&file), folder.path().join(&file)).unwrap();
    let registry = Registry::discover(&[folder.path().to_owned()], None);
    assert!(registry.refusals.is_empty(), "{:?}", registry.refusals);
    registry
}

#[test]
fn an_old_plugin_works() {
    let registry = registry();

    let family = registry.family_for("FrozenForCausalLM").unwrap();
    assert_eq!(family.name, "frozen-family");
    assert!(family.chat_template.as_ref().unwrap().contains("message.content"));
    let (graph, _) = dpo_hub::model::understood(family, &family.example_config, &[]).unwrap();
    assert_eq!(graph.layers.iter().map(|l| l.block).collect::<Vec<_>>(), [0, 0, 1]);
    let ops: Vec<&str> = graph.blocks[1].nodes.iter().map(|n| n.op.as_str()).collect();
    let layer = "rms_norm linear linear linear rms_norm rope rope attention add linear linear glu linear add";
    assert_eq!(ops.join(" "), layer);
    assert_eq!(graph.blocks[1].nodes[7].attrs.get("window"), Some(&json!(6)));
    let misfit = family.example_config.replace("\"yarn\"", "\"spiral\"");
    assert!(family.graph(&misfit).unwrap_err().to_string().contains("spiral"));

    let format = registry.format("frozen-format").unwrap();
    let rows: Vec<Row> = format.examples.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(rows.iter().map(|r| format.recognises(r).unwrap()).collect::<Vec<_>>(), [2, 2, 2]);
    let records = serde_json::to_value(rows.iter().map(|r| format.records(r).unwrap()).collect::<Vec<_>>()).unwrap();
    let prompt = json!({"messages": [{"role": "user", "content": "2+2"}]});
    let record =
        |answers: Value| json!({"prompt": prompt, "answers": answers, "template_args": {"enable_thinking": false}});
    let answer = |text: &str, label: f64| json!({"text": {"plain": text}, "label": label});
    let mut pair = record(json!([answer("4", 1.0), answer("5", 0.0)]));
    pair["tools"] = json!([{"name": "add"}]);
    let single = record(json!([answer("4", 1.0)]));
    let detached = json!({"text": {"plain": "another's"}, "label": 0.0, "detached": true});
    let ranked = record(json!([answer("four", 0.9), answer("5", 0.5), answer("fish", -1.0), detached]));
    assert_eq!(records, json!([[pair], [single], [ranked]]));
    let error = format.records(&Row::from_iter([("frozen".to_owned(), json!([])), ("good".to_owned(), json!(4))]));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("column 'good' is 4") && error.contains("help: write a text"), "{error}");

    let loss = registry.loss("frozen-loss").unwrap();
    assert!(loss.needs.reference && loss.needs.whole_batch && loss.needs.answers == Answers::Ranked);
    assert_eq!(loss.needs.statistics, ["log_sum_sq_probs"]);
    assert_eq!(loss.options.iter().map(|o| &o.default).collect::<Vec<_>>(), [&json!(0.1), &json!("plus")]);
    let answer = |policy: &'static [f32], statistics: &'static [f32], label: f64| {
        let mut answer = RawAnswer {
            policy: policy.into(),
            reference: RSlice::from_slice(&[-1.0; 2]),
            weights: RSlice::from_slice(&[1.0, 0.5]),
            statistics: [RSlice::EMPTY; 4],
            reference_statistics: [RSlice::EMPTY; 4],
            label,
            detached: label < 0.0,
        };
        answer.statistics[0] = statistics.into();
        answer.reference_statistics[0] = RSlice::from_slice(&[-0.25; 2]);
        answer
    };
    let answers = [
        answer(&[-0.5, -0.5], &[-1.0, -2.0], 2.0),
        answer(&[-9.0, -9.0], &[-1.0, -1.0], 1.0),
        answer(&[-2.0, -1.0], &[-1.0, -1.0], 0.0),
        answer(&[-7.0, -7.0], &[-1.0, -1.0], -1.0),
    ];
    let examples = [RawExample { answers: RSlice::from_slice(&answers), prompt: RSlice::from_slice(&[]) }];
    let totals = RawTotals { examples: 2.0, answers: 6.0, best_tokens: 4.0, tokens: 12.0, prompt_tokens: 0.0 };
    let options = json!({"beta": 0.4, "sign": "minus"}).to_string();
    let call = LossCall { options: &options, examples: &examples, totals, state: &[0.25] };
    let result = loss.eval(&call).unwrap();
    // The best answer's ratio is 0.5 + 0.5/2, the worst one's is -1; the detached one has no part.
    let x = -0.4 * 1.75 - 0.25_f64;
    let derivative = 1.0 / (1.0 + x.exp());
    assert!((result.losses[0] - ((-x).exp().ln_1p() + 3.0 - 0.5)).abs() < 1e-9, "{:?}", result.losses);
    let expected = [1.0, 0.5, 0.0, 0.0, -1.0, -0.5, 0.0, 0.0].map(|w| w * 0.4 * derivative);
    assert_eq!(result.grad.len(), expected.len());
    for (ours, expected) in result.grad.iter().zip(expected) {
        assert!((f64::from(*ours) - expected).abs() < 1e-7, "{:?} {expected}", result.grad);
    }
    assert!((result.state[0] - (0.25 - 0.7 / 2.0)).abs() < 1e-12, "{:?}", result.state);
    let call = LossCall { options: &Value::Null.to_string(), ..call };
    assert!(loss.eval(&call).is_err(), "options that are no object");
    let single = [RawExample { answers: RSlice::from_slice(&answers[..1]), prompt: RSlice::from_slice(&[]) }];
    let error = loss.eval(&LossCall { options: &options, examples: &single, ..call }).unwrap_err().to_string();
    assert!(error.contains("1 answers") && error.contains("takes 2 to 16 answers"), "{error}");
}

/// A type at the boundary and what it is made of, down to numbers and pointers; one that was met before is only named.
fn describe(layout: &'static TypeLayout, depth: usize, met: &mut Vec<UTypeId>) -> String {
    let head = format!("{}, size {}, align {}\n", layout.full_type(), layout.size(), layout.alignment());
    if met.contains(&layout.get_utypeid()) {
        return head;
    }
    met.push(layout.get_utypeid());
    let fields = layout.get_fields().into_iter().flatten().chain(layout.phantom_fields());
    let lines = fields.map(|field| {
        let indent = "  ".repeat(depth + 1);
        if field.is_function() {
            // Below the signature abi_stable prints how it counts lifetimes.
            let signatures = field.function_range().iter().map(|f| f.to_string());
            return signatures.map(|s| format!("{indent}{}: {}\n", field.name(), s.lines().next().unwrap())).collect();
        }
        format!("{indent}{}: {}", field.name(), describe(field.layout(), depth + 1, met))
    });
    let lines: Vec<String> = lines.collect();
    head + &lines.concat()
}

#[test]
fn the_boundary_is_unchanged() {
    let layouts =
        [PluginModule_Ref::LAYOUT, RawLossCall::LAYOUT, RawExample::LAYOUT, RawAnswer::LAYOUT, RawLossResult::LAYOUT];
    let mut met = Vec::new();
    let ours = layouts.map(|l| describe(l, 0, &mut met)).concat();
    let file = frozen().join("layout.txt");
    if std::env::var_os("DPO_HOST_BLESS").is_some() {
        // Before the first release alone.
        std::fs::write(&file, &ours).unwrap();
    }
    let frozen = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(
        ours,
        frozen,
        "plugins in the world have the layout of {}; a wider one is a second module",
        file.display()
    );
}
