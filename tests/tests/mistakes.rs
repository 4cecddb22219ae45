//! Mistakes of somebody who trains a model of a hub: each is told before a weight is fetched, with what to do.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use dpo_tests::hub::Hub;
use dpo_tests::{Sandbox, golden};

/// What may be fetched before a mistake is told.
const BESIDE_WEIGHTS: [&str; 4] = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];

/// The mistake of a disk that has no room for the weights.
const FULL: &str = "a disk without room";

/// The files of a small model whose weights are of any size.
fn model() -> Vec<(String, Vec<u8>)> {
    let folder = golden("trajectories/qwen2/model");
    let file = |e: std::io::Result<std::fs::DirEntry>| {
        let path = e.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap())
    };
    std::fs::read_dir(folder).unwrap().map(file).collect()
}

fn config(files: &mut [(String, Vec<u8>)], key: &str, value: serde_json::Value) {
    let (_, bytes) = files.iter_mut().find(|(name, _)| name == "config.json").unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(bytes).unwrap();
    config[key] = value;
    *bytes = config.to_string().into_bytes();
}

#[test]
fn a_mistake_costs_no_weights() {
    let rows = golden("trajectories/qwen2/prefs.jsonl").display().to_string();
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let unknown = sandbox.write("unknown.jsonl", "{\"a\": \"b\", \"c\": \"d\"}\n");
    let misspelt = sandbox.write("misspelt.jsonl", "{\"prompt\": \"a\", \"choosen\": \"b\", \"rejected\": \"c\"}\n");
    let broken = sandbox.write("broken.jsonl", "{\"prompt\": \n");
    let used = sandbox.path("used");
    std::fs::create_dir(&used).unwrap();
    std::fs::write(format!("{used}/args.json"), "{}").unwrap();
    let mut other_family = model();
    config(&mut other_family, "architectures", serde_json::json!(["MambaForCausalLM"]));
    let mut not_understood = model();
    config(&mut not_understood, "logit_softcap", serde_json::json!(30.0));
    let mut bad_template = model();
    bad_template.push(("chat_template.jinja".into(), b"{% for m in messages %}".to_vec()));
    let mut no_weights = model();
    no_weights
        .iter_mut()
        .filter(|(name, _)| name == "model.safetensors")
        .for_each(|f| f.0 = "pytorch_model.bin".into());

    let data = ["--dataset", rows.as_str()];
    let with = |more: &[&'static str]| [&data[..], more].concat();
    type Case<'a> = (&'a str, Option<Vec<(String, Vec<u8>)>>, Vec<&'a str>, &'a [&'a str]);
    let cases: Vec<Case<'_>> = vec![
        (
            "rows that are not there",
            None,
            vec!["--dataset", "missing.jsonl"],
            &["missing.jsonl", "cannot read", "help:"],
        ),
        ("rows of no known format", None, vec!["--dataset", &unknown], &["no known dataset format", "--columns"]),
        (
            "a misspelt column",
            None,
            vec!["--dataset", &misspelt],
            &["did you mean 'chosen' for 'choosen'", "--columns"],
        ),
        ("broken rows", None, vec!["--dataset", &broken], &["broken.jsonl:1"]),
        ("a misspelt format", None, with(&["--dataset-format", "trll"]), &["did you mean 'trl'"]),
        ("a misspelt loss", None, with(&["--loss", "sigmod"]), &["did you mean 'sigmoid'"]),
        ("an option that the loss does not have", None, with(&["--loss-option", "gama=1"]), &["gama"]),
        ("a number out of range", None, with(&["--warmup-ratio", "5"]), &["--warmup-ratio", "from 0 to 1"]),
        ("a misspelt flag", None, with(&["--learning-rat", "1e-4"]), &["--learning-rate"]),
        ("a folder that holds a run", None, [&data[..], &["--output-dir", &used]].concat(), &["holds a run already"]),
        ("a module that is not there", None, with(&["--target-modules", "q_prj"]), &["did you mean 'q_proj'"]),
        ("a rank that does not fit", None, with(&["--lora-rank", "60000", "--gpu-memory", "8MiB"]), &["MiB"]),
        ("a model that does not fit", None, with(&["--gpu-memory", "1MiB"]), &["needs", "there are 1.0 MiB"]),
        ("a best evaluation of none", None, with(&["--load-best-model-at-end"]), &["--val-dataset"]),
        ("an adapter that is not there", None, with(&["--ref-adapter", "nowhere"]), &["nowhere"]),
        ("an architecture of no plugin", Some(other_family), with(&[]), &["MambaForCausalLM", "list models"]),
        ("a config that is not understood", Some(not_understood), with(&[]), &["logit_softcap"]),
        ("a template that does not compile", Some(bad_template), with(&[]), &["chat_template.jinja"]),
        (FULL, None, with(&[]), &["its weights take", "are free", "HF_HOME"]),
        ("a model without safetensors", Some(no_weights), with(&[]), &["neither model.safetensors nor"]),
    ];
    let mut most = 0;
    for (mistake, files, args, texts) in cases {
        let hub = Hub::start(files.unwrap_or_else(model));
        if mistake == FULL {
            hub.state.lock().unwrap().sizes.insert("model.safetensors".into(), 1 << 60);
        }
        let home = sandbox.path(&mistake.replace(' ', "-"));
        let mut command =
            sandbox.command(&[&["train", "--device", "cpu", "--model", "tiny/qwen2"], &args[..]].concat());
        for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command.env_remove("HF_HUB_OFFLINE").env_remove("HF_HUB_CACHE").env("HF_HOME", &home);
        command.env("HF_ENDPOINT", &hub.address);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{mistake}:\n{said}");
        texts.iter().for_each(|text| assert!(said.contains(text), "{mistake}: it does not say '{text}':\n{said}"));
        let asked: Vec<String> = hub.asked().into_iter().map(|(path, _)| path).collect();
        let allowed = |path: &String| BESIDE_WEIGHTS.contains(&path.as_str()) || path == "chat_template.jinja";
        assert!(asked.iter().all(allowed), "{mistake}: {asked:?}");
        let state = hub.state.lock().unwrap();
        let bytes: usize = state.files.iter().filter(|(path, _)| asked.contains(path)).map(|(_, b)| b.len()).sum();
        most = most.max(bytes);
        println!("{bytes:>7} bytes  {mistake}: {}", said.lines().rfind(|l| l.contains("error:")).unwrap_or_default());
    }
    println!("{most} bytes at most");
}

/// What `chat` and `merge` are told of an adapter, and where a run of a hub's model is written.
#[test]
fn an_adapter_is_looked_at_before_weights_and_a_run_has_the_name_of_its_model() {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let (hub, rows) = (Hub::start(model()), golden("trajectories/qwen2/prefs.jsonl").display().to_string());
    let run = |args: &[&str]| {
        let mut command = sandbox.command(args);
        for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command.env_remove("HF_HUB_OFFLINE").env_remove("HF_HUB_CACHE").env("HF_HOME", sandbox.path("hf"));
        command.env("HF_ENDPOINT", &hub.address).current_dir(sandbox.path("."));
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let merged = sandbox.path("merged");
    for args in [
        &["chat", "--prompt", "hi", "--device", "cpu", "--model", "tiny/qwen2", "--adapter", "nowhere"][..],
        &["merge", "--output-dir", &merged, "--model", "tiny/qwen2", "--adapter", "nowhere"],
    ] {
        let (code, said) = run(args);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("nowhere/adapter_config.json"), "{said}");
        assert!(hub.asked().iter().all(|(path, _)| BESIDE_WEIGHTS.contains(&path.as_str())), "{args:?}");
    }
    let (code, said) =
        run(&["train", "--device", "cpu", "--model", "tiny/qwen2@main", "--dataset", &rows, "--max-steps", "1"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("adapter     output/qwen2-1/adapter_model.safetensors"), "{said}");
    // The built-in model has a name for every command.
    let (code, said) = run(&["data", &rows, "--model", "demo"]);
    assert_eq!(code, Some(0), "{said}");
}
