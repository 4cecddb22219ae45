//! LLaMA-Factory's ranking rows: Alpaca's columns, ShareGPT's or OpenAI's conversations, and whole conversations in
//! `chosen_messages` and `rejected_messages` (LLaMA-Factory, `data/README.md`, `src/llamafactory/data/converter.py`).

use dpo_plugin_api::dataset::{column, kind, plain_text};
use dpo_plugin_api::prelude::*;

/// The format `llama-factory`.
pub struct LlamaFactory;

impl DatasetFormat for LlamaFactory {
    fn name(&self) -> &'static str {
        "llama-factory"
    }

    fn summary(&self) -> &'static str {
        "Alpaca and ShareGPT ranking; chosen_messages and rejected_messages"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        let has = |name: &str| filled(row, name).is_some();
        let whole = has("chosen_messages") && has("rejected_messages");
        let alpaca = has("instruction") && has("chosen") && has("rejected");
        let turns = ["chosen", "rejected"].iter().all(|name| row.get(*name).is_some_and(Value::is_object));
        let sharegpt = turns && (has("conversations") || has("messages"));
        if whole || alpaca || sharegpt { 2 } else { 0 }
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let mut record = if filled(row, "chosen_messages").is_some() {
            let whole = |name| Ok(Text::Messages(Message::parse_list(column(row, name)?)?));
            Record::pair(Text::Messages(Vec::new()), whole("chosen_messages")?, whole("rejected_messages")?)
        } else {
            let mut prompt = match filled(row, "conversations").or_else(|| filled(row, "messages")) {
                Some(list) => Message::parse_list(list)?,
                None => alpaca_prompt(row)?,
            };
            if let Some(system) = filled(row, "system").filter(|_| prompt.first().is_none_or(|m| m.role != "system")) {
                prompt.insert(0, Message::new("system", plain_text(system)?));
            }
            if prompt.last().is_some_and(|m| m.role == "assistant") {
                return Err(Error::new("the conversation before the answers ends with an assistant's turn")
                    .help("it should end with the turn that 'chosen' and 'rejected' answer"));
            }
            Record::pair(Text::Messages(prompt), answer(column(row, "chosen")?)?, answer(column(row, "rejected")?)?)
        };
        record.tools = filled(row, "tools").cloned();
        Ok(vec![record])
    }
}

/// The value of a column that says something: LLaMA-Factory writes "" for what is not there.
fn filled<'a>(row: &'a Row, name: &str) -> Option<&'a Value> {
    row.get(name).filter(|v| !v.is_null() && v.as_str() != Some("") && v.as_array().is_none_or(|list| !list.is_empty()))
}

/// `history`, then `instruction` with `input` on a line of its own.
fn alpaca_prompt(row: &Row) -> Result<Vec<Message>> {
    let mut turns = Vec::new();
    match filled(row, "history") {
        None => {}
        Some(Value::Array(history)) => {
            for round in history {
                match round.as_array().map(Vec::as_slice) {
                    Some([Value::String(question), Value::String(reply)]) => turns
                        .extend([Message::new("user", question.as_str()), Message::new("assistant", reply.as_str())]),
                    _ => return bail!("'history' should be a list of [question, answer]"),
                }
            }
        }
        Some(other) => return bail!("'history' should be a list, is {}", kind(other)),
    }
    let mut question = plain_text(column(row, "instruction")?)?;
    if let Some(input) = filled(row, "input") {
        question = format!("{question}\n{}", plain_text(input)?);
    }
    turns.push(Message::new("user", question));
    Ok(turns)
}

/// One answer: a text, a turn, or a list of turns.
fn answer(value: &Value) -> Result<Text> {
    let turns = match value {
        Value::String(text) => vec![Message::new("assistant", text.as_str())],
        Value::Object(_) => vec![Message::parse(value)?],
        _ => Message::parse_list(value)?,
    };
    Ok(Text::Messages(turns))
}

plugin! { datasets: [LlamaFactory] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::check_format;

    use super::*;

    fn prompt(row: Value) -> Vec<(String, String)> {
        let records = LlamaFactory.records(row.as_object().unwrap()).unwrap();
        let Text::Messages(prompt) = &records[0].prompt else { panic!("{records:?}") };
        prompt.iter().map(|m| (m.role.clone(), m.content.clone())).collect()
    }

    fn turn(role: &str, content: &str) -> (String, String) {
        (role.into(), content.into())
    }

    #[test]
    fn examples() {
        check_format(&LlamaFactory);
    }

    #[test]
    fn alpaca_joins_instruction_and_input() {
        let row = json!({"instruction": "Translate.", "input": "Guten Tag", "chosen": "Good day", "rejected": "Day",
            "system": "Be brief.", "history": [["hi", "hello"]]});
        let expected = [
            turn("system", "Be brief."),
            turn("user", "hi"),
            turn("assistant", "hello"),
            turn("user", "Translate.\nGuten Tag"),
        ];
        assert_eq!(prompt(row), expected);
        let row = json!({"instruction": "Sing.", "input": "", "chosen": "la", "rejected": "no", "system": ""});
        assert_eq!(prompt(row), [turn("user", "Sing.")]);
    }

    #[test]
    fn sharegpt_takes_the_system_column() {
        let row = json!({"conversations": [{"from": "human", "value": "hi"}], "system": "S",
            "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}});
        assert_eq!(LlamaFactory.recognises(row.as_object().unwrap()), 2);
        assert_eq!(prompt(row), [turn("system", "S"), turn("user", "hi")]);
    }

    #[test]
    fn the_prompt_ends_with_the_question() {
        let row = json!({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}],
            "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}});
        let error = LlamaFactory.records(row.as_object().unwrap()).unwrap_err();
        assert!(error.message.contains("ends with an assistant's turn"), "{error}");
    }
}
