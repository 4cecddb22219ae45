//! `push` against a hub on the loopback: what goes up and what stays, interruptions, cards, tokens, refusals.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::PathBuf;

use dpo_tests::hub::{Hub, Trouble};
use dpo_tests::{Ended, Sandbox, golden};

/// A text of the rows, which nobody else is to see.
const SECRET: &str = "my-secret-question";

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"))
}

fn hub() -> Hub {
    Hub::start(Vec::new())
}

/// A run of two steps with evaluations, on rows that have [`SECRET`], and a checkpoint in it.
fn trained(s: &Sandbox) -> String {
    let row = |answer: &str| {
        format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"{SECRET}\"}},{{\"role\":\"assistant\",\"content\":\"{answer}\"}}],\
             \"rejected_response\":\"no\"}}\n"
        )
    };
    let rows: String = ["yes", "of course", "with pleasure", "sure"].into_iter().map(row).collect();
    let rows = s.write(&format!("{SECRET}/rows.jsonl"), &rows);
    let (model, run) = (golden("trajectories").join("qwen2/model").display().to_string(), s.path("run"));
    let fixed = ["train", "--device", "cpu", "--model", &model, "--dataset", &rows, "--val-dataset", &rows];
    let more =
        ["--output-dir", &run, "--max-steps", "2", "--save-steps", "1", "--eval-steps", "1", "--batch-size", "2"];
    s.ok(&[&fixed[..], &more, &["--logging-steps", "1", "--system", SECRET]].concat());
    run
}

/// The adapter of a golden run, which is all that most tests need.
fn adapter(s: &Sandbox) -> String {
    let folder = golden("trajectories").join("qwen2/final_adapter");
    dpo_tests::copy(&folder, &PathBuf::from(s.path("adapter")));
    s.path("adapter")
}

fn run(s: &Sandbox, hub: &Hub, args: &[&str], more: &[(&str, &str)]) -> Ended {
    let mut command = s.command(&[&["push"], args].concat());
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name);
    }
    for name in ["HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", &hub.address).env("MODELSCOPE_ENDPOINT", &hub.address);
    command.env("HF_TOKEN", "let-me-in").env("MODELSCOPE_API_TOKEN", "let-me-in").envs(more.iter().copied());
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let ended =
        Ended { code: output.status.code().unwrap(), stdout: text(&output.stdout), stderr: text(&output.stderr) };
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    ended
}

