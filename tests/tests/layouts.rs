//! Checkpoints whose files name a graph's tensors otherwise: a model wrapped with others takes the steps that it takes by itself,
//! from a family in a library.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use dpo_core::weights::{Checkpoint, read_f32};
use dpo_hub::model::{Model, ModelOptions};
use dpo_plugins::Registry;
use dpo_tests::{Sandbox, golden, log};
use serde_json::{Map, Value, json};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// The names of the graph in the files of each layout.
const LAYOUTS: &[fn(&str) -> String] = &[
    str::to_owned,
    |name| format!("language_model.{name}"),
    |name| {
        let name = name.replace("model.layers.", "transformer.h.").replace("self_attn.", "attn.attention.");
        name.replace("model.", "transformer.")
    },
];

/// A folder with the library of the wrapping family.
fn plugins(s: &Sandbox) -> String {
    let file = format!("{}wrapped{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let folder = s.path("plugins");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(std::env::current_exe().unwrap().with_file_name(&file), Path::new(&folder).join(&file)).unwrap();
    folder
}

/// A copy of a model in a wrapper, with its tensors under other names and one of another modality.
fn wrap(s: &Sandbox, model: &Path, name: &str, rename: impl Fn(&str) -> Option<String>) -> String {
    let folder = s.path(name);
    std::fs::create_dir_all(&folder).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model.join(file), Path::new(&folder).join(file)).unwrap();
    }
    let text = std::fs::read_to_string(model.join("config.json")).unwrap();
    let mut text: Map<String, Value> = serde_json::from_str(&text).unwrap();
    let tied = text.remove("tie_word_embeddings");
    let config = json!({"architectures": ["WrappedForConditionalGeneration"], "model_type": "wrapped", "text_config": text,
        "tie_word_embeddings": tied, "image_token_index": 5, "vision_config": {"hidden_size": 8, "rope_theta": 5.0}});
    std::fs::write(Path::new(&folder).join("config.json"), config.to_string()).unwrap();
    let all = safetensors::load(model.join("model.safetensors"), &Device::Cpu).unwrap();
    let mut all: HashMap<String, Tensor> = all.into_iter().filter_map(|(n, t)| Some((rename(&n)?, t))).collect();
    all.insert("vision_tower.proj.weight".into(), Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap());
    safetensors::save(&all, Path::new(&folder).join("model.safetensors")).unwrap();
    folder
}

#[test]
fn a_wrapped_model_is_trained_merged_and_read_back() {
    let case = golden("trajectories/qwen2");
    let (model, rows) = (case.join("model"), case.join("prefs.jsonl").display().to_string());
    let s = sandbox();
    let plugins = plugins(&s);
    let train = |model: &str, output: &str| {
        let flags = "--device cpu --max-steps 3 --batch-size 4 --learning-rate 0.01 --logging-steps 1 --plugin-dir";
        let named = ["train", "--model", model, "--dataset", &rows, "--output-dir", output];
        let flags: Vec<&str> = flags.split_whitespace().collect();
        s.ok(&[&named[..], &flags, &[&plugins]].concat());
        let losses: Vec<String> = log(output).iter().map(|line| line["loss"].to_string()).collect();
        (losses, std::fs::read(Path::new(output).join("adapter_model.safetensors")).unwrap())
    };
    let plain = train(&model.display().to_string(), &s.path("plain"));
    assert_eq!(plain.0.len(), 3);
    for (at, rename) in LAYOUTS.iter().enumerate() {
        let wrapped = wrap(&s, &model, &format!("wrapped-{at}"), |name| Some(rename(name)));
        let output = s.path(&format!("run-{at}"));
        // The adapter has the names of the graph, whatever those of the files are.
        assert!(train(&wrapped, &output) == plain, "layout {at} takes other steps");

        let merged = s.path(&format!("merged-{at}"));
        let merge = ["merge", "--model", &wrapped, "--adapter", &output, "--output-dir", &merged];
        s.ok(&[&merge[..], &["--plugin-dir", &plugins]].concat());
        let [before, after] = [&wrapped, &merged].map(|folder| Path::new(folder).join("model.safetensors"));
        let header = |path: &Path| {
            let bytes = std::fs::read(path).unwrap();
            bytes[..8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize].to_vec()
        };
        assert!(header(&before) == header(&after), "layout {at}: the header");
        let (before, after) = (read_f32(&before).unwrap(), read_f32(&after).unwrap());
        let changed = before.keys().filter(|name| before[*name] != after[*name]).count();
        assert_eq!(changed, 14, "layout {at}");
        let sums = |model: &[&str]| {
            let fixed = ["eval", "--device", "cpu", "--json", "--dataset", &rows, "--plugin-dir", &plugins, "--model"];
            let told: Value = serde_json::from_str(&s.ok(&[&fixed[..], model].concat()).stdout).unwrap();
            ["logps/chosen", "logps/rejected"].map(|key| told[0][key].as_f64().unwrap_or_else(|| panic!("{told}")))
        };
        let (together, folded) = (sums(&[&wrapped, "--adapter", &output]), sums(&[&merged]));
        for (a, b) in together.iter().zip(folded) {
            assert!((a - b).abs() < 1e-4, "layout {at}: {together:?} {folded:?}");
        }
    }
}

