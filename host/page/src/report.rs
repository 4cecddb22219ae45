//! `report.html`: a run in one file that opens anywhere, in the page's style and without a script.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value};

use super::answers::{before_and_after, document, generated};
use super::chart::{CHARTS, best, short};
use super::settings::{flat, settings};
use super::{ANSWERS, ARGS, FACTS, GENERATED, LOG, REMARKS, SAMPLES, escaped, excerpt};
use dpo_core::error::Result;
use dpo_core::files;

type Line = Map<String, Value>;

/// Writes the report of a run from the files of its folder.
pub fn write(output: &Path) -> Result<()> {
    let object = |name: &str| serde_json::from_str::<Value>(&excerpt::read(output, name)).unwrap_or_default();
    let (args, facts) = (object(ARGS), object(FACTS));
    let lines = excerpt::lines(output, LOG);
    let name = output.file_name().unwrap_or(output.as_os_str()).to_string_lossy();
    let sections = [
        ("Remarks", remarks(&excerpt::lines(output, REMARKS))),
        ("Curves", CHARTS.iter().map(|chart| chart.figure(&lines)).collect()),
        ("Sample examples", samples(&excerpt::lines(output, SAMPLES))),
        (
            "Answers",
            before_and_after(&excerpt::lines(output, ANSWERS)) + &generated(&excerpt::lines(output, GENERATED)),
        ),
        ("Data", data(&facts)),
        ("Settings", args.as_object().map(|args| list(settings(args).into_iter())).unwrap_or_default()),
    ];
    let section = |(title, body): &(&str, String)| {
        let class = title.to_lowercase().replace(' ', "-");
        format!("<section><h2>{title}</h2><div class={class}>{body}</div></section>\n")
    };
    let body = format!(
        "<p class=muted>{}</p></header>\n<div class=figures>{}</div>\n{}",
        escaped(&[vec![about(&facts)], excerpt::left_out(output)].concat().join(" · ")),
        figures(&lines, &facts),
        sections.iter().filter(|(_, body)| !body.is_empty()).map(section).collect::<String>(),
    );
    let html = document(&name, &body);
    files::write_into(&output.join("report.html"), html.as_bytes())
}

/// Model, device and data in a line.
fn about(facts: &Value) -> String {
    let text = |name: &str| facts[name].as_str().unwrap_or_default();
    let number = |name: &str| facts[name].as_u64().unwrap_or(0);
    let model: Vec<&str> = text("model").rsplitn(3, '/').take(2).collect();
    let model = model.into_iter().rev().collect::<Vec<_>>().join("/");
    let mut parts = vec![text("family").to_owned(), model, text("device").to_owned()];
    if number("ranks") > 1 {
        parts.push(format!("{} ranks", number("ranks")));
    }
    parts.push(format!("{} examples", number("examples")));
    if number("validation_examples") > 0 {
        parts.push(format!("{} to evaluate on", number("validation_examples")));
    }
    parts.push(format!("{} adapter parameters", number("parameters")));
    parts.join(" · ")
}

/// The numbers that are looked for first.
fn figures(lines: &[Line], facts: &Value) -> String {
    let values = |name: &str| -> Vec<f64> { lines.iter().filter_map(|l| l.get(name)?.as_f64()).collect() };
    let mut html = String::new();
    let mut figure = |name: &str, value: String, note: String| {
        let _ = write!(html, "<div><span>{name}</span><b>{value}</b><i>{note}</i></div>");
    };
    if let Some(step) = values("global_step").last() {
        let total = facts["total_steps"].as_u64().map(|t| format!("of {t}")).unwrap_or_default();
        figure("Steps", format!("{step}"), total);
    }
    for (title, name) in [("Loss", "loss"), ("Margin", "rewards/margins"), ("Accuracy", "rewards/accuracies")] {
        if let [first, .., last] | [first @ last] = values(name).as_slice() {
            let held = values(&format!("eval_{name}")).last().map(|v| format!(", eval {}", short(*v)));
            figure(title, short(*last), format!("from {}{}", short(*first), held.unwrap_or_default()));
        }
    }
    if let Some([step, loss]) = best(lines) {
        figure("Best eval loss", short(loss), format!("at step {step}"));
    }
    if let Some(seconds) = values("elapsed_s").last() {
        let speeds = values("tokens_per_second");
        let mean = speeds.iter().sum::<f64>() / speeds.len().max(1) as f64;
        figure("Time", duration(*seconds), format!("{} tokens/s", short(mean)));
    }
    html
}

