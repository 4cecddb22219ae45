//! Frozen matrices that are kept small: nf4 against bitsandbytes, fp8 against its definition; checkpoints that are published so, against
//! the tools that write them.
//!
//! Goldens are in `tests/golden/quantization`, made by `tests/oracle/bitsandbytes_nf4.py` and `published.py`.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use dpo_core::base::Base;
use dpo_core::cpu_decoder::CpuDecoder;
use dpo_core::decoder::{Decoder, Sequences};
use dpo_core::engine::Engine;
use dpo_core::lora::Adapter;
use dpo_core::plan::{MemoryOptions, Plan};
use dpo_core::storage::Quantization;
use dpo_core::weights::{Checkpoint, blocks, is_quantized};
use dpo_core::{fp8, nf4};
use dpo_hub::model::{Model, ModelOptions};
use dpo_plugins::Registry;
use dpo_tests::{Numbers, Sandbox, golden, log};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

fn f32s(tensor: &TensorView<'_>) -> Vec<f32> {
    let of = |b: &[u8]| {
        f32::from_bits(b.iter().rev().fold(0, |bits, byte| bits << 8 | u32::from(*byte)) << (32 - 8 * b.len()))
    };
    tensor.data().chunks(if tensor.dtype() == safetensors::Dtype::BF16 { 2 } else { 4 }).map(of).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn nf4_has_the_bits_of_bitsandbytes() {
    let file = std::fs::read(golden("quantization/nf4.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let of = |case: &str, name: &str| f32s(&file.tensor(&format!("{case}.{name}")).unwrap());
    assert_eq!(bits(&nf4::VALUES), bits(&f32s(&file.tensor("values").unwrap())));
    assert_eq!(bits(&nf4::SCALES), bits(&f32s(&file.tensor("scales").unwrap())));
    let names = file.names();
    let cases: BTreeSet<&str> = names.iter().filter_map(|name| Some(name.split_once('.')?.0)).collect();
    assert_eq!(cases.len(), 10);
    for case in cases {
        let (values, codes) = (of(case, "values"), |name| file.tensor(&format!("{case}.{name}")).unwrap());
        let ours = nf4::quantize(&values);
        assert_eq!(ours.codes, codes("codes").data(), "{case}");
        assert_eq!(ours.scales, codes("scales").data(), "{case}");
        assert_eq!(bits(&ours.scale_scales), bits(&of(case, "scale_scales")), "{case}");
        assert_eq!(bits(&[ours.offset]), bits(&of(case, "offset")), "{case}");
        let mut back = vec![f32::NAN; values.len()];
        ours.dequantize(&mut back);
        assert_eq!(bits(&back), bits(&of(case, "dequantized")), "{case}");
    }
}

#[test]
fn fp8_takes_the_nearest_value() {
    for code in 0..=255 {
        assert_eq!(fp8::code(fp8::VALUES[usize::from(code)]), code);
    }
    for (low, high) in (0..126_u8).map(|code| (code, code + 1)) {
        let middle = (fp8::VALUES[usize::from(low)] + fp8::VALUES[usize::from(high)]) / 2.0;
        for (sign, bit) in [(1.0, 0), (-1.0, 0x80)] {
            assert_eq!(fp8::code(sign * middle), bit | (low + low % 2), "{middle}");
            assert_eq!(fp8::code(sign * middle.next_down()), bit | low, "below {middle}");
            assert_eq!(fp8::code(sign * middle.next_up()), bit | high, "above {middle}");
        }
    }
    assert_eq!([500.0, f32::INFINITY, -1e30].map(fp8::code), [0x7e, 0x7e, 0xfe]);
}

#[test]
fn fp8_has_a_scale_for_every_row() {
    let mut values: Vec<f32> = (0..3 * 40)
        .map({
            let mut n = Numbers::new(1);
            move |_| n.draw() as f32
        })
        .collect();
    values[40..80].fill(0.0);
    values[7] = -96.0;
    let (codes, scales) = fp8::quantize_rows(&values, 40);
    assert_eq!((scales.len(), scales[0], scales[1], codes[7]), (3, 96.0 / 448.0, 1.0, 0xfe));
    let mut back = vec![f32::NAN; values.len()];
    fp8::dequantize_rows(&codes, &scales, 40, &mut back);
    for (at, (a, b)) in values.iter().zip(&back).enumerate() {
        let step = (a.abs() / 16.0).max(scales[at / 40] / 1024.0);
        assert!((a - b).abs() <= step * 1.000_001, "{a} {b}");
    }
}

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn case(name: &str) -> String {
    golden("trajectories").join(name).display().to_string()
}

fn model(folder: &Path) -> Model<'static> {
    let registry = Box::leak(Box::new(Registry::discover(&[], None)));
    Model::open(registry, folder, &ModelOptions::default()).unwrap()
}

/// A copy of a model whose layers' matrices are what a quantisation makes of them.
fn made_whole(s: &Sandbox, folder: &Path, kind: Quantization) -> String {
    let graph = model(folder).graph;
    let mut tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    for (block, prefix, nodes) in blocks(&graph) {
        for (node, weight) in nodes.iter().flat_map(|n| n.weights.iter().map(move |w| (n, w))) {
            if is_quantized(kind.numbers(), block, node, weight) {
                let tensor = tensors.get_mut(&format!("{prefix}{}", weight.tensor)).unwrap();
                let values = tensor.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
                let values: Vec<f32> = values.flatten_all().unwrap().to_vec1().unwrap();
                let values = kind.unpack(&weight.shape, &kind.pack(&weight.shape, &values));
                *tensor = Tensor::from_vec(values, weight.shape.as_slice(), &Device::Cpu).unwrap();
            }
        }
    }
    let to = s.path(&format!("whole-{}", kind.name()));
    dpo_tests::copy(folder, Path::new(&to));
    candle_core::safetensors::save(&tensors, Path::new(&to).join("model.safetensors")).unwrap();
    to
}

#[test]
fn a_quantised_base_computes_what_its_values_do() {
    let s = sandbox();
    for (name, kind) in [("qwen2", Quantization::Nf4), ("phi3", Quantization::Nf4), ("qwen2", Quantization::Fp8)] {
        let (folder, rows) = (Path::new(&case(name)).join("model"), format!("{}/prefs.jsonl", case(name)));
        let (whole, adapter) = (made_whole(&s, &folder, kind), format!("{}/final_adapter", case(name)));
        let folder = folder.display().to_string();
        let scores = |model: &str, flags: &[&str]| {
            let output = s.path("scores.jsonl");
            let _ = std::fs::remove_file(&output);
            let eval = ["eval", "--device", "cpu", "--model", model, "--adapter", &adapter, "--dataset", &rows];
            s.ok(&[&eval[..], &["--output", &output], flags].concat());
            std::fs::read_to_string(output).unwrap()
        };
        let plain = scores(&folder, &[]);
        let quantised = scores(&folder, &["--quantization", kind.name()]);
        assert_eq!(quantised, scores(&whole, &[]), "{name} in {kind:?}");
        assert_ne!(quantised, plain, "{name} in {kind:?}");
    }
}

#[test]
fn answers_come_from_the_quantised_base() {
    let s = sandbox();
    let folder = Path::new(&case("qwen2")).join("model");
    let whole = made_whole(&s, &folder, Quantization::Nf4);
    let graph = model(&folder).graph;
    let adapter = [Adapter::load(&graph, &Path::new(&case("qwen2")).join("final_adapter")).unwrap()];
    let checkpoint = |folder: &Path| Checkpoint::of(folder, &graph).unwrap();
    let options = MemoryOptions { quantization: Some(Quantization::Nf4), ..MemoryOptions::default() };
    let mut quantised = CpuDecoder::load(&graph, &checkpoint(&folder), &adapter, Sequences::of(2), options).unwrap();
    assert_eq!(quantised.name(), "cpu float32, base in nf4");
    let base = Base::load(&graph, &checkpoint(Path::new(&whole))).unwrap();
    let engine = Engine::new(graph.clone(), base, Adapter::idle(&graph).unwrap()).unwrap();
    let mut plain = CpuDecoder::of(engine, &adapter, Sequences::of(2)).unwrap();
    for (sequence, adapter) in [None, Some(0)].into_iter().enumerate() {
        for ids in [&[5, 9, 40, 7][..], &[11], &[12]] {
            let [a, b] = [&mut quantised, &mut plain]
                .map(|decoder| decoder.append(adapter, &[(sequence, ids)]).unwrap().swap_remove(0));
            assert_eq!(bits(&a), bits(&b), "{adapter:?} {ids:?}");
        }
    }
}

#[test]
fn a_plan_counts_codes_and_scales() {
    let graph = dpo_tests::graph("qwen2", dpo_tests::CONFIGS[0].1);
    let plan = |quantization, parts| {
        let options = MemoryOptions { limit: Some(1 << 30), quantization, ..MemoryOptions::default() };
        Plan::new(&graph, 0, 8, parts, options).unwrap()
    };
    let mut shapes = Vec::new();
    for (block, _, nodes) in blocks(&graph) {
        for node in nodes {
            shapes.extend(
                node.weights
                    .iter()
                    .filter(|w| is_quantized(Quantization::Nf4.numbers(), block, node, w))
                    .map(|w| w.shape.clone()),
            );
        }
    }
    let values: usize = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
    let layer = values / graph.layers.len();
    for kind in [Quantization::Nf4, Quantization::Fp8] {
        let small: usize = shapes.iter().map(|shape| kind.numbers().bytes_of(shape)).sum();
        // Two layers are whole at a time.
        assert_eq!(plan(Some(kind), 1).weights, plan(None, 1).weights - 4 * values + small + 8 * layer, "{kind:?}");
        assert!(plan(Some(kind), 2).weights < plan(None, 2).weights, "{kind:?}");
    }
    assert!(plan(Some(Quantization::Nf4), 1).to_string().contains("nf4 weights "));
}

/// The reference of another storage is not taken, DoRA begins with the norms of what is kept, and a run goes on as it began.
#[test]
fn a_run_begins_as_its_reference_and_goes_on_in_its_storage() {
    let s = sandbox();
    let (folder, rows) = (format!("{}/model", case("llama3")), format!("{}/prefs.jsonl", case("llama3")));
    let train = |run: &str, more: &[&str]| {
        let fixed = ["train", "--device", "cpu", "--model", &folder, "--dataset", &rows, "--batch-size", "4"];
        [&fixed[..], &["--max-steps", "2", "--logging-steps", "1", "--save-steps", "1", "--output-dir", run], more]
            .concat()
            .iter()
            .map(|a| (*a).to_owned())
            .collect::<Vec<String>>()
    };
    let ok = |args: Vec<String>| s.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
    ok(train(&s.path("plain"), &[]));
    let small = s.path("small");
    let said = ok(train(&small, &["--quantization", "nf4", "--use-dora"])).stderr;
    // What is printed to go on with has it: to chat and to evaluate.
    assert_eq!(said.matches(&format!(" --adapter {small} --quantization nf4")).count(), 1, "{said}");
    assert_eq!(said.matches(&format!("--dataset {rows} --quantization nf4")).count(), 1, "{said}");
    let first = &log(&small)[0];
    let number = |name: &str| first[name].as_f64().unwrap();
    assert!(number("rewards/margins").abs() < 1e-6 && number("rewards/chosen").abs() < 1e-6, "{first}");
    let args: Value = serde_json::from_str(&std::fs::read_to_string(format!("{small}/args.json")).unwrap()).unwrap();
    assert_eq!(args["quantization"], "nf4");
    let other = train(&small, &["--quantization", "fp8", "--use-dora", "--resume-from-checkpoint", "latest"]);
    let other: Vec<&str> = other.iter().map(String::as_str).collect();
    s.refuses(&other, &["--quantization was nf4, is fp8"]);
}

/// A tensor to be written: its type, shape and bytes.
type Raw = (safetensors::Dtype, Vec<usize>, Vec<u8>);

fn write(folder: &Path, config: &Value, tensors: &[(String, Raw)]) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    std::fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn published_forms_have_the_values_of_their_tools() {
    let s = sandbox();
    let file = std::fs::read(golden("quantization/published.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let configs: Value =
        serde_json::from_str(&std::fs::read_to_string(golden("quantization/published.json")).unwrap()).unwrap();
    let configs = configs.as_object().unwrap();
    assert_eq!(configs.len(), 17);
    for (case, config) in configs {
        let parts: Vec<(String, Raw)> = file
            .tensors()
            .into_iter()
            .filter_map(|(name, t)| {
                let name = name.strip_prefix(&format!("{case}."))?.to_owned();
                name.starts_with("m.").then(|| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
            })
            .collect();
        let folder = s.path(case);
        write(Path::new(&folder), &json!({"quantization_config": config}), &parts);
        let checkpoint = Checkpoint::open(Path::new(&folder)).unwrap();
        let expected = file.tensor(&format!("{case}.expected")).unwrap();
        assert!(checkpoint.is_quantized(), "{case}");
        assert_eq!(checkpoint.bytes_of("m.weight").unwrap(), expected.data(), "{case}");
        // A part that is missing is named.
        let part = parts.iter().find(|(name, _)| {
            [".absmax", "weight_scale", "scale_inv", ".scales"].iter().any(|end| name.ends_with(end))
        });
        let part = part.unwrap().0.clone();
        let less: Vec<_> = parts.into_iter().filter(|(name, _)| *name != part).collect();
        write(Path::new(&folder), &json!({"quantization_config": config}), &less);
        let missing = Checkpoint::open(Path::new(&folder)).err().unwrap().to_string();
        assert!(missing.contains("tensor 'm.weight'") && missing.contains("missing"), "{case}: {missing}");
    }
}

/// A copy of a model whose layers' matrices are in nf4, as bitsandbytes saves it.
fn saved_by_bitsandbytes(s: &Sandbox, folder: &Path) -> String {
    let graph = model(folder).graph;
    let mut matrices = BTreeSet::new();
    for (block, prefix, nodes) in blocks(&graph) {
        for (node, weight) in nodes.iter().flat_map(|n| n.weights.iter().map(move |w| (n, w))) {
            if is_quantized(Quantization::Nf4.numbers(), block, node, weight) {
                matrices.insert(format!("{prefix}{}", weight.tensor));
            }
        }
    }
    let file = std::fs::read(folder.join("model.safetensors")).unwrap();
    let floats = |values: &[f32]| {
        (safetensors::Dtype::F32, vec![values.len()], values.iter().flat_map(|v| v.to_le_bytes()).collect())
    };
    let codes = |values: &[u8]| (safetensors::Dtype::U8, vec![values.len()], values.to_vec());
    let mut tensors: Vec<(String, Raw)> = Vec::new();
    for (name, tensor) in SafeTensors::deserialize(&file).unwrap().tensors() {
        if !matrices.contains(&name) {
            tensors.push((name, (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec())));
            continue;
        }
        let values = Tensor::from_vec(f32s(&tensor), tensor.shape(), &Device::Cpu).unwrap();
        let values = values.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        let nf4 = nf4::quantize(&values.to_vec1::<f32>().unwrap());
        let state = json!({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": tensor.shape(),
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": f64::from(nf4.offset)});
        let parts = [
            ("", codes(&nf4.codes)),
            (".absmax", codes(&nf4.scales)),
            (".quant_map", floats(&nf4::VALUES)),
            (".nested_absmax", floats(&nf4.scale_scales)),
            (".nested_quant_map", floats(&nf4::SCALES)),
            (".quant_state.bitsandbytes__nf4", codes(state.to_string().as_bytes())),
        ];
        tensors.extend(parts.map(|(part, raw)| (format!("{name}{part}"), raw)));
    }
    let to = s.path("saved");
    dpo_tests::copy(folder, Path::new(&to));
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    config["quantization_config"] =
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
    write(Path::new(&to), &config, &tensors);
    to
}

#[test]
fn a_checkpoint_in_nf4_is_read_trained_and_merged() {
    let s = sandbox();
    let (folder, rows) = (Path::new(&case("llama3")).join("model"), format!("{}/prefs.jsonl", case("llama3")));
    let (saved, whole) = (saved_by_bitsandbytes(&s, &folder), made_whole(&s, &folder, Quantization::Nf4));
    let adapter = format!("{}/final_adapter", case("llama3"));
    let scores = |model: &str, more: &[&str]| {
        let output = s.path("scores.jsonl");
        let _ = std::fs::remove_file(&output);
        let eval = ["eval", "--device", "cpu", "--model", model, "--dataset", &rows, "--output", &output];
        s.ok(&[&eval[..], more].concat());
        std::fs::read_to_string(output).unwrap()
    };
    let expected = scores(&whole, &["--adapter", &adapter]);
    // Dequantised, and with the codes as they are.
    for how in ["none", "nf4"] {
        assert_eq!(scores(&saved, &["--adapter", &adapter, "--quantization", how]), expected, "{how}");
    }
    let run = s.path("run");
    let train = ["train", "--device", "cpu", "--model", &saved, "--dataset", &rows, "--quantization", "nf4"];
    s.ok(&[&train[..], &["--max-steps", "1", "--batch-size", "4", "--output-dir", &run]].concat());
    let [merged, of_whole] = [&saved, &whole].map(|model| {
        let merged = format!("{model}-merged");
        s.ok(&["merge", "--model", model, "--adapter", &adapter, "--output-dir", &merged]);
        merged
    });
    let config = std::fs::read_to_string(format!("{merged}/config.json")).unwrap();
    assert!(!config.contains("quantization"), "{config}");
    let names = |model: &str| -> BTreeSet<String> {
        let file = std::fs::read(format!("{model}/model.safetensors")).unwrap();
        SafeTensors::deserialize(&file).unwrap().names().into_iter().map(str::to_owned).collect()
    };
    assert_eq!(names(&merged), names(&of_whole));
    // Its matrices are in bf16.
    let number = |line: &str| serde_json::from_str::<Value>(line).unwrap()["chosen"].as_f64().unwrap();
    for (a, b) in scores(&merged, &[]).lines().zip(expected.lines()) {
        assert!((number(a) / number(b) - 1.0).abs() < 5e-3, "{a} {b}");
    }
}
