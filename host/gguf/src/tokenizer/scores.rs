//! Scores of a vocabulary of sentencepiece. llama.cpp merges the two neighbours whose text has the highest score; `tokenizer.json` has the order
//! of merges in place of scores, so that the text of the first merge gets the highest.

use std::collections::HashMap;

use dpo_core::console::Remark;
use dpo_core::error::Result;
use serde_json::Value as Json;

use super::{BYTE, CONTROL, NORMAL, Tokens, UNKNOWN, USER_DEFINED, refused};

/// The score of what is no result of a merge.
const LAST: f32 = -1e6;

/// Scores by id; tokens of bytes and the unknown one get their types.
pub(super) fn of(tokens: &mut Tokens, merges: &[[String; 2]], model: &Json) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, merge) in merges.iter().enumerate() {
        ranks.entry(merge.concat()).or_insert(rank);
    }
    let unknown = model.get("unk_token").and_then(Json::as_str);
    let all = tokens.texts.iter().zip(&mut tokens.types);
    all.map(|(text, kind)| match *kind {
        NORMAL if is_byte(text) => {
            *kind = BYTE;
            0.0
        }
        NORMAL | CONTROL if Some(text.as_str()) == unknown => {
            *kind = UNKNOWN;
            0.0
        }
        NORMAL => ranks.get(text).map_or(LAST, |rank| -(*rank as f32)),
        CONTROL | USER_DEFINED => -1000.0,
        _ => -10000.0,
    })
    .collect()
}

/// `<0x0A>` and the like.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Whether a space is put before a text, and where llama.cpp puts more of them.
///
/// # Errors
/// Steps before the merges that llama.cpp does not take.
pub(super) fn add_space_prefix(file: &Json, settings: &Json) -> Result<(bool, Option<Remark>)> {
    let (mut prefix, mut at_start_alone) = (false, false);
    let parts = |name: &str, list: &str| {
        let own = file.get(name).filter(|part| !part.is_null());
        let inner = own.and_then(|own| own.get(list)).and_then(Json::as_array);
        inner.map_or_else(|| own.into_iter().collect::<Vec<_>>(), |list| list.iter().collect())
    };
    let steps = parts("normalizer", "normalizers").into_iter().chain(parts("pre_tokenizer", "pretokenizers"));
    for step in steps {
        let text = |name: &str| step.get(name).and_then(Json::as_str);
        let pattern = step.get("pattern").and_then(|pattern| pattern.get("String")).and_then(Json::as_str);
        match (text("type"), pattern) {
            (Some("Prepend"), _) if text("prepend") == Some("▁") => prefix = true,
            (Some("Replace"), Some(" ")) if text("content") == Some("▁") => {}
            (Some("Metaspace"), _) => {
                prefix |= text("prepend_scheme") != Some("never");
                at_start_alone |= text("prepend_scheme") == Some("first");
            }
            (Some("Split"), Some(" ")) if text("behavior") == Some("MergedWithPrevious") => {}
            _ => return Err(refused(format!("a tokenizer with the step {step}"))),
        }
    }
    let prefix = prefix && settings.get("add_prefix_space").and_then(Json::as_bool) != Some(false);
    let remark = "the tokenizer puts a space before a whole text, llama.cpp behind every special token, too, which may make other tokens there";
    Ok((prefix, (prefix && at_start_alone).then(|| Remark::from(remark))))
}
