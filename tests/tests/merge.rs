//! Merging: a model with its adapter folded in computes what the two compute together, and has the files of the model.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use dpo_core::weights::read_f32;
use dpo_tests::{Sandbox, golden};
use serde_json::{Value, json};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Models, adapters and rows of all trajectories.
fn cases() -> Vec<[String; 3]> {
    let folders = std::fs::read_dir(golden("trajectories")).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir());
    let mut cases: Vec<_> =
        folders.map(|f| ["model", "final_adapter", "prefs.jsonl"].map(|name| text(&f.join(name)))).collect();
    cases.sort();
    cases
}

fn case(name: &str) -> [String; 3] {
    cases().into_iter().find(|c| c[0].contains(&format!("/{name}/"))).unwrap()
}

/// Log-probs of the first rows' answers.
fn logps(s: &Sandbox, rows: &str, model: &[&str]) -> Vec<f64> {
    let loss = if rows.contains("unpaired") { "apo_zero_unpaired" } else { "sigmoid" };
    let (rows, output) = (format!("{rows}#6"), s.path("scores.jsonl"));
    let fixed =
        ["eval", "--device", "cpu", "--shuffle", "false", "--loss", loss, "--dataset", &rows, "--output", &output];
    s.ok(&[&fixed[..], &["--model"], model].concat());
    let lines = std::fs::read_to_string(&output).unwrap();
    let lines = lines.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    let sums = |l: Value| match l["answers"].as_array() {
        Some(answers) => answers.iter().map(|sum| sum.as_f64().unwrap()).collect::<Vec<f64>>(),
        None => ["chosen", "rejected"].map(|side| l[side].as_f64().unwrap()).to_vec(),
    };
    lines.flat_map(sums).collect()
}

/// How far log-probs are from others, at most, relative to these.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f64::max)
}

