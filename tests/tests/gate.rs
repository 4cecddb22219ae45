//! What a stranger sized: no number in a config, an adapter or a flag makes the tool allocate, overflow or compute on its word.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::fs;
use std::path::Path;
use std::time::Instant;

use dpo_tests::{Sandbox, copy, golden};
use serde_json::{Value, json};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// A folder of a golden case, copied and with a file of JSON changed.
fn changed(sandbox: &Sandbox, name: &str, from: &str, file: &str, change: impl Fn(&mut Value)) -> String {
    let to = sandbox.path(name);
    copy(&golden("trajectories").join(from), Path::new(&to));
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
        ("use_dora", json!(true), "lora_magnitude_vector"),
        ("use_dora", json!("yes"), "use_dora"),
        ("bias", json!("lora_only"), "'bias'"),
        ("lora_bias", json!(true), "'lora_bias'"),
        ("modules_to_save", json!(["embed_tokens"]), "'modules_to_save'"),
        ("trainable_token_indices", json!([1, 2]), "'trainable_token_indices'"),
        ("use_qalora", json!(true), "'use_qalora'"),
        ("loftq_config", json!({"loftq_bits": 4}), "'loftq_config'"),
        ("layer_replication", json!([[0, 2]]), "'layer_replication'"),
        ("rank_pattern", json!({"q_proj": 0}), "'rank_pattern': 'q_proj' should be a whole number"),
        ("rank_pattern", json!([4]), "rank_pattern"),
        ("layers_to_transform", json!("1"), "layers_to_transform"),
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

/// What is no regular file is not read, not written, and not waited for.
#[test]
fn links_pipes_and_devices_are_no_files() {
    let (sandbox, rows) = (sandbox(), rows());
    let model = golden("trajectories/qwen2/model").display().to_string();
    let pipe = |name: &str| {
        let path = sandbox.path(name);
        fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        path
    };
    let start = Instant::now();
    pipe("plugins/x.so");
    std::os::unix::fs::symlink("/dev/zero", sandbox.path("plugins/y.so")).unwrap();
    let said = sandbox.ok(&["list", "--plugin-dir", &sandbox.path("plugins")]).stdout;
    assert_eq!(said.matches("is not a regular file").count(), 2, "{said}");
    sandbox.refuses(&["data", &pipe("x.jsonl"), "--model", &model], &["x.jsonl: is not a regular file"]);
    pipe("adapter/adapter_config.json");
    let adapter = sandbox.path("adapter");
    sandbox
        .refuses(&["eval", "--model", &model, "--adapter", &adapter, "--dataset", &rows], &["is not a regular file"]);
    sandbox.refuses(&["train", "--config", "/dev/zero"], &["/dev/zero: is not a regular file"]);
    sandbox.refuses(&["describe", "qwen2", "--config", "/dev/zero"], &["/dev/zero: is not a regular file"]);

    // A lock that leads to another's file.
    let (output, other) = (sandbox.path("run"), sandbox.write("other", "precious"));
    fs::create_dir_all(&output).unwrap();
    std::os::unix::fs::symlink(&other, Path::new(&output).join(".lock")).unwrap();
    let ended = sandbox.run(&train(&model, &rows, &["--output-dir", &output]));
    assert_eq!((ended.code, fs::read_to_string(&other).unwrap().as_str()), (1, "precious"), "{}", ended.stderr);
    pipe("piped/.lock");
    assert_eq!(sandbox.run(&train(&model, &rows, &["--output-dir", &sandbox.path("piped")])).code, 1);
    assert!(start.elapsed().as_secs() < 10, "something was waited for: {:?}", start.elapsed());
}

#[test]
fn counts_beyond_every_machine_are_refused() {
    let (sandbox, rows) = (sandbox(), rows());
    let model = golden("trajectories/qwen2/model").display().to_string();
    for gpus in ["257", "4000000000", "18446744073709551615"] {
        sandbox.refuses(&train(&model, &rows, &["--gpus", gpus]), &["--gpus"]);
    }
    for wanted in ["100000001", "4294967296", "9223372036854775807"] {
        let data = format!("{rows}#{wanted}");
        sandbox.refuses(&["data", &data, "--model", &model], &["asks for more than"]);
    }
    let pairs = ["--per_device_train_batch_size", "4294967296", "--gradient_accumulation_steps", "4294967297"];
    sandbox.refuses(&train(&model, &rows, &pairs), &["pairs a step"]);
    sandbox.refuses(&train(&model, &rows, &["--gpus", "2", "--rendezvous", "1e19"]), &["--rendezvous"]);
}

/// A broken adapter is told of where it is only looked at, and a run does not go into the model's folder.
#[test]
fn what_is_broken_is_told_where_it_is_used() {
    let (sandbox, rows) = (sandbox(), rows());
    let model = golden("trajectories/qwen2/model").display().to_string();
    let adapter = changed(&sandbox, "adapter", "qwen2/init_adapter", "adapter_config.json", |_| {});
    let path = Path::new(&adapter).join("adapter_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let first = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[first..first + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let ended = sandbox.run(&["eval", "--model", &model, "--adapter", &adapter, "--dataset", &rows]);
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("prefs.jsonl:1: the log-probs of this row are not finite"), "{}", ended.stderr);

    let own = changed(&sandbox, "own", "qwen2/model", "config.json", |_| {});
    sandbox.refuses(&train(&own, &rows, &["--output-dir", &own]), &["is the model's folder"]);
    assert!(!Path::new(&own).join(".lock").exists(), "a refused run leaves its lock");
}

#[test]
fn folders_that_are_mixed_up_are_told_apart() {
    let sandbox = sandbox();
    let golden = |name: &str| golden("trajectories/qwen2").join(name).display().to_string();
    let (model, adapter, rows) = (golden("model"), golden("init_adapter"), golden("prefs.jsonl"));
    let config = fs::read_to_string(Path::new(&adapter).join("adapter_config.json")).unwrap();
    sandbox.write("runs/first/adapter_config.json", &config);
    sandbox.write("run/args.json", "{}");
    let (runs, run) = (sandbox.path("runs"), sandbox.path("run"));
    let eval = |model: &str, adapter: &str, texts: &[&str]| {
        sandbox.refuses(&["eval", "--model", model, "--adapter", adapter, "--dataset", &rows], texts);
    };
    eval(&adapter, &adapter, &["is the folder of an adapter, not of a model", "--init-adapter"]);
    eval(&model, &model, &["is the folder of a model, not of an adapter", "--model"]);
    eval(&model, &runs, &["this folder has several adapters", "runs/first"]);
    eval(&model, "nowhere", &["nowhere/adapter_config.json", "an adapter is a folder with"]);
    eval("https://huggingface.co/owner/name/tree/main", &adapter, &["is an address", "--model owner/name"]);
    let resumed = train(&model, &rows, &["--resume-from-checkpoint", &run]);
    sandbox.refuses(&resumed, &["is the folder of a run", "--output-dir"]);
}
