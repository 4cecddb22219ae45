//! Kinds of LoRA against PEFT: steps of DPO from its adapters and as it initialises them, and what its files say.
//!
//! A case is a folder of `tests/golden/lora`, made by `tests/oracle/lora.py` over the model and rows of `trajectories/qwen2`.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use dpo_tests::{Sandbox, golden, log};
use serde_json::{Value, json};

/// Relative to PEFT's value, absolute near zero.
const STEP: f64 = 1e-4;
const GRADIENT: f64 = 1e-3;

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn qwen2(name: &str) -> String {
    golden("trajectories/qwen2").join(name).display().to_string()
}

fn expected(case: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("lora").join(case).join("expected.json")).unwrap()).unwrap()
}

fn read(path: impl AsRef<Path>) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The settings of `tests/oracle/lora.py`.
const SETTINGS: &str = "--device cpu --batch-size 4 --max-steps 4 --learning-rate 2e-3 --lr-scheduler linear --warmup-steps 0 \
                        --weight-decay 0.01 --adam-beta1 0.9 --adam-beta2 0.95 --max-grad-norm 1.0 --shuffle false \
                        --logging-steps 1 --truncation-strategy right --max-length 512 --beta 0.1 --loss sigmoid --seed 0";

/// A run over the rows of the cases.
fn train(s: &Sandbox, model: &str, flags: &[&str], run: &str) -> String {
    let output = s.path(run);
    let rows = qwen2("prefs.jsonl");
    let fixed = ["train", "--model", model, "--dataset", &rows, "--output-dir", &output];
    s.ok(&[&fixed[..], &SETTINGS.split_whitespace().collect::<Vec<_>>(), flags].concat());
    output
}

/// Log-probs of both answers of every row.
fn logps(s: &Sandbox, model: &str, adapter: &str) -> Vec<[f64; 2]> {
    let (rows, output) = (qwen2("prefs.jsonl"), s.path("scores.jsonl"));
    let _ = std::fs::remove_file(&output);
    s.ok(&["eval", "--device", "cpu", "--model", model, "--adapter", adapter, "--dataset", &rows, "--output", &output]);
    let text = std::fs::read_to_string(&output).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.map(|line| ["chosen", "rejected"].map(|name| line[name].as_f64().unwrap())).collect()
}

/// Compares a run's steps, and the log-probs of its adapter on the model that it names, with PEFT's.
fn compare(s: &Sandbox, case: &str, model: &str, run: &str) {
    let expected = expected(case);
    let (lines, steps) = (log(run), expected["steps"].as_array().unwrap());
    assert_eq!(lines.len(), steps.len(), "{case}");
    for (at, (ours, theirs)) in lines.iter().zip(steps).enumerate() {
        for (name, theirs) in theirs.as_object().unwrap() {
            let (a, b) = (ours[name].as_f64().unwrap(), theirs.as_f64().unwrap());
            let bound = if name == "grad_norm" { GRADIENT } else { STEP };
            assert!((a - b).abs() < bound * b.abs().max(1e-3), "{case}, step {}: {name} is {a}, PEFT has {b}", at + 1);
        }
    }
    let end: Vec<[f64; 2]> = serde_json::from_value(expected["end"].clone()).unwrap();
    for (ours, theirs) in logps(s, model, run).concat().iter().zip(end.concat()) {
        assert!((ours - theirs).abs() < STEP * theirs.abs(), "{case}: log-prob {ours} at the end, PEFT has {theirs}");
    }
}

/// Trains as a case says, and compares.
fn case(name: &str) -> (Sandbox, String) {
    let (s, model, adapter) = (sandbox(), qwen2("model"), golden("lora").join(name).join("adapter"));
    let (flags, adapter) = (expected(name)["flags"].as_str().unwrap().to_owned(), adapter.display().to_string());
    let mut flags: Vec<&str> = flags.split_whitespace().collect();
    if Path::new(&adapter).exists() {
        flags.extend(["--init-adapter", &adapter]);
    }
    let run = train(&s, &model, &flags, "run");
    compare(&s, name, &model, &run);
    (s, run)
}

