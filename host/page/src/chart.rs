//! The charts: which there are, for the page and the report alike, and how the report draws one as SVG.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde::Serialize;
use serde_json::{Map, Value};

use super::escaped;

/// A chart. A series that evaluations have too, as `eval_NAME` or, of an evaluation set with a name, as `eval_SET_NAME`, shows
/// them as points.
#[derive(Serialize)]
pub(super) struct Chart {
    title: &'static str,
    series: &'static [Series],
    /// A value that means something: drawn where the curves come near it.
    guide: Option<f64>,
}

/// A logged number, and its label where a chart has several.
#[derive(Serialize)]
struct Series {
    name: &'static str,
    label: &'static str,
}

const fn chart(title: &'static str, series: &'static [Series], guide: Option<f64>) -> Chart {
    Chart { title, series, guide }
}

const fn series(name: &'static str, label: &'static str) -> Series {
    Series { name, label }
}

/// In the order in which they are looked at.
pub(super) const CHARTS: &[Chart] = &[
    chart("Loss", &[series("loss", "")], None),
    chart("Margin", &[series("rewards/margins", "")], Some(0.0)),
    chart("Accuracy", &[series("rewards/accuracies", "")], Some(0.5)),
    chart("Rewards", &[series("rewards/chosen", "chosen"), series("rewards/rejected", "rejected")], Some(0.0)),
    chart("Log-probs", &[series("logps/chosen", "chosen"), series("logps/rejected", "rejected")], None),
    chart("NLL of chosen", &[series("nll_loss", "")], None),
    chart("Auxiliary loss of routers", &[series("aux_loss", "")], None),
    chart("Gradient norm", &[series("grad_norm", "")], None),
    chart("Learning rate", &[series("learning_rate", "")], None),
    chart("Tokens per second", &[series("tokens_per_second", "")], None),
    chart("Memory, GiB", &[series("memory_gib", "")], None),
];

const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 170.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = 52.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 22.0;
/// Between labels at the ends of curves.
const LABEL: f64 = 13.0;

/// Marks of evaluation sets, in the order of their names; as text, and as a path around a place.
const MARKS: [(&str, &str); 4] = [
    ("○", "m-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0 -5 0z"),
    ("□", "m-2.5 -2.5h5v5h-5z"),
    ("△", "m0 -3.5l3.5 6h-7z"),
    ("◇", "m0 -3.5l3.5 3.5l-3.5 3.5l-3.5 -3.5z"),
];

pub(super) type Points = Vec<[f64; 2]>;

/// The points of a number in some lines of the log.
fn points(lines: &[Map<String, Value>], name: &str) -> Points {
    let point = |l: &Map<String, Value>| Some([l.get("global_step")?.as_f64()?, l.get(name)?.as_f64()?]);
    lines.iter().filter_map(point).collect()
}

/// The numbers under a name, the first set of evaluations of them, each with its step.
pub(super) fn numbers(lines: &[Map<String, Value>], name: &str) -> (Points, Points) {
    let held = evaluations(lines, name).pop_first().map(|(_, key)| points(lines, &key));
    (points(lines, name), held.unwrap_or_default())
}

/// Evaluations of a number: by the name of the set, which is empty for one without, the name of the series.
fn evaluations(lines: &[Map<String, Value>], name: &str) -> BTreeMap<String, String> {
    let keys: BTreeSet<&str> = lines.iter().flat_map(|l| l.keys().map(String::as_str)).collect();
    let charted = CHARTS.iter().flat_map(|c| c.series.iter().map(|s| s.name));
    let known: Vec<&str> = charted.chain(keys.iter().copied().filter(|k| !k.starts_with("eval_"))).collect();
    // `nll_loss` is a number of its own, not the loss of a set `nll`.
    let longest = |rest: &str| known.iter().filter(|k| rest.ends_with(&format!("_{k}"))).map(|k| k.len()).max();
    let set = |key: &&str| {
        let rest = key.strip_prefix("eval_")?;
        let set = rest.strip_suffix(name)?;
        let named = !known.contains(&rest) && longest(rest) == Some(name.len());
        let set = if set.is_empty() { "" } else { set.strip_suffix('_').filter(|_| named)? };
        Some((set.to_owned(), (*key).to_owned()))
    };
    keys.iter().filter_map(set).collect()
}

