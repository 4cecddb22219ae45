//! GGUF files: a merge writes what llama.cpp's own converter and quantisers make of the merged checkpoint.
//!
//! The goldens are of `tests/oracle/gguf_files.py`.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use dpo_core::lora::{Adapter, AdapterConfig};
use dpo_gguf::architecture::ARCHITECTURES;
use dpo_gguf::quantize::TensorType;
use dpo_hub::model::graph_of;
use dpo_plugin_api::graph::ModelGraph;
use dpo_plugins::Registry;
use dpo_tests::{Sandbox, golden};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A file's metadata, and of every tensor its format, its shape and its bytes.
struct Gguf {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, (TensorType, Vec<usize>, Vec<u8>)>,
}

/// A reader of its own, so that what the writer has wrong is not wrong twice.
struct Reader<'a>(&'a [u8], usize);

impl Reader<'_> {
    fn bytes(&mut self, count: usize) -> &[u8] {
        self.1 += count;
        &self.0[self.1 - count..self.1]
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes(4).try_into().unwrap())
    }

    fn u64(&mut self) -> usize {
        u64::from_le_bytes(self.bytes(8).try_into().unwrap()) as usize
    }

    fn text(&mut self) -> String {
        let length = self.u64();
        String::from_utf8(self.bytes(length).to_vec()).unwrap()
    }

    fn value(&mut self, kind: u32) -> Value {
        match kind {
            4 => json!(self.u32()),
            5 => json!(self.u32() as i32),
            6 => json!(f32::from_bits(self.u32())),
            7 => json!(self.bytes(1)[0] == 1),
            8 => json!(self.text()),
            9 => {
                let (kind, length) = (self.u32(), self.u64());
                (0..length).map(|_| self.value(kind)).collect()
            }
            other => panic!("a value of kind {other}"),
        }
    }
}

impl Gguf {
    fn open(path: &str) -> Gguf {
        let bytes = std::fs::read(path).unwrap();
        let mut r = Reader(&bytes, 0);
        assert_eq!(r.bytes(4), b"GGUF");
        assert_eq!(r.u32(), 3);
        let (tensors, pairs) = (r.u64(), r.u64());
        let pair = |r: &mut Reader<'_>| {
            let (key, kind) = (r.text(), r.u32());
            (key, r.value(kind))
        };
        let metadata = (0..pairs).map(|_| pair(&mut r)).collect();
        let info = |r: &mut Reader<'_>| {
            let (name, dimensions) = (r.text(), r.u32());
            let mut shape: Vec<usize> = (0..dimensions).map(|_| r.u64()).collect();
            shape.reverse();
            let id = r.u32();
            (name, TensorType::all().find(|kind| kind.id() == id).unwrap(), shape, r.u64())
        };
        let infos: Vec<_> = (0..tensors).map(|_| info(&mut r)).collect();
        let first = r.1.next_multiple_of(32);
        let mut end = first;
        let tensor = |(name, kind, shape, offset): (String, TensorType, Vec<usize>, usize)| {
            let size = kind.bytes(shape.iter().product());
            assert_eq!(first + offset, end, "{name}");
            end = (first + offset + size).next_multiple_of(32);
            (name, (kind, shape, bytes[first + offset..first + offset + size].to_vec()))
        };
        let tensors = infos.into_iter().map(tensor).collect();
        assert_eq!(bytes.len(), end);
        Gguf { metadata, tensors }
    }
}

/// As the oracle's `numbers`.
fn numbers(name: &str, count: usize) -> Vec<f32> {
    let digest = Sha256::digest(name.as_bytes());
    let seed = u64::from(u32::from_le_bytes(digest[..4].try_into().unwrap()));
    let of = |i: u64| ((i * 7919 + seed).wrapping_mul(2_654_435_761) % 4_294_967_296) >> 21;
    (0..count as u64).map(|i| of(i) as f32 / 1024.0 - 1.0).collect()
}