fn ok(s: &Sandbox, hub: &Hub, args: &[&str]) -> Ended {
    let ended = run(s, hub, args, &[]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    ended
}

fn says(ended: &Ended, code: i32, texts: &[&str]) {
    assert_eq!(ended.code, code, "{}", ended.stderr);
    for text in texts {
        assert!(ended.stderr.contains(text), "it does not say '{text}':\n{}", ended.stderr);
    }
}

fn there(hub: &Hub) -> Vec<String> {
    let mut names: Vec<String> = hub.state.lock().unwrap().files.iter().map(|(path, _)| path.clone()).collect();
    names.sort();
    names
}

fn content(hub: &Hub, path: &str) -> Vec<u8> {
    hub.state.lock().unwrap().files.iter().find(|(own, _)| own == path).unwrap().1.clone()
}

fn card(hub: &Hub) -> String {
    String::from_utf8(content(hub, "README.md")).unwrap()
}

fn trouble(hub: &Hub, what: &str, troubles: &[Trouble]) {
    hub.state.lock().unwrap().troubles.insert(what.to_owned(), troubles.to_vec());
}

const WHOLE: [&str; 4] = ["README.md", "adapter_config.json", "adapter_model.safetensors", "curves.svg"];

#[test]
fn a_run_goes_up_without_its_rows_and_its_checkpoint_with_its_own_numbers() {
    let (s, hub) = (sandbox(), hub());
    let run = trained(&s);
    let with = ["me/tiny", &run, "--base-model", "owner/base", "--license", "mit", "--private"];
    let ended = ok(&s, &hub, &with);
    says(&ended, 0, &["left out", "samples.jsonl", "report.html", "checkpoint-1"]);
    assert_eq!(there(&hub), WHOLE);
    assert!(hub.state.lock().unwrap().repositories["me/tiny"]);
    let everything: Vec<u8> = hub.state.lock().unwrap().files.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
    let everything = String::from_utf8_lossy(&everything);
    assert!(!everything.contains(SECRET) && !everything.contains(&s.path("")), "a text or a path of this machine");
    assert_eq!(content(&hub, WHOLE[2]), std::fs::read(format!("{run}/{}", WHOLE[2])).unwrap());
    let config: serde_json::Value = serde_json::from_slice(&content(&hub, WHOLE[1])).unwrap();
    assert_eq!(config["base_model_name_or_path"], "owner/base");
    let text = card(&hub);
    for part in [
        "license: mit\nbase_model: owner/base\nbase_model_relation: adapter\nlibrary_name: peft\npipeline_tag: text-generation\n",
        "- lora\n- dpo\n---\n",
        "| Loss | ",
        "(step 2)",
        "4 pairs from data of the author's own; 4 to evaluate on",
        "| `batch_size` | 2 |",
        "AutoPeftModelForCausalLM.from_pretrained(\"me/tiny\")",
        "--lora-modules tiny=me/tiny",
        "dpo-host chat --compare --adapter tiny",
        "![Curves of the training](curves.svg)",
    ] {
        assert!(text.contains(part), "no '{part}' in\n{text}");
    }
    assert!(!text.contains("system"), "{text}");

    // Again there is nothing to do, and no commit.
    hub.sent();
    says(&ok(&s, &hub, &with[..6]), 0, &["nothing: all is there already"]);
    assert_eq!(hub.sent(), ["preupload"]);

    // The card is a push's own, so that the next one may replace it: that of a checkpoint ends at its step.
    says(&ok(&s, &hub, &["me/tiny", &format!("{run}/checkpoint-1"), "--base-model", "owner/base"]), 0, &["pushed"]);
    assert!(!card(&hub).contains("step 2") && card(&hub).contains("step 1"), "{}", card(&hub));
    assert_eq!(there(&hub), WHOLE);

    // The report goes where it is asked for, with its texts.
    ok(&s, &hub, &["me/tiny", &run, "--include-report"]);
    assert!(String::from_utf8(content(&hub, "report.html")).unwrap().contains(SECRET));
}

#[test]
fn names_of_hubs_are_told_and_paths_are_not() {
    let (s, hub) = (sandbox(), hub());
    let adapter = adapter(&s);
    let file = format!("{adapter}/adapter_config.json");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let cached = "/home/me/hf/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/0123abcd";
    let cases = [
        (cached, "me/cached", Some("Qwen/Qwen2.5-7B-Instruct")),
        ("Qwen/Qwen3-8B@v1", "me/named", Some("Qwen/Qwen3-8B")),
        ("ms::Qwen/Qwen3-8B", "ms::me/named", Some("Qwen/Qwen3-8B")),
        ("ms::Qwen/Qwen3-8B", "me/other", None),
        ("/home/me/models/Qwen3-8B", "me/path", None),
    ];
    s.write("adapter/run.json", r#"{"examples": 7, "data": {"noun": "pair", "unique_tokens": 70}}"#);
    let rows = "hf::trl-lib/ultrafeedback_binarized#500";
    s.write(
        "adapter/args.json",
        &format!(r#"{{"dataset": ["{rows}", "/home/me/rows.jsonl"], "loss": ["kto"], "beta": 0.3}}"#),
    );
    for (named, to, known) in cases {
        let mut config = config.clone();
        config["base_model_name_or_path"] = named.into();
        std::fs::write(&file, config.to_string()).unwrap();
        let ended = ok(&s, &hub, &[to, &adapter, "--overwrite-card"]);
        let sent: serde_json::Value = serde_json::from_slice(&content(&hub, "adapter_config.json")).unwrap();
        assert_eq!(sent["base_model_name_or_path"].as_str(), known, "{named}");
        assert_eq!(sent["r"], config["r"]);
        let text = card(&hub);
        assert_eq!(text.contains("base_model:"), known.is_some(), "{text}");
        assert_eq!(ended.stderr.contains("--base-model owner/name"), known.is_none(), "{}", ended.stderr);
        assert!(!text.contains("/home/me"), "{text}");
        if to.starts_with("me/") {
            assert!(text.contains("datasets:\n- trl-lib/ultrafeedback_binarized\n"), "{text}");
            assert!(
                text.contains("7 pairs from trl-lib/ultrafeedback_binarized, others of the author's own"),
                "{text}"
            );
        }
        assert!(text.contains("- kto\n") && text.contains("| `beta` | 0.3 |"), "{text}");
    }
}

#[test]
fn dry_runs_send_nothing() {
    let (s, hub) = (sandbox(), hub());
    let ended = run(&s, &hub, &["me/tiny", &adapter(&s), "--dry-run"], &[("HF_TOKEN", "")]);
    says(&ended, 0, &["file        adapter_model.safetensors", "3 files", "nothing is sent"]);
    assert!(ended.stdout.starts_with("---\nlibrary_name: peft\n"), "{}", ended.stdout);
    assert!(hub.sent().is_empty() && hub.asked().is_empty() && there(&hub).is_empty());
}

#[test]
fn objects_go_on_where_they_broke() {
    let (s, hub) = (sandbox(), hub());
    let adapter = adapter(&s);
    trouble(&hub, "object", &[Trouble::Breaks, Trouble::Status(503), Trouble::Lost]);
    ok(&s, &hub, &["me/tiny", &adapter]);
    let sent = hub.sent();
    assert_eq!(sent.iter().filter(|what| *what == "object").count(), 4, "{sent:?}");
    assert_eq!(sent.iter().filter(|what| *what == "commit").count(), 1, "{sent:?}");
    assert_eq!(content(&hub, WHOLE[2]), std::fs::read(format!("{adapter}/{}", WHOLE[2])).unwrap());

    // A hub that is given up has the object already when the push is begun again.
    let hub = self::hub();
    trouble(&hub, "commit", &[Trouble::Status(503); 5]);
    says(&run(&s, &hub, &["me/tiny", &adapter], &[]), 1, &["given up after 5 tries", "run it again"]);
    assert!(there(&hub).is_empty());
    hub.sent();
    says(&ok(&s, &hub, &["me/tiny", &adapter]), 0, &["1 of 1 large files, from before"]);
    assert!(!hub.sent().contains(&"object".to_owned()));
    assert_eq!(hub.state.lock().unwrap().commits, ["Upload adapter with dpo-host"]);
}

#[test]
fn parts_that_are_done_are_not_sent_again() {
    let (s, hub) = (sandbox(), hub());
    let adapter = adapter(&s);
    let size = std::fs::metadata(format!("{adapter}/{}", WHOLE[2])).unwrap().len() as usize;
    hub.state.lock().unwrap().part = Some(size / 3 + 1);
    trouble(&hub, "object 2", &[Trouble::Breaks, Trouble::Lost]);
    ok(&s, &hub, &["me/tiny", &adapter]);
    let sent = hub.sent();
    let parts: Vec<&str> = sent.iter().map(String::as_str).filter(|what| what.starts_with("object")).collect();
    assert_eq!(parts, ["object 1", "object 2", "object 2", "object 2", "object 3"]);
    assert_eq!(content(&hub, WHOLE[2]), std::fs::read(format!("{adapter}/{}", WHOLE[2])).unwrap());
}

#[test]
fn a_commit_whose_answer_is_lost_is_made_once() {
    for name in ["me/tiny", "ms::me/tiny"] {
        let (s, hub) = (sandbox(), hub());
        let adapter = adapter(&s);
        trouble(&hub, "commit", &[Trouble::Breaks, Trouble::Lost]);
        ok(&s, &hub, &[name, &adapter, "--commit-message", "first words"]);
        // The first was cut, the second was made and not answered; nothing was left for a third.
        assert_eq!(hub.state.lock().unwrap().commits, ["first words"], "{name}");
        assert_eq!(hub.sent().iter().filter(|what| *what == "commit").count(), 2, "{name}");
    }
}

#[test]
fn modelscope_has_its_own_way() {
    let (s, hub) = (sandbox(), hub());
    let adapter = adapter(&s);
    trouble(&hub, "object", &[Trouble::Breaks]);
    ok(&s, &hub, &["ms::me/tiny", &adapter, "--private", "--base-model", "Qwen/Qwen2.5-0.5B-Instruct"]);
    assert_eq!(there(&hub), WHOLE[..3]);
    assert!(hub.state.lock().unwrap().repositories["me/tiny"]);
    // The card that the hub put into the new repository is not in the way.
    let text = card(&hub);
    assert!(text.contains("modelscope download me/tiny --local_dir tiny"), "{text}");
    assert!(text.contains("https://modelscope.cn/models/Qwen/Qwen2.5-0.5B-Instruct"), "{text}");
    says(&ok(&s, &hub, &["ms::me/tiny", &adapter, "--base-model", "Qwen/Qwen2.5-0.5B-Instruct"]), 0, &["nothing: all"]);
    assert_eq!(hub.state.lock().unwrap().commits.len(), 1);
}

#[test]
fn cards_of_others_stay() {
    let (s, hub) = (sandbox(), hub());
    let adapter = adapter(&s);
    hub.state.lock().unwrap().repositories.insert("me/tiny".into(), false);
    hub.state.lock().unwrap().files.push(("README.md".into(), b"# My words\n".to_vec()));
    says(&ok(&s, &hub, &["me/tiny", &adapter]), 0, &["has a card of its own", "--overwrite-card"]);
    assert_eq!(card(&hub), "# My words\n");
    ok(&s, &hub, &["me/tiny", &adapter, "--overwrite-card"]);
    assert!(card(&hub).contains("library_name: peft"));
    // A card that a push wrote and a person changed is that person's.
    let changed = card(&hub).replace("# tiny", "# My tiny");
    hub.state.lock().unwrap().files.iter_mut().find(|(path, _)| path == "README.md").unwrap().1 =
        changed.clone().into();
    ok(&s, &hub, &["me/tiny", &adapter, "--license", "mit"]);
    assert_eq!(card(&hub), changed);
    // One beside the adapter is taken as it is.
    s.write("adapter/README.md", "# By hand\n");
    says(&ok(&s, &hub, &["me/tiny", &adapter, "--overwrite-card"]), 0, &["README.md of the folder is the card"]);
    assert_eq!(card(&hub), "# By hand\n");
}

#[test]
fn models_and_gguf_files_go_up() {
    let (s, hub) = (sandbox(), hub());
    let model = golden("trajectories").join("qwen2/model").display().to_string();
    let run = trained(&s);
    ok(&s, &hub, &["me/merged", &model, "--base-model", "owner/base", "--run", &run, "--revision", "first"]);
    let files = ["README.md", "config.json", "curves.svg", "model.safetensors"];
    assert!(files.iter().all(|file| there(&hub).iter().any(|name| name == file)), "{:?}", there(&hub));
    assert_eq!(hub.state.lock().unwrap().branches, ["first"]);
    assert!(card(&hub).contains("library_name: transformers") && card(&hub).contains("| `beta` |"), "{}", card(&hub));

    let hub = self::hub();
    let file = s.write("gguf/model-q8_0.gguf", "GGUF");
    s.write("gguf/Modelfile", "FROM model-q8_0.gguf");
    ok(&s, &hub, &["me/gguf", &s.path("gguf")]);
    assert_eq!(there(&hub), ["Modelfile", "README.md", "model-q8_0.gguf"]);
    assert!(card(&hub).contains("llama-cli"), "{}", card(&hub));
    says(&ok(&s, &hub, &["me/gguf", &file]), 0, &["nothing: all"]);
}

#[test]
fn a_token_is_shown_to_its_hub_alone() {
    let (s, hub, store) = (sandbox(), hub(), hub());
    let adapter = adapter(&s);
    for state in [&hub.state, &store.state] {
        state.lock().unwrap().token = None;
    }
    hub.state.lock().unwrap().store = Some(store.address.clone());
    // What the store has, the hub is told of elsewhere: here the commit finds nothing, which is enough to look at tokens.
    let ended = run(&s, &hub, &["me/tiny", &adapter], &[]);
    says(&ended, 2, &["no such object"]);
    assert_eq!(store.sent(), ["object"]);
    assert_eq!(store.state.lock().unwrap().shown, Vec::<String>::new());
    assert!(hub.state.lock().unwrap().shown.iter().all(|token| token == "let-me-in"));
}

#[test]
fn refusals_say_what_helps() {
    let (s, hub) = (sandbox(), hub());
    let adapter = adapter(&s);
    let no_token = run(&s, &hub, &["me/tiny", &adapter], &[("HF_TOKEN", "")]);
    says(&no_token, 2, &["there is no token", "HF_TOKEN", "huggingface.co/settings/tokens"]);
    let no_token = run(&s, &hub, &["ms::me/tiny", &adapter], &[("MODELSCOPE_API_TOKEN", "")]);
    says(&no_token, 2, &["there is no token", "MODELSCOPE_API_TOKEN"]);
    // The file that `hf auth login` writes is a token.
    s.write("hf/token", "let-me-in\n");
    hub.state.lock().unwrap().token = Some("let-me-in".into());
    assert_eq!(run(&s, &hub, &["me/tiny", &adapter], &[("HF_TOKEN", "")]).code, 0);
    says(&run(&s, &hub, &["me/other", &adapter], &[("HF_TOKEN", "wrong")]), 2, &["does not know this token (401"]);
    hub.state.lock().unwrap().read_only = true;
    says(&run(&s, &hub, &["me/other", &adapter], &[]), 2, &["may not do this", "403", "the rights", "may write"]);
    says(&run(&s, &hub, &["ms::me/other", &adapter], &[]), 2, &["may not do this", "the rights"]);
    says(&run(&s, &hub, &["me/tiny", &adapter, "--private"], &[]), 2, &["everybody sees it", "make it private"]);
    says(&run(&s, &hub, &["me/tiny", &adapter], &[("HF_HUB_OFFLINE", "1")]), 2, &["offline", "unset it"]);

    says(&run(&s, &hub, &["tiny", &adapter], &[]), 2, &["'tiny' is not the name of a repository", "owner/name"]);
    says(&run(&s, &hub, &["datasets/me/tiny", &adapter], &[]), 2, &["not the name of a repository"]);
    says(&run(&s, &hub, &[&adapter, "me/tiny"], &[]), 2, &["the repository stands first"]);
    says(&run(&s, &hub, &["me/tiny@a", &adapter, "--revision", "b"], &[]), 2, &["names another branch"]);
    s.write("empty/words.txt", "");
    says(&run(&s, &hub, &["me/tiny", &s.path("empty")], &[]), 2, &["nothing that could be pushed", "adapter_model"]);
    s.write("broken/checkpoint-3/adapter_config.json", "{}");
    s.write("broken/checkpoint-20/adapter_config.json", "{}");
    says(&run(&s, &hub, &["me/tiny", &s.path("broken")], &[]), 2, &["not come to its end", "checkpoint-20"]);
    let file = s.write("rows.jsonl", "");
    says(&run(&s, &hub, &["me/tiny", &file], &[]), 2, &["neither a folder nor a GGUF file"]);
    says(&run(&s, &hub, &["me/tiny", &adapter, "--license", "a b"], &[]), 2, &["--license", "apache-2.0"]);
    says(&run(&s, &hub, &["me/tiny", &adapter, "--run", &s.path("empty")], &[]), 2, &["no args.json"]);
}

/// A file that grows while it is sent is no file that could be fetched.
#[test]
fn a_file_that_changes_is_not_committed() {
    let (s, hub) = (sandbox(), hub());
    let adapter = adapter(&s);
    let file = format!("{adapter}/adapter_model.safetensors");
    let state = hub.state.clone();
    // The first try is told to come again, half a second later; meanwhile the file changes.
    trouble(&hub, "object", &[Trouble::Status(503)]);
    let writer = std::thread::spawn(move || {
        while !state.lock().unwrap().sent.contains(&"object".to_owned()) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::fs::write(file, b"another adapter").unwrap();
    });
    trouble(&hub, "commit", &[]);
    trouble(&hub, "object", &[Trouble::Breaks, Trouble::Breaks]);
    let ended = run(&s, &hub, &["me/tiny", &adapter], &[]);
    writer.join().unwrap();
    says(&ended, 1, &["changed while it was sent", "checkpoint"]);
    assert!(hub.state.lock().unwrap().commits.is_empty());
}
