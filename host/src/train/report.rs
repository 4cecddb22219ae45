//! `report.html`: the curves of a run in one file that opens anywhere.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::files;

/// A chart: its title, and the logged numbers it shows.
const CHARTS: &[(&str, &[&str])] = &[
    ("loss", &["loss", "eval_loss"]),
    ("rewards", &["rewards/chosen", "rewards/rejected", "rewards/margins"]),
    ("accuracy", &["rewards/accuracies", "eval_rewards/accuracies"]),
    ("log-probs", &["logps/chosen", "logps/rejected"]),
    ("gradient norm", &["grad_norm"]),
    ("learning rate", &["learning_rate"]),
    ("tokens per second", &["tokens_per_second"]),
];

const COLOURS: &[&str] = &["#2563eb", "#dc2626", "#059669"];
const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 180.0;
const MARGIN: f64 = 46.0;

/// Writes the report from the lines of the log and the run's arguments.
pub(super) fn write(output: &Path, args: &Value) -> Result<()> {
    let log = std::fs::read_to_string(output.join("logging.jsonl")).unwrap_or_default();
    let lines: Vec<Map<String, Value>> = log.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let charts: String = CHARTS.iter().map(|(title, names)| chart(title, names, &lines)).collect();
    let rows: String = args.as_object().into_iter().flatten().fold(String::new(), |mut text, (name, value)| {
        let _ = write!(text, "<tr><td>{}</td><td>{}</td></tr>", escaped(name), escaped(&value.to_string()));
        text
    });
    let html = format!(
        "<!doctype html><meta charset=utf-8><title>dpo-host run</title>\
         <style>body{{font:14px system-ui;margin:2em;max-width:1000px}}svg{{margin:4px}}td{{padding:1px 12px 1px 0}}\
         text{{font:11px system-ui;fill:#444}}</style>\
         <h1>{}</h1>{charts}<h2>Arguments</h2><table>{rows}</table>\n",
        escaped(&output.display().to_string())
    );
    files::write_into(&output.join("report.html"), html.as_bytes())
}

fn chart(title: &str, names: &[&str], lines: &[Map<String, Value>]) -> String {
    let points = |name: &str| -> Vec<[f64; 2]> {
        let point = |l: &Map<String, Value>| Some([l.get("global_step")?.as_f64()?, l.get(name)?.as_f64()?]);
        lines.iter().filter_map(point).collect()
    };
    let series: Vec<(&str, Vec<[f64; 2]>)> = names.iter().map(|n| (*n, points(n))).collect();
    let all = || series.iter().flat_map(|(_, p)| p);
    if all().next().is_none() {
        return String::new();
    }
    let range = |axis: usize| {
        let low = all().map(|p| p[axis]).fold(f64::INFINITY, f64::min);
        let high = all().map(|p| p[axis]).fold(f64::NEG_INFINITY, f64::max);
        // A flat curve is drawn in the middle.
        if high > low { (low, high) } else { (low - 1.0, high + 1.0) }
    };
    let (steps, values) = (range(0), range(1));
    let x = |step: f64| MARGIN + (step - steps.0) / (steps.1 - steps.0) * (WIDTH - MARGIN - 8.0);
    let y = |value: f64| HEIGHT - 20.0 - (value - values.0) / (values.1 - values.0) * (HEIGHT - 44.0);
    let mut svg =
        format!("<svg width={WIDTH} height={HEIGHT}><text x=4 y=14><tspan font-weight=bold>{title}</tspan></text>");
    for (i, (name, points)) in series.iter().enumerate().filter(|(_, (_, p))| !p.is_empty()) {
        let colour = COLOURS[i % COLOURS.len()];
        let path: String = points.iter().map(|[s, v]| format!("{:.1},{:.1} ", x(*s), y(*v))).collect();
        let _ = write!(svg, "<polyline fill=none stroke={colour} stroke-width=1.5 points=\"{path}\"/>");
        let left = 110.0 + 115.0 * i as f64;
        let _ = write!(svg, "<text x={left} y=14 style=\"fill:{colour}\">{}</text>", escaped(name));
    }
    for value in [values.0, values.1] {
        let _ = write!(svg, "<text x=2 y={:.1}>{}</text>", y(value) + 4.0, short(value));
    }
    for (step, anchor) in [(steps.0, "start"), (steps.1, "end")] {
        let _ = write!(svg, "<text x={:.1} y={} text-anchor={anchor}>{step}</text>", x(step), HEIGHT - 4.0);
    }
    svg + "</svg>"
}

fn short(value: f64) -> String {
    if value != 0.0 && (value.abs() < 1e-3 || value.abs() >= 1e5) {
        format!("{value:.1e}")
    } else {
        format!("{value:.4}")
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
