//! What a person reads while a command runs, on stderr, and what a program reads with `--json`, on stdout. Of many ranks, one
//! speaks. Colours are for terminals; NO_COLOR and CLICOLOR_FORCE are obeyed.

use std::fmt::Display;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::error::Error;

static SILENT: AtomicBool = AtomicBool::new(false);
static QUIET: AtomicBool = AtomicBool::new(false);
static JSON: AtomicBool = AtomicBool::new(false);

const RED: Style = AnsiColor::Red.on_default().bold();
const YELLOW: Style = AnsiColor::Yellow.on_default().bold();
const DIM: Style = Style::new().dimmed();

/// A text for the person who runs a command, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// What is so.
    pub text: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Remark {
    /// With what to do about it.
    pub fn help(self, help: impl Into<String>) -> Remark {
        Remark { help: Some(help.into()), ..self }
    }

    /// That something could not be had, and the error that says why.
    pub fn because(text: impl Display, error: &Error) -> Remark {
        let cause = Remark::from(error);
        Remark { text: format!("{text}: {}", cause.text), help: cause.help }
    }
}

impl From<&str> for Remark {
    fn from(text: &str) -> Remark {
        Remark { text: text.to_owned(), help: None }
    }
}

impl From<String> for Remark {
    fn from(text: String) -> Remark {
        Remark { text, help: None }
    }
}

impl From<&Error> for Remark {
    fn from(error: &Error) -> Remark {
        let place = error.place().map(|place| format!("{place}: ")).unwrap_or_default();
        Remark { text: format!("{place}{}", error.message()), help: error.advice().map(str::to_owned) }
    }
}

/// From now on only errors are printed: another rank prints the rest.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// From now on only warnings, errors and results are printed.
pub fn quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// From now on events are printed to stdout, and steps nowhere else.
pub fn json() {
    JSON.store(true, Ordering::Relaxed);
}

/// Prints a line that tells how things go.
pub fn line(text: impl Display) {
    if !is(&SILENT) && !is(&QUIET) {
        print(text);
    }
}

/// Prints a line that says what came of it.
pub fn result(text: impl Display) {
    if !is(&SILENT) {
        print(text);
    }
}

/// Prints what the user should know and need not mend.
pub fn note(remark: impl Into<Remark>) {
    let remark = remark.into();
    line(labelled("note", DIM, &remark));
    event("note", &facts(&remark));
}

/// Prints what may be wrong.
pub fn warning(remark: impl Into<Remark>) {
    let remark = remark.into();
    result(labelled("warning", YELLOW, &remark));
    event("warning", &facts(&remark));
}

/// Prints why a command, or a rank, ends.
pub fn error(error: &Error) {
    print(labelled("error", RED, &error.into()));
    let known = [("text", Some(error.message())), ("place", error.place()), ("help", error.advice())];
    event("error", &known.into_iter().filter_map(|(name, text)| Some((name.to_owned(), json!(text?)))).collect());
}

/// Prints a line of JSON to stdout, with `--json`.
pub fn event(kind: &str, facts: &Map<String, Value>) {
    if !is(&SILENT) && is(&JSON) {
        let mut line = Map::from_iter([("event".to_owned(), json!(kind))]);
        line.extend(facts.clone());
        // Who does not read on does not end the run.
        let _ = writeln!(std::io::stdout(), "{}", Value::Object(line));
    }
}

/// Prints a line about a step: to stderr, unless stdout has it as an event.
pub fn step(text: impl Display) {
    if !is(&JSON) {
        line(text);
    }
}

/// A bar on a terminal; nothing elsewhere.
pub fn bar(length: u64, template: &str) -> ProgressBar {
    if is(&SILENT) || is(&QUIET) || is(&JSON) {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style.progress_chars("━╸ "))
}

/// A remark as a program reads it.
pub fn facts(remark: &Remark) -> Map<String, Value> {
    let help = remark.help.as_deref().unwrap_or_default();
    Map::from_iter([("text".to_owned(), json!(remark.text)), ("help".to_owned(), json!(help))])
}

fn labelled(label: &str, style: Style, remark: &Remark) -> String {
    let text = format!("{style}{label}:{style:#} {}", remark.text);
    match &remark.help {
        Some(help) => format!("{text}\n  {DIM}help: {help}{DIM:#}"),
        None => text,
    }
}

fn print(text: impl Display) {
    // A terminal that is gone does not end the run.
    let _ = writeln!(anstream::stderr(), "{text}");
}

fn is(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}
