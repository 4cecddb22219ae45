//! What a model answers before and after a run: on a GPU, or where the model is so small that it takes a moment on the CPU.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use dpo_core::backend::Backend;
use serde_json::json;

use dpo_core::console::{self, Remark};
use dpo_core::error::Result;
use dpo_data::Examples;
use dpo_generate::{Generator, Sampling, compare};
use {dpo_core::files, dpo_page as page};

/// Most bytes of a checkpoint whose model is asked on the CPU.
const SMALL: usize = 64 << 20;
/// Prompts, tokens of an answer, and the time after which no further prompt is begun.
const PROMPTS: usize = 3;
const TOKENS: usize = 40;
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether a checkpoint of so many bytes is asked there.
pub(super) fn are_cheap(bytes: usize, backend: &dyn Backend) -> bool {
    backend.is_gpu() || bytes <= SMALL
}

/// Asks prompts of some examples, and puts what is answered into the report.
pub(super) fn write(mut generator: Generator, examples: &Examples, output: &Path) -> Result<()> {
    let sampling = Sampling { max_new_tokens: TOKENS, ..Sampling::default() };
    let mut seen = HashSet::new();
    let prompts = examples.iter().filter_map(Result::ok).map(|example| example.prompt().to_vec());
    let prompts = prompts.filter(|prompt| seen.insert(prompt.clone()));
    let (start, mut lines, mut same) = (Instant::now(), String::new(), true);
    for prompt in prompts.take(PROMPTS).take_while(|_| start.elapsed() < PATIENCE) {
        for answers in compare(&mut generator, &[&prompt], &sampling)? {
            let line = json!({"prompt": answers.prompt, "before": answers.base, "after": answers.tuned});
            lines += &format!("{line}\n");
            same &= answers.base == answers.tuned;
        }
    }
    if same && !lines.is_empty() {
        let what = "the model answers the prompts that were tried as it did before";
        let help = "more steps, or a higher --learning-rate; where a loss compares answers, rewards may be good before what is said \
                    changes: --rpo-alpha 1 makes the chosen answers likelier";
        console::note(Remark::from(what).help(help));
    }
    files::write_into(&output.join(page::ANSWERS), lines.as_bytes())?;
    page::write_report(output)
}
