//! Answers side by side: what a model said before and after a run, and what `eval --generate` had it say with its adapter and
//! without, with what a judge says of them.

use std::path::Path;

use serde_json::{Map, Value};

use super::{STYLE, escaped};
use dpo_core::error::Result;
use dpo_core::files;

type Line = Map<String, Value>;

/// What a judge came to, as a person reads it.
const OUTCOMES: [(&str, &str); 3] = [("win", "tuned is better"), ("loss", "base is better"), ("unclear", "no verdict")];

/// Answers to held prompts, before and after, of lines with `prompt`, `before` and `after`.
pub(super) fn before_and_after(lines: &[Line]) -> String {
    let text = |line: &Line, name: &str| line.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let article = |line: &Line| {
        article("", &text(line, "prompt"), &[("before", &text(line, "before")), ("after", &text(line, "after"))])
    };
    lines.iter().map(article).collect()
}

/// Answers that were generated: the first line says in `text` what came of it, every other one has a `prompt`, an answer of `base` and
/// maybe of `tuned`, and the outcome of `judge`.
pub(super) fn generated(lines: &[Line]) -> String {
    let Some((head, lines)) = lines.split_first() else { return String::new() };
    let told = head.get("text").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let told: String = told.map(|line| format!("<p class=muted>{}</p>", escaped(line))).collect();
    let one = |line: &Line| {
        let text = |name: &str| line.get(name).and_then(Value::as_str).unwrap_or_default();
        let sides = ["base", "tuned"].into_iter().filter_map(|name| Some((name, line.get(name)?["text"].as_str()?)));
        let outcome = line.get("judge").and_then(|judge| judge["outcome"].as_str());
        let told =
            outcome.map(|outcome| OUTCOMES.iter().find(|(name, _)| *name == outcome).map_or(outcome, |(_, told)| told));
        let outcome = told.map(|told| format!(" · {told}")).unwrap_or_default();
        article(&format!("{}{outcome}", text("place")), text("prompt"), &sides.collect::<Vec<_>>())
    };
    told + &lines.iter().map(one).collect::<String>()
}

fn article(title: &str, prompt: &str, sides: &[(&str, &str)]) -> String {
    let side = |(name, text): &(&str, &str)| {
        format!("<div class=answer><h4>{}</h4><pre>{}</pre></div>", escaped(name), escaped(text))
    };
    let title = if title.is_empty() { String::new() } else { format!("<h3>{}</h3>", escaped(title)) };
    let sides: String = sides.iter().map(side).collect();
    format!("<article>{title}<pre class=prompt>{}</pre><div class=answers>{sides}</div></article>", escaped(prompt))
}

/// Writes a page of generated answers, all of them, that opens anywhere.
///
/// # Errors
/// A file that cannot be written.
pub fn write_answers(path: &Path, title: &str, lines: &[Line]) -> Result<()> {
    files::write_into(path, document(title, &format!("</header><section>{}</section>", generated(lines))).as_bytes())
}

/// A page in one file, without a script; its body ends the header that begins with the title.
pub(super) fn document(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=en><meta charset=utf-8>\
         <meta name=viewport content=\"width=device-width,initial-scale=1\">\
         <meta http-equiv=content-security-policy content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <title>{title} – dpo-host</title>\n<style>\n{STYLE}</style>\n<main class=r0><header><h1>{title}</h1>{body}</main></html>\n",
        title = escaped(title),
    )
}