#[test]
fn linears_have_ranks_and_scales_of_their_own() {
    let (s, run) = case("patterns");
    let (theirs, ours) =
        (read(golden("lora/patterns/adapter/adapter_config.json")), read(Path::new(&run).join("adapter_config.json")));
    for key in ["r", "use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    // A run that goes on, and a merge.
    let merged = s.path("merged");
    s.ok(&["merge", "--model", &qwen2("model"), "--adapter", &run, "--output-dir", &merged]);
    let (together, run) = (logps(&s, &qwen2("model"), &run), s.path("other"));
    let none = ["--max-steps", "1", "--learning-rate", "0", "--lora-rank", "1"];
    train(&s, &merged, &none, "other");
    for (a, b) in logps(&s, &merged, &run).concat().iter().zip(together.concat()) {
        assert!((a - b).abs() < 1e-5 * b.abs(), "{a} merged, {b} before");
    }
}

#[test]
fn some_layers_are_adapted() {
    let (_s, run) = case("layers");
    let config = read(Path::new(&run).join("adapter_config.json"));
    assert_eq!((&config["layers_to_transform"], &config["layers_pattern"]), (&json!([1]), &json!(["layers"])));
}

/// LoRA+: B learns at a rate of its own, and decays by it, as in PEFT's `create_loraplus_optimizer`.
#[test]
fn loraplus_has_pefts_groups() {
    let (s, model, start) = (sandbox(), qwen2("model"), qwen2("init_adapter"));
    let flags = ["--loraplus-lr-ratio", "8", "--init-adapter", &start];
    let run = train(&s, &model, &flags, "run");
    compare(&s, "loraplus", &model, &run);
    // A resumed run has the same ratio: four steps are two and two.
    let whole = std::fs::read(Path::new(&run).join("adapter_model.safetensors")).unwrap();
    let cut = train(&s, &model, &[&flags[..], &["--save-steps", "2"]].concat(), "cut");
    let checkpoint = Path::new(&cut).join("checkpoint-2").display().to_string();
    let rows = qwen2("prefs.jsonl");
    let settings: Vec<&str> = SETTINGS.split_whitespace().collect();
    let output = s.path("resumed");
    let again = [
        "train",
        "--model",
        &model,
        "--dataset",
        &rows,
        "--output-dir",
        &output,
        "--resume-from-checkpoint",
        &checkpoint,
    ];
    let again = [&again[..], &settings].concat();
    s.refuses(
        &[&again[..], &["--init-adapter", &start, "--loraplus-lr-ratio", "4"]].concat(),
        &["--loraplus-lr-ratio was 8"],
    );
    s.ok(&[&again[..], &flags].concat());
    assert!(whole == std::fs::read(Path::new(&output).join("adapter_model.safetensors")).unwrap());
}

/// PiSSA and OLoRA: PEFT trains what is left of the weights, here the start is subtracted from the update. The steps are the same, and the file
/// is right on the model as it is.
#[test]
fn a_start_from_the_weights_is_saved_as_a_plain_adapter() {
    for name in ["pissa", "olora"] {
        let (s, run) = case(name);
        let config = read(Path::new(&run).join("adapter_config.json"));
        let (rank, alpha) = if name == "pissa" { (8, 16.0) } else { (6, 8.0 * 2_f64.sqrt()) };
        assert_eq!((&config["r"], &config["init_lora_weights"]), (&json!(rank), &json!(true)), "{name}");
        assert!((config["lora_alpha"].as_f64().unwrap() - alpha).abs() < 1e-9, "{config}");
        let flags = expected(name)["flags"].as_str().unwrap().to_owned();
        let flags: Vec<&str> = flags.split_whitespace().chain(["--save-steps", "2"]).collect();
        // Ranks have one start.
        let ranks = train(&s, &qwen2("model"), &[&flags[..], &["--gpus", "2"]].concat(), "ranks");
        compare(&s, name, &qwen2("model"), &ranks);
        // It goes on from a checkpoint with the start that it had.
        let cut = train(&s, &qwen2("model"), &flags, "cut");
        for folder in ["checkpoint-4", "latest"] {
            let path = Path::new(&cut).join(folder);
            let _ = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path));
        }
        std::fs::remove_file(Path::new(&cut).join("adapter_model.safetensors")).unwrap();
        train(&s, &qwen2("model"), &[&flags[..], &["--resume-from-checkpoint", "latest"]].concat(), "cut");
        let of = |folder: &str| std::fs::read(Path::new(folder).join("adapter_model.safetensors")).unwrap();
        assert!(of(&run) == of(&cut), "{name}: the resumed run has another adapter");
    }
}

