//! What a person sees of runs: the live page of `train --dashboard` and `ui`, `report.html`, and the card of a model that is pushed.
//!
//! All of it knows a run by the files in its folder and by nothing else, so that a run that goes on, one that ended and one
//! that was copied from another machine look the same.

mod answers;
mod card;
mod chart;
mod connections;
mod door;
mod excerpt;
mod launcher;
mod report;
mod request;
mod runs;
mod server;
mod settings;

pub use answers::write_answers;
pub use card::{Card, PICTURE, Weights};
pub use launcher::{Launcher, ReadStart, Start};
pub use report::write as write_report;
pub use runs::Runs;
pub use server::{Server, Watchers};

/// The flags of a run, every one of them.
pub const ARGS: &str = "args.json";
/// What was known before the first step: model, device, data, number of steps.
pub const FACTS: &str = "run.json";
/// Numbers, a line a logged step.
pub const LOG: &str = "logging.jsonl";
/// Warnings, and what the loss doctor said.
pub const REMARKS: &str = "remarks.jsonl";
/// A few examples, token by token.
pub const SAMPLES: &str = "samples.jsonl";
/// Answers to held prompts before and after: `prompt`, `before`, `after`.
pub const ANSWERS: &str = "answers.jsonl";
/// Answers of the model with the run's adapter and without, from `eval --generate`.
pub const GENERATED: &str = "generated.jsonl";
/// What a run printed that the page has started.
const CONSOLE: &str = "console.log";

const STYLE: &str = include_str!("page.css");

/// Text of data, as text.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            '\'' => safe += "&#39;",
            letter => safe.push(letter),
        }
    }
    safe
}
