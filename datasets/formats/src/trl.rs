//! TRL's preference rows: `chosen` and `rejected`, both with the prompt in front or with a `prompt` of their own, as text
//! or as conversations (TRL, `docs/source/dataset_formats.md`, `data_utils.py::extract_prompt`).

use dpo_plugin_api::dataset::column;
use dpo_plugin_api::prelude::*;

use crate::pairs::scores;
use crate::row::{has_more_prompt, has_prompt, is_dialogue, text, with_variables};

/// Parts of names of columns that may hold what the answers reply to, whatever else is in the name.
const ASKS: [&str; 12] = [
    "prompt",
    "question",
    "instruct",
    "query",
    "input",
    "problem",
    "context",
    "message",
    "conversation",
    "dialog",
    "history",
    "request",
];

/// The format `trl`.
pub(crate) struct Trl;

impl DatasetFormat for Trl {
    fn name(&self) -> &'static str {
        "trl"
    }

    fn summary(&self) -> &'static str {
        "chosen and rejected, with or without prompt; text or conversations"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows/trl.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        crate::recognised(self.name(), row)
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let (chosen, rejected) = (text(column(row, "chosen")?)?, text(column(row, "rejected")?)?);
        let prompt = row.get("prompt").filter(|v| !v.is_null()).map(text).transpose()?;
        let (prompt, chosen, rejected) = match (prompt, chosen, rejected) {
            (Some(prompt), chosen, rejected) => (prompt, chosen, rejected),
            (None, Text::Plain(chosen), Text::Plain(rejected)) => part(&chosen, &rejected),
            (None, chosen, rejected) => (Text::Messages(Vec::new()), chosen, rejected),
        };
        let [better, worse] = scores(row)?;
        let record = Record::scored(prompt, vec![(chosen, better), (rejected, worse)]);
        with_variables(record, row).map(|record| vec![record])
    }
}

pub(crate) fn takes(row: &Row) -> u8 {
    let of = |name: &str| row.get(name).filter(|value| !value.is_null());
    match (of("prompt"), of("chosen"), of("rejected")) {
        _ if has_more_prompt(row) => 0,
        (Some(Value::String(prompt)), Some(Value::String(_)), Some(Value::String(_))) if !is_dialogue(prompt) => 2,
        (Some(Value::Array(_)), Some(Value::Array(_)), Some(Value::Array(_))) => 2,
        (None, Some(Value::Array(_)), Some(Value::Array(_))) if !has_prompt(row) => 2,
        (None, Some(Value::String(_)), Some(Value::String(_))) if !row.iter().any(asks) => 1,
        _ => 0,
    }
}

/// Whether a column may hold what the answers reply to. What two texts have in common is then no prompt.
fn asks((name, value): (&String, &Value)) -> bool {
    let name = name.to_lowercase();
    let about = ["_id", "_source", "_type", "_hash", "_len", "_length"].iter().any(|end| name.ends_with(end));
    let says = value.as_str().is_some_and(|text| !text.is_empty()) || value.is_array();
    says && !about && ASKS.iter().any(|part| name.contains(part))
}

/// The prompt of two texts is what they begin with, less a space before the place where they part: that belongs to the
/// answers. As in TRL at least one letter is left to each of them.
fn part(chosen: &str, rejected: &str) -> (Text, Text, Text) {
    let letters = || chosen.char_indices().zip(rejected.chars());
    let parting = letters().find(|((_, a), b)| a != b);
    let mut at = parting.or_else(|| letters().last()).map_or(0, |((at, _), _)| at);
    if parting.is_some() && chosen[..at].ends_with(' ') {
        at -= 1;
    }
    let plain = |text: &str| Text::Plain(text.to_owned());
    (plain(&chosen[..at]), plain(&chosen[at..]), plain(&rejected[at..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(prompt: &str, chosen: &str, rejected: &str) -> (Text, Text, Text) {
        let text = |t: &str| Text::Plain(t.into());
        (text(prompt), text(chosen), text(rejected))
    }

    #[test]
    fn texts_part_as_in_trl() {
        // The right sides are what trl.data_utils.extract_prompt 1.16 answers.
        assert_eq!(part("The sky is blue.", "The sky is green."), plain("The sky is", " blue.", " green."));
        assert_eq!(part("The sky is blue.", "The sky is black."), plain("The sky is bl", "ue.", "ack."));
        assert_eq!(part("天空是蓝的", "天空是绿的"), plain("天空是", "蓝的", "绿的"));
        assert_eq!(part("The sky", "The sky is"), plain("The sk", "y", "y is"));
    }

    #[test]
    fn a_prompt_text_with_conversations_is_of_another_format() {
        let row = json!({"prompt": "hi", "chosen": [], "rejected": []});
        assert_eq!(Trl.recognises(row.as_object().unwrap()), 0);
    }

    #[test]
    fn template_arguments_and_tools_are_kept() {
        let turn = |role: &str| json!([{"role": role, "content": "x"}]);
        let row = json!({"prompt": turn("user"), "chosen": turn("assistant"), "rejected": turn("assistant"),
            "tools": "[]", "chat_template_kwargs": {"enable_thinking": false}});
        let record = &Trl.records(row.as_object().unwrap()).unwrap()[0];
        assert_eq!(record.template_args["enable_thinking"], json!(false));
        assert_eq!(record.tools, Some(json!("[]")));
    }
}
