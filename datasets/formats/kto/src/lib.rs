//! Rows that judge one answer: `messages` or `prompt` and `completion`, with a `label` that says whether it was liked
//! (TRL's unpaired preference, ms-swift's and LLaMA-Factory's KTO rows). Where a loss compares answers, the host joins those to
//! the same prompt.

use dpo_plugin_api::dataset::{column, kind};
use dpo_plugin_api::prelude::*;

/// The format `kto`.
pub struct Kto;

impl DatasetFormat for Kto {
    fn name(&self) -> &'static str {
        "kto"
    }

    fn summary(&self) -> &'static str {
        "one answer with a label: messages, or prompt and completion"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        let has = |name: &str| row.get(name).is_some_and(|v| !v.is_null());
        let answer = has("messages") || has("prompt") && has("completion");
        if has("label") && answer && !has("rejected_response") && !has("rejected_messages") { 2 } else { 0 }
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let liked = liked(column(row, "label")?)?;
        let (prompt, answer) = match row.get("messages").filter(|v| !v.is_null()) {
            Some(list) => {
                let mut messages = Message::parse_list(list)?;
                let start = messages.iter().rposition(|m| m.role != "assistant").map_or(0, |last| last + 1);
                let answer = messages.split_off(start);
                if answer.is_empty() {
                    return bail!("'messages' ends without an assistant's answer");
                }
                (Text::Messages(messages), Text::Messages(answer))
            }
            None => (text(column(row, "prompt")?)?, text(column(row, "completion")?)?),
        };
        let mut record = Record::liked(prompt, answer, liked);
        record.tools = row.get("tools").filter(|v| !v.is_null()).cloned();
        Ok(vec![record])
    }
}

/// A label as JSON or csv writes it.
fn liked(label: &Value) -> Result<bool> {
    match label.to_string().trim_matches('"').to_lowercase().as_str() {
        "true" | "1" | "1.0" => Ok(true),
        "false" | "0" | "0.0" => Ok(false),
        _ => bail!("'label' should be true or false, is {label}"),
    }
}

fn text(value: &Value) -> Result<Text> {
    match value {
        Value::String(text) => Ok(Text::Plain(text.clone())),
        Value::Array(_) => Ok(Text::Messages(Message::parse_list(value)?)),
        other => bail!("a prompt or an answer should be a text or a conversation, is {}", kind(other)),
    }
}

plugin! { datasets: [Kto] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::check_format;

    use super::*;

    #[test]
    fn examples() {
        check_format(&Kto);
    }

    #[test]
    fn labels() {
        for (label, expected) in [(json!(true), true), (json!(0), false), (json!("True"), true), (json!("0"), false)] {
            assert_eq!(liked(&label).unwrap(), expected, "{label}");
        }
        assert_eq!(liked(&json!("good")).unwrap_err().message, "'label' should be true or false, is \"good\"");
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