fn duration(seconds: f64) -> String {
    let s = seconds as u64;
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

fn remarks(lines: &[Line]) -> String {
    let text = |line: &Line, name: &str| escaped(line.get(name).and_then(Value::as_str).unwrap_or_default());
    let remark = |line: &Line| {
        let step = line.get("global_step").and_then(Value::as_u64).unwrap_or(0);
        let (kind, what, help) = (text(line, "kind"), text(line, "text"), text(line, "help"));
        format!("<p><span>step {step} · {kind}</span>{what}<i>{help}</i></p>")
    };
    match lines {
        [] => "<p class=muted>Nothing to remark.</p>".into(),
        lines => lines.iter().map(remark).collect(),
    }
}

/// Sample examples, each token in the colour of what became of its log-prob.
fn samples(lines: &[Line]) -> String {
    let [first, .., last] = lines else { return String::new() };
    let step = last.get("global_step").and_then(Value::as_u64).unwrap_or(0);
    let list = |line: &Line, name: &str| line.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let mut html = format!(
        "<p class=muted>Each token in the colour of its log-prob at step {step} against the start. <span class=scale>\
         <span class=\"token n4\">less likely</span> <span class=token>as before</span> \
         <span class=\"token p4\">more likely</span></span></p>"
    );
    let scores = list(first, "scores").into_iter().zip(list(last, "scores"));
    for (example, (before, after)) in list(first, "examples").iter().zip(scores) {
        let text = |name: &str| escaped(example[name].as_str().unwrap_or_default());
        let _ = write!(html, "<article><h3>{}</h3><pre class=prompt>{}</pre>", text("place"), text("prompt"));
        html += "<div class=answers>";
        for (i, texts) in example["answers"].as_array().into_iter().flatten().enumerate() {
            html += &answer(texts, &before[i], &after[i]);
        }
        html += "</div></article>";
    }
    html
}

fn answer(texts: &Value, before: &Value, after: &Value) -> String {
    let name = escaped(texts["name"].as_str().unwrap_or_default());
    // Sums of log-probs are shown in tenths, and one that rounds to zero without its sign.
    let sum = |score: &Value| (score["sum"].as_f64().unwrap_or(f64::NAN) * 10.0).round() / 10.0 + 0.0;
    let change = sum(after) - sum(before);
    let mut html = format!(
        "<div class=answer><h4>{name}<span class=now>log-prob {:.1} → {:.1} <b class={}>{change:+.1}</b></span></h4><pre>",
        sum(before),
        sum(after),
        if change < 0.0 { "less" } else { "more" },
    );
    for (i, token) in texts["tokens"].as_array().into_iter().flatten().enumerate() {
        let logp = |score: &Value| score["logps"][i].as_f64();
        let text = escaped(token.as_str().unwrap_or_default());
        let _ = match (logp(before), logp(after)) {
            (Some(before), Some(after)) => {
                let class = tint(after - before);
                write!(html, "<span class=\"token {class}\" title=\"{before:.2} → {after:.2}\">{text}</span>")
            }
            _ => write!(html, "{text}"),
        };
    }
    if let Some(more @ 1..) = texts["more"].as_u64() {
        let _ = write!(html, "<i> … {more} tokens more</i>");
    }
    html + "</pre></div>"
}

/// The class of a token whose log-prob changed by so much: four steps each way, each twice as far as the one before.
fn tint(change: f64) -> String {
    let sign = if change < 0.0 { 'n' } else { 'p' };
    match [0.05, 0.2, 0.8, 3.2].iter().filter(|step| change.abs() >= **step).count() {
        0 => String::new(),
        steps => format!("{sign}{steps}"),
    }
}

/// What became of the rows, and their lengths.
fn data(facts: &Value) -> String {
    let data = &facts["data"];
    let cell = |value: &Value| escaped(value.as_str().map_or_else(|| value.to_string(), str::to_owned).as_str());
    let Some(files) = data["files"].as_array() else { return String::new() };
    let mut html =
        String::from("<div class=wide><table><tr><th>file<th>format<th class=n>rows<th class=n>examples</tr>");
    for file in files {
        let [path, format, rows, examples] = ["path", "format", "rows", "examples"].map(|name| cell(&file[name]));
        let _ = write!(html, "<tr><td>{path}<td>{format}<td class=n>{rows}<td class=n>{examples}</tr>");
    }
    html += "</table><table><tr><th>tokens<th class=n>shortest<th class=n>median<th class=n>95%<th class=n>longest<th></tr>";
    for part in data["parts"].as_array().into_iter().flatten() {
        let (name, lengths) = (cell(&part["name"]), &part["lengths"]);
        let [min, median, p95, max] = ["min", "median", "p95", "max"].map(|name| cell(&lengths[name]));
        let bars = histogram(&lengths["histogram"]);
        let numbers = [min, median, p95, max].map(|v| format!("<td class=n>{v}")).concat();
        let _ = write!(html, "<tr><td>{name}{numbers}<td>{bars}</tr>");
    }
    let line = cell(&facts["data_line"]);
    let _ = write!(html, "</table></div><p class=pre>{line}</p>");
    let told = |name: &String| !ELSEWHERE.contains(&name.as_str());
    let rest = flat(data).into_iter().filter(|(path, _)| path.first().is_some_and(told));
    html + &list(rest.map(|(path, value)| (path.join(" ").replace('_', " "), value)))
}

/// What of the data report is not in its list.
const ELSEWHERE: [&str; 6] = ["noun", "files", "parts", "dropped", "messages", "sample"];

fn histogram(counts: &Value) -> String {
    let counts: Vec<f64> = counts.as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    let most = counts.iter().copied().fold(1.0, f64::max);
    let mut svg = format!("<svg class=bars viewBox=\"0 0 {} 16\" role=img aria-label=lengths>", counts.len() * 6);
    for (i, count) in counts.iter().enumerate() {
        let height = (count / most * 15.0).max(if *count > 0.0 { 1.0 } else { 0.0 });
        let _ = write!(svg, "<rect x={} y={:.1} width=5 height={height:.1} />", i * 6, 16.0 - height);
    }
    svg + "</svg>"
}

/// Names and values in columns.
fn list(pairs: impl Iterator<Item = (String, String)>) -> String {
    let row =
        |(name, value): (String, String)| format!("<div><dt>{}</dt><dd>{}</dd></div>", escaped(&name), escaped(&value));
    let rows: String = pairs.map(row).collect();
    if rows.is_empty() { rows } else { format!("<dl>{rows}</dl>") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    #[test]
    fn answers_are_text() {
        let folder = tempfile::tempdir().unwrap();
        let evil = "</div><script>alert(1)</script><img src=x onerror=\"alert(2)\">";
        let line = serde_json::json!({"prompt": evil, "before": evil, "after": evil});
        std::fs::write(folder.path().join(ANSWERS), format!("{line}\n")).unwrap();
        let head = serde_json::json!({"text": [evil]});
        let line = serde_json::json!({"prompt": evil, "place": evil, "base": {"text": evil}, "tuned": {"text": evil},
            "judge": {"outcome": evil}});
        std::fs::write(folder.path().join(GENERATED), format!("{head}\n{line}\n")).unwrap();
        write(folder.path()).unwrap();
        let html = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
        assert_eq!(html.matches("&lt;script&gt;").count(), 3 + 6, "{html}");
        assert!(!html.contains("<script") && !html.contains("<img"), "{html}");
    }
}
