//! Shared helpers of the end-to-end tests: small random models in memory, and engines over them.

pub mod hub;
pub mod mlflow;
pub mod nested;
pub mod page;

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use dpo_core::engine::{Engine, Loras};
use dpo_core::example::{Answer, Example};
use dpo_core::lora::{Adapter, AdapterConfig};
use dpo_core::ops::KvCache;
use dpo_core::weights::blocks;
use dpo_plugin_api::graph::ModelGraph;
use dpo_plugin_api::ops::number;
use dpo_plugins::Registry;

/// A stream of numbers in -1..1 that is the same everywhere.
pub struct Numbers(u64);

impl Numbers {
    /// Begins a stream.
    pub fn new(seed: u64) -> Numbers {
        Numbers(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number.
    pub fn draw(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }

    /// A tensor of such numbers, f64.
    pub fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| self.draw()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).expect("a CPU tensor of a known shape")
    }

    /// A whole number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((self.draw() + 1.0) / 2.0 * end as f64) as usize
    }
}

/// Small configs of built-in families, with the features that set them apart: attention alone, then states between it.
pub const CONFIGS: &[(&str, &str)] = &[
    (
        "qwen2",
        r#"{"architectures":["Qwen2ForCausalLM"],"hidden_size":32,"intermediate_size":48,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"vocab_size":96,"rms_norm_eps":1e-6,"rope_theta":10000.0,
        "max_position_embeddings":128,"tie_word_embeddings":true,"use_sliding_window":true,"sliding_window":6,
        "max_window_layers":1,"hidden_act":"silu"}"#,
    ),
    (
        "qwen3",
        r#"{"architectures":["Qwen3ForCausalLM"],"hidden_size":32,"intermediate_size":48,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"head_dim":12,"vocab_size":96,"rms_norm_eps":1e-6,
        "rope_theta":10000.0,"max_position_embeddings":128,"tie_word_embeddings":false,"hidden_act":"silu"}"#,
    ),
    (
        "llama3",
        r#"{"architectures":["LlamaForCausalLM"],"hidden_size":32,"intermediate_size":48,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"vocab_size":96,"rms_norm_eps":1e-5,"rope_theta":10000.0,
        "max_position_embeddings":128,"tie_word_embeddings":false,"hidden_act":"silu","rope_scaling":{"rope_type":"llama3",
        "factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":16}}"#,
    ),
    (
        "qwen3_5",
        r#"{"architectures":["Qwen3_5ForCausalLM"],"hidden_size":32,"intermediate_size":48,"num_hidden_layers":3,
        "num_attention_heads":4,"num_key_value_heads":2,"head_dim":12,"vocab_size":96,"rms_norm_eps":1e-6,
        "layer_types":["linear_attention","full_attention","linear_attention"],"linear_num_key_heads":2,
        "linear_num_value_heads":4,"linear_key_head_dim":8,"linear_value_head_dim":6,"partial_rotary_factor":0.5}"#,
    ),
    (
        "lfm2",
        r#"{"architectures":["Lfm2ForCausalLM"],"hidden_size":32,"intermediate_size":48,"num_hidden_layers":3,
        "num_attention_heads":4,"num_key_value_heads":2,"vocab_size":96,"layer_types":["conv","full_attention","conv"],
        "block_auto_adjust_ff_dim":false}"#,
    ),
    (
        "nemotron_h",
        r#"{"architectures":["NemotronHForCausalLM"],"hidden_size":32,"intermediate_size":48,"num_attention_heads":4,
        "num_key_value_heads":2,"head_dim":12,"vocab_size":96,"hybrid_override_pattern":"M*-M","mamba_num_heads":4,
        "mamba_head_dim":8,"n_groups":2,"ssm_state_size":8,"time_step_min":0.6}"#,
    ),
];

/// The graph of a built-in family for a config.
pub fn graph(family: &str, config: &str) -> ModelGraph {
    let registry = Registry::discover(&[], None);
    let family = registry.family(family).expect("a built-in family");
    dpo_hub::model::graph_of(family, config).expect("a graph")
}

/// Random f32 weights for every tensor of a graph, by name.
pub fn weights(graph: &ModelGraph, seed: u64) -> HashMap<String, Tensor> {
    let mut numbers = Numbers::new(seed);
    let mut all = HashMap::new();
    for (_, prefix, nodes) in blocks(graph) {
        for node in nodes {
            for weight in &node.weights {
                let spread = if node.op == "rms_norm" { 0.2 } else { 0.3 };
                let shift = if node.op == "rms_norm" { 1.0 - number(node, "offset") } else { 0.0 };
                let tensor = (numbers.tensor(&weight.shape) * spread).and_then(|t| t + shift);
                let tensor =
                    tensor.and_then(|t| t.to_dtype(candle_core::DType::F32)).expect("arithmetic on a CPU tensor");
                all.entry(format!("{prefix}{}", weight.tensor)).or_insert(tensor);
            }
        }
    }
    all
}

/// An engine over such weights, with an adapter on every linear whose A and B are not zero.
pub fn engine(graph: &ModelGraph, weights: &HashMap<String, Tensor>, seed: u64) -> Engine {
    engine_with(graph, weights, seed, AdapterConfig::new(3, 6.0))
}