/// A checkpoint of a graph with these numbers, and an adapter that adds nothing to them.
fn checkpoint(s: &Sandbox, config: &Value, graph: &ModelGraph) -> [String; 2] {
    let [model, adapter] = ["model", "adapter"].map(|name| s.path(name));
    std::fs::create_dir_all(&model).unwrap();
    s.write("model/config.json", &config.to_string());
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let from = golden("trajectories/qwen2/model").join(name);
        std::fs::copy(from, Path::new(&model).join(name)).unwrap();
    }
    // gpt-oss has rows and columns of its experts exchanged.
    let exchanged = |name: &str| graph.assemblies.iter().any(|a| a.transposed && name.ends_with(&a.tensor));
    let tensor = |(prefix, weight): (&str, &dpo_plugin_api::graph::Weight)| {
        let (name, mut shape) = (format!("{prefix}{}", weight.tensor), weight.shape.clone());
        if exchanged(&name) {
            shape.swap(1, 2);
        }
        let values = numbers(&name, shape.iter().product());
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    };
    let all: HashMap<String, Tensor> = graph.weights().map(tensor).collect();
    candle_core::safetensors::save(&all, Path::new(&model).join("model.safetensors")).unwrap();
    std::fs::create_dir_all(&adapter).unwrap();
    Adapter::new(graph, AdapterConfig::new(2, 4.0), 1).unwrap().save(Path::new(&adapter), &model).unwrap();
    [model, adapter]
}

fn cases() -> Map<String, Value> {
    serde_json::from_value(read(&golden("gguf/families.json"))).unwrap()
}

#[test]
fn every_architecture_has_a_case() {
    let cases = cases();
    let of = |family: &str| cases.values().filter(|case| case["family"] == family).collect::<Vec<_>>();
    for row in ARCHITECTURES {
        assert!(!of(row.family).is_empty(), "{}", row.family);
        assert!(of(row.family).iter().all(|case| case["architecture"] == row.name), "{}", row.family);
    }
}

/// Of every family: the converter's metadata, and in f16 and q4_k_m its tensors to the bit.
#[test]
fn files_are_those_of_llama_cpp() {
    let registry = Registry::discover(&[], None);
    for (name, case) in cases() {
        let s = sandbox();
        let family = registry.family(case["family"].as_str().unwrap()).unwrap();
        let graph = graph_of(family, &case["config"].to_string()).unwrap();
        let [model, adapter] = checkpoint(&s, &case["config"], &graph);
        for mixture in ["f16", "q4_k_m"] {
            let output = s.path(mixture);
            let fixed = ["merge", "--model", &model, "--adapter", &adapter, "--format", "gguf"];
            s.ok(&[&fixed[..], &["--quantize", mixture, "--output-dir", &output]].concat());
            let file = Gguf::open(&format!("{output}/model-{mixture}.gguf"));
            assert_eq!(file.metadata["general.architecture"], case["architecture"], "{name}");
            for (key, value) in case["metadata"].as_object().unwrap() {
                let own = file.metadata.get(key).unwrap_or_else(|| panic!("{name}: no {key}"));
                let same = match (own.as_f64(), value.as_f64()) {
                    (Some(own), Some(theirs)) => (own - theirs).abs() <= 1e-6 * theirs.abs(),
                    _ => own == value,
                };
                assert!(same, "{name}: {key} is {own}, not {value}");
            }
            let theirs: BTreeMap<String, (String, Vec<usize>, String)> =
                serde_json::from_value(case[mixture].clone()).unwrap();
            let names = |keys: Vec<&String>| keys.into_iter().cloned().collect::<Vec<String>>();
            assert_eq!(names(file.tensors.keys().collect()), names(theirs.keys().collect()), "{name} {mixture}");
            for (tensor, (kind, shape, bytes)) in &file.tensors {
                let (their_kind, their_shape, hash) = &theirs[tensor];
                assert_eq!(kind.name().to_lowercase(), *their_kind, "{name} {mixture}: {tensor}");
                assert_eq!(shape, their_shape, "{name} {mixture}: {tensor}");
                let own = format!("{:x}", Sha256::digest(bytes));
                // Factors of scaled frequencies are computed in f32 there.
                assert!(own.starts_with(hash) || tensor == "rope_freqs.weight", "{name} {mixture}: {tensor}");
            }
        }
    }
}

