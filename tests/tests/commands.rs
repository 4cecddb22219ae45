//! Every command that a page shows is one that the command line takes, and what a small machine can run is run, with the demo in the
//! place of models, rows and adapters that a page does not make. Links between pages lead somewhere.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use dpo_tests::page::{Fenced, anchor, commands, fenced, prose, spans};
use dpo_tests::{Sandbox, copy, golden};

/// Commands of other tools that pages show: they are not looked at, but for a `dpo-host` that they start.
const OTHERS: &str = ". .ci/run cd cp curl docker export llama-cli llama-server llamafactory-cli man maturin mdbook mkdir mpirun nvidia-smi ollama pip \
                      pipx podman python python3 srun ssh swift tensorboard tools/book tools/release torchrun uvx vllm";

fn of_other_tools(command: &str) -> bool {
    OTHERS.split_whitespace().any(|other| other == command)
}

/// Commands and flags whose commands are parsed and not run, with the reason.
const NOT_RUN: &[(&str, &str)] = &[
    ("bench", "random weights of published sizes"),
    ("selftest", "it needs a GPU"),
    ("serve", "it serves until it is ended: the test of that name does"),
    ("ui", "it serves until it is ended"),
    ("--dashboard", "it serves until it is ended"),
    ("--gpus", "it needs GPUs"),
    ("--judge", "it asks a server"),
    ("push", "it asks a hub: the test of that name does"),
    ("mlflow", "it asks a server: the test `trackers` does"),
    ("--plugin-dir", "plugins that the page writes: the test `docs` does"),
    ("--loss-option", "of such a plugin"),
    ("--table", "the test `plan` does"),
];

/// Pages whose commands are not run here, with the reason.
const PAGES_NOT_RUN: &[(&str, &str)] = &[
    ("docs/loss-does-not-fall.md", "the test `doctor` runs them and compares what they say"),
    ("docs/performance.md", "measurements of their day"),
    ("docs/plugins.md", "the test `docs` builds what they need"),
    ("docs/llama-factory.md", "the test `peers` trains from files of other tools"),
];

/// What stands behind a flag that names something to be read.
#[derive(Clone, Copy, PartialEq)]
enum Input {
    Model,
    Adapter,
    Rows,
}