/// The evaluation with the lowest loss, of the first set where the sets have names: its step and its loss.
pub(super) fn best(lines: &[Map<String, Value>]) -> Option<[f64; 2]> {
    let (_, key) = evaluations(lines, "loss").pop_first()?;
    points(lines, &key).into_iter().min_by(|a, b| a[1].total_cmp(&b[1]))
}

impl Chart {
    /// The chart of some lines of the log; nothing where they have none of its numbers.
    pub(super) fn draw(&self, lines: &[Map<String, Value>]) -> String {
        let held = |s: &Series| evaluations(lines, s.name).values().map(|key| points(lines, key)).collect();
        let curves: Vec<(&Series, Points, Vec<Points>)> =
            self.series.iter().map(|s| (s, points(lines, s.name), held(s))).collect();
        let all = || curves.iter().flat_map(|(_, curve, held)| curve.iter().chain(held.iter().flatten()));
        let range = |axis: usize| {
            let low = all().map(|p| p[axis]).fold(f64::INFINITY, f64::min);
            (low, all().map(|p| p[axis]).fold(f64::NEG_INFINITY, f64::max))
        };
        if all().next().is_none() {
            return String::new();
        }
        let (steps, values) = (widened(range(0)), widened(range(1)));
        let x = |step: f64| LEFT + (step - steps.0) / (steps.1 - steps.0) * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| HEIGHT - BOTTOM - (value - values.0) / (values.1 - values.0) * (HEIGHT - BOTTOM - TOP);
        let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">", self.title);
        let end = WIDTH - RIGHT;
        let marks = ticks(values, 4);
        for value in &marks {
            let at = y(*value);
            let _ = write!(svg, "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{end}\"/>");
            let text = (LEFT - 6.0, at + 4.0, tick(*value, &marks));
            let _ = write!(
                svg,
                "<text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                text.0, text.1, text.2
            );
        }
        for step in ticks(steps, 4).into_iter().filter(|s| s.fract() == 0.0) {
            let (at, low) = (x(step), HEIGHT - 6.0);
            let _ = write!(svg, "<text class=\"tick\" x=\"{at:.1}\" y=\"{low}\" text-anchor=\"middle\">{step}</text>");
        }
        if let Some(guide) = self.guide.filter(|g| (values.0..=values.1).contains(g)) {
            let _ = write!(svg, "<path class=\"guide\" d=\"M{LEFT} {:.1}H{end}\"/>", y(guide));
        }
        let mut labels = Vec::new();
        for (i, (series, curve, held)) in curves.iter().enumerate() {
            let path =
                |all: &Points| all.iter().map(|[s, v]| format!("{:.1},{:.1} ", x(*s), y(*v))).collect::<String>();
            let second = if i > 0 { " second" } else { "" };
            let _ = write!(svg, "<polyline class=\"curve{second}\" points=\"{}\"/>", path(curve));
            for (held, (_, mark)) in held.iter().zip(MARKS.iter().cycle()) {
                let _ = write!(svg, "<polyline class=\"held\" points=\"{}\"/>", path(held));
                for [step, value] in held {
                    let _ = write!(svg, "<path class=\"dot\" d=\"M{:.1} {:.1}{mark}\"/>", x(*step), y(*value));
                }
            }
            if let Some([_, value]) = curve.last() {
                let text = if series.label.is_empty() { short(*value) } else { series.label.to_owned() };
                labels.push((y(*value), text));
            }
        }
        labels.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut above = f64::NEG_INFINITY;
        for (at, text) in labels {
            above = at.max(above + LABEL);
            let _ = write!(svg, "<text class=\"label\" x=\"{}\" y=\"{:.1}\">{text}</text>", end + 6.0, above + 4.0);
        }
        svg + "</svg>"
    }

    /// A figure: the chart with its title and the last numbers of evaluations.
    pub(super) fn figure(&self, lines: &[Map<String, Value>]) -> String {
        let drawn = self.draw(lines);
        if drawn.is_empty() {
            return drawn;
        }
        let last = |key: &String| points(lines, key).last().map(|[_, value]| short(*value));
        let mut sets = BTreeMap::<String, Vec<String>>::new();
        for (set, key) in self.series.iter().flat_map(|s| evaluations(lines, s.name)) {
            sets.entry(set).or_default().extend(last(&key));
        }
        let told = |((set, values), (mark, _)): ((&String, &Vec<String>), &(&str, &str))| {
            format!(" {mark} {}{}{}", escaped(set), if set.is_empty() { "" } else { " " }, values.join(" / "))
        };
        let held: String = sets.iter().zip(MARKS.iter().cycle()).map(told).collect();
        let held = match held.is_empty() {
            true => String::new(),
            false => format!("<span class=now>eval<span class=key>{held}</span></span>"),
        };
        format!("<figure class=chart><figcaption><b>{}</b>{held}</figcaption>{drawn}</figure>", self.title)
    }
}

