//! How text is split before bytes are merged: `tokenizer.json` says it by steps and regular expressions, llama.cpp by the name of a tokenizer
//! that it knows (`src/llama-vocab.cpp`, `llm_tokenizer_bpe`). A tokenizer that splits as one of these gets its name.

use dpo_core::console::Remark;
use dpo_core::error::Result;
use serde_json::Value as Json;

use super::refused;

const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A way to split.
struct Row {
    steps: &'static [Step<'static>],
    /// Whether a word that is a token is taken whole, whatever merges say.
    whole_words: bool,
    name: &'static str,
}

/// A step of it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step<'a> {
    /// What the expression matches is apart.
    Regex(&'a str),
    /// So is every digit.
    Digits,
    /// So is what the expression of GPT-2 matches.
    Gpt2,
}

const ROWS: &[Row] = &[
    Row { steps: &[Step::Regex(QWEN2)], whole_words: false, name: "qwen2" },
    Row { steps: &[Step::Regex(QWEN35)], whole_words: false, name: "qwen35" },
    Row { steps: &[Step::Regex(LLAMA3)], whole_words: true, name: "llama-bpe" },
    Row { steps: &[Step::Regex(LLAMA3)], whole_words: false, name: "dbrx" },
    Row { steps: &[Step::Regex(TEKKEN)], whole_words: true, name: "tekken" },
    Row { steps: &[Step::Regex(O200K)], whole_words: false, name: "gpt-4o" },
    Row { steps: &[Step::Digits, Step::Gpt2], whole_words: false, name: "smollm" },
    Row { steps: &[Step::Gpt2], whole_words: false, name: "gpt-2" },
];

/// The name by which llama.cpp splits as `tokenizer.json` says, and what it does otherwise.
pub(super) fn name(file: &Json) -> Result<(&'static str, Option<Remark>)> {
    let kind = |part: &Json| part.get("type").and_then(Json::as_str).unwrap_or_default().to_owned();
    match file.get("normalizer").filter(|n| !n.is_null()) {
        None => {}
        // Text that is composed stays as it is, and llama.cpp takes it as it comes.
        Some(normalizer) if kind(normalizer) == "NFC" => {}
        Some(normalizer) => return Err(refused(format!("a tokenizer with the normalizer {}", kind(normalizer)))),
    }
    let own = file.get("pre_tokenizer").unwrap_or(&Json::Null);
    let parts = match own.get("pretokenizers").and_then(Json::as_array) {
        Some(parts) => parts.iter().collect(),
        None => vec![own],
    };
    let steps = parts.into_iter().map(step).collect::<Result<Vec<_>>>()?;
    let steps: Vec<Step<'_>> = steps.into_iter().flatten().collect();
    let whole_words = file.get("model").and_then(|m| m.get("ignore_merges")).and_then(Json::as_bool) == Some(true);
    let same: Vec<&Row> = ROWS.iter().filter(|row| row.steps == steps).collect();
    match (same.iter().find(|row| row.whole_words == whole_words), same.first()) {
        (Some(row), _) => Ok((row.name, None)),
        (None, Some(row)) => {
            let (own, theirs) = if whole_words { ("whole", "by merges") } else { ("by merges", "whole") };
            let what = format!(
                "the tokenizer makes words that are tokens {own}, llama.cpp's '{}' makes them {theirs}: rare words may get other tokens there",
                row.name
            );
            Ok((row.name, Some(Remark::from(what))))
        }
        (None, None) => Err(refused(format!("a tokenizer that splits text by {}", said(&steps)))),
    }
}

/// A step of a pre-tokenizer; none for the one that only writes bytes as letters.
fn step(part: &Json) -> Result<Option<Step<'_>>> {
    let flag = |name: &str| part.get(name).and_then(Json::as_bool);
    let text = |name: &str| part.get(name).and_then(Json::as_str);
    let regex = part.get("pattern").and_then(|pattern| pattern.get("Regex")).and_then(Json::as_str);
    match (text("type"), regex) {
        (Some("Split"), Some(regex)) if text("behavior") == Some("Isolated") && flag("invert") != Some(true) => {
            Ok(Some(Step::Regex(regex)))
        }
        (Some("Digits"), _) if flag("individual_digits") == Some(true) => Ok(Some(Step::Digits)),
        (Some("ByteLevel"), _) if flag("add_prefix_space") != Some(true) => {
            Ok((flag("use_regex") != Some(false)).then_some(Step::Gpt2))
        }
        _ => Err(refused(format!("a tokenizer with the step {part}"))),
    }
}

fn said(steps: &[Step<'_>]) -> String {
    let one = |step: &Step<'_>| match step {
        Step::Regex(regex) => format!("'{regex}'"),
        Step::Digits => "digits".into(),
        Step::Gpt2 => "GPT-2's expression".into(),
    };
    steps.iter().map(one).collect::<Vec<_>>().join(", then ")
}
