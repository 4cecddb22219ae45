//! Models with experts: the forms in which files have them, LoRA on experts and routers, merging, quantised bases, answers.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use dpo_core::base::Base;
use dpo_core::engine::Engine;
use dpo_core::lora::{Adapter, AdapterConfig, Targets};
use dpo_core::ops::KvCache;
use dpo_core::storage::{Numbers, Quantization};
use dpo_core::weights::{Checkpoint, read_f32};
use dpo_hub::model::{Model, ModelOptions};
use dpo_plugins::Registry;
use dpo_tests::{Sandbox, golden, log, logits};
use serde_json::{Value, json};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn case(name: &str, part: &str) -> String {
    golden("trajectories").join(name).join(part).display().to_string()
}

fn opened(folder: &str) -> Model<'static> {
    let registry = Box::leak(Box::new(Registry::discover(&[], None)));
    Model::open(registry, Path::new(folder), &ModelOptions::default()).unwrap()
}

/// A copy of a model with other tensors.
fn with_tensors(s: &Sandbox, model: &str, name: &str, change: impl FnOnce(&mut HashMap<String, Tensor>)) -> String {
    let to = s.path(name);
    dpo_tests::copy(Path::new(model), Path::new(&to));
    let file = Path::new(&to).join("model.safetensors");
    let mut tensors = safetensors::load(&file, &Device::Cpu).unwrap();
    change(&mut tensors);
    safetensors::save(&tensors, &file).unwrap();
    to
}

/// Qwen3 MoE's experts, a tensor each, as transformers 5 has them in memory.
fn fused(tensors: &mut HashMap<String, Tensor>) {
    for layer in [0, 2] {
        let front = format!("model.layers.{layer}.mlp.experts");
        let mut take = |expert: usize, name: &str| tensors.remove(&format!("{front}.{expert}.{name}.weight")).unwrap();
        let both: Vec<Tensor> =
            (0..6).map(|e| Tensor::cat(&[take(e, "gate_proj"), take(e, "up_proj")], 0).unwrap()).collect();
        let down: Vec<Tensor> = (0..6).map(|e| take(e, "down_proj")).collect();
        tensors.insert(format!("{front}.gate_up_proj"), Tensor::stack(&both, 0).unwrap());
        tensors.insert(format!("{front}.down_proj"), Tensor::stack(&down, 0).unwrap());
    }
}

fn trained(s: &Sandbox, model: &str, name: &str, output: &str, more: &[&str]) -> (Vec<String>, Vec<u8>) {
    let rows = case(name, "prefs.jsonl");
    let fixed = ["train", "--model", model, "--dataset", &rows, "--output-dir", output, "--device", "cpu"];
    let flags = "--max-steps 2 --batch-size 4 --learning-rate 0.01 --logging-steps 1 --lora-rank 3";
    s.ok(&[&fixed[..], &flags.split_whitespace().collect::<Vec<_>>(), more].concat());
    let losses = log(output).iter().map(|line| line["loss"].to_string()).collect();
    (losses, std::fs::read(Path::new(output).join("adapter_model.safetensors")).unwrap())
}

/// Mean log-probs of both answers.
fn sums(s: &Sandbox, name: &str, model: &[&str]) -> [f64; 2] {
    let rows = case(name, "prefs.jsonl");
    let fixed = ["eval", "--device", "cpu", "--json", "--dataset", &rows, "--model"];
    let told: Value = serde_json::from_str(&s.ok(&[&fixed[..], model].concat()).stdout).unwrap();
    ["logps/chosen", "logps/rejected"].map(|key| told[0][key].as_f64().unwrap_or_else(|| panic!("{told}")))
}

const EVERYTHING: &[&str] =
    &["--target-modules", "all-linear", "--target-parameters", "gate_up_proj", "down_proj", "gate.weight"];

#[test]
fn experts_in_any_form_take_the_same_steps_and_are_merged_in_their_own() {
    let (s, parts) = (sandbox(), case("qwen3_moe", "model"));
    let whole = with_tensors(&s, &parts, "fused", fused);
    let runs = [(&parts, s.path("run-parts")), (&whole, s.path("run-fused"))];
    let [first, second] = runs.each_ref().map(|(model, output)| trained(&s, model, "qwen3_moe", output, EVERYTHING));
    assert_eq!(first.0.len(), 2);
    assert!(first == second, "{:?} {:?}", first.0, second.0);
    for (model, output) in &runs {
        let merged = format!("{output}-merged");
        s.ok(&["merge", "--model", model, "--adapter", output, "--output-dir", &merged]);
        let [before, after] = [*model, &merged].map(|f| read_f32(&Path::new(f).join("model.safetensors")).unwrap());
        assert!(before.keys().eq(after.keys()));
        let experts = before.keys().filter(|name| name.contains("experts"));
        assert!(experts.clone().count() > 0 && experts.clone().all(|name| before[name] != after[name]));
        let (together, folded) =
            (sums(&s, "qwen3_moe", &[model, "--adapter", output]), sums(&s, "qwen3_moe", &[&merged]));
        // The merged model is in bf16.
        let apart = together.iter().zip(folded).map(|(a, b)| (a - b).abs() / a.abs()).fold(0.0, f64::max);
        assert!(apart < 5e-3 && together != sums(&s, "qwen3_moe", &[model]), "{together:?} {folded:?}");
    }
}

