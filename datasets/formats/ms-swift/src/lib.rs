//! ms-swift's rows: a whole conversation in `messages`, and what should not have been said in `rejected_response` or
//! `rejected_messages` (ms-swift, `docs/source_en/Customization/Custom-dataset.md`).

use dpo_plugin_api::dataset::{column, kind};
use dpo_plugin_api::prelude::*;

/// The format `ms-swift`.
pub struct MsSwift;

impl DatasetFormat for MsSwift {
    fn name(&self) -> &'static str {
        "ms-swift"
    }

    fn summary(&self) -> &'static str {
        "messages with rejected_response or rejected_messages"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        let has = |name: &str| row.get(name).is_some_and(|v| !v.is_null());
        if has("messages") && (has("rejected_response") || has("rejected_messages")) { 2 } else { 0 }
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let mut messages = Message::parse_list(column(row, "messages")?)?;
        let mut record = match row.get("rejected_messages").filter(|v| !v.is_null()) {
            Some(other) => {
                let (chosen, rejected) = (Text::Messages(messages), Text::Messages(Message::parse_list(other)?));
                Record::pair(Text::Messages(Vec::new()), chosen, rejected)
            }
            None => {
                let rejected = rejected_answer(column(row, "rejected_response")?)?;
                let answer = messages.iter().rposition(|m| m.role != "assistant").map_or(0, |last| last + 1);
                let chosen = messages.split_off(answer);
                if chosen.is_empty() {
                    return bail!("'messages' ends without an assistant's answer");
                }
                Record::pair(Text::Messages(messages), Text::Messages(chosen), Text::Messages(rejected))
            }
        };
        record.tools = row.get("tools").filter(|v| !v.is_null()).cloned();
        Ok(vec![record])
    }
}

/// `rejected_response` as text, or as the list of turns that it is made of.
fn rejected_answer(value: &Value) -> Result<Vec<Message>> {
    match value {
        Value::String(text) => Ok(vec![Message::new("assistant", text.as_str())]),
        Value::Array(_) => Message::parse_list(value),
        other => bail!("'rejected_response' should be a text or a list of messages, is {}", kind(other)),
    }
}

plugin! { datasets: [MsSwift] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::check_format;

    use super::*;

    fn records(row: &str) -> Result<Vec<Record>> {
        MsSwift.records(&serde_json::from_str(row).unwrap())
    }

    #[test]
    fn examples() {
        check_format(&MsSwift);
    }

    #[test]
    fn the_answer_follows_the_last_user_or_tool_turn() {
        let record = &records(
            r#"{"messages": [{"role": "user", "content": "weather?"}, {"role": "tool_call", "content": "{\"name\": \"w\", \"arguments\": {}}"},
                {"role": "tool_response", "content": "rain"}, {"role": "assistant", "content": "It rains."}], "rejected_response": "Sun."}"#,
        )
        .unwrap()[0];
        let Text::Messages(prompt) = &record.prompt else { panic!("{record:?}") };
        assert_eq!(prompt.iter().map(|m| m.role.as_str()).collect::<Vec<_>>(), ["user", "assistant", "tool"]);
        let answers: Vec<&Text> = record.answers.iter().map(|a| &a.text).collect();
        let turn = |text: &str| Text::Messages(vec![Message::new("assistant", text)]);
        assert_eq!(answers, [&turn("It rains."), &turn("Sun.")]);
    }

    #[test]
    fn no_answer_is_an_error() {
        let error =
            records(r#"{"messages": [{"role": "user", "content": "hi"}], "rejected_response": "x"}"#).unwrap_err();
        assert_eq!(error.message, "'messages' ends without an assistant's answer");
    }

    #[test]
    fn judged_rows_are_of_another_format() {
        let row = r#"{"messages": [{"role": "user", "content": "hi"}], "label": true}"#;
        assert_eq!(MsSwift.recognises(&serde_json::from_str(row).unwrap()), 0);
    }
}
