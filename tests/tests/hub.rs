//! Models and datasets by name, against a hub on the loopback: whole, broken, refused, and without any hub.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::{Path, PathBuf};

use dpo_tests::hub::{COMMIT, Hub, Trouble};
use dpo_tests::{Ended, Sandbox, golden};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

/// The files of a small model, and some that nothing here reads.
fn model() -> Vec<(String, Vec<u8>)> {
    let folder = golden("trajectories").join("qwen2/model");
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&p).unwrap()))
        .collect();
    files.sort();
    files.extend([("README.md".into(), b"words".to_vec()), ("pytorch_model.bin".into(), vec![0; 100])]);
    files
}

fn rows() -> PathBuf {
    golden("trajectories").join("qwen2/prefs.jsonl")
}

fn run(s: &Sandbox, hub: &Hub, args: &[&str], more: &[(&str, &str)]) -> Ended {
    let mut command = s.command(args);
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name);
    }
    for name in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MODELSCOPE_API_TOKEN"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", &hub.address).env("MODELSCOPE_ENDPOINT", &hub.address);
    command.env("MODELSCOPE_CACHE", s.path("ms")).envs(more.iter().copied());
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let ended =
        Ended { code: output.status.code().unwrap(), stdout: text(&output.stdout), stderr: text(&output.stderr) };
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    ended
}

/// Fetches everything of a model and computes with it.
fn eval(s: &Sandbox, hub: &Hub, name: &str, more: &[(&str, &str)]) -> Ended {
    let rows = format!("{}#2", rows().display());
    run(s, hub, &["eval", "--device", "cpu", "--model", name, "--dataset", &rows], more)
}

fn ok(ended: &Ended) {
    assert_eq!(ended.code, 0, "{}", ended.stderr);
}

fn says(ended: &Ended, code: i32, texts: &[&str]) {
    assert_eq!(ended.code, code, "{}", ended.stderr);
    for text in texts {
        assert!(ended.stderr.contains(text), "it does not say '{text}':\n{}", ended.stderr);
    }
}

fn asked(hub: &Hub) -> Vec<String> {
    let mut paths: Vec<String> = hub.asked().into_iter().map(|(path, _)| path).collect();
    paths.sort();
    paths
}

