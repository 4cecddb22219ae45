//! The command line: what it refuses and how it says so, and ms-swift's flags.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::Path;

use dpo_tests::{Sandbox, golden};
use serde_json::Value;

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn model() -> String {
    golden("trajectories").join("qwen2/model").display().to_string()
}

fn rows() -> String {
    golden("trajectories").join("qwen2/prefs.jsonl").display().to_string()
}

const ROW: &str = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"ok sure"}],"rejected_response":"no"}"#;

#[test]
fn bad_rows_are_named() {
    let (s, model) = (sandbox(), model());
    let broken = s.write("broken.jsonl", &format!("{ROW}\n{ROW}\n{{\"messages\": [\n"));
    s.refuses(&["train", "--model", &model, "--dataset", &broken], &["broken.jsonl:3"]);
    let silent = s.write("silent.jsonl", &format!("{ROW}\n{{\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}],\"rejected_response\":\"no\"}}\n"));
    s.refuses(&["train", "--model", &model, "--dataset", &silent, "--strict"], &["silent.jsonl:2", "assistant"]);
    let same = s.write("same.jsonl", &format!("{ROW}\n{}\n", ROW.replace("\"no\"", "\"ok sure\"")));
    s.refuses(&["train", "--model", &model, "--dataset", &same, "--strict"], &["same.jsonl:2"]);
    let empty = s.write("empty.jsonl", "");
    s.refuses(&["train", "--model", &model, "--dataset", &empty], &["empty.jsonl"]);
    let missing = s.path("missing.jsonl");
    s.refuses(&["train", "--model", &model, "--dataset", &missing], &["missing.jsonl", "no such file"]);
}

#[test]
fn unknown_names_come_with_the_nearest() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let base = ["train", "--model", &model, "--dataset", &rows];
    let with = |more: &[&'static str]| [&base[..], more].concat();
    s.refuses(&with(&["--plugin", "qwen4"]), &["--plugin", "unknown plugin 'qwen4'", "qwen2"]);
    s.refuses(&with(&["--loss", "sigmod"]), &["unknown loss 'sigmod'", "did you mean 'sigmoid'"]);
    s.refuses(&with(&["--dataset-format", "msswift"]), &["msswift", "did you mean 'ms-swift'"]);
    s.refuses(&with(&["--target-modules", "q_prj"]), &["did you mean 'q_proj'"]);
    s.refuses(&with(&["--loss-option", "bta=1"]), &["bta", "did you mean 'beta'"]);
    s.refuses(&with(&["--no-such-flag"]), &["--no-such-flag"]);
    s.refuses(&["train", "--plugin", "qwen9"], &["unknown plugin 'qwen9'"]);
}

/// A copy of the small model in which a file has been changed.
fn broken_model(s: &Sandbox, name: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> String {
    let folder = s.path("model");
    std::fs::create_dir_all(&folder).unwrap();
    for entry in std::fs::read_dir(model()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, Path::new(&folder).join(path.file_name().unwrap())).unwrap();
    }
    let path = Path::new(&folder).join(name);
    std::fs::write(&path, change(std::fs::read(&path).unwrap())).unwrap();
    folder
}

#[test]
fn broken_checkpoints_are_named() {
    let rows = rows();
    let refuses = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>, texts: &[&str]| {
        let s = sandbox();
        let model = broken_model(&s, name, change);
        s.refuses(&["train", "--model", &model, "--dataset", &rows], texts);
        assert!(!Path::new(&s.path("output")).exists(), "a refused run left something");
    };
    let replaced = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(from, to).into_bytes()
    };
    let cut = |bytes: Vec<u8>| bytes[..bytes.len() - 4000].to_vec();
    refuses("model.safetensors", &cut, &["model.safetensors", "cut short at tensor '"]);
    let renamed = |bytes: Vec<u8>| {
        let at = bytes.windows(10).position(|w| w == b"model.norm").unwrap();
        [&bytes[..at], b"model.nrom", &bytes[at + 10..]].concat()
    };
    refuses("model.safetensors", &renamed, &["model.nrom.weight", "not part of the model"]);
    refuses("config.json", &replaced("\"intermediate_size\": 64", "\"intermediate_size\": 72"), &["[64, 32]", "[72, 32]", ".safetensors"]);
    refuses("config.json", &replaced("\"use_cache\"", "\"attn_logit_softcapping\": 50.0, \"use_cache\""), &["attn_logit_softcapping"]);
    refuses("config.json", &replaced("Qwen2ForCausalLM", "GPT2LMHeadModel"), &["GPT2LMHeadModel"]);
}