/// PEFT advises a randomised decomposition: it finds the same update.
#[test]
fn pissa_by_iterations_takes_the_same_steps() {
    let s = sandbox();
    let run = train(
        &s,
        &qwen2("model"),
        &["--init-lora-weights", "pissa_niter_8", "--lora-rank", "4", "--lora-alpha", "8"],
        "run",
    );
    compare(&s, "pissa", &qwen2("model"), &run);
}

/// Starts that leave the model as it is: the first step's loss is that of the model itself.
#[test]
fn a_new_adapter_changes_nothing() {
    let s = sandbox();
    for start in ["true", "gaussian", "orthogonal", "pissa", "olora"] {
        let run = train(&s, &qwen2("model"), &["--init-lora-weights", start, "--max-steps", "1"], start);
        let line = &log(&run)[0];
        assert!((line["loss"].as_f64().unwrap() - 2_f64.ln()).abs() < 1e-6, "{start}: {line}");
        assert!(line["grad_norm"].as_f64().unwrap() > 1e-3, "{start}: {line}");
    }
    let (model, rows) = (qwen2("model"), qwen2("prefs.jsonl"));
    let refused: [(&[&str], &str); 5] = [
        (&["--init-lora-weights", "loftq"], "pissa_niter_16"),
        (&["--init-lora-weights", "false"], "--init-lora-weights"),
        (&["--init-lora-weights", "orthogonal", "--lora-rank", "3"], "even"),
        (&["--init-lora-weights", "pissa", "--use-dora"], "--init-lora-weights"),
        (&["--lora-dropout", "1"], "--lora-dropout"),
    ];
    for (flags, text) in refused {
        s.refuses(&[&["train", "--model", &model, "--dataset", &rows][..], flags].concat(), &[text]);
    }
}

#[test]
fn dora_is_pefts() {
    let (s, run) = case("dora");
    assert_eq!(read(Path::new(&run).join("adapter_config.json"))["use_dora"], true);
    // Folded into the model it gives the same.
    let (model, merged) = (qwen2("model"), s.path("merged"));
    s.ok(&["merge", "--model", &model, "--adapter", &run, "--output-dir", &merged]);
    let together = logps(&s, &model, &run);
    let idle = train(&s, &merged, &["--max-steps", "1", "--learning-rate", "0", "--lora-rank", "1"], "idle");
    for (a, b) in logps(&s, &merged, &idle).concat().iter().zip(together.concat()) {
        assert!((a - b).abs() < 1e-5 * b.abs(), "{a} merged, {b} before");
    }
    let (s, run) = case("dora-new");
    // A new one of ours begins with the lengths that PEFT found.
    let flags = "--use-dora --lora-rank 2 --lora-alpha 6 --target-modules q_proj v_proj down_proj --learning-rate 0";
    let new = train(&s, &model, &flags.split_whitespace().collect::<Vec<_>>(), "new");
    assert_eq!(tensors(&new), tensors(&run));
    let magnitudes = |folder: &Path| -> Vec<f32> {
        let mut all: Vec<_> =
            dpo_core::weights::read_f32(&folder.join("adapter_model.safetensors")).unwrap().into_iter().collect();
        all.retain(|(name, _)| name.ends_with("lora_magnitude_vector"));
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all.into_iter().flat_map(|(_, (_, values))| values).collect()
    };
    let (ours, theirs) = (magnitudes(Path::new(&new)), magnitudes(&golden("lora/dora-new/adapter")));
    assert_eq!(ours.len(), 2 * (32 + 16 + 32));
    ours.iter().zip(theirs).for_each(|(a, b)| assert!((a - b).abs() < 1e-5 * b, "{a} {b}"));
}