#[test]
fn only_what_is_needed_is_fetched_and_only_once() {
    let (s, hub) = (sandbox(), Hub::start(model()));
    ok(&run(&s, &hub, &["plan", "--model", "tiny/qwen2", "--device", "cpu"], &[]));
    assert_eq!(asked(&hub), ["config.json"]);
    let rows = rows().display().to_string();
    ok(&run(&s, &hub, &["data", &rows, "--model", "tiny/qwen2"], &[]));
    assert_eq!(asked(&hub), ["tokenizer.json", "tokenizer_config.json"]);
    let named = eval(&s, &hub, "tiny/qwen2@main", &[]);
    ok(&named);
    assert_eq!(asked(&hub), ["model.safetensors"]);
    ok(&eval(&s, &hub, "hf::tiny/qwen2", &[]));
    assert_eq!(asked(&hub), Vec::<String>::new());

    // As Hugging Face's own tools lay it out.
    let cache = PathBuf::from(s.path("hf/hub/models--tiny--qwen2"));
    assert_eq!(std::fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    let weights = cache.join("snapshots").join(COMMIT).join("model.safetensors");
    assert_eq!(std::fs::read(&weights).unwrap(), model().into_iter().find(|f| f.0 == "model.safetensors").unwrap().1);
    assert!(std::fs::canonicalize(&weights).unwrap().starts_with(std::fs::canonicalize(cache.join("blobs")).unwrap()));

    let folder = golden("trajectories").join("qwen2/model").display().to_string();
    assert_eq!(eval(&s, &hub, &folder, &[]).stdout, named.stdout);
    // A folder of that name wins.
    std::fs::create_dir_all(s.path("tiny/qwen2")).unwrap();
    says(&eval(&s, &hub, "tiny/qwen2", &[]), 2, &["tiny/qwen2/config.json"]);
}

#[test]
fn shards_of_an_index_are_fetched() {
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let mut files: Vec<_> = model().into_iter().filter(|f| f.0 != "model.safetensors").collect();
    for (name, bytes) in [
        ("model.safetensors.index.json", index.as_bytes()),
        ("model-00001-of-00002.safetensors", b"one"),
        ("model-00002-of-00002.safetensors", b"two"),
        ("consolidated.safetensors", b"another form of the same"),
    ] {
        files.push((name.into(), bytes.to_vec()));
    }
    let (s, hub) = (sandbox(), Hub::start(files));
    // They are no safetensors, but they are here.
    says(&eval(&s, &hub, "tiny/shards", &[]), 2, &["model-00001-of-00002.safetensors"]);
    let asked = asked(&hub);
    assert_eq!(asked.iter().filter(|f| f.ends_with(".safetensors")).count(), 2, "{asked:?}");
}

#[test]
fn a_broken_connection_goes_on_where_it_broke() {
    let (s, hub) = (sandbox(), Hub::start(model()));
    let troubles = vec![Trouble::Breaks, Trouble::Status(429), Trouble::Breaks, Trouble::Status(503)];
    hub.state.lock().unwrap().troubles.insert("model.safetensors".into(), troubles);
    ok(&eval(&s, &hub, "tiny/qwen2", &[]));
    let from: Vec<u64> = hub.asked().into_iter().filter(|(path, _)| path == "model.safetensors").map(|a| a.1).collect();
    assert_eq!(from.len(), 5, "{from:?}");
    assert!(from[0] == 0 && from[1] > 0 && from[1] == from[2] && from[3] > from[2] && from[3] == from[4], "{from:?}");
}

#[test]
fn a_hub_that_never_comes_further_is_given_up() {
    let (s, hub) = (sandbox(), Hub::start(model()));
    ok(&run(&s, &hub, &["data", &rows().display().to_string(), "--model", "tiny/qwen2"], &[]));
    hub.state.lock().unwrap().cuts = Some(5_000);
    hub.asked();
    let ended = eval(&s, &hub, "tiny/qwen2", &[]);
    says(&ended, 1, &["model.safetensors", "after 5000 of 118464 bytes", "each answer begins anew", "HF_ENDPOINT"]);
    assert_eq!(hub.asked().len(), 5);
}

#[test]
fn a_token_is_shown_to_its_hub_alone() {
    let (s, hub, other) = (sandbox(), Hub::start(model()), Hub::start(model()));
    let token = [("HF_TOKEN", "let-me-in")];
    let state = |hub: &Hub, token: Option<&str>, redirect: &Hub| {
        let mut state = hub.state.lock().unwrap();
        (state.token, state.redirect) = (token.map(str::to_owned), Some(redirect.address.clone()));
    };
    // A model that was renamed, on the same hub.
    state(&hub, Some("let-me-in"), &hub);
    ok(&run(&s, &hub, &["plan", "--model", "tiny/renamed", "--device", "cpu"], &token));
    // Files on another port of the same host.
    state(&hub, Some("let-me-in"), &other);
    ok(&eval(&s, &hub, "tiny/qwen2", &token));
    assert!(!other.asked().is_empty() && !hub.state.lock().unwrap().shown.is_empty());
    assert_eq!(other.state.lock().unwrap().shown, Vec::<String>::new());
    // One that leads in circles.
    other.state.lock().unwrap().redirect = Some(format!("{}/x", other.address));
    hub.state.lock().unwrap().redirect = Some(format!("{}/x", other.address));
    says(&eval(&s, &hub, "tiny/circles", &token), 1, &["leads on and on"]);
}

#[test]
fn a_mistyped_folder_is_no_name_on_a_hub() {
    let (s, hub) = (sandbox(), Hub::start(model()));
    std::fs::create_dir_all(s.path("models/qwen3")).unwrap();
    says(
        &eval(&s, &hub, "models/qwen2", &[]),
        2,
        &["--model: 'models' is a folder, 'models/qwen2' is not", "hf::models/qwen2"],
    );
    assert_eq!(asked(&hub), Vec::<String>::new());
    ok(&eval(&s, &hub, "hf::models/qwen2", &[]));
}

#[test]
fn a_command_that_was_given_up_is_gone_on_with() {
    let (s, hub) = (sandbox(), Hub::start(model()));
    let troubles = [&[Trouble::Breaks][..], &[Trouble::Status(500); 4]].concat();
    hub.state.lock().unwrap().troubles.insert("model.safetensors".into(), troubles);
    says(&eval(&s, &hub, "tiny/qwen2", &[]), 1, &["model.safetensors", "500", "run it again"]);
    hub.asked();
    ok(&eval(&s, &hub, "tiny/qwen2", &[]));
    let asked = hub.asked();
    assert!(matches!(asked.as_slice(), [(path, from)] if path == "model.safetensors" && *from > 0), "{asked:?}");
}

#[test]
fn refusals_say_what_to_do() {
    let (s, hub) = (sandbox(), Hub::start(model()));
    says(&eval(&s, &hub, "tiny/missing", &[]), 2, &["tiny/missing@main on Hugging Face", "404"]);
    says(&eval(&s, &hub, "ms::tiny/missing", &[]), 2, &["tiny/missing@master on ModelScope", "404"]);
    for no_name in ["./nowhere", "a/b/c", "a/..", "../b", "xx::a/b", "name"] {
        says(&eval(&s, &hub, no_name, &[]), 2, &["--model", no_name, "is not a folder"]);
    }
    for (file, why) in [("nowhere.pem", "cannot be read"), ("no.pem", "no certificates")] {
        let path = if file == "no.pem" { s.write(file, "words") } else { s.path(file) };
        says(&eval(&s, &hub, "tiny/qwen2", &[("SSL_CERT_FILE", &path)]), 2, &["SSL_CERT_FILE=", file, why]);
    }
    hub.state.lock().unwrap().token = Some("let-me-in".into());
    says(&eval(&s, &hub, "tiny/qwen2", &[]), 2, &["401", "HF_TOKEN"]);
    let wrong = eval(&s, &hub, "tiny/qwen2", &[("HF_TOKEN", "guessed")]);
    says(&wrong, 2, &["401", "HF_TOKEN"]);
    assert!(!wrong.stderr.contains("guessed"), "a token is told:\n{}", wrong.stderr);
    s.write("hf/token", "let-me-in\n");
    ok(&eval(&s, &hub, "tiny/qwen2", &[]));
}

#[test]
fn another_file_than_the_hub_says_is_not_taken() {
    for name in ["tiny/qwen2", "ms::tiny/qwen2"] {
        let (s, hub) = (sandbox(), Hub::start(model()));
        hub.state.lock().unwrap().lies.push("model.safetensors".into());
        says(&eval(&s, &hub, name, &[]), 1, &["model.safetensors", "SHA-256"]);
        let left = files(Path::new(&s.path("."))).into_iter().filter(|f| f.contains("model.safetensors"));
        assert_eq!(left.collect::<Vec<_>>(), Vec::<String>::new());
        hub.state.lock().unwrap().lies.clear();
        ok(&eval(&s, &hub, name, &[]));
    }
    // A small one is known by the name that git gave it.
    let (s, hub) = (sandbox(), Hub::start(model()));
    hub.state.lock().unwrap().lies.push("tokenizer.json".into());
    says(&eval(&s, &hub, "tiny/qwen2", &[]), 1, &["tokenizer.json", "git hash", "is another file"]);
}

fn files(folder: &Path) -> Vec<String> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() { paths.extend(files(&entry)) } else { paths.push(entry.display().to_string()) }
    }
    paths
}