/// A sum in f32 is exact enough to tell one expert's update from another's, and rows from columns.
#[test]
fn transposed_experts_are_merged_to_rounding() {
    let s = sandbox();
    for (name, parameters) in [
        ("gpt_oss", ["mlp.experts.gate_up_proj", "down_proj", "mlp.router.weight"]),
        ("mixtral", ["gate_up_proj", "down_proj", "gate.weight"]),
    ] {
        let model = with_tensors(&s, &case(name, "model"), &format!("{name}-f32"), |tensors| {
            tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::F32).unwrap());
        });
        let (output, merged) = (s.path(&format!("{name}-run")), s.path(&format!("{name}-merged")));
        let flags = [&["--target-modules", "none", "--target-parameters"][..], &parameters].concat();
        trained(&s, &model, name, &output, &flags);
        s.ok(&["merge", "--model", &model, "--adapter", &output, "--output-dir", &merged]);
        let (together, folded) = (sums(&s, name, &[&model, "--adapter", &output]), sums(&s, name, &[&merged]));
        let base = sums(&s, name, &[&model]);
        for ((a, b), base) in together.iter().zip(folded).zip(base) {
            assert!(
                (a - b).abs() < 1e-4 * a.abs() && (a - base).abs() > 1e-2,
                "{name}: {together:?} {folded:?} {base}"
            );
        }
    }
}

