//! The plan of a run on the CPU is an upper bound: the most memory that a process held, beside what was planned, over shapes, with
//! one arena of malloc's.
//! `DPO_CAMPAIGN=1` takes all of them, else those that take seconds.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use dpo_tests::{Sandbox, golden, graph, log, weights};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Family, hidden, intermediate, layers, heads, key heads, head columns, vocabulary; bytes of a row's prompt and of each answer;
/// whether it takes seconds.
type Shape = (&'static str, [usize; 7], [usize; 2], bool);

const SHAPES: [Shape; 21] = [
    ("qwen2", [64, 96, 1, 64, 1, 16, 320], [500, 200], true),
    ("qwen2", [64, 96, 2, 64, 1, 16, 320], [1500, 500], false),
    ("qwen2", [64, 96, 1, 64, 1, 16, 320], [2500, 500], false),
    ("qwen3", [128, 256, 1, 32, 1, 16, 320], [2500, 1000], false),
    ("qwen2", [448, 512, 2, 14, 2, 32, 320], [1500, 500], false),
    ("qwen2", [448, 512, 1, 28, 4, 16, 320], [4000, 500], false),
    ("llama3", [256, 512, 2, 8, 8, 32, 320], [1500, 500], false),
    ("llama3", [256, 512, 1, 8, 8, 32, 320], [2000, 2000], false),
    ("llama3", [256, 512, 8, 8, 2, 32, 320], [1000, 300], false),
    ("qwen3", [64, 4096, 1, 4, 2, 16, 320], [500, 200], true),
    ("qwen3", [64, 8192, 4, 4, 2, 16, 320], [1000, 300], false),
    ("qwen2", [64, 128, 2, 4, 2, 16, 32000], [500, 500], true),
    ("qwen2", [64, 128, 2, 4, 2, 16, 150000], [200, 300], false),
    ("llama3", [512, 1024, 2, 8, 2, 64, 50000], [200, 300], false),
    ("qwen3", [96, 128, 30, 4, 2, 24, 320], [600, 200], false),
    ("qwen3", [96, 128, 2, 4, 2, 24, 320], [20, 4000], false),
    ("qwen3", [96, 128, 2, 4, 2, 24, 320], [6000, 20], false),
    ("qwen2", [512, 2048, 4, 8, 8, 64, 320], [40, 40], true),
    ("llama3", [1024, 2816, 3, 16, 4, 64, 320], [600, 200], false),
    ("qwen2", [128, 256, 1, 128, 1, 8, 320], [1500, 300], false),
    ("llama3", [32, 64, 1, 4, 2, 8, 96], [10, 10], true),
];

/// A model of a shape with random weights, and rows for it.
fn model(folder: &str, (family, [hidden, ffn, layers, heads, kv, dim, vocab], _, _): &Shape) {
    let architecture = HashMap::from([("qwen2", "Qwen2"), ("qwen3", "Qwen3"), ("llama3", "Llama")])[family];
    let vocab = (*vocab).max(320);
    let config = json!({
        "architectures": [format!("{architecture}ForCausalLM")], "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": dim,
        "vocab_size": vocab, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
        "tie_word_embeddings": false, "hidden_act": "silu",
    });
    fs::create_dir_all(folder).unwrap();
    let at = |name: &str| Path::new(folder).join(name);
    fs::write(at("config.json"), config.to_string()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(golden("trajectories/qwen2/model").join(name), at(name)).unwrap();
    }
    let tensors = weights(&graph(family, &config.to_string()), 1);
    let bytes = |t: &candle_core::Tensor| {
        let values: Vec<f32> = t.flatten_all().unwrap().to_vec1().unwrap();
        values.iter().flat_map(|v| (v * 0.1).to_le_bytes()).collect::<Vec<u8>>()
    };
    let data: Vec<_> = tensors.iter().map(|(n, t)| (n.clone(), t.dims().to_vec(), bytes(t))).collect();
    let views = data.iter().map(|(n, s, b)| (n.as_str(), TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    fs::write(at("model.safetensors"), safetensors::serialize(views, None::<HashMap<String, String>>).unwrap())
        .unwrap();
}

/// A size as people write it, in MiB.
fn mib(text: &str) -> f64 {
    let (number, unit) = text.trim().split_once(' ').unwrap();
    number.parse::<f64>().unwrap() * HashMap::from([("GiB", 1024.0), ("MiB", 1.0), ("KiB", 1.0 / 1024.0)])[unit]
}

#[test]
fn a_process_stays_within_its_plan() {
    let all = std::env::var_os("DPO_CAMPAIGN").is_some();
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let mut beyond = Vec::new();
    for (i, shape) in SHAPES.iter().enumerate().filter(|(_, s)| s.3 || all) {
        let folder = sandbox.path(&format!("model-{i}"));
        model(&folder, shape);
        let [prompt, answer] = shape.2;
        let text = |n: usize, of: &str| of.repeat(n / of.len() + 1)[..n].to_owned();
        let row =
            json!({"prompt": text(prompt, "xq#7 "), "chosen": text(answer, "k9! "), "rejected": text(answer, "z?0 ")});
        let rows = sandbox.write(&format!("rows-{i}.jsonl"), &format!("{row}\n").repeat(2));
        // All rows in one micro-batch, which the plan then is of.
        let said =
            sandbox.ok(&["data", "--json", "--model", &folder, "--dataset", &rows, "--max-length", "30000"]).stdout;
        let said: Value = serde_json::from_str(&said).unwrap();
        let of_row: u64 = said["parts"].as_array().unwrap().iter().map(|p| p["lengths"]["max"].as_u64().unwrap()).sum();
        let tokens = &(2 * of_row).to_string();
        for (recompute, base) in [("false", "none"), ("true", "none"), ("true", "nf4"), ("true", "fp8")] {
            let output = sandbox.path(&format!("run-{i}-{recompute}-{base}"));
            let args = ["train", "--device", "cpu", "--max-steps", "1", "--batch-size", "2", "--max-length", "30000"];
            let more = [
                "--model",
                &folder,
                "--dataset",
                &rows,
                "--output-dir",
                &output,
                "--recompute",
                recompute,
                "--quantization",
                base,
            ];
            let mut command = sandbox.command(&[&args[..], &more, &["--micro-batch-tokens", tokens]].concat());
            // With an arena for each thread, glibc keeps what was freed in one of them while another grows: which thread runs
            // a pass is chance, and so is how much is kept.
            let ended = command.env("MALLOC_ARENA_MAX", "1").output().unwrap();
            let stderr = String::from_utf8_lossy(&ended.stderr);
            assert!(ended.status.success(), "{stderr}");
            let line = stderr.lines().find(|l| l.starts_with("memory")).unwrap_or_else(|| panic!("{stderr}"));
            let planned = mib(line.split(", ").nth(1).unwrap().trim_end_matches("planned"));
            let peak = log(&output).last().and_then(|l: &Value| l["memory_gib"].as_f64()).unwrap() * 1024.0;
            let told = format!(
                "{shape:?}, {tokens} tokens, recompute {recompute}, base {base}: planned {planned:.0} MiB, peak {peak:.0}"
            );
            println!("{told}");
            if peak > planned {
                beyond.push(told);
            }
        }
        fs::remove_dir_all(&folder).unwrap();
    }
    assert!(beyond.is_empty(), "{beyond:#?}");
}
