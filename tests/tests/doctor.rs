//! `docs/loss-does-not-fall.md`: its commands, run on the demo, say what the page shows, and nothing else is warned of.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use dpo_tests::Sandbox;
use dpo_tests::page::{Fenced, fenced, page};

/// Where the page has the demo.
const DEMO: &str = "~/.cache/dpo-host/demo";

/// Runs a command of the page and returns all it printed, with paths as the page writes them.
fn run(sandbox: &Sandbox, words: &[String], code: i32) -> String {
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../datasets/demo").display().to_string();
    let mut words: Vec<String> = words.iter().map(|w| w.replace(DEMO, &demo)).collect();
    assert_eq!(words.remove(0), "dpo-host");
    if words[0] == "train" {
        words.extend(["--device".into(), "cpu".into()]);
    }
    let ended = sandbox.run(&words.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(ended.code, code, "{words:?}\n{}", ended.stderr);
    (ended.stdout + &ended.stderr).replace(&demo, DEMO)
}

/// What has to be the same: of lines with numbers that depend on the processor, that they are there.
fn essence(line: &str) -> String {
    let numbers = ["step ", "evaluation "].iter().any(|kind| line.starts_with(kind));
    let words = line.split(' ').take(if numbers { 2 } else { usize::MAX });
    words.collect::<Vec<_>>().join(" ")
}

/// Signs of the page's tables: what stands in code in the first column.
fn signs(page: &str) -> Vec<&str> {
    let tables = page.split("\n\n").filter(|part| part.starts_with("| sign |"));
    tables.flat_map(|table| table.lines().filter_map(|l| l.strip_prefix("| `")?.split('`').next())).collect()
}

#[test]
fn the_page_shows_what_is_said() {
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_dpo-host-test"));
    let page = page("loss-does-not-fall.md");
    let mut all = String::new();
    let mut command: Option<Fenced> = None;
    for block in fenced(&page) {
        match (block.info.as_str(), block.file()) {
            (_, Some(file)) => drop(sandbox.write(file, &block.text)),
            ("sh", _) => command = Some(block),
            _ => {
                let words = command.take().expect("a command before its output").commands().remove(0);
                let code = i32::from(block.text.contains("error: "));
                let output = run(&sandbox, &words, code);
                let said: Vec<String> = output.lines().map(essence).collect();
                for line in block.text.lines().filter(|l| *l != "…") {
                    assert!(said.contains(&essence(line)), "{words:?} does not say '{line}':\n{output}");
                }
                let warnings = said.iter().filter(|l| l.starts_with("warning: "));
                let unknown: Vec<_> = warnings.filter(|l| !block.text.contains(l.as_str())).collect();
                assert!(unknown.is_empty(), "{words:?} says what the page does not show: {unknown:?}");
                all += &output;
            }
        }
    }
    let signs = signs(&page);
    assert!(signs.len() > 8, "{signs:?}");
    for sign in signs {
        assert!(all.contains(sign), "no command of the page shows '{sign}'");
    }
}
