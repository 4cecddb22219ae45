//! Tables of speeds have one source, `docs/measurements.jsonl`, and everything in it is in the log, `docs/performance.md`: its numbers and
//! flags stand in the entry of its day. `DPO_HOST_BLESS=1 cargo test --release -p dpo-tests --test measurements` writes the tables anew.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::path::{Path, PathBuf};

use dpo_tests::page::anchor;
use serde_json::Value;

/// Pages with tables, each between [`BEGIN`] with the name of a table and [`END`].
const PAGES: &[&str] = &["README.md", "README.zh-CN.md", "docs/performance.md", "docs/compare.md", "docs/zh/README.md"];
const BEGIN: &str = "<!-- measurements: ";
const END: &str = "<!-- The end of the measurements. -->\n";

/// What a table says beside numbers and names, in the language of a page.
struct Words {
    english: bool,
    heads: [&'static str; 7],
}

const ENGLISH: Words = Words {
    english: true,
    heads: ["", "tool", "unique tokens/s", "the version before", "GPU memory", "command", "measured"],
};
const CHINESE: Words = Words {
    english: false,
    heads: ["", "工具", "不重复 token/s", "前一版本", "GPU 内存", "命令", "测于"],
};

/// Units and devices in Chinese.
const IN_CHINESE: &[(&str, &str)] = &[
    ("one H200", "一张 H200"),
    ("two H200", "两张 H200"),
    ("one H100", "一张 H100"),
    ("two CPU cores", "两个 CPU 核心"),
    ("tokens/s", "token/s"),
    ("s of CPU time", "秒 CPU 时间"),
    ("s", "秒"),
];

impl Words {
    fn word<'a>(&self, english: &'a str) -> &'a str {
        let known = IN_CHINESE.iter().find(|(word, _)| *word == english && !self.english);
        known.map_or(english, |(_, chinese)| chinese)
    }

    /// What stands in brackets behind something.
    fn aside(&self, english: String, chinese: String) -> String {
        if self.english { format!(" ({english})") } else { format!("（{chinese}）") }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

fn measurements() -> Vec<Value> {
    read("docs/measurements.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn text<'a>(measured: &'a Value, name: &str) -> &'a str {
    measured[name].as_str().unwrap_or_default()
}

/// The heading of the log's entry.
fn heading(measured: &Value) -> String {
    format!("{}, {}", text(measured, "date"), text(measured, "log"))
}

/// A number as pages write it, with a comma at thousands.
fn number(value: &Value) -> String {
    let Some(whole) = value.as_u64() else { return value.to_string() };
    let digits = whole.to_string();
    let place = |(at, digit): (usize, char)| {
        let comma = at > 0 && (digits.len() - at).is_multiple_of(3);
        [comma.then_some(','), Some(digit)].into_iter().flatten()
    };
    digits.chars().enumerate().flat_map(place).collect()
}

fn numbers(value: &Value) -> String {
    value.as_array().into_iter().flatten().map(number).collect::<Vec<_>>().join(", ")
}

/// Whether a number stands in a text, and not as a part of another.
fn stands_in(number: &str, text: &str) -> bool {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let goes_on = |at: usize| matches!(bytes.get(at), Some(b'.' | b',')) && digit(at + 1);
    text.match_indices(number).any(|(at, _)| {
        let before = at > 0 && (digit(at - 1) || matches!(bytes[at - 1], b'.' | b',') && at > 1 && digit(at - 2));
        let end = at + number.len();
        !before && !digit(end) && !goes_on(end)
    })
}

/// That all which was measured is in the log.
fn assert_logged(all: &[Value]) {
    let log = read("docs/performance.md");
    let mut wrong = Vec::new();
    for measured in all {
        let (heading, what) = (heading(measured), text(measured, "what").to_owned());
        let Some(entry) = log.split("\n## ").find(|entry| entry.lines().next() == Some(heading.as_str())) else {
            wrong.push(format!("{what}: the log has no entry '{heading}'"));
            continue;
        };
        let single = ["best", "floor", "gib"].iter().map(|name| &measured[*name]).filter(|value| !value.is_null());
        let listed = ["values", "before"].iter().flat_map(|name| measured[*name].as_array().into_iter().flatten());
        let lost = listed.chain(single).map(number).filter(|number| !stands_in(number, entry));
        wrong.extend(lost.map(|number| format!("{what}: '{heading}' has no {number}")));
        let words: Vec<&str> = text(measured, "command").split(' ').collect();
        for (at, flag) in words.iter().enumerate().filter(|(_, word)| word.starts_with("--")) {
            let value = words.get(at + 1).filter(|word| !word.starts_with("--"));
            let said = value.is_some_and(|v| entry.contains(v) || entry.contains(&v.replace("GiB", " GiB")));
            if !entry.contains(flag) && !said {
                wrong.push(format!("{what}: '{heading}' says nothing of {flag}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The cells of a row; those of columns that a table has not stay empty in all of its rows.
fn cells(measured: &Value, words: &Words, compared: bool, one_unit: bool, log: &str) -> [String; 7] {
    let (tool, unit) = (text(measured, "tool"), text(measured, "unit"));
    let what = text(measured, if words.english { "what" } else { "zh" });
    let label = match (compared, tool) {
        (true, _) | (false, "dpo-host") => what.to_owned(),
        _ => format!("{tool}{}{what}", if words.english { ": " } else { "：" }),
    };
    let mut speed = numbers(&measured["values"]);
    if !one_unit {
        let unit = if unit.is_empty() { words.heads[2] } else { words.word(unit) };
        speed = format!("{speed} {unit}");
    }
    if let Some(best) = measured["best"].as_u64().map(|best| number(&best.into())) {
        speed += &words.aside(format!("best step {best}"), format!("最快一步 {best}"));
    }
    if let (Some(floor), Some(last)) = (measured["floor"].as_f64(), measured["values"].as_array().unwrap().last()) {
        let share = (100.0 * last.as_f64().unwrap() / floor).round();
        speed += &words.aside(format!("{share}% of the floor"), format!("下限的 {share}%"));
    }
    let memory = measured["gib"].as_f64().map_or(String::new(), |gib| format!("{gib:.1} GiB"));
    let command = Some(text(measured, "command")).filter(|command| !command.is_empty());
    [
        label,
        tool.to_owned(),
        speed,
        numbers(&measured["before"]),
        memory,
        command.map_or(String::new(), |command| format!("`{command}`")),
        format!(
            "[{}]({log}#{}), {}",
            text(measured, "date"),
            anchor(&heading(measured)),
            words.word(text(measured, "device"))
        ),
    ]
}

/// The rows of a table, in the order of the file; of one that compares, those of a group together.
fn rows<'a>(all: &'a [Value], name: &str) -> Vec<&'a Value> {
    let named = |m: &&Value| m["tables"].as_array().unwrap().iter().any(|table| table == name);
    let mut rows: Vec<&Value> = all.iter().filter(named).collect();
    if name == "compare" {
        let order: Vec<&str> = rows.iter().map(|m| text(m, "group")).collect();
        rows.sort_by_key(|m| order.iter().position(|group| *group == text(m, "group")));
    }
    rows
}

fn table(all: &[Value], name: &str, words: &Words, log: &str) -> String {
    let rows = rows(all, name);
    assert!(!rows.is_empty(), "no measurement is of a table '{name}'");
    let compared = name == "compare";
    let one_unit = rows.iter().all(|m| text(m, "unit") == text(rows[0], "unit"));
    let mut filled: Vec<[String; 7]> = rows.iter().map(|m| cells(m, words, compared, one_unit, log)).collect();
    let mut heads = words.heads.map(str::to_owned);
    if !one_unit {
        heads[2] = String::new();
    }
    let mut group = "";
    for (row, measured) in filled.iter_mut().zip(&rows).filter(|_| compared) {
        let own = text(measured, "group");
        let label = std::mem::replace(&mut row[0], if own == group { String::new() } else { own.to_owned() });
        row[1] = if text(measured, "command").is_empty() { format!("{}: {label}", row[1]) } else { row[1].clone() };
        row[3] = String::new();
        group = own;
    }
    let kept: Vec<usize> =
        (0..7).filter(|c| (*c != 1 || compared) && filled.iter().any(|row| !row[*c].is_empty())).collect();
    let line = |cells: &[String; 7]| {
        let own: Vec<String> = kept.iter().map(|c| format!(" {}", cells[*c]).trim_end().to_owned() + " ").collect();
        format!("|{}|\n", own.join("|"))
    };
    let rule = format!("|{}\n", "---|".repeat(kept.len()));
    filled.iter().fold(line(&heads) + &rule, |text, row| text + &line(row))
}

#[test]
fn tables_are_those_of_what_was_measured() {
    let (all, mut told) = (measurements(), 0);
    assert_logged(&all);
    for page in PAGES.iter().filter(|page| root().join(page).exists()) {
        let (old, mut new) = (read(page), String::new());
        let words = if page.contains("zh") { CHINESE } else { ENGLISH };
        let log = match *page {
            "docs/performance.md" => "",
            "docs/compare.md" => "performance.md",
            page if page.starts_with("docs/zh/") => "../performance.md",
            _ => "docs/performance.md",
        };
        let mut parts = old.split(BEGIN);
        new += parts.next().unwrap();
        for part in parts {
            let (name, rest) = part.split_once(" -->\n").unwrap();
            let (_, after) = rest.split_once(END).unwrap_or_else(|| panic!("{page}: table {name} has no end"));
            new += &format!("{BEGIN}{name} -->\n\n{}\n{END}{after}", table(&all, name, &words, log));
            told += 1;
        }
        if std::env::var_os("DPO_HOST_BLESS").is_some() {
            std::fs::write(root().join(page), new).unwrap();
        } else {
            assert!(old == new, "the tables of {page} are others; write them anew with DPO_HOST_BLESS=1");
        }
    }
    assert!(told > 10, "{told} tables");
}