#[test]
fn no_listing_leads_out_of_the_cache() {
    for path in ["../../../outside.json", "/outside.json", "a/../../outside.json", "..\\outside.json"] {
        let (s, hub) = (sandbox(), Hub::start(model()));
        hub.state.lock().unwrap().listed.push(path.into());
        says(&eval(&s, &hub, "tiny/qwen2", &[]), 2, &["lists a file", "outside.json", "refused"]);
        assert_eq!(asked(&hub), Vec::<String>::new());
        assert!(files(Path::new(&s.path("."))).iter().all(|f| !f.contains("outside")));
    }
}

#[test]
fn without_a_hub_the_cache_serves() {
    let (s, hub) = (sandbox(), Hub::start(model()));
    let offline = [("HF_HUB_OFFLINE", "1")];
    says(&eval(&s, &hub, "tiny/qwen2", &offline), 2, &["not in the cache", "models--tiny--qwen2", "HF_HUB_OFFLINE"]);
    let rows = rows().display().to_string();
    ok(&run(&s, &hub, &["data", &rows, "--model", "tiny/qwen2"], &[]));
    says(&eval(&s, &hub, "tiny/qwen2", &offline), 2, &["model.safetensors missing in"]);
    ok(&eval(&s, &hub, "tiny/qwen2", &[]));
    hub.asked();
    ok(&eval(&s, &hub, "tiny/qwen2", &offline));
    assert_eq!(asked(&hub), Vec::<String>::new());
    // Nor is a hub needed that is down.
    let nobody = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    let ended = eval(&s, &hub, "tiny/qwen2", &nobody);
    ok(&ended);
    assert!(ended.stderr.contains("what the cache has is used"), "{}", ended.stderr);
    says(&eval(&s, &hub, "tiny/other", &nobody), 1, &["127.0.0.1:9"]);
}

