//! What a stranger sized: no number in a config, an adapter or a flag makes the tool allocate, overflow or compute on its word.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::fs;
use std::path::Path;
use std::time::Instant;

use dpo_tests::{Sandbox, golden};
use serde_json::{Value, json};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// A folder of a golden case, copied and with a file of JSON changed.
fn changed(sandbox: &Sandbox, name: &str, from: &str, file: &str, change: impl Fn(&mut Value)) -> String {
    let (from, to) = (golden("trajectories").join(from), sandbox.path(name));
    fs::create_dir_all(&to).unwrap();
    for entry in fs::read_dir(&from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), Path::new(&to).join(entry.file_name())).unwrap();
    }
    let path = Path::new(&to).join(file);
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
    to
}

/// Trains on the rows of the golden case, with further flags.
fn train<'a>(model: &'a str, rows: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "--device", "cpu", "--max-steps", "1", "--model", model, "--dataset", rows], more].concat()
}

fn rows() -> String {
    golden("trajectories/qwen2/prefs.jsonl").display().to_string()
}

/// Sizes that the weights do not have, most of them beyond any machine.
#[test]
fn a_config_is_compared_with_the_weights_before_anything_is_allocated() {
    let (sandbox, rows) = (sandbox(), rows());
    let keys =
        ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim"];
    for key in keys {
        for size in [1_000_u64, 1_000_000_000, 1 << 31, 1 << 62, u64::MAX] {
            let start = Instant::now();
            let name = format!("{key}-{size}");
            let model = changed(&sandbox, &name, "qwen2/model", "config.json", |c| c[key] = json!(size));
            for command in [train(&model, &rows, &[]), vec!["chat", "--model", &model, "--prompt", "Hello"]] {
                sandbox.refuses(&command, &[]);
            }
            assert!(start.elapsed().as_secs() < 10, "{name} took {:?}", start.elapsed());
        }
    }
    let model =
        changed(&sandbox, "wide", "qwen2/model", "config.json", |c| c["intermediate_size"] = json!(1_000_000_000));
    sandbox.refuses(&train(&model, &rows, &[]), &["has shape", "the model needs [1000000000,"]);
    let model = changed(&sandbox, "deep", "qwen2/model", "config.json", |c| c["num_hidden_layers"] = json!(10_000_000));
    sandbox.refuses(&train(&model, &rows, &[]), &["num_hidden_layers is 10000000"]);
}

/// A window beyond every row is none, and one beyond all numbers of a model is refused; neither wraps around to nothing.
#[test]
fn a_window_beyond_every_row_is_none() {
    let (sandbox, rows) = (sandbox(), rows());
    let windowed = |name: &str, window: u64| {
        changed(&sandbox, name, "qwen2/model", "config.json", |c| {
            c["use_sliding_window"] = json!(true);
            c["max_window_layers"] = json!(0);
            c["sliding_window"] = json!(window);
        })
    };
    let loss = |window: u64| {
        let (model, output) = (windowed(&format!("{window}"), window), sandbox.path(&format!("run-{window}")));
        sandbox.ok(&train(&model, &rows, &["--output-dir", &output]));
        dpo_tests::log(&output)[0]["logps/chosen"].as_f64().unwrap()
    };
    assert_eq!(loss((1 << 31) - 1), loss(100_000));
    let model = windowed("beyond", 1 << 32);
    sandbox
        .refuses(&train(&model, &rows, &[]), &["'sliding_window' should be a whole number below 2^31", "4294967296"]);
}

#[test]
fn a_rank_is_compared_with_what_there_is() {
    let (sandbox, rows) = (sandbox(), rows());
    let model = golden("trajectories/qwen2/model").display().to_string();
    for rank in ["0", "65537", "1000000000", "4611686018427387904"] {
        sandbox.refuses(&train(&model, &rows, &["--lora-rank", rank]), &["--lora-rank"]);
        sandbox.refuses(&["plan", "--model", &model, "--lora-rank", rank], &["--lora-rank"]);
    }
    // Within the range, but beyond most machines.
    let plan = ["plan", "--model", "qwen2.5-7b", "--lora-rank", "65536", "--device", "cpu", "--gpu-memory", "64GiB"];
    sandbox.refuses(&plan, &["needs", "adapter", "GiB", "--lora-rank"]);
    for (flag, value) in
        [("--lora-alpha", "0"), ("--lora-alpha", "-8"), ("--lora-alpha", "1e308"), ("--loss-weights", "nan")]
    {
        sandbox.refuses(&train(&model, &rows, &[flag, value]), &[flag]);
    }
    sandbox.refuses(&train(&model, &rows, &["--loss-option", "beta=nan"]), &["beta", "nan"]);
}

/// Adapters whose tensors mean something else than `W + scale · B · A` on the model as it is.
#[test]
fn an_adapter_of_another_kind_is_refused_by_name() {
    let (sandbox, rows) = (sandbox(), rows());
    let model = golden("trajectories/qwen2/model").display().to_string();
    let with = |name: &str, key: &str, value: &Value| {
        changed(&sandbox, name, "qwen2/init_adapter", "adapter_config.json", |c| c[key] = value.clone())
    };
    let refused = [
        ("init_lora_weights", json!("pissa"), "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", json!("pissa_niter_16"), "changes the base model"),
        ("init_lora_weights", json!("olora"), "changes the base model"),
        ("init_lora_weights", json!("corda"), "changes the base model"),
        ("init_lora_weights", json!("loftq"), "changes the base model"),
        ("init_lora_weights", json!("lora_ga"), "changes the base model"),
        ("use_dora", json!(true), "use_dora"),
        ("rank_pattern", json!({"q_proj": 4}), "rank_pattern"),
        ("use_foresight", json!(true), "use_foresight"),
        ("foresight_config", json!({"depth": 3}), "foresight_config"),
        ("use_rslora", json!("yes"), "use_rslora"),
        ("lora_alpha", json!(0), "'lora_alpha' is 0"),
        ("lora_alpha", json!(-8), "'lora_alpha' is -8"),
        ("lora_alpha", json!(1e308), "'lora_alpha' is 1e+308"),
        ("lora_alpha", json!("16"), "'lora_alpha' is \"16\""),
    ];
    for (i, (key, value, text)) in refused.iter().enumerate() {
        let adapter = with(&format!("refused-{i}"), key, value);
        sandbox.refuses(
            &["eval", "--model", &model, "--adapter", &adapter, "--dataset", &rows],
            &["adapter_config.json", text],
        );
    }
    let harmless = [
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!(false)),
        ("peft_version", json!("0.99.0")),
        ("lora_dropout", json!(0.1)),
        ("revision", json!("main")),
        ("loftq_config", json!({})),
        ("foresight_config", Value::Null),
        ("use_foresight", json!(false)),
        ("runtime_config", json!({"ephemeral_gpu_offload": false})),
    ];
    for (i, (key, value)) in harmless.iter().enumerate() {
        let adapter = with(&format!("harmless-{i}"), key, value);
        sandbox.ok(&["eval", "--model", &model, "--adapter", &adapter, "--dataset", &rows]);
    }
}