/// Charts of a picture, and how many of them lie side by side.
const PICTURED: usize = 4;
const COLUMNS: usize = 2;
/// Room for the title of a chart in a picture.
const TITLE: f64 = 24.0;
/// The look of a picture, which has no page around it.
const LOOK: &str = "text{font:11px system-ui,sans-serif;fill:#6d7078}.title{font-size:13px;font-weight:600;fill:#1b1c1f}\
    .label{fill:#2f66c8}.grid{stroke:#e7e7ea;fill:none}.guide{stroke:#6d7078;stroke-dasharray:1 3;fill:none}\
    .curve{fill:none;stroke:#2f66c8;stroke-width:1.5}.second{stroke-width:1;stroke-dasharray:4 3}\
    .held{fill:none;stroke:#2f66c8;opacity:.4}.dot{fill:#fff;stroke:#2f66c8;stroke-width:1.5}";

/// The first charts of some lines of the log as a picture of its own (SVG); none where they have no numbers.
pub(super) fn picture(lines: &[Map<String, Value>]) -> Option<String> {
    let drawn = CHARTS.iter().map(|chart| (chart.title, chart.draw(lines))).filter(|(_, svg)| !svg.is_empty());
    let drawn: Vec<(&str, String)> = drawn.take(PICTURED).collect();
    let (width, height) = (WIDTH * COLUMNS as f64, (HEIGHT + TITLE) * drawn.len().div_ceil(COLUMNS) as f64);
    let mut all = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\"><style>{LOOK}</style><rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>"
    );
    for (i, (title, svg)) in drawn.iter().enumerate() {
        let (x, y) = ((i % COLUMNS) as f64 * WIDTH, (i / COLUMNS) as f64 * (HEIGHT + TITLE));
        let placed = format!("<svg x=\"{x}\" y=\"{}\" width=\"{WIDTH}\" height=\"{HEIGHT}\"", y + TITLE);
        let _ = write!(all, "<text class=\"title\" x=\"{}\" y=\"{}\">{title}</text>", x + LEFT, y + TITLE - 7.0);
        all += &svg.replacen("<svg", &placed, 1);
    }
    (!drawn.is_empty()).then(|| all + "</svg>\n")
}

/// A flat curve is drawn in the middle.
fn widened((low, high): (f64, f64)) -> (f64, f64) {
    let (room, flat) = ((high - low) * 0.04, (low.abs() * 0.1).max(1e-12));
    if high > low { (low - room, high + room) } else { (low - flat, high + flat) }
}

/// Round values within a range, about so many.
fn ticks((low, high): (f64, f64), about: usize) -> Vec<f64> {
    let rough = (high - low) / about as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    (first..).map(|n| n as f64 * step).take_while(|v| *v <= high + step * 1e-9).take(2 * about + 2).collect()
}