/// gpt-oss as it is published: codes and scales of experts beside the rest in bf16.
#[test]
fn experts_in_mxfp4_are_read_and_merged_to_bf16() {
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let s = sandbox();
    let config = json!({"architectures": ["GptOssForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 320,
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12, "max_position_embeddings": 512});
    let folder = |name: &str, config: &Value, tensors: &HashMap<String, Tensor>| {
        let to = s.path(name);
        dpo_tests::copy(Path::new(&case("gpt_oss", "model")), Path::new(&to));
        std::fs::write(Path::new(&to).join("config.json"), config.to_string()).unwrap();
        safetensors::save(tensors, Path::new(&to).join("model.safetensors")).unwrap();
        to
    };
    let graph = {
        let folder = s.path("config");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(Path::new(&folder).join("config.json"), config.to_string()).unwrap();
        opened(&folder).graph
    };
    let mut numbers = dpo_tests::Numbers::new(5);
    let (mut plain, mut packed) = (HashMap::new(), HashMap::new());
    for (prefix, weight) in graph.weights() {
        let name = format!("{prefix}{}", weight.tensor);
        let [experts, rows, columns] = weight.shape[..] else {
            let tensor = (numbers.tensor(&weight.shape) * 0.2).unwrap().to_dtype(DType::BF16).unwrap();
            plain.insert(name.clone(), tensor.clone());
            packed.insert(name, tensor);
            continue;
        };
        let count = experts * rows * columns;
        let codes: Vec<u8> = (0..count / 2).map(|_| numbers.below(256) as u8).collect();
        let scales: Vec<u8> = (0..count / 32).map(|_| 121 + numbers.below(4) as u8).collect();
        let value = |at: usize| {
            let code = codes[at / 2] >> (4 * (at % 2)) & 15;
            let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
            sign * VALUES[usize::from(code & 7)] * 2.0_f32.powi(i32::from(scales[at / 32]) - 127)
        };
        let values: Vec<f32> = (0..count).map(value).collect();
        let values = Tensor::from_vec(values, (experts, rows, columns), &Device::Cpu).unwrap();
        let values = values.transpose(1, 2).unwrap().contiguous().unwrap().to_dtype(DType::BF16).unwrap();
        plain.insert(name.clone(), values);
        let bytes = |bytes: &[u8], shape: &[usize]| Tensor::from_slice(bytes, shape, &Device::Cpu).unwrap();
        packed.insert(format!("{name}_blocks"), bytes(&codes, &[experts, rows, columns / 32, 16]));
        packed.insert(format!("{name}_scales"), bytes(&scales, &[experts, rows, columns / 32]));
    }
    let mut published = config.clone();
    published["quantization_config"] = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
    let (plain, packed) = (folder("plain", &config, &plain), folder("mxfp4", &published, &packed));
    let [one, other] = [&plain, &packed].map(|folder| Checkpoint::of(Path::new(folder), &graph).unwrap());
    for (prefix, weight) in graph.weights() {
        let values = |checkpoint: &Checkpoint| -> Vec<f32> {
            checkpoint.load(prefix, weight).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        assert!(values(&one) == values(&other), "{prefix}{}", weight.tensor);
    }
    let flags = ["--target-modules", "q_proj", "--target-parameters", "mlp.experts.down_proj"];
    let (mxfp4, runs) = (["--quantization", "mxfp4"], [s.path("run-plain"), s.path("run-mxfp4")]);
    // The codes as they are published, bf16 of them, and their values rounded to where they are.
    let kept = [
        (&packed, &runs[1], &mxfp4[..]),
        (&packed, &s.path("run-whole"), &[]),
        (&plain, &s.path("run-rounded"), &mxfp4),
    ];
    let expected = trained(&s, &plain, "gpt_oss", &runs[0], &flags);
    for (model, output, more) in kept {
        assert!(trained(&s, model, "gpt_oss", output, &[&flags[..], more].concat()) == expected, "{model} {more:?}");
    }
    for (prefix, weight) in graph.weights().filter(|(_, weight)| weight.shape.len() == 3) {
        let file = safetensors::load(Path::new(&packed).join("model.safetensors"), &Device::Cpu).unwrap();
        let published = ["_blocks", "_scales"].map(|part| {
            let tensor = &file[&format!("{prefix}{}{part}", weight.tensor)];
            tensor.flatten_all().unwrap().to_vec1::<u8>().unwrap()
        });
        let bytes = other.load_packed(prefix, weight, Quantization::Mxfp4).unwrap();
        assert!(bytes == published.concat(), "{prefix}{}", weight.tensor);
        assert_eq!(bytes.len(), Numbers::Mxfp4.bytes_of(&weight.shape));
    }
    let merged = [s.path("merged-plain"), s.path("merged-mxfp4")];
    for ((model, run), merged) in [&plain, &packed].into_iter().zip(&runs).zip(&merged) {
        s.ok(&["merge", "--model", model, "--adapter", run, "--output-dir", merged]);
    }
    let [a, b] = merged.each_ref().map(|f| read_f32(&Path::new(f).join("model.safetensors")).unwrap());
    assert!(a == b);
    let config = std::fs::read_to_string(Path::new(&merged[1]).join("config.json")).unwrap();
    assert!(!config.contains("mxfp4"), "{config}");
}

/// An adapter of the time when experts were linears: gate and up have an A and a B each.
#[test]
fn adapters_with_a_file_name_for_each_expert_are_read() {
    let (s, graph) = (sandbox(), opened(&case("qwen3_moe", "model")).graph);
    let mut numbers = dpo_tests::Numbers::new(11);
    let (mut tensors, mut updates) = (HashMap::new(), HashMap::new());
    let rank = 2;
    for layer in [0, 2] {
        let mut add = |module: String, outputs: usize, inputs: usize| {
            let [a, b] =
                [[rank, inputs], [outputs, rank]].map(|shape| numbers.tensor(&shape).to_dtype(DType::F32).unwrap());
            updates.insert(module.clone(), b.matmul(&a).unwrap());
            for (part, tensor) in [("lora_A", a), ("lora_B", b)] {
                tensors.insert(format!("base_model.model.{module}.{part}.weight"), tensor);
            }
        };
        let front = format!("model.layers.{layer}.mlp");
        add(format!("{front}.gate"), 6, 32);
        for expert in 0..6 {
            let front = format!("{front}.experts.{expert}");
            add(format!("{front}.gate_proj"), 16, 32);
            add(format!("{front}.up_proj"), 16, 32);
            add(format!("{front}.down_proj"), 32, 16);
        }
    }
    let config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none",
        "target_modules": ["gate_proj", "up_proj", "down_proj", "gate"], "layers_to_transform": [0, 2]});
    let folder = s.path("adapter");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(Path::new(&folder).join("adapter_config.json"), config.to_string()).unwrap();
    safetensors::save(&tensors, Path::new(&folder).join("adapter_model.safetensors")).unwrap();
    let adapter = Adapter::load(&graph, Path::new(&folder)).unwrap();
    assert_eq!(adapter.sites.len(), 6, "{:?}", adapter.sites);
    for site in &adapter.sites {
        let (lora, name) = (adapter.lora(site).unwrap(), site.parameter.clone().unwrap());
        assert_eq!(lora.scale, 2.0, "{name}");
        for expert in 0..site.experts {
            let own = |all: &Tensor, rows: usize| all.narrow(0, expert * rows, rows).unwrap();
            let update = own(&lora.b, site.outputs).matmul(&own(&lora.a, site.rank)).unwrap();
            let front = name.rsplit_once('.').unwrap().0;
            let of = |projection: &str| updates[&format!("{front}.{expert}.{projection}")].clone();
            let wanted = match name.rsplit('.').next().unwrap() {
                "gate_up_proj" => Tensor::cat(&[of("gate_proj"), of("up_proj")], 0).unwrap(),
                "down_proj" => of("down_proj"),
                _ => updates[front].clone(),
            };
            let apart = (update - wanted).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(apart < 1e-6, "{name} {expert}: {apart}");
        }
    }
}