/// Dropout is off unless it is asked for in so many words, and then repeats with the seed.
#[test]
fn dropout_is_applied_where_it_is_asked_for() {
    let s = sandbox();
    let start = qwen2("init_adapter");
    let run = |name: &str, flags: &[&str]| {
        let run = train(&s, &qwen2("model"), &[&["--init-adapter", &start][..], flags].concat(), name);
        (log(&run), std::fs::read(Path::new(&run).join("adapter_model.safetensors")).unwrap())
    };
    let dropped = ["--lora-dropout", "0.3", "--disable-dropout", "false"];
    let (plain, off) = (run("plain", &[]), run("off", &["--lora-dropout", "0.3"]));
    assert!(plain.1 == off.1);
    let on = run("on", &dropped);
    assert!(plain.1 != on.1);
    // Micro-batches and ranks do not matter beyond rounding, and the reference has none of it: a first step differs from ln 2 by what was dropped.
    let small = run("small", &[&dropped[..], &["--micro-batch-tokens", "64"]].concat());
    let ranks = run("ranks", &[&dropped[..], &["--gpus", "2"]].concat());
    for (a, b) in on.0.iter().chain(&on.0).zip(small.0.iter().chain(&ranks.0)) {
        let [a, b] = [a, b].map(|line| line["loss"].as_f64().unwrap());
        assert!((a - b).abs() < 1e-4, "{a} {b}");
        assert!(a.is_finite());
    }
    assert!((on.0[0]["loss"].as_f64().unwrap() - 2_f64.ln()).abs() > 1e-4);
    assert!((plain.0[0]["loss"].as_f64().unwrap() - 2_f64.ln()).abs() < 1e-6);
    assert!(run("again", &dropped).1 == on.1);
    assert!(run("seed", &[&dropped[..], &["--seed", "1"]].concat()).1 != on.1);
}