/// A tick with the digits that set it apart from the next, written as the others of its axis.
fn tick(value: f64, all: &[f64]) -> String {
    let step = if let [a, b, ..] = all { b - a } else { value }.abs();
    let largest = all.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
    let power = |v: f64| (v.abs().log10() + 1e-9).floor();
    match value.abs() {
        size if size < step / 2.0 => "0".into(),
        size if !(1e-3..1e5).contains(&largest) => {
            format!("{value:.*e}", (power(size) - power(step)).clamp(0.0, 12.0) as usize)
        }
        _ => format!("{value:.*}", (-power(step)).clamp(0.0, 12.0) as usize),
    }
}

/// A number in the few digits that can be told apart in a chart.
pub(super) fn short(value: f64) -> String {
    let text = match value.abs() {
        0.0 => return "0".into(),
        size if !(1e-3..1e5).contains(&size) => return format!("{value:.1e}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.01 => format!("{value:.3}"),
        _ => format!("{value:.5}"),
    };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        let close = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(close(&ticks((0.1, 0.72), 4), &[0.2, 0.4, 0.6]), "{:?}", ticks((0.1, 0.72), 4));
        assert!(close(&ticks((-3.0, 3.0), 4), &[-2.0, 0.0, 2.0]));
        assert_eq!(widened((2.0, 2.0)), (1.8, 2.2));
    }

    #[test]
    fn ticks_differ() {
        let texts = |all: &[f64]| all.iter().map(|v| tick(*v, all)).collect::<Vec<_>>();
        assert_eq!(texts(&[0.6925, 0.693, 0.6935]), ["0.6925", "0.6930", "0.6935"]);
        assert_eq!(texts(&[-0.5, 0.0, 0.5]), ["-0.5", "0", "0.5"]);
        assert_eq!(texts(&[1000.0, 2000.0]), ["1000", "2000"]);
        assert_eq!(texts(&[0.0, 5e-7, 1e-6]), ["0", "5e-7", "1.0e-6"]);
        assert_eq!(texts(&[1e5, 1.05e5]), ["1.00e5", "1.05e5"]);
        assert_eq!(texts(&[0.0, 0.0005, 0.001]), ["0", "0.0005", "0.0010"]);
    }

    #[test]
    fn numbers() {
        let cases = [
            (0.0, "0"),
            (0.00186, "0.00186"),
            (0.002, "0.002"),
            (0.6412, "0.641"),
            (0.5, "0.5"),
            (12.0, "12"),
            (1234.5, "1234"),
            (1e-5, "1.0e-5"),
        ];
        cases.iter().for_each(|(value, text)| assert_eq!(short(*value), *text));
    }

    #[test]
    fn curves_are_drawn_of_what_is_there() {
        let lines: Vec<Map<String, Value>> = ["{\"global_step\":1,\"loss\":0.7}", "{\"global_step\":2,\"loss\":null}"]
            .iter()
            .map(|l| serde_json::from_str(l).unwrap_or_default())
            .collect();
        assert!(CHARTS[0].draw(&lines).contains("<polyline class=\"curve\" points=\""));
        assert_eq!(CHARTS[1].figure(&lines), "");
    }

    #[test]
    fn evaluation_sets_have_marks_of_their_own() {
        let line = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap_or_default();
        let lines = [
            line(
                "{\"global_step\":0,\"eval_loss\":0.7,\"eval_easy_loss\":0.6,\"eval_nll_loss\":2,\"eval_easy_nll_loss\":3}",
            ),
            line("{\"global_step\":9,\"eval_loss\":0.5,\"eval_easy_loss\":0.4,\"eval_<b>_loss\":0.3}"),
            line("{\"global_step\":12,\"eval_loss\":0.6}"),
        ];
        let sets = |name: &str| evaluations(&lines, name).into_keys().collect::<Vec<_>>();
        assert_eq!(sets("loss"), ["", "<b>", "easy"]);
        assert_eq!(sets("nll_loss"), ["", "easy"]);
        let figure = CHARTS[0].figure(&lines);
        assert!(figure.contains("eval<span class=key> ○ 0.6 □ &lt;b&gt; 0.3 △ easy 0.4</span>"), "{figure}");
        assert_eq!(figure.matches("class=\"dot\"").count(), 6);
        assert_eq!(best(&lines), Some([9.0, 0.5]));
    }
}
