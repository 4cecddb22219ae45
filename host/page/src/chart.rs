//! The charts: which there are, for the page and the report alike, and how the report draws one as SVG.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Map, Value};

/// A chart. A series that evaluations have too, under the same name with `eval_` before it, shows them as points.
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

type Points = Vec<[f64; 2]>;

impl Chart {
    /// The chart of some lines of the log; nothing where they have none of its numbers.
    pub(super) fn draw(&self, lines: &[Map<String, Value>]) -> String {
        let points = |name: &str| -> Points {
            let point = |l: &Map<String, Value>| Some([l.get("global_step")?.as_f64()?, l.get(name)?.as_f64()?]);
            lines.iter().filter_map(point).collect()
        };
        let curves: Vec<(&Series, Points, Points)> =
            self.series.iter().map(|s| (s, points(s.name), points(&format!("eval_{}", s.name)))).collect();
        let all = || curves.iter().flat_map(|(_, curve, held)| curve.iter().chain(held));
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
        let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=img aria-label=\"{}\">", self.title);
        let end = WIDTH - RIGHT;
        let marks = ticks(values, 4);
        for value in &marks {
            let at = y(*value);
            let _ = write!(svg, "<path class=grid d=\"M{LEFT} {at:.1}H{end}\"/>");
            let text = (LEFT - 6.0, at + 4.0, tick(*value, &marks));
            let _ = write!(svg, "<text class=tick x={} y={:.1} text-anchor=end>{}</text>", text.0, text.1, text.2);
        }
        for step in ticks(steps, 4).into_iter().filter(|s| s.fract() == 0.0) {
            let (at, low) = (x(step), HEIGHT - 6.0);
            let _ = write!(svg, "<text class=tick x={at:.1} y={low} text-anchor=middle>{step}</text>");
        }
        if let Some(guide) = self.guide.filter(|g| (values.0..=values.1).contains(g)) {
            let _ = write!(svg, "<path class=guide d=\"M{LEFT} {:.1}H{end}\"/>", y(guide));
        }
        let mut labels = Vec::new();
        for (i, (series, curve, held)) in curves.iter().enumerate() {
            let path: String = curve.iter().map(|[s, v]| format!("{:.1},{:.1} ", x(*s), y(*v))).collect();
            let dashed = if i > 0 { " dashed" } else { "" };
            let _ = write!(svg, "<polyline class=\"curve{dashed}\" points=\"{path}\"/>");
            for [step, value] in held {
                let _ = write!(svg, "<circle class=dot cx={:.1} cy={:.1} r=2.5 />", x(*step), y(*value));
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
            let _ = write!(svg, "<text class=label x={} y={:.1}>{text}</text>", end + 6.0, above + 4.0);
        }
        svg + "</svg>"
    }

    /// A figure: the chart with its title and the last numbers of evaluations.
    pub(super) fn figure(&self, lines: &[Map<String, Value>]) -> String {
        let drawn = self.draw(lines);
        if drawn.is_empty() {
            return drawn;
        }
        let last = |name: String| lines.iter().rev().find_map(|l| l.get(&name)?.as_f64()).map(short);
        let held: Vec<String> = self.series.iter().filter_map(|s| last(format!("eval_{}", s.name))).collect();
        let held = match held.is_empty() {
            true => String::new(),
            false => format!("<span class=now>eval <span class=key>○ {}</span></span>", held.join(" / ")),
        };
        format!("<figure class=chart><figcaption><b>{}</b>{held}</figcaption>{drawn}</figure>", self.title)
    }
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

/// A tick with the digits that set it apart from the next.
fn tick(value: f64, all: &[f64]) -> String {
    let step = if let [a, b, ..] = all { b - a } else { value };
    match value.abs() {
        size if size < step.abs() / 2.0 => "0".into(),
        size if !(1e-3..1e5).contains(&size) => format!("{value:.1e}"),
        _ => format!("{value:.*}", (-step.abs().log10() + 1e-9).ceil().clamp(0.0, 7.0) as usize),
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
        assert_eq!(texts(&[0.0, 5e-7, 1e-6]), ["0", "5.0e-7", "1.0e-6"]);
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
}
