//! What chat templates expect of Python: `json.dumps`, `str` of a value, `strftime`.
//!
//! Templates were written against transformers' jinja environment; the numbers and quotes that they print are Python's.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::Value as Jinja;
use minijinja::value::ValueKind;
use serde_json::Value;

/// The arguments of `json.dumps`, with transformers' defaults.
#[derive(Clone, Debug)]
pub(super) struct Dumps {
    /// Spaces a level; none writes one line.
    pub(super) indent: Option<usize>,
    /// Between elements.
    pub(super) item_separator: String,
    /// Between a key and its value.
    pub(super) key_separator: String,
    /// Keys in order of their letters.
    pub(super) sort_keys: bool,
    /// Letters beyond ASCII as `\uXXXX`.
    pub(super) ensure_ascii: bool,
}

impl Dumps {
    /// Python's separators: no space after the comma where lines are broken there.
    pub(super) fn new(indent: Option<usize>) -> Dumps {
        let item_separator = if indent.is_some() { "," } else { ", " }.to_owned();
        Dumps { indent, item_separator, key_separator: ": ".into(), sort_keys: false, ensure_ascii: false }
    }

    /// The text of a value; `None` if it has more than `most` bytes.
    pub(super) fn text(&self, value: &Value, most: usize) -> Option<String> {
        let mut out = String::new();
        self.write(value, 0, most, &mut out);
        (out.len() <= most).then_some(out)
    }

    /// Stops soon after `most` bytes: separators may have any length.
    fn write(&self, value: &Value, level: usize, most: usize, out: &mut String) {
        match value {
            Value::Null => out.push_str("null"),
            Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
            Value::Number(number) => out.push_str(&number_text(number)),
            Value::String(text) => self.write_text(text, out),
            Value::Array(list) if list.is_empty() => out.push_str("[]"),
            Value::Object(keys) if keys.is_empty() => out.push_str("{}"),
            Value::Array(list) => {
                out.push('[');
                for (i, item) in list.iter().enumerate() {
                    if out.len() > most {
                        return;
                    }
                    self.part(i, level + 1, out);
                    self.write(item, level + 1, most, out);
                }
                self.newline(level, out);
                out.push(']');
            }
            Value::Object(keys) => {
                let mut entries: Vec<_> = keys.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                out.push('{');
                for (i, (key, item)) in entries.into_iter().enumerate() {
                    if out.len() > most {
                        return;
                    }
                    self.part(i, level + 1, out);
                    self.write_text(key, out);
                    out.push_str(&self.key_separator);
                    self.write(item, level + 1, most, out);
                }
                self.newline(level, out);
                out.push('}');
            }
        }
    }

    fn part(&self, i: usize, level: usize, out: &mut String) {
        if i > 0 {
            out.push_str(&self.item_separator);
        }
        self.newline(level, out);
    }

    fn newline(&self, level: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * level));
        }
    }

    fn write_text(&self, text: &str, out: &mut String) {
        out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) || (self.ensure_ascii && c == '\u{7f}') => {
                    let mut units = [0; 2];
                    out.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn number_text(number: &serde_json::Number) -> String {
    match number.as_f64().filter(|_| number.is_f64()) {
        Some(float) => float_text(float),
        None => number.to_string(),
    }
}

/// `repr` of a float: the shortest digits that give it back, with an exponent from 1e16 on and below 1e-4.
pub(super) fn float_text(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "NaN".into() } else { format!("{}Infinity", if value < 0.0 { "-" } else { "" }) };
    }
    let size = value.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = value.to_string();
    if text.contains('.') { text } else { text + ".0" }
}

/// `str` of a value that is no text: `True`, `None`, `[1, 'two']`, `('a', 1.0)`; `None` if it has more than `most` bytes.
pub(super) fn repr(value: &Jinja, most: usize) -> Option<String> {
    let mut out = String::new();
    write_repr(value, most, &mut out)?;
    Some(out)
}

fn write_repr(value: &Jinja, most: usize, out: &mut String) -> Option<()> {
    let list = |ends: [&str; 2], out: &mut String| {
        out.push_str(ends[0]);
        for (i, item) in value.try_iter().ok()?.enumerate() {
            out.push_str(if i > 0 { ", " } else { "" });
            write_repr(&item, most, out)?;
        }
        out.push_str(ends[1]);
        Some(())
    };
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
        ValueKind::Number => out.push_str(&float_repr(f64::try_from(value.clone()).ok()?)),
        ValueKind::String => write_text_repr(value.as_str()?, out),
        ValueKind::Seq if value.is_tuple() => list(["(", if value.len() == Some(1) { ",)" } else { ")" }], out)?,
        ValueKind::Seq | ValueKind::Iterable => list(["[", "]"], out)?,
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().ok()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(&key, most, out)?;
                out.push_str(": ");
                write_repr(&value.get_item(&key).ok()?, most, out)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    (out.len() <= most).then_some(())
}