/// Blocks of usual numbers, and those at which quantisers branch: ggml's bytes.
#[test]
fn blocks_are_packed_as_ggml_packs_them() {
    let golden = read(&golden("gguf/quantised.json"));
    let bytes = |name: &str| decoded(golden[name].as_str().unwrap());
    let values: Vec<f32> = bytes("values").chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    for kind in TensorType::all().filter(|kind| kind.block() > 1) {
        let (own, theirs) = (kind.pack(&values), bytes(kind.name()));
        let size = kind.bytes(256);
        for (row, (own, theirs)) in own.chunks(size).zip(theirs.chunks(size)).enumerate() {
            assert_eq!(own, theirs, "{} of row {row}", kind.name());
        }
        assert_eq!(own.len(), theirs.len());
    }
}

/// The bytes of base64.
fn decoded(text: &str) -> Vec<u8> {
    const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0_u32, 0);
    for six in text.chars().filter_map(|c| LETTERS.find(c)) {
        (bits, held) = (bits << 6 | six as u32, held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}

/// A merge of the one kind has the numbers of a merge of the other, expert by expert.
#[test]
fn the_adapter_is_in_the_file() {
    let each = |name: &str| (0..4).map(|e| format!("block_sparse_moe.experts.{e}.{name}.weight")).collect::<Vec<_>>();
    let one = |name: &str| vec![name.to_owned()];
    let attention =
        [("attn_v.weight", one("self_attn.v_proj.weight")), ("attn_output.weight", one("self_attn.o_proj.weight"))];
    let mlp = [("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")];
    let experts = [("ffn_gate_exps", "w1"), ("ffn_up_exps", "w3"), ("ffn_down_exps", "w2")];
    let dense = mlp.map(|(there, here)| (format!("{there}.weight"), one(&format!("mlp.{here}.weight"))));
    let sparse = experts.map(|(there, here)| (format!("{there}.weight"), each(here)));
    for (family, more) in [("qwen2", dense), ("mixtral", sparse)] {
        let s = sandbox();
        let folder = golden("trajectories").join(family);
        let [model, adapter] = ["model", "final_adapter"].map(|name| folder.join(name).display().to_string());
        let [plain, gguf] = ["plain", "gguf"].map(|name| s.path(name));
        s.ok(&["merge", "--model", &model, "--adapter", &adapter, "--output-dir", &plain]);
        let options = ["--format", "gguf", "--quantize", "bf16", "--output-dir", &gguf];
        s.ok(&[&["merge", "--model", &model, "--adapter", &adapter], &options[..]].concat());
        let file = Gguf::open(&format!("{gguf}/model-bf16.gguf"));
        let load = |folder: &str| {
            candle_core::safetensors::load(Path::new(folder).join("model.safetensors"), &Device::Cpu).unwrap()
        };
        let (merged, base) = (load(&plain), load(&model));
        let own = attention.clone().map(|(there, here)| (there.to_owned(), here));
        for (there, here) in own.into_iter().chain(more) {
            let bytes = |of: &HashMap<String, Tensor>| {
                let mut bytes = Vec::new();
                for name in &here {
                    let tensor = of[&format!("model.layers.1.{name}")].to_dtype(DType::BF16).unwrap();
                    tensor.write_bytes(&mut bytes).unwrap();
                }
                bytes
            };
            let (_, _, written) = &file.tensors[&format!("blk.1.{there}")];
            assert!(bytes(&merged) == *written, "{family}: {there}");
            assert!(bytes(&base) != *written, "{family}: {there} is not adapted");
        }
    }
}

/// What llama.cpp would compute otherwise is refused before anything is written.
#[test]
fn other_models_are_refused() {
    let registry = Registry::discover(&[], None);
    let cases = cases();
    let refuses = |case: &str, change: Value, texts: &[&str]| {
        let s = sandbox();
        let mut config = cases[case]["config"].clone();
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let family = registry.family(cases[case]["family"].as_str().unwrap()).unwrap();
        let graph = graph_of(family, &config.to_string()).unwrap();
        let [model, adapter] = checkpoint(&s, &config, &graph);
        let output = s.path("out");
        let fixed = ["merge", "--model", &model, "--adapter", &adapter, "--format", "gguf", "--output-dir", &output];
        s.refuses(&fixed, texts);
        assert!(!Path::new(&output).exists());
    };
    refuses("gpt_oss", json!({"swiglu_limit": 3.0}), &["experts bounded by"]);
    refuses("gemma2", json!({"query_pre_attn_scalar": 100}), &["scores times"]);
    refuses("qwen3_moe", json!({"norm_topk_prob": false}), &["divided by their sum"]);
    refuses("smollm3", json!({"no_rope_layers": [1, 1, 1, 1, 1, 1, 1, 1]}), &["in other layers"]);
    refuses(
        "qwen2",
        json!({"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
        &["rule 'llama3'"],
    );
    refuses(
        "gemma3",
        json!({"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention",
        "full_attention", "full_attention", "full_attention", "full_attention", "full_attention"]}),
        &["other layers with a window"],
    );
    let s = sandbox();
    let folder = golden("trajectories/olmo2");
    let [model, adapter] = ["model", "final_adapter"].map(|name| folder.join(name).display().to_string());
    let output = s.path("out");
    let fixed = ["merge", "--model", &model, "--adapter", &adapter, "--format", "gguf", "--output-dir", &output];
    let plain = ["merge", "--model", &model, "--adapter", &adapter, "--quantize", "q8_0", "--output-dir", &output];
    s.refuses(&plain, &["not quantised to q8_0", "--format gguf"]);
    s.refuses(&fixed, &["'olmo2' are not written", "qwen2, qwen3", "convert_hf_to_gguf.py"]);
}

/// A model with another tokenizer, merged; what it says, and the file's metadata.
fn with_tokenizer(s: &Sandbox, change: impl FnOnce(&mut Value)) -> (dpo_tests::Ended, String) {
    let from = golden("trajectories/qwen2");
    let (model, output) = (s.path("model"), s.path("out"));
    dpo_tests::copy(&from.join("model"), Path::new(&model));
    let path = Path::new(&model).join("tokenizer.json");
    let mut tokenizer = read(&path);
    change(&mut tokenizer);
    std::fs::write(path, tokenizer.to_string()).unwrap();
    let adapter = from.join("final_adapter").display().to_string();
    let fixed = ["merge", "--model", &model, "--adapter", &adapter, "--format", "gguf", "--output-dir", &output];
    (s.run(&fixed), format!("{output}/model-f16.gguf"))
}

#[test]
fn other_tokenizers_are_refused() {
    let split = json!({"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": false});
    let changes = [
        ("pre_tokenizer", split, "splits text by '[a-z]+'"),
        ("normalizer", json!({"type": "Lowercase"}), "the normalizer Lowercase"),
    ];
    for (key, value, said) in changes {
        let s = sandbox();
        let (ended, file) = with_tokenizer(&s, |tokenizer| tokenizer[key] = value);
        assert_eq!(ended.code, 2, "{}", ended.stderr);
        assert!(ended.stderr.contains(said) && ended.stderr.contains("tokenizer.json"), "{}", ended.stderr);
        assert!(!Path::new(&file).exists());
    }
}

/// A vocabulary of sentencepiece: scores follow from the order of merges, what no merge makes comes last.
#[test]
fn merges_become_scores() {
    let s = sandbox();
    let vocabulary = json!({"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "\u{2581}": 4, "ab": 5, "\u{2581}ab": 6});
    let (ended, file) = with_tokenizer(&s, |tokenizer| {
        tokenizer["added_tokens"].as_array_mut().unwrap().retain(|token| token["id"].as_u64() > Some(6));
        tokenizer["pre_tokenizer"] = Value::Null;
        tokenizer["decoder"] = Value::Null;
        let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
        tokenizer["normalizer"] =
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, spaces]});
        tokenizer["model"] = json!({"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], ["\u{2581}", "ab"]],
            "byte_fallback": true, "fuse_unk": true, "unk_token": "<unk>"});
    });
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let file = Gguf::open(&file);
    let first = |key: &str| file.metadata[&format!("tokenizer.ggml.{key}")].as_array().unwrap()[..7].to_vec();
    assert_eq!(file.metadata["tokenizer.ggml.model"], json!("llama"));
    assert_eq!(file.metadata["tokenizer.ggml.add_space_prefix"], json!(true));
    assert_eq!(json!(first("token_type")), json!([2, 6, 1, 1, 1, 1, 1]));
    let scores: Vec<f64> = first("scores").iter().map(|score| score.as_f64().unwrap()).collect();
    assert_eq!(scores, [0.0, 0.0, -1e6, -1e6, -1e6, 0.0, -1.0]);
    assert_eq!(json!(first("tokens")), json!(["<unk>", "<0x0A>", "a", "b", "\u{2581}", "ab", "\u{2581}ab"]));
}

/// The demo's model: its tokenizer's kind, its tokens, and what ollama is told.
#[test]
fn the_tokenizer_is_in_the_file() {
    let s = sandbox();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("datasets/demo/model");
    let registry = Registry::discover(&[], None);
    let config = std::fs::read_to_string(demo.join("config.json")).unwrap();
    let graph = graph_of(registry.family("qwen2").unwrap(), &config).unwrap();
    let (model, adapter, output) = (demo.display().to_string(), s.path("adapter"), s.path("out"));
    std::fs::create_dir_all(&adapter).unwrap();
    Adapter::new(&graph, AdapterConfig::new(2, 4.0), 1).unwrap().save(Path::new(&adapter), &model).unwrap();
    let fixed = ["merge", "--model", &model, "--adapter", &adapter, "--format", "gguf", "--quantize", "q8_0"];
    s.ok(&[&fixed[..], &["--output-dir", &output]].concat());
    let file = Gguf::open(&format!("{output}/model-q8_0.gguf"));
    let of = |key: &str| &file.metadata[&format!("tokenizer.{key}")];
    assert_eq!((of("ggml.model"), of("ggml.pre")), (&json!("gpt2"), &json!("qwen2")));
    assert_eq!(of("ggml.add_bos_token"), &json!(false));
    let tokens = of("ggml.tokens").as_array().unwrap();
    assert_eq!(tokens.len(), graph.vocab_size);
    let tokenizer = read(&demo.join("tokenizer.json"));
    for (text, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        assert_eq!(tokens[id.as_u64().unwrap() as usize], json!(text));
    }
    let types = of("ggml.token_type").as_array().unwrap();
    let eos = of("ggml.eos_token_id").as_u64().unwrap() as usize;
    assert_eq!((&tokens[eos], &types[eos], &types[0]), (&json!("<|im_end|>"), &json!(3), &json!(1)));
    let merges = tokenizer["model"]["merges"].as_array().unwrap().len();
    assert_eq!(of("ggml.merges").as_array().unwrap().len(), merges);
    let modelfile = std::fs::read_to_string(format!("{output}/Modelfile")).unwrap();
    for line in [
        "FROM ./model-q8_0.gguf\n",
        "PARAMETER stop \"<|im_end|>\"\n",
        "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n",
    ] {
        assert!(modelfile.contains(line), "{modelfile}");
    }
}