fn names(folder: &str) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Bytes of every tensor of a file by name, and the header as it is written.
fn tensors(path: &Path) -> (Vec<u8>, BTreeMap<String, Vec<u8>>) {
    let bytes = std::fs::read(path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let table: BTreeMap<String, Value> = serde_json::from_slice(&bytes[8..header]).unwrap();
    let of = |v: &Value| [0, 1].map(|at| header + v["data_offsets"][at].as_u64().unwrap() as usize);
    let all = table.iter().filter(|(name, _)| *name != "__metadata__");
    let all = all.map(|(name, v)| (name.clone(), bytes[of(v)[0]..of(v)[1]].to_vec())).collect();
    (bytes[..header].to_vec(), all)
}

/// A copy of a model with its tensors in another type, in shards of which an index tells.
fn convert(s: &Sandbox, model: &str, dtype: DType, shards: usize) -> String {
    let folder = s.path(&format!("model-{dtype:?}"));
    std::fs::create_dir_all(&folder).unwrap();
    let place = |name: &str| Path::new(&folder).join(name);
    for name in names(model).iter().filter(|n| n.ends_with(".json")) {
        std::fs::copy(Path::new(model).join(name), place(name)).unwrap();
    }
    let all = safetensors::load(Path::new(model).join("model.safetensors"), &Device::Cpu).unwrap();
    let mut sorted: Vec<(String, Tensor)> = all.into_iter().map(|(n, t)| (n, t.to_dtype(dtype).unwrap())).collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let mut map = serde_json::Map::new();
    let per_shard = sorted.len().div_ceil(shards);
    for (at, shard) in sorted.chunks(per_shard).enumerate() {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", at + 1);
        map.extend(shard.iter().map(|(name, _)| (name.clone(), json!(file))));
        let shard: HashMap<String, Tensor> = shard.iter().cloned().collect();
        safetensors::save(&shard, place(&file)).unwrap();
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(place("model.safetensors.index.json"), index.to_string()).unwrap();
    folder
}

/// The tensor of all experts that a tensor of a file is a part of; another's own name.
fn of_all_experts(name: &str) -> String {
    match name.split_once(".experts.") {
        Some((front, own)) if own.starts_with(|c: char| c.is_ascii_digit()) => {
            let down = ["down_proj", "w2"].iter().any(|part| own.contains(part));
            format!("{front}.experts.{}", if down { "down_proj" } else { "gate_up_proj" })
        }
        _ => name.to_owned(),
    }
}

#[test]
fn a_merged_model_computes_the_same() {
    let cases = cases();
    assert!(cases.len() >= 7, "{} cases", cases.len());
    // What was quantised is written anew: `quantization.rs` has that.
    let plain = |case: &[String; 3]| {
        !std::fs::read_to_string(format!("{}/config.json", case[0])).unwrap().contains("quantization_config")
    };
    for [model, adapter, rows] in cases.into_iter().filter(plain) {
        let s = sandbox();
        let merged = s.path("new/merged");
        s.ok(&["merge", "--model", &model, "--adapter", &adapter, "--output-dir", &merged]);
        assert_eq!(names(&merged), names(&model));
        for name in names(&model).iter().filter(|n| n.ends_with(".json")) {
            let of = |folder: &str| std::fs::read(Path::new(folder).join(name)).unwrap();
            assert!(of(&merged) == of(&model), "{model}: {name}");
        }
        let together = logps(&s, &rows, &[&model, "--adapter", &adapter]);
        let base = distance(&logps(&s, &rows, &[&model]), &together);
        let mut off = distance(&logps(&s, &rows, &[&merged]), &together);
        assert!(base > 1e-4, "{model}: the adapter changes nothing, so that this shows nothing");
        let [before, after] = [&model, &merged].map(|folder| tensors(&Path::new(folder).join("model.safetensors")));
        assert_eq!(before.0, after.0, "{model}: the header");
        // A sum is rounded to the file's type, in bf16 to what is still far nearer than the model without the adapter.
        let mut is_rounded = before.0.windows(4).any(|w| w == b"BF16");
        // What is rounded may choose another expert: such a model is merged in f32 as well.
        if is_rounded && before.1.keys().any(|name| name.contains(".experts.")) {
            let (wide, merged) = (convert(&s, &model, DType::F32, 1), s.path("new/wide"));
            s.ok(&["merge", "--model", &wide, "--adapter", &adapter, "--output-dir", &merged]);
            let together = logps(&s, &rows, &[&wide, "--adapter", &adapter]);
            (off, is_rounded) = (distance(&logps(&s, &rows, &[&merged]), &together), false);
        }
        let bound = if is_rounded { base / 5.0 } else { 1e-5 };
        assert!(off < bound, "{model}: log-probs are off by {off:.1e}, without the adapter by {base:.1e}");
        let adapted = read_f32(&Path::new(&adapter).join("adapter_model.safetensors")).unwrap();
        let changed = before.1.iter().filter(|(name, bytes)| *bytes != &after.1[*name]);
        // Files may have other names than PEFT, and a tensor for each expert where it has one for all.
        let changed: BTreeSet<String> = changed.map(|(name, _)| of_all_experts(name)).collect();
        assert_eq!(changed.len() * 2, adapted.len(), "{model}: as many tensors change as are adapted");
    }
}

/// For vLLM: what is of all experts becomes a module for each, which computes the same and is read as any adapter.
#[test]
fn an_adapter_may_have_a_module_for_each_expert() {
    for name in ["qwen3_moe", "mixtral"] {
        let [model, adapter, rows] = case(name);
        let s = sandbox();
        let each = s.path(&format!("{name}/each"));
        s.ok(&["merge", "--model", &model, "--adapter", &adapter, "--format", "adapter", "--output-dir", &each]);
        let modules = read_f32(&Path::new(&each).join("adapter_model.safetensors")).unwrap();
        // As vLLM calls them, which is as the checkpoint does.
        let of = if name == "mixtral" { "block_sparse_moe.experts.1.w3" } else { "mlp.experts.1.up_proj" };
        assert!(modules.keys().any(|key| key.ends_with(&format!("layers.0.{of}.lora_B.weight"))), "{modules:?}");
        let [own, split] = [&adapter, &each].map(|adapter| logps(&s, &rows, &[&model, "--adapter", adapter]));
        assert!(distance(&split, &own) < 1e-6, "{name}: {own:?} {split:?}");
    }
    let [model, adapter, _] = case("qwen3");
    let s = sandbox();
    let none = s.path("none");
    let ended =
        s.run(&["merge", "--model", &model, "--adapter", &adapter, "--format", "adapter", "--output-dir", &none]);
    assert!(ended.code == 2 && ended.stderr.contains("no experts"), "{}", ended.stderr);
}

/// W + scale · B · A in f64, and of that the nearest bf16, an even one of two.
fn rounded(w: f32, update: f64) -> f32 {
    let exact = f64::from(w) + update;
    let down = f32::from_bits((exact as f32).to_bits() & 0xffff_0000);
    let up = f32::from_bits(down.to_bits() + 0x1_0000);
    let [below, above] = [down, up].map(|v| (f64::from(v) - exact).abs());
    let odd = down.to_bits() & 0x1_0000 != 0;
    if below < above || (below == above && !odd) { down } else { up }
}

#[test]
fn shards_stay_and_bf16_is_rounded_once() {
    let [model, adapter, rows] = case("qwen3");
    let s = sandbox();
    let (model, merged) = (convert(&s, &model, DType::BF16, 3), s.path("merged"));
    std::fs::create_dir(&merged).unwrap();
    s.ok(&["merge", "--model", &model, "--adapter", &adapter, "--output-dir", &merged]);
    assert_eq!(names(&merged), names(&model));
    let index = |folder: &str| std::fs::read(Path::new(folder).join("model.safetensors.index.json")).unwrap();
    assert_eq!(index(&merged), index(&model));
    let config = std::fs::read_to_string(Path::new(&adapter).join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let (rank, alpha) = (config["r"].as_u64().unwrap() as usize, config["lora_alpha"].as_f64().unwrap());
    let lora = read_f32(&Path::new(&adapter).join("adapter_model.safetensors")).unwrap();
    let (mut values, mut other) = (0, 0);
    for shard in names(&model).iter().filter(|n| n.ends_with(".safetensors")) {
        let [before, after] = [&model, &merged].map(|f| Path::new(f).join(shard));
        assert_eq!(tensors(&before).0, tensors(&after).0, "{shard}: the header");
        let [before, after] = [before, after].map(|path| read_f32(&path).unwrap());
        for (name, (shape, w)) in &before {
            let part = |p: &str| {
                let module = name.strip_suffix(".weight").unwrap();
                lora.get(&format!("base_model.model.{module}.{p}.weight")).map(|(_, values)| values)
            };
            let Some((a, b)) = part("lora_A").zip(part("lora_B")) else {
                assert_eq!(w, &after[name].1, "{name}");
                continue;
            };
            for (at, (w, is)) in w.iter().zip(&after[name].1).enumerate() {
                let (row, column) = (at / shape[1], at % shape[1]);
                let term = |r: usize| f64::from(b[row * rank + r]) * f64::from(a[r * shape[1] + column]);
                let should = rounded(*w, alpha / rank as f64 * (0..rank).map(term).sum::<f64>());
                values += 1;
                other += usize::from(should != *is);
                assert!((should - is).abs() <= should.abs() / 128.0, "{name} at {at}: {is} for {should}");
            }
        }
    }
    // The sum in f32 may fall on the other side of a middle, and hardly ever does.
    assert!(values > 1000 && other * 1000 < values, "{other} of {values} values are not the nearest");
    let together = logps(&s, &rows, &[&model, "--adapter", &adapter]);
    let off = distance(&logps(&s, &rows, &[&merged]), &together);
    assert!(off < 5e-3, "log-probs are off by {off:.1e}");
}

#[test]
fn some_modules_and_rslora() {
    let [model, _, rows] = case("qwen2");
    let s = sandbox();
    let (run, merged) = (s.path("run"), s.path("merged"));
    let flags = "--device cpu --max-steps 3 --batch-size 2 --learning-rate 0.05 --lora-rank 4 --lora-alpha 8 --use-rslora \
                 --target-modules q_proj down_proj";
    let train = ["train", "--model", &model, "--dataset", &rows, "--output-dir", &run];
    s.ok(&[&train[..], &flags.split_whitespace().collect::<Vec<_>>()].concat());
    s.ok(&["merge", "--model", &model, "--adapter", &run, "--output-dir", &merged]);
    let together = logps(&s, &rows, &[&model, "--adapter", &run]);
    assert!(distance(&logps(&s, &rows, &[&model]), &together) > 1e-2);
    let off = distance(&logps(&s, &rows, &[&merged]), &together);
    assert!(off < 1e-5, "log-probs are off by {off:.1e}");
    let [before, after] = [&model, &merged].map(|f| tensors(&Path::new(f).join("model.safetensors")).1);
    let changed: Vec<&String> = before.keys().filter(|n| before[*n] != after[*n]).collect();
    assert!(
        !changed.is_empty() && changed.iter().all(|n| n.contains("q_proj") || n.contains("down_proj")),
        "{changed:?}"
    );
}

#[test]
fn what_is_there_is_whole() {
    let [model, adapter, _] = case("qwen2");
    let s = sandbox();
    let full = s.write("full/notes.txt", "mine");
    let folder = text(Path::new(&full).parent().unwrap());
    let merge = |model: &str, adapter: &str, output: &str| {
        ["merge", "--model", model, "--adapter", adapter, "--output-dir", output].map(str::to_owned)
    };
    let args = merge(&model, &adapter, &folder);
    s.refuses(&args.each_ref().map(String::as_str), &["full", "not empty"]);
    assert_eq!(names(&folder), ["notes.txt"]);

    // An update that f16 cannot hold: half of the model is written by then.
    let model16 = convert(&s, &model, DType::F16, 2);
    let large = s.path("large");
    std::fs::create_dir(&large).unwrap();
    std::fs::copy(
        Path::new(&adapter).join("adapter_model.safetensors"),
        Path::new(&large).join("adapter_model.safetensors"),
    )
    .unwrap();
    let config = std::fs::read_to_string(Path::new(&adapter).join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["lora_alpha"] = json!(1e12);
    std::fs::write(Path::new(&large).join("adapter_config.json"), config.to_string()).unwrap();
    let output = s.path("out/merged");
    let args = merge(&model16, &large, &output);
    let ended = s.run(&args.each_ref().map(String::as_str));
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("tensor 'model.layers.") && ended.stderr.contains("F16"), "{}", ended.stderr);
    assert_eq!(names(&s.path("out")), Vec::<String>::new());

    // What a merge that was killed has left goes with the next one.
    let left = s.write("out/.merged.tmp/model.safetensors", "half");
    let args = merge(&model, &adapter, &output);
    s.ok(&args.each_ref().map(String::as_str));
    assert!(!Path::new(&left).exists());
    assert_eq!((names(&s.path("out")), names(&output)), (vec!["merged".to_owned()], names(&model)));
}