/// As [`float_text`], but for what JSON writes otherwise.
fn float_repr(value: f64) -> String {
    match value {
        _ if value.is_nan() => "nan".into(),
        f64::INFINITY => "inf".into(),
        f64::NEG_INFINITY => "-inf".into(),
        _ => float_text(value),
    }
}

fn write_text_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for letter in text.chars() {
        match letter {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote || c == '\\' => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c if c <= '\u{ff}' => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if c <= '\u{ffff}' => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push_str(&format!("\\U{:08x}", c as u32)),
        }
    }
    out.push(quote);
}

/// Python's `isprintable`: Rust asks the same of a letter that it shows for debugging, behind another one.
fn is_printable(letter: char) -> bool {
    match letter {
        ' '..='~' => true,
        _ if letter.is_alphanumeric() => true,
        _ => !format!("{:?}", String::from_iter(['a', letter])).contains("\\"),
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `strftime` of this moment, in UTC.
pub fn strftime_now(format: &str) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    strftime(format, seconds)
}

/// `strftime` of a number of seconds since 1970, in UTC. A directive that templates do not use stays as it is.
pub(super) fn strftime(format: &str, seconds: u64) -> String {
    let days = seconds / 86_400;
    let (year, month, day, year_day) = civil(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let mut directive = letters.next();
        let plain = directive == Some('-');
        if plain {
            directive = letters.next();
        }
        let digits = |value: u64, width: usize| if plain { value.to_string() } else { format!("{value:0width$}") };
        match directive {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&digits(year % 100, 2)),
            Some('m') => out.push_str(&digits(month, 2)),
            Some('d') => out.push_str(&digits(day, 2)),
            Some('j') => out.push_str(&digits(year_day, 3)),
            Some('H') => out.push_str(&digits(hour, 2)),
            Some('I') => out.push_str(&digits(hour12, 2)),
            Some('M') => out.push_str(&digits(minute, 2)),
            Some('S') => out.push_str(&digits(second, 2)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month, day and day of the year for a number of days since 1970-01-01 (Hinnant, `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // The count above begins on the first of March.
    let year_day = if month <= 2 { day_of_year - 305 } else { day_of_year + 60 + u64::from(leap) };
    (year, month, day, year_day)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use serde_json::json;

    use super::*;

    #[test]
    fn dumps_as_python() {
        // Python 3.11: json.dumps(value, ensure_ascii=False) and with indent=2.
        let value = json!({"b": [1, 2.0, 1e16, 1e-5, true, null], "a": "<é>\n\"\\\u{1}", "e": {}, "l": []});
        let line = r#"{"b": [1, 2.0, 1e+16, 1e-05, true, null], "a": "<é>\n\"\\\u0001", "e": {}, "l": []}"#;
        assert_eq!(Dumps::new(None).text(&value, 1000).unwrap(), line);
        assert_eq!(
            Dumps::new(Some(2)).text(&json!({"a": [1, {}]}), 1000).unwrap(),
            "{\n  \"a\": [\n    1,\n    {}\n  ]\n}"
        );
        let ascii = Dumps { ensure_ascii: true, sort_keys: true, ..Dumps::new(None) };
        assert_eq!(ascii.text(&json!({"b": "😀", "a": "é"}), 1000).unwrap(), r#"{"a": "\u00e9", "b": "\ud83d\ude00"}"#);
    }

    #[test]
    fn repr_as_python() {
        let value = json!([true, null, "it's", "a\"'b", {"k": 1.5}]);
        assert_eq!(
            repr(&Jinja::from(minijinja::value::Serde(&value)), 1000).unwrap(),
            r#"[True, None, "it's", 'a"\'b', {'k': 1.5}]"#
        );
    }

    #[test]
    fn dates() {
        // date -u -d @SECONDS
        assert_eq!(strftime("%d %b %Y, %A %j", 1_721_952_000), "26 Jul 2024, Friday 208");
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S %-d %I %p", 951_782_399), "2000-02-28 23:59:59 28 11 PM");
        assert_eq!(strftime("%B %y %j %a", 1_735_603_200), "December 24 366 Tue");
        assert_eq!(strftime("%d.%m.%Y %j", 0), "01.01.1970 001");
    }
}
