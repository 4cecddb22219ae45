//! What a person reads while a command runs. Of many ranks, one speaks.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressStyle};

static SILENT: AtomicBool = AtomicBool::new(false);

/// From now on only errors are printed: another rank speaks.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Prints a line to stderr.
pub fn line(text: impl Display) {
    if !SILENT.load(Ordering::Relaxed) {
        eprintln!("{text}");
    }
}

/// A bar on a terminal; nothing elsewhere.
pub fn bar(length: u64, template: &str) -> ProgressBar {
    if SILENT.load(Ordering::Relaxed) {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style.progress_chars("━╸ "))
}
