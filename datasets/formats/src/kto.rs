//! Rows that judge one answer, a conversation's last or one in a column of its own, with a `label` (LLaMA-Factory: `kto_tag`) that
//! says whether it was liked: TRL's unpaired preference, ms-swift's and LLaMA-Factory's KTO rows. Where a loss compares answers,
//! the host joins those to the same prompt.

use dpo_plugin_api::prelude::*;

use crate::row::{conversation, first, with_system, with_variables};
use crate::sft::{has_single, single};

/// Whether the answer was liked.
const LABELS: [&str; 2] = ["label", "kto_tag"];

/// The format `kto`.
pub(crate) struct Kto;

impl DatasetFormat for Kto {
    fn name(&self) -> &'static str {
        "kto"
    }

    fn summary(&self) -> &'static str {
        "one answer with a label: messages, prompt and completion, or Alpaca's columns"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows/kto.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        crate::recognised(self.name(), row)
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let Some((name, label)) = first(row, &LABELS) else { return bail!("column 'label' is missing") };
        let Some(liked) = liked(label) else { return bail!("'{name}' should be true or false, is {label}") };
        let (prompt, answer) = match conversation(row).filter(|_| !has_single(row)) {
            Some(list) => {
                let mut turns = Message::parse_list(list)?;
                let start = turns.iter().rposition(|m| m.role != "assistant").map_or(0, |last| last + 1);
                let answer = turns.split_off(start);
                if answer.is_empty() {
                    return bail!("the conversation ends without an assistant's answer");
                }
                (Text::Messages(with_system(turns, row)?), Text::Messages(answer))
            }
            None => single(row)?,
        };
        Ok(vec![with_variables(Record::liked(prompt, answer, liked), row)?])
    }
}

pub(crate) fn takes(row: &Row) -> u8 {
    let label = first(row, &LABELS).is_some_and(|(_, label)| liked(label).is_some());
    if label && (has_single(row) || conversation(row).is_some()) { 2 } else { 0 }
}

/// A label as JSON or csv writes it.
fn liked(label: &Value) -> Option<bool> {
    match label.to_string().trim_matches('"').to_lowercase().as_str() {
        "true" | "1" | "1.0" => Some(true),
        "false" | "0" | "0.0" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        for (label, expected) in [(json!(true), true), (json!(0), false), (json!("True"), true), (json!("0"), false)] {
            assert_eq!(liked(&label), Some(expected), "{label}");
        }
        assert_eq!(liked(&json!("good")), None);
    }

    #[test]
    fn the_label_is_kept() {
        let row = json!({"prompt": "2 + 2 =", "completion": " 5", "label": false});
        let record = &Kto.records(row.as_object().unwrap()).unwrap()[0];
        let answer = RecordAnswer { text: Text::Plain(" 5".into()), label: 0.0, detached: false };
        assert_eq!(record.answers, [answer]);
    }

    #[test]
    fn an_answer_is_needed() {
        let row = json!({"messages": [{"role": "user", "content": "hi"}], "label": true});
        assert!(Kto.records(row.as_object().unwrap()).unwrap_err().message.contains("without an assistant"));
    }
}