const INPUTS: &[(&str, Input)] = &[
    ("--model", Input::Model),
    ("--model_name_or_path", Input::Model),
    ("--ref-model", Input::Model),
    ("--adapter", Input::Adapter),
    ("--adapters", Input::Adapter),
    ("--init-adapter", Input::Adapter),
    ("--ref-adapter", Input::Adapter),
    ("--dataset", Input::Rows),
    ("--dataset_name", Input::Rows),
    ("--val-dataset", Input::Rows),
    ("--generate", Input::Rows),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every page by its path in the repository, with its text.
fn pages() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in ["", "docs", "docs/zh", "datasets/demo", "datasets/formats"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.extension().is_some_and(|e| e == "md") {
                let name = Path::new(folder).join(entry.file_name().unwrap()).display().to_string();
                found.push((name, std::fs::read_to_string(&entry).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// Blocks that are command lines, and those of a page whose language says nothing where a command of the list begins them.
fn shell(block: &Fenced) -> bool {
    let begins = |words: &Vec<String>| of_other_tools(&words[0]) || ["dpo-host", "cargo"].contains(&words[0].as_str());
    match block.info.as_str() {
        "sh" | "bash" | "console" => true,
        "" => block.commands().iter().any(begins),
        _ => false,
    }
}

/// The arguments of `dpo-host` in a command: its own, those of `cargo run --release --`, or of what a launcher starts.
fn arguments(words: &[String]) -> Option<&[String]> {
    if words.starts_with(&["cargo".into(), "run".into(), "--release".into(), "--".into()]) {
        return Some(&words[4..]);
    }
    let at = words.iter().position(|word| word == "dpo-host")?;
    Some(&words[at + 1..])
}

/// What stands for a value that a page leaves open, where a number will not do.
const VALUES: &[(&str, &str)] = &[("--quantization", "nf4"), ("--shape", "qwen2.5-7b")];

/// The ways in which a page's abbreviations may be meant: `…` is something left out or a value, a name in capitals a value.
fn meant(words: &[String]) -> Vec<Vec<String>> {
    let plain = |word: &String| word.trim_start_matches('[').trim_end_matches(']').to_owned();
    let first = |word: String| word.split('|').next().unwrap_or_default().to_owned();
    let words: Vec<String> = words.iter().map(plain).map(first).collect();
    let capital = |word: &str| word.chars().all(|c| c.is_ascii_uppercase());
    let value = |at: usize| {
        let known = VALUES.iter().find(|(flag, _)| at > 0 && words[at - 1] == *flag);
        known.map_or("1", |(_, value)| value).to_owned()
    };
    let replaced = |dots_are_values: bool, capitals_are_values: bool| -> Vec<String> {
        let meant = |(at, word): (usize, &String)| match word.as_str() {
            "…" => dots_are_values.then(|| value(at)),
            word if capital(word) && capitals_are_values => Some(value(at)),
            word => Some(word.to_owned()),
        };
        words.iter().enumerate().filter_map(meant).collect()
    };
    [(false, false), (true, false), (false, true), (true, true)].map(|(a, b)| replaced(a, b)).into()
}

/// Whether the command line takes the arguments: `--help` behind them is only reached when all flags before it are known and their values
/// read. Nothing is run, and what a page leaves out is not missed.
fn taken(sandbox: &Sandbox, words: &[String]) -> Result<(), String> {
    for file in words.iter().filter(|word| [".yaml", ".yml", ".toml"].iter().any(|end| word.ends_with(end))) {
        sandbox.write(file, "");
    }
    let mut said = String::new();
    for words in meant(words) {
        let args: Vec<&str> = words.iter().map(String::as_str).chain(["--help"]).collect();
        let ended = sandbox.run(&args);
        if ended.code == 0 {
            return Ok(());
        }
        said = ended.stderr;
    }
    Err(said)
}

/// What a command of cargo names: packages and tests of this repository.
fn cargo_knows(words: &[String]) -> bool {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let named = |flag: &str, exists: &dyn Fn(&str) -> bool| {
        words.windows(2).filter(|pair| pair[0] == flag).all(|pair| pair[1].contains('…') || exists(&pair[1]))
    };
    let known = ["build", "clippy", "doc", "fmt", "install", "run", "test", "vendor"];
    known.contains(&words[1].as_str())
        && named("-p", &|name| lock.contains(&format!("name = \"{name}\"")))
        && named("--test", &|name| {
            name.chars().all(|c| c.is_ascii_uppercase()) || root().join(format!("tests/tests/{name}.rs")).is_file()
        })
        && named("--path", &|path| root().join(path).join("Cargo.toml").is_file())
}

#[test]
fn commands_of_pages_are_taken() {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let (mut wrong, mut count) = (Vec::new(), 0);
    for (page, text) in pages() {
        let mut check = |words: &[String]| {
            count += 1;
            let refused = match arguments(words) {
                Some(own) => taken(&sandbox, own).err(),
                None if words[0] == "cargo" => (!cargo_knows(words)).then(|| "names what is not there".to_owned()),
                None => (!of_other_tools(&words[0])).then(|| "is in no list of this test".to_owned()),
            };
            wrong.extend(refused.map(|why| format!("{page}: {}\n{why}", words.join(" "))));
        };
        let blocks = fenced(&text);
        blocks.iter().filter(|block| shell(block)).flat_map(Fenced::commands).for_each(|words| check(&words));
        let ours = |words: &Vec<String>| words.len() > 1 && ["dpo-host", "cargo"].contains(&words[0].as_str());
        spans(&text).iter().flat_map(|span| commands(span)).filter(ours).for_each(|words| check(&words));
    }
    assert!(wrong.is_empty(), "{} of {count} commands are not taken:\n{}", wrong.len(), wrong.join("\n"));
    assert!(count > 150, "{count}");
}

/// The demo's rows, as many as a run of a second needs.
fn rows() -> String {
    let text = std::fs::read_to_string(root().join("datasets/demo/prefs.jsonl")).unwrap();
    text.lines().take(8).map(|line| format!("{line}\n")).collect()
}

fn demo() -> String {
    root().join("datasets/demo/model").canonicalize().unwrap().display().to_string()
}

/// Lets a command find what it reads: what the page has not made is the demo's.
fn with_inputs(sandbox: &Sandbox, words: &[String]) -> Vec<String> {
    let missing = |word: &str| !Path::new(&sandbox.path(word)).exists();
    let of_experts = words.windows(2).any(|pair| pair == ["--format", "adapter"]);
    let mut kind = (words[0] == "data").then_some(Input::Rows);
    let mut given = vec![words[0].clone()];
    for word in &words[1..] {
        if word.starts_with('-') {
            kind = INPUTS.iter().find(|(flag, _)| flag == word).map(|(_, kind)| *kind).filter(|_| words[0] != "plan");
            given.push(word.clone());
            continue;
        }
        let file = word.rsplit('=').next().unwrap_or(word).split('#').next().unwrap_or(word);
        match kind {
            // A dataset of a hub is a folder here.
            Some(Input::Rows) if missing(file) && !file.contains('.') => {
                drop(sandbox.write(&format!("{file}/rows.jsonl"), &rows()))
            }
            Some(Input::Rows) if missing(file) => drop(sandbox.write(file, &rows())),
            Some(Input::Adapter) if missing(word) && of_experts => {
                copy(&golden("trajectories/qwen3_moe/final_adapter"), Path::new(&sandbox.path(word)));
            }
            Some(Input::Adapter) if missing(word) => {
                let (rows, model) = (sandbox.write("rows.jsonl", &rows()), demo());
                sandbox.ok(&[
                    "train",
                    "--model",
                    &model,
                    "--dataset",
                    &rows,
                    "--device",
                    "cpu",
                    "--max-steps",
                    "1",
                    "--output-dir",
                    word,
                ]);
            }
            // Answers to other prompts, of an earlier command of the page, would be kept.
            Some(Input::Adapter) => drop(std::fs::remove_file(sandbox.path(&format!("{word}/generated.jsonl")))),
            Some(Input::Model) if missing(word) => {
                given.push(demo());
                continue;
            }
            _ => {}
        }
        given.push(word.clone());
    }
    if words.contains(&"--config".to_owned()) {
        given.extend(["--model".into(), demo()]);
    }
    match words[0].as_str() {
        "train" => given.extend(["--device", "cpu", "--max-steps", "1"].map(str::to_owned)),
        "merge" if of_experts => {
            given.extend(["--model".into(), golden("trajectories/qwen3_moe/model").display().to_string()])
        }
        _ => {}
    }
    for pair in words.windows(2).filter(|pair| ["--output-dir", "--output_dir"].contains(&pair[0].as_str())) {
        let _ = std::fs::remove_dir_all(sandbox.path(&pair[1]));
    }
    given
}

#[test]
fn commands_of_pages_run() {
    let mut count = 0;
    for (page, text) in pages() {
        if PAGES_NOT_RUN.iter().any(|(name, _)| *name == page) {
            continue;
        }
        let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
        let blocks = fenced(&text);
        for block in &blocks {
            if let Some(file) = block.file() {
                sandbox.write(file, &block.text);
            }
        }
        for words in blocks.iter().filter(|block| shell(block)).flat_map(Fenced::commands) {
            let Some(own) = arguments(&words).filter(|_| ["dpo-host", "cargo"].contains(&words[0].as_str())) else {
                continue;
            };
            let whole = own.iter().all(|word| word != "…" && !word.starts_with('~'));
            if !whole || own.iter().any(|word| NOT_RUN.iter().any(|(name, _)| name == word)) {
                continue;
            }
            let given = with_inputs(&sandbox, own);
            sandbox.ok(&given.iter().map(String::as_str).collect::<Vec<_>>());
            count += 1;
        }
    }
    assert!(count > 40, "{count} commands ran");
}

/// The links of a page to files, as they are written.
fn links(text: &str) -> Vec<String> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(link, _)| link.to_owned()));
    targets.filter(|link| !link.contains("://") && !link.contains(' ')).collect()
}

#[test]
fn links_lead_somewhere() {
    let all = pages();
    let anchors = |page: &Path| -> BTreeSet<String> {
        let text = prose(&std::fs::read_to_string(page).unwrap());
        text.lines().filter(|line| line.starts_with('#')).map(anchor).collect()
    };
    let mut lost = Vec::new();
    for (page, text) in &all {
        let own = root().join(page);
        for link in links(&prose(text)) {
            let (path, part) = link.split_once('#').unwrap_or((&link, ""));
            let file = if path.is_empty() { own.clone() } else { own.parent().unwrap().join(path) };
            if !file.exists() || (!part.is_empty() && !anchors(&file).contains(part)) {
                lost.push(format!("{page}: {link}"));
            }
        }
    }
    assert!(lost.is_empty(), "links that lead nowhere:\n{}", lost.join("\n"));
    let chapters: BTreeSet<PathBuf> = links(&std::fs::read_to_string(root().join("docs/SUMMARY.md")).unwrap())
        .iter()
        .map(|link| root().join("docs").join(link).canonicalize().unwrap())
        .collect();
    let forgotten: Vec<&String> = all
        .iter()
        .map(|(page, _)| page)
        .filter(|page| *page != "docs/SUMMARY.md" && !chapters.contains(&root().join(page).canonicalize().unwrap()))
        .collect();
    assert!(forgotten.is_empty(), "pages that docs/SUMMARY.md forgets: {forgotten:?}");
}