#[test]
fn a_part_of_a_tensor_is_read_under_its_name() {
    let (s, model) = (sandbox(), golden("trajectories/qwen2/model"));
    let registry = Registry::discover(&[plugins(&s).into()], None);
    let wrapped = wrap(&s, &model, "wrapped", |name| Some(LAYOUTS[2](name)));
    let opened = Model::open(&registry, Path::new(&wrapped), &ModelOptions::default()).unwrap();
    let checkpoint = Checkpoint::of(Path::new(&wrapped), &opened.graph).unwrap();
    let own = read_f32(&model.join("model.safetensors")).unwrap();
    for (prefix, weight) in opened.graph.weights() {
        let (_, values) = &own[&format!("{prefix}{}", weight.tensor)];
        assert_eq!(checkpoint.load_range(prefix, weight, &(3..7)).unwrap(), values[3..7]);
        assert_eq!(
            checkpoint.load_kept(prefix, weight).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            *values
        );
    }
}

#[test]
fn what_no_layout_fits_is_told_by_the_nearest() {
    let (s, model) = (sandbox(), golden("trajectories/qwen2/model"));
    let plugins = plugins(&s);
    let refused = |name: &str, rename: &dyn Fn(&str) -> Option<String>, texts: &[&str]| {
        let wrapped = wrap(&s, &model, name, rename);
        let rows = golden("trajectories/qwen2/prefs.jsonl").display().to_string();
        let args = ["eval", "--device", "cpu", "--model", &wrapped, "--dataset", &rows, "--plugin-dir", &plugins];
        s.refuses(&args, texts);
    };
    let second = |name: &str| Some(LAYOUTS[1](name));
    refused(
        "lacking",
        &|n| second(n).filter(|n| !n.contains("1.mlp.up")),
        &[
            "tensor 'language_model.model.layers.1.mlp.up_proj.weight' of shape [64, 32] is missing",
            "config.json and the weights are of different models: 26 of the model's 27 tensors are in its files by the best of 3",
        ],
    );
    let more = |n: &str| second(n).map(|n| n.replace("layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.scale"));
    refused("renamed", &more, &["'language_model.model.layers.1.mlp.up_proj.weight' of shape [64, 32] is missing"]);
    refused(
        "strange",
        &|n| Some(format!("net.{n}")),
        &["tensor 'model.embed_tokens.weight' of shape", "0 of the model's 27"],
    );
}

#[test]
fn published_checkpoints_are_listed() {
    let s = sandbox();
    let plugins = plugins(&s);
    let list = |more: &[&str]| s.ok(&[&["list", "models", "--plugin-dir", &plugins], more].concat()).stdout;
    let table = list(&[]);
    assert!(
        table.contains("WrappedForConditionalGeneration") && table.contains("tests/Wrapped-1B and 4 more"),
        "{table}"
    );
    let all = list(&["--all"]);
    assert_eq!(all.lines().filter(|l| l.starts_with("wrapped ") && l.contains(" tests/Wrapped-")).count(), 5, "{all}");
    let json: Value = serde_json::from_str(&list(&["--json"])).unwrap();
    let row = json["plugins"].as_array().unwrap().iter().find(|row| row["name"] == "wrapped").unwrap().clone();
    assert_eq!(row["checkpoints"].as_array().unwrap().len(), 5);
    let described = s.ok(&["describe", "wrapped", "--plugin-dir", &plugins]).stdout;
    assert!(described.contains("reads tests/Wrapped-5B"), "{described}");
}
