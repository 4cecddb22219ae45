//! `docs/plugins.md`: its plugins build as crates that `dpo-host new` has made, pass their own tests, load, and train.

#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use dpo_host::commands::new::{Kind, new};
use dpo_tests::Sandbox;
use dpo_tests::nested::{cargo, target_folder};
use dpo_tests::page::{fenced, page};

#[test]
fn plugins_of_the_page_build_and_train() {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let folder = tempfile::tempdir().unwrap();
    let blocks = fenced(&page("plugins.md"));
    for (kind, name) in
        [(Kind::Loss, "my-dpop"), (Kind::Format, "rated"), (Kind::Model, "my-smollm3"), (Kind::Model, "my-gemma3")]
    {
        let dir = folder.path().join(name);
        new(kind, name, &dir).unwrap();
        let own = blocks.iter().filter_map(|b| Some((b.file()?.strip_prefix(name)?.strip_prefix('/')?, &b.text)));
        let written = own.map(|(file, text)| std::fs::write(dir.join(file), text).unwrap()).count();
        assert!(written > 0, "the page has no {name}");
        let tests = cargo(&dir, "test");
        assert!(tests.contains("test result: ok") && !tests.contains("warning"), "{tests}");
        cargo(&dir, "build");
    }
    let plugins = target_folder().join("release").display().to_string();
    let run = |more: &[&str]| sandbox.ok(&[more, &["--plugin-dir", &plugins]].concat());
    let listed = run(&["list"]).stdout;
    for name in ["my-dpop", "rated", "my-smollm3", "my-gemma3"] {
        assert!(listed.lines().any(|l| l.split_whitespace().nth(1) == Some(name)), "{name}: {listed}");
    }
    // The loss, on rows of the format.
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../datasets/demo/model").display().to_string();
    let row = blocks.iter().find(|b| b.file() == Some("rated/src/lib.rs")).unwrap();
    let row = row.text.lines().find_map(|l| l.trim().strip_prefix("r#\"")?.strip_suffix("\"#")).unwrap();
    let rows = sandbox.write("rated.jsonl", &format!("{row}\n"));
    let output = sandbox.path("run");
    let train = ["train", "--model", &demo, "--dataset", &rows, "--output-dir", &output, "--device", "cpu"];
    run(&[&train[..], &["--loss", "my-dpop", "--loss-option", "lambda=2", "--max-steps", "1"]].concat());
    let log = dpo_tests::log(&output);
    assert!((log[0]["loss"].as_f64().unwrap() - 2.0_f64.ln()).abs() < 1e-6, "{log:?}");
}
