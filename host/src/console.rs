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

/// From now on only errors are printed: another rank speaks.
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
pub fn note(text: impl Display) {
    line(labelled("note", DIM, &text.to_string()));
    event("note", &said(&text.to_string()));
}

/// Prints what may be wrong.
pub fn warning(text: impl Display) {
    result(labelled("warning", YELLOW, &text.to_string()));
    event("warning", &said(&text.to_string()));
}

/// Prints why a command, or a rank, ends.
pub fn error(error: &Error) {
    print(labelled("error", RED, &error.to_string()));
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

/// A text and its help, apart.
pub fn said(text: &str) -> Map<String, Value> {
    let (text, help) = text.split_once(HELP).unwrap_or((text, ""));
    Map::from_iter([("text".to_owned(), json!(text)), ("help".to_owned(), json!(help))])
}

/// How an error's `Display` puts its help below it.
const HELP: &str = "\n  help: ";

fn labelled(label: &str, style: Style, text: &str) -> String {
    match text.split_once(HELP) {
        Some((what, help)) => format!("{style}{label}:{style:#} {what}\n  {DIM}help: {help}{DIM:#}"),
        None => format!("{style}{label}:{style:#} {text}"),
    }
}

fn print(text: impl Display) {
    // A terminal that is gone does not end the run.
    let _ = writeln!(anstream::stderr(), "{text}");
}

fn is(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}
