//! What a model answers before and after a run, at the end of one whose model is so small that it takes a moment.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::data::TokenPair;
use crate::error::Result;
use crate::generate::{Generator, Sampling, compare};
use crate::lora::Adapter;
use crate::model::Model;
use crate::{files, page};

/// Most bytes of a checkpoint whose model is asked.
const SMALL: usize = 64 << 20;
/// Prompts, tokens of an answer, and the time after which no further prompt is begun.
const PROMPTS: usize = 3;
const TOKENS: usize = 40;
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether a checkpoint of so many bytes is asked.
pub(super) fn are_cheap(bytes: usize) -> bool {
    bytes <= SMALL
}

/// Asks prompts of some pairs, and puts what is answered into the report.
pub(super) fn write(model: &Model<'_>, adapter: Adapter, pairs: &[TokenPair], output: &Path) -> Result<()> {
    let mut generator = Generator::open(model, Some(adapter), "cpu")?;
    let sampling = Sampling { max_new_tokens: TOKENS, ..Sampling::default() };
    let mut seen = HashSet::new();
    let prompts = pairs.iter().map(|pair| pair.prompt.as_slice()).filter(|prompt| seen.insert(*prompt));
    let (start, mut lines) = (Instant::now(), String::new());
    for prompt in prompts.take(PROMPTS).take_while(|_| start.elapsed() < PATIENCE) {
        for answers in compare(&mut generator, &[prompt], &sampling)? {
            let line = json!({"prompt": answers.prompt, "before": answers.base, "after": answers.tuned});
            lines += &format!("{line}\n");
        }
    }
    files::write_into(&output.join(page::ANSWERS), lines.as_bytes())?;
    page::write_report(output)
}