#[test]
fn all_linear_leaves_experts_and_routers_as_they_are() {
    let graph = opened(&case("qwen2_moe", "model")).graph;
    let adapter = |targets: Targets, parameters: &[&str]| {
        let parameters = parameters.iter().map(|name| (*name).to_owned()).collect();
        let config = AdapterConfig { targets, parameters, ..AdapterConfig::new(2, 4.0) };
        let modules = |a: Adapter| a.sites.into_iter().map(|s| s.module).filter(|m| m.contains("layers.1.")).collect();
        Adapter::planned(&graph, config).map(modules).map_err(|e| e.to_string())
    };
    let all: Vec<String> = adapter(Targets::AllLinear, &[]).unwrap();
    // Of the shared expert the gate alone: its projections have the names of the experts'.
    assert_eq!(all.len(), 5, "{all:?}");
    assert!(all.iter().all(|module| !module.contains("experts") && !module.ends_with("mlp.gate")), "{all:?}");
    let named = adapter(Targets::Names(vec!["shared_expert.up_proj".into()]), &[]).unwrap();
    assert_eq!(named, ["model.layers.1.mlp.shared_expert.up_proj"]);
    let both = adapter(Targets::Names(Vec::new()), &["gate_up_proj", "down_proj", "mlp.gate.weight"]).unwrap();
    let names = ["mlp.gate", "mlp.experts.base_layer", "mlp.experts"].map(|m| format!("model.layers.1.{m}"));
    assert_eq!(both, names);
    let one = adapter(Targets::Names(Vec::new()), &["experts.down_proj"]).unwrap();
    assert_eq!(one, ["model.layers.1.mlp.experts"]);
    let unknown = adapter(Targets::AllLinear, &["experts.gate_proj"]).unwrap_err();
    assert!(unknown.contains("target parameter 'experts.gate_proj'"), "{unknown}");
}

#[test]
fn a_base_of_experts_is_quantised_and_planned() {
    let (s, model) = (sandbox(), case("qwen3_moe", "model"));
    let base = sums(&s, "qwen3_moe", &[&model]);
    for kind in ["fp8", "nf4", "mxfp4"] {
        let kept = sums(&s, "qwen3_moe", &[&model, "--quantization", kind]);
        let apart = (kept[0] - base[0]).abs() / base[0].abs();
        assert!(apart > 1e-6 && apart < 0.1, "{kind}: {kept:?} {base:?}");
    }
    let told = s.ok(&["plan", "--model", &model, "--device", "cpu"]).stdout;
    assert!(told.contains("weights"), "{told}");
    let plan =
        |memory: &str| s.ok(&["plan", "--model", "gpt-oss-20b", "--device", "cpu", "--gpu-memory", memory]).stdout;
    // What is published small stays so where bf16's values do not fit.
    assert!(plan("30GiB").contains("mxfp4 weights") && !plan("120GiB").contains("mxfp4"), "{}", plan("30GiB"));
    let dense = ["plan", "--device", "cpu", "--model", "qwen2.5-0.5b", "--quantization", "mxfp4"];
    s.refuses(&dense, &["mxfp4 is for experts, which the model has not", "take nf4 or fp8"]);
}

/// Token by token with the KV cache, and all at once.
#[test]
fn answers_do_not_depend_on_the_cache() {
    for name in ["gpt_oss", "qwen2_moe"] {
        let (model, folder) = (opened(&case(name, "model")), case(name, "model"));
        let adapter = Adapter::load(&model.graph, Path::new(&case(name, "init_adapter"))).unwrap();
        let base = Base::load(&model.graph, &Checkpoint::of(Path::new(&folder), &model.graph).unwrap()).unwrap();
        let engine = Engine::new(model.graph, base, adapter).unwrap();
        let ids: Vec<u32> = (0..20).map(|at| at * 13 % 300).collect();
        let whole = logits(&engine, &ids, &mut KvCache::default(), true);
        let mut cache = KvCache::default();
        logits(&engine, &ids[..7], &mut cache, true);
        let last = ids[7..].iter().map(|id| logits(&engine, &[*id], &mut cache, true)).last().unwrap();
        let apart = whole.iter().zip(&last).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-4, "{name}: {apart}");
    }
}
