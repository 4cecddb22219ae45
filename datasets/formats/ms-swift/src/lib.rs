//! ms-swift's rows: a whole conversation in `messages` or `conversations`, or `query` and `response` with `history` and `system`
//! before them; and what should not have been said in `rejected_response` or `rejected_messages` (ms-swift,
//! `docs/source_en/Customization/Custom-dataset.md`).

use dpo_plugin_api::dataset::{column, kind, plain_text};
use dpo_plugin_api::prelude::*;

/// The format `ms-swift`.
pub struct MsSwift;

impl DatasetFormat for MsSwift {
    fn name(&self) -> &'static str {
        "ms-swift"
    }

    fn summary(&self) -> &'static str {
        "messages, or query and response, with rejected_response or rejected_messages"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        let has = |name: &str| there(row, name).is_some();
        let conversation = has("messages") || has("conversations") || has("query") && has("response");
        if conversation && (has("rejected_response") || has("rejected_messages")) { 2 } else { 0 }
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let mut messages = conversation(row)?;
        let mut record = match there(row, "rejected_messages") {
            Some(other) => {
                let other = with_system(Message::parse_list(other)?, row);
                let (chosen, rejected) = (Text::Messages(messages), Text::Messages(other));
                Record::pair(Text::Messages(Vec::new()), chosen, rejected)
            }
            None => {
                let rejected = rejected_answer(column(row, "rejected_response")?)?;
                let answer = messages.iter().rposition(|m| m.role != "assistant").map_or(0, |last| last + 1);
                let chosen = messages.split_off(answer);
                if chosen.is_empty() {
                    return bail!("the conversation ends without an assistant's answer");
                }
                Record::pair(Text::Messages(messages), Text::Messages(chosen), Text::Messages(rejected))
            }
        };
        record.tools = there(row, "tools").cloned();
        Ok(vec![record])
    }
}

/// A column that is filled.
fn there<'a>(row: &'a Row, name: &str) -> Option<&'a Value> {
    row.get(name).filter(|value| !value.is_null())
}

/// The turns of a row, with the system message that a column of its own has.
fn conversation(row: &Row) -> Result<Vec<Message>> {
    let messages = match there(row, "messages").or_else(|| there(row, "conversations")) {
        Some(list) => Message::parse_list(list)?,
        None => {
            let mut messages = Vec::new();
            for turn in there(row, "history").and_then(Value::as_array).into_iter().flatten() {
                let Some([query, response]) = turn.as_array().map(Vec::as_slice) else {
                    return bail!("a turn of 'history' should be a list of two texts, is {}", kind(turn));
                };
                messages.push(Message::new("user", plain_text(query)?));
                messages.push(Message::new("assistant", plain_text(response)?));
            }
            messages.push(Message::new("user", plain_text(column(row, "query")?)?));
            messages.push(Message::new("assistant", plain_text(column(row, "response")?)?));
            messages
        }
    };
    Ok(with_system(messages, row))
}

/// Turns behind the system message of a row's `system`, unless they begin with one.
fn with_system(mut messages: Vec<Message>, row: &Row) -> Vec<Message> {
    let has_system = messages.first().is_some_and(|m| m.role == "system");
    if let Some(Value::String(system)) = there(row, "system").filter(|_| !has_system) {
        messages.insert(0, Message::new("system", system.as_str()));
    }
    messages
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
        assert_eq!(error.message, "the conversation ends without an assistant's answer");
    }

    #[test]
    fn questions_and_turns_of_sharegpt_are_conversations() {
        let turns = |row: &str| {
            let record = records(row).unwrap().remove(0);
            let Text::Messages(prompt) = &record.prompt else { panic!("{record:?}") };
            let prompt: Vec<String> = prompt.iter().map(|m| format!("{}: {}", m.role, m.content)).collect();
            assert_eq!(record.answers[0].text, Text::Messages(vec![Message::new("assistant", "Paris.")]));
            prompt
        };
        let row = r#"{"system": "Be brief.", "history": [["Hi", "Hello"]], "query": "France?", "response": "Paris.", "rejected_response": "Lyon."}"#;
        assert_eq!(turns(row), ["system: Be brief.", "user: Hi", "assistant: Hello", "user: France?"]);
        let row = r#"{"conversations": [{"from": "human", "value": "France?"}, {"from": "gpt", "value": "Paris."}], "rejected_response": "Lyon."}"#;
        assert_eq!(turns(row), ["user: France?"]);
    }

    #[test]
    fn judged_rows_are_of_another_format() {
        let row = r#"{"messages": [{"role": "user", "content": "hi"}], "label": true}"#;
        assert_eq!(MsSwift.recognises(&serde_json::from_str(row).unwrap()), 0);
    }
}