/// As [`engine`], with another kind of adapter.
pub fn engine_with(graph: &ModelGraph, weights: &HashMap<String, Tensor>, seed: u64, config: AdapterConfig) -> Engine {
    let of_graph = blocks(graph).map(|(_, prefix, nodes)| {
        let of_node = |n: &dpo_plugin_api::graph::Node| {
            n.weights.iter().map(|w| weights[&format!("{prefix}{}", w.tensor)].clone()).collect()
        };
        nodes.iter().map(of_node).collect()
    });
    let mut adapter = Adapter::new(graph, config, seed).expect("an adapter on every linear");
    let mut numbers = Numbers::new(seed + 1);
    adapter.params.iter_mut().for_each(|p| *p = 0.1 * numbers.draw() as f32);
    Engine::of(graph.clone(), of_graph.collect(), adapter).expect("an engine")
}

/// Pairs of random tokens with odd lengths: a prompt of one token, answers of one token, answers that begin alike.
pub fn pairs(vocab: usize, seed: u64) -> Vec<Example> {
    let lengths: [&[usize]; 6] = [&[5, 3, 4], &[1, 1, 1], &[9, 7, 1], &[2, 1, 6], &[13, 5, 5], &[3, 2, 8]];
    examples(vocab, seed, &lengths)
}

/// Examples of random tokens, best answer first: of every one the length of the prompt, then those of its answers.
pub fn examples(vocab: usize, seed: u64, lengths: &[&[usize]]) -> Vec<Example> {
    let mut numbers = Numbers::new(seed);
    let mut tokens = |n: usize| (0..n).map(|_| numbers.below(vocab) as u32).collect::<Vec<u32>>();
    let mut example = |(i, lengths): (usize, &&[usize])| {
        let mut parts = lengths.iter().map(|n| tokens(*n));
        let prompt = parts.next().expect("a prompt's length");
        let behind = (0..lengths.len() - 1).rev().map(|n| n as f64);
        let answers = parts.zip(behind).map(|(ids, label)| Answer::new(ids, label)).collect();
        Example::new(prompt, answers, format!("example {i}")).expect("lengths above 0")
    };
    lengths.iter().enumerate().map(&mut example).collect()
}

/// The binary under test in a folder of its own: cache, plugins and output are found nowhere else.
pub struct Sandbox {
    binary: &'static str,
    folder: tempfile::TempDir,
}

/// How a command ended.
pub struct Ended {
    /// Exit code.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it reported.
    pub stderr: String,
}

impl Sandbox {
    /// `binary` is `env!("CARGO_BIN_EXE_dpo-host-test")`, which only integration tests see.
    pub fn new(binary: &'static str) -> Sandbox {
        Sandbox { binary, folder: tempfile::tempdir().expect("a temporary folder") }
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a file in a folder")).expect("a folder");
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    }

    /// A command that has not started.
    pub fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = std::process::Command::new(self.binary);
        command.args(args).current_dir(self.folder.path()).env_remove("DPO_PLUGIN_PATH").env_remove("RUST_BACKTRACE");
        for (name, folder) in [("XDG_CACHE_HOME", "cache"), ("XDG_DATA_HOME", "data"), ("HF_HOME", "hf")] {
            command.env(name, self.folder.path().join(folder));
        }
        command
    }

    /// Runs a command to its end. No command may panic.
    pub fn run(&self, args: &[&str]) -> Ended {
        let output = self.command(args).output().expect("the binary under test");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(!stderr.contains("panicked"), "{args:?} panicked:\n{stderr}");
        Ended { code: output.status.code().unwrap_or(-1), stdout, stderr }
    }

    /// Runs a command that has to succeed.
    pub fn ok(&self, args: &[&str]) -> Ended {
        let ended = self.run(args);
        assert_eq!(ended.code, 0, "{args:?}\n{}", ended.stderr);
        ended
    }

    /// Runs a command that has to refuse its input, with every one of these texts in what it reports.
    pub fn refuses(&self, args: &[&str], texts: &[&str]) {
        let ended = self.run(args);
        assert_eq!(ended.code, 2, "{args:?}\n{}", ended.stderr);
        for text in texts {
            assert!(ended.stderr.contains(text), "{args:?} does not say '{text}':\n{}", ended.stderr);
        }
    }
}

/// A folder of goldens.
pub fn golden(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// Copies a folder with all that is in it.
pub fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder").map(|entry| entry.expect("an entry")) {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &to);
        } else {
            std::fs::copy(&path, &to).expect("a copy");
        }
    }
}

/// The lines of a run's log.
pub fn log(folder: &str) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(format!("{folder}/logging.jsonl")).expect("a log");
    text.lines().map(|l| serde_json::from_str(l).expect("a line of JSON")).collect()
}

/// Logits of the token after `ids`, `[vocab]`, which follow the tokens of a cache; with the engine's adapter or without.
pub fn logits(engine: &Engine, ids: &[u32], cache: &mut KvCache, adapted: bool) -> Vec<f32> {
    let loras = Loras::of(engine.adapter()).expect("an adapter of tensors");
    engine.logits(&mut [(ids, cache)], adapted.then_some(&loras)).expect("logits").swap_remove(0)
}