#[test]
fn modelscope_has_a_cache_of_its_own() {
    let (s, hub) = (sandbox(), Hub::start(model()));
    hub.state.lock().unwrap().troubles.insert("model.safetensors".into(), vec![Trouble::Breaks]);
    ok(&eval(&s, &hub, "ms::tiny/qwen2.5", &[]));
    assert!(Path::new(&s.path("ms/models/tiny/qwen2___5/model.safetensors")).is_file());
    hub.asked();
    ok(&eval(&s, &hub, "ms::tiny/qwen2.5", &[]));
    assert_eq!(asked(&hub), Vec::<String>::new());
}

#[test]
fn a_dataset_is_its_training_rows() {
    let text = std::fs::read(rows()).unwrap();
    let lines: Vec<&[u8]> = text.split_inclusive(|b| *b == b'\n').collect();
    let part = |from: usize, to: usize| lines[from..to].concat();
    let files = vec![
        ("data/train-00000-of-00002.jsonl".to_owned(), part(0, 2)),
        ("data/train-00001-of-00002.jsonl".to_owned(), part(2, 3)),
        ("data/test-00000-of-00001.jsonl".to_owned(), part(3, 4)),
        ("dataset_infos.json".to_owned(), b"{}".to_vec()),
        ("README.md".to_owned(), b"words".to_vec()),
    ];
    let (s, hub) = (sandbox(), Hub::start(files));
    let model = golden("trajectories").join("qwen2/model").display().to_string();
    let data = |name: &str, more: &[(&str, &str)]| {
        let ended = run(&s, &hub, &["data", name, "--model", &model, "--json"], more);
        ok(&ended);
        let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
        report["files"].as_array().unwrap().iter().map(|f| f["rows"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(data("hf::owner/pairs", &[]), [2, 1]);
    assert_eq!(asked(&hub), ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]);
    assert_eq!(data("hf::owner/pairs#2", &[("HF_HUB_OFFLINE", "1")]).iter().sum::<u64>(), 2);
    assert_eq!(data("hf::owner/pairs/data/test-00000-of-00001.jsonl", &[]), [1]);
    // Of ModelScope they are listed page by page.
    let page: Vec<_> = (0..400).map(|i| (format!("more/{i}.txt"), b"words".to_vec())).collect();
    hub.state.lock().unwrap().files.splice(0..0, page);
    hub.asked();
    assert_eq!(data("ms::owner/pairs", &[]), [2, 1]);
    assert_eq!(asked(&hub), ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]);
    assert_eq!(data("ms::owner/pairs/data/test-00000-of-00001.jsonl", &[]), [1]);
    let ended = run(&s, &hub, &["data", "ms::owner/missing", "--model", &model], &[]);
    says(&ended, 2, &["owner/missing@master on ModelScope", "404"]);
    let ended = run(&s, &hub, &["data", "hf::owner/missing", "--model", &model], &[]);
    says(&ended, 2, &["owner/missing@main on Hugging Face", "404"]);
}