/// What each tool writes beside the same tensors.
#[test]
fn adapters_of_four_tools_are_read() {
    let s = sandbox();
    let theirs = read(Path::new(&qwen2("init_adapter")).join("adapter_config.json"));
    let expected = logps(&s, &qwen2("model"), &qwen2("init_adapter"));
    let tensors = std::fs::read(Path::new(&qwen2("init_adapter")).join("adapter_model.safetensors")).unwrap();
    let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let blocks = "self_attn|attention|attn|mlp|feed_forward|ffn|dense";
    let linears = names.join("|");
    let unsloth = format!(
        r"(?:.*?(?:language|text).*?(?:{blocks}).*?(?:{linears}).*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{blocks})\.(?:(?:{linears})))"
    );
    let mapping = json!({"base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers.models.qwen2.modeling_qwen2",
                         "unsloth_fixed": true});
    let configs = [
        ("peft", json!({})),
        (
            "peft-older",
            json!({"peft_version": Value::Null, "layer_replication": Value::Null, "megatron_config": Value::Null, "fan_in_fan_out": false}),
        ),
        (
            "unsloth",
            json!({"auto_mapping": mapping, "target_modules": unsloth, "lora_dropout": 0, "loftq_config": {}, "task_type": Value::Null,
                           "base_model_name_or_path": "unsloth/qwen2.5-0.5b-instruct-unsloth-bnb-4bit"}),
        ),
        (
            "ms-swift",
            json!({"modules_to_save": [], "lora_dropout": 0.05, "target_modules": format!(r"^(model(?=\.).*\.({linears}))$"),
                            "rank_pattern": {}, "alpha_pattern": {}, "base_model_name_or_path": "/cache/models/Qwen2"}),
        ),
        (
            "llama-factory",
            json!({"lora_dropout": 0.0, "target_modules": names, "trainable_token_indices": Value::Null, "corda_config": Value::Null}),
        ),
    ];
    for (tool, more) in configs {
        let mut config = theirs.clone();
        more.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        let path = s.write(&format!("{tool}/adapter_config.json"), &config.to_string());
        let folder = Path::new(&path).parent().unwrap();
        std::fs::write(folder.join("adapter_model.safetensors"), &tensors).unwrap();
        s.write(
            &format!("{tool}/additional_config.json"),
            r#"{"lora_dtype": null, "lorap_lr_ratio": null, "lorap_emb_lr": 1e-06}"#,
        );
        s.write(&format!("{tool}/README.md"), "---\nlibrary_name: peft\n---\n");
        assert_eq!(logps(&s, &qwen2("model"), &folder.display().to_string()), expected, "{tool}");
    }
    let refuses = |folder: &str, text: &str| {
        let (model, rows, folder) = (qwen2("model"), qwen2("prefs.jsonl"), s.path(folder));
        s.refuses(&["eval", "--model", &model, "--adapter", &folder, "--dataset", &rows], &[text]);
    };
    s.write("swift/default/adapter_config.json", r#"{"swift_type": "LORA", "r": 8}"#);
    refuses("swift/default", "--tuner_backend peft");
    refuses("swift", "swift/default");
    dpo_tests::copy(Path::new(&s.path("llama-factory")), Path::new(&s.path("run/pissa_backup")));
    refuses("run/pissa_backup", "pissa_converted");
    dpo_tests::copy(Path::new(&s.path("peft")), Path::new(&s.path("pickled")));
    std::fs::rename(s.path("pickled/adapter_model.safetensors"), s.path("pickled/adapter_model.bin")).unwrap();
    refuses("pickled", "Python objects");
    // A resized embedding, which PEFT saves with the adapter.
    dpo_tests::copy(Path::new(&s.path("peft")), Path::new(&s.path("resized")));
    let file = s.path("resized/adapter_model.safetensors");
    let mut all = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let table = Tensor::zeros((4, 32), DType::F32, &Device::Cpu).unwrap();
    all.insert("base_model.model.model.embed_tokens.weight".into(), table);
    candle_core::safetensors::save(&all, &file).unwrap();
    refuses("resized", "embed_tokens.weight' is a whole weight");
}

/// An adapter of SFT folded in, and DPO with a new one on top: the reference is the model with the first.
#[test]
fn a_new_adapter_on_top_of_a_merged_one() {
    let s = sandbox();
    let merged = s.path("merged");
    s.ok(&["merge", "--model", &qwen2("model"), "--adapter", &qwen2("init_adapter"), "--output-dir", &merged]);
    let start = golden("lora/stacked/adapter").display().to_string();
    let run = train(&s, &merged, &["--init-adapter", &start], "run");
    compare(&s, "stacked", &merged, &run);
}

/// The flags make what PEFT's file says.
#[test]
fn flags_say_what_peft_says() {
    let s = sandbox();
    let flags = [
        "--use-rslora",
        "--lora-rank",
        "4",
        "--lora-alpha",
        "8",
        "--exclude-modules",
        "up_proj",
        "--rank-pattern",
        r#"{"layers.1.self_attn.q_proj": 2, "q_proj|k_proj": 6, "layers\\.0\\.mlp\\..*": 3}"#,
        "--alpha-pattern",
        r#"{"down_proj": 20, "^model.layers.0.self_attn.v_proj": 2}"#,
    ];
    let run = train(&s, &qwen2("model"), &flags, "run");
    let (ours, theirs) = (tensors(&run), tensors(&golden("lora/patterns/adapter").display().to_string()));
    assert_eq!(ours, theirs);
    let config = read(Path::new(&run).join("adapter_config.json"));
    assert!(config["base_model_name_or_path"].is_string());

    let refused: [(&[&str], &[&str]); 6] = [
        (&["--exclude-modules", "up_porj"], &["--exclude-modules", "up_proj"]),
        (&["--exclude-modules", ".*"], &["no linear is left"]),
        (&["--rank-pattern", r#"{"q_porj": 4}"#], &["--rank-pattern", "q_proj"]),
        (&["--rank-pattern", r#"{"q_proj": 0}"#], &["--rank-pattern", "from 1 to"]),
        (&["--alpha-pattern", "q_proj=4"], &["--alpha-pattern", "JSON"]),
        (
            &["--rank-pattern", r#"{"q_proj": 4}"#, "--init-adapter", &qwen2("init_adapter")],
            &["--rank-pattern", "new adapter"],
        ),
    ];
    for (flags, texts) in refused {
        let (model, rows) = (qwen2("model"), qwen2("prefs.jsonl"));
        s.refuses(&[&["train", "--model", &model, "--dataset", &rows][..], flags].concat(), texts);
    }
    // A resumed run has the same patterns.
    let (model, rows) = (qwen2("model"), qwen2("prefs.jsonl"));
    let again =
        ["train", "--model", &model, "--dataset", &rows, "--output-dir", &run, "--resume-from-checkpoint", "latest"];
    let save = ["--save-steps", "2"];
    let run = train(&s, &model, &[&flags[..], &save].concat(), "saved");
    let again: Vec<&str> = again.iter().map(|a| if *a == again[6] { run.as_str() } else { a }).collect();
    let other = ["--lora-rank", "4", "--lora-alpha", "8", "--use-rslora", "--exclude-modules", "up_proj"];
    let settings: Vec<&str> = SETTINGS.split_whitespace().collect();
    s.refuses(&[&again[..], &settings, &other].concat(), &["--rank-pattern was {", "--alpha-pattern was {"]);
}

/// Names and shapes of an adapter's tensors.
fn tensors(folder: &str) -> Vec<(String, Vec<usize>)> {
    let tensors = dpo_core::weights::read_f32(&Path::new(folder).join("adapter_model.safetensors")).unwrap();
    let mut all: Vec<(String, Vec<usize>)> = tensors.into_iter().map(|(name, (shape, _))| (name, shape)).collect();
    all.sort();
    all
}
