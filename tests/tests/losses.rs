//! docs/losses.md: the table of losses is what the plugins say of themselves.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::Path;

use dpo_plugins::{Loss, Registry};

const END: &str = "<!-- The end of the losses. -->\n";

/// A cell of a table: bars would end it.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', "<br>")
}

fn row(loss: &Loss) -> String {
    let (formula, legend) = loss.formula.split_once('\n').unwrap_or((&loss.formula, ""));
    let legend = legend.lines().map(str::trim).collect::<Vec<_>>().join("; ");
    let options: Vec<String> = loss.options.iter().map(|o| format!("`{}` {}", o.name, o.default)).collect();
    let answers = loss.needs.answers.describe();
    let reference = if loss.needs.reference { "reference" } else { "no reference" };
    format!(
        "| `{}` | {} | {answers}, {reference} | `{}`<br>{} | {} | {} |\n",
        loss.name,
        cell(&loss.summary),
        cell(formula),
        cell(&legend),
        options.join(", "),
        cell(&loss.peers),
    )
}

/// `DPO_HOST_BLESS=1 cargo test --release -p dpo-tests --test losses` writes it anew.
#[test]
fn the_table_of_losses_is_what_plugins_say() {
    let registry = Registry::discover(&[], None);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/losses.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let now: String = registry.losses.iter().map(row).collect();
    let (before, after) = text.split_once(END).unwrap();
    let begin = before.rfind("|---|\n").unwrap() + "|---|\n".len();
    let (before, written) = before.split_at(begin);
    if std::env::var_os("DPO_HOST_BLESS").is_some() {
        std::fs::write(&path, format!("{before}{now}{END}{after}")).unwrap();
    } else {
        assert!(written == now, "docs/losses.md is of other losses; write it anew with DPO_HOST_BLESS=1:\n{now}");
    }
    assert!(registry.losses.iter().all(|l| !l.peers.is_empty()), "a built-in loss does not say who has it");
}