#[test]
fn a_folder_with_a_run_is_left_alone() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let output = s.path("run");
    let args = ["train", "--model", &model, "--dataset", &rows, "--output-dir", &output, "--max-steps", "1"];
    s.ok(&args);
    let before = std::fs::read(Path::new(&output).join("adapter_model.safetensors")).unwrap();
    s.refuses(&args, &["holds a run already", "--resume-from-checkpoint"]);
    assert_eq!(before, std::fs::read(Path::new(&output).join("adapter_model.safetensors")).unwrap());
}

/// ms-swift's examples/train/rlhf/dpo/lora.sh, with a model and rows that are here.
#[test]
fn ms_swifts_script_means_the_same() {
    let s = sandbox();
    let script = "train --rlhf_type dpo --tuner_type lora --load_from_cache_file true --split_dataset_ratio 0.01 --torch_dtype \
        bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --learning_rate 1e-4 \
        --lora_rank 8 --lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 16 --eval_steps 50 \
        --save_steps 50 --save_total_limit 2 --logging_steps 5 --max_length 2048 --warmup_ratio 0.05 \
        --dataloader_num_workers 4 --rpo_alpha 0.1 --dataset_num_proc 4";
    let (output, model, rows) = (s.path("output"), model(), rows());
    let given = ["--model", &model, "--dataset", &rows, "--output_dir", &output];
    let ended = s.ok(&script.split_whitespace().chain(given).collect::<Vec<_>>());
    for ignored in ["load_from_cache_file", "per_device_eval_batch_size", "dataloader_num_workers", "dataset_num_proc"] {
        let note = ended.stderr.lines().find(|l| l.contains(ignored) && l.contains("is ignored: "));
        assert!(note.is_some(), "no reason for {ignored}:\n{}", ended.stderr);
    }
    let args: Value = serde_json::from_str(&std::fs::read_to_string(Path::new(&output).join("args.json")).unwrap()).unwrap();
    let expected = serde_json::json!({
        "split_dataset_ratio": 0.01, "dtype": "bfloat16", "num_epochs": 1.0, "batch_size": 16, "learning_rate": 1e-4,
        "lora_rank": 8, "lora_alpha": 32.0, "target_modules": ["all-linear"], "eval_steps": 50, "save_steps": 50,
        "save_total_limit": 2, "logging_steps": 5, "max_length": 2048, "warmup_ratio": 0.05, "rpo_alpha": 0.1,
        "lr_scheduler": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95, "loss": ["sigmoid"],
    });
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&args[name], value, "{name}");
    }
    s.refuses(&["train", "--rlhf_type", "grpo"], &["--rlhf_type grpo", "dpo"]);
    s.refuses(&["train", "--tuner_type", "full"], &["--tuner_type full", "lora"]);
}

#[test]
fn a_file_of_flags_is_overruled_by_the_command_line() {
    let (s, model, rows) = (sandbox(), model(), rows());
    let config = s.write("run.toml", &format!("model = {model:?}\ndataset = [{rows:?}]\nbatch_size = 3\nmax-steps = 1\n"));
    let output = s.path("run");
    s.ok(&["train", "--config", &config, "--batch-size", "2", "--output-dir", &output]);
    let args: Value = serde_json::from_str(&std::fs::read_to_string(Path::new(&output).join("args.json")).unwrap()).unwrap();
    assert_eq!((&args["batch_size"], &args["max_steps"]), (&2.into(), &1.into()));
    let wrong = s.write("wrong.toml", "model = 'x'\nbatch_size = = 3\n");
    s.refuses(&["train", "--config", &wrong], &["wrong.toml:2"]);
}

#[test]
fn plugins_describe_themselves() {
    let s = sandbox();
    let list = s.ok(&["list"]).stdout;
    for name in ["qwen2", "qwen3", "llama3", "ms-swift", "sigmoid", "built-in"] {
        assert!(list.contains(name), "{name} is not listed:\n{list}");
    }
    assert!(s.ok(&["describe", "qwen2"]).stdout.contains("self_attn.q_proj.weight [3584, 3584]"));
    assert!(s.ok(&["describe", "ms-swift"]).stdout.contains("rejected_response"));
    assert!(s.ok(&["describe", "sigmoid"]).stdout.contains("beta"));
    assert!(s.ok(&["list", "ops"]).stdout.contains("rms_norm"));
    s.refuses(&["describe", "qwen7"], &["unknown plugin 'qwen7'"]);
}
