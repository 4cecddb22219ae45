//! Dataset formats: from a row of a file to records of a prompt and its answers.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result, bail};

/// A row: what one line of a jsonl file, one element of a json array or one record of csv or parquet holds.
pub type Row = Map<String, Value>;

/// Most records of one row.
pub const MAX_RECORDS: usize = 10_000;

/// Refuses more records than a row may have.
pub fn check_records(records: &[Record]) -> Result<()> {
    match records.len() {
        count if count > MAX_RECORDS => bail!("{count} records of one row, more than {MAX_RECORDS}"),
        _ => Ok(()),
    }
}

/// A way to write preferences into rows.
pub trait DatasetFormat: Send + Sync + 'static {
    /// What `--dataset-format` takes and `dpo-host list` prints.
    fn name(&self) -> &'static str;

    /// One line for `dpo-host list`.
    fn summary(&self) -> &'static str;

    /// Rows of this format as jsonl: for `describe`, and checked by [`crate::testing::check_format`].
    fn examples(&self) -> &'static str;

    /// How surely a row is of this format: 0 is not, 1 might be, 2 can be nothing else. The host takes the format that is
    /// surest of the first rows; equals go to the first by name.
    fn recognises(&self, row: &Row) -> u8;

    /// The records of a row, usually one, never more than [`MAX_RECORDS`].
    fn records(&self, row: &Row) -> Result<Vec<Record>>;
}

/// A prompt and one or more answers to it, best first: a pair, one answer that was liked or not, or a ranking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// What all answers reply to.
    pub prompt: Text,
    /// Answers, best first; detached ones behind all others.
    pub answers: Vec<RecordAnswer>,
    /// Tool descriptions for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// Further variables for the chat template, such as `enable_thinking`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub template_args: Map<String, Value>,
}

/// An answer, and what was thought of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordAnswer {
    /// The answer.
    pub text: Text,
    /// 1 for one that was preferred or liked, 0 for one that was not, or a score: the higher, the better.
    pub label: f64,
    /// Whether losses only read its log-probs: no gradient flows through it, and it is not counted among the answers that a
    /// loss asks for (a mismatched answer, from which KTO estimates its KL term).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detached: bool,
}

impl Record {
    fn new(prompt: Text, answers: impl IntoIterator<Item = (Text, f64)>) -> Record {
        let answer = |(text, label)| RecordAnswer { text, label, detached: false };
        let answers = answers.into_iter().map(answer).collect();
        Record { prompt, answers, tools: None, template_args: Map::new() }
    }

    /// A better and a worse answer.
    pub fn pair(prompt: Text, chosen: Text, rejected: Text) -> Record {
        Record::new(prompt, [(chosen, 1.0), (rejected, 0.0)])
    }

    /// One answer, liked or not. Where a loss compares answers, the host joins it with others to the same prompt.
    pub fn liked(prompt: Text, answer: Text, liked: bool) -> Record {
        Record::new(prompt, [(answer, f64::from(u8::from(liked)))])
    }

    /// Answers in their order, best first. Their labels are the number of answers behind each.
    pub fn ranked(prompt: Text, answers: Vec<Text>) -> Record {
        let behind = (0..answers.len()).rev().map(|n| n as f64);
        Record::new(prompt, answers.into_iter().zip(behind))
    }

    /// Answers with their scores, in any order: the higher, the better. Equal ones stay in theirs.
    pub fn scored(prompt: Text, mut answers: Vec<(Text, f64)>) -> Record {
        answers.sort_by(|a, b| b.1.total_cmp(&a.1));
        Record::new(prompt, answers)
    }
}

/// A prompt or an answer: a conversation for the chat template, or text that is used as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Text {
    /// Turns, to be rendered by the checkpoint's chat template.
    Messages(Vec<Message>),
    /// Text as it is, of which a chat model's template makes a turn unless the user says otherwise. The host ends an answer with EOS.
    Plain(String),
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text of the turn; empty where a turn only calls tools.
    pub content: String,
    /// Further keys that chat templates read, such as `tool_calls`, `reasoning_content` and `name`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A turn with nothing but text.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into(), extra: Map::new() }
    }

    /// A turn as rows write it: `role`/`content`, `from`/`value` or `role`/`text`, the usual names of roles, content as text or as a list
    /// of text parts.
    pub fn parse(value: &Value) -> Result<Message> {
        let Value::Object(keys) = value else { return bail!("a message should be an object, is {}", kind(value)) };
        let role = keys.get("role").or_else(|| keys.get("from"));
        let Some(role) = role.and_then(Value::as_str) else { return bail!("a message has no role") };
        let content = keys.get("content").or_else(|| keys.get("value")).or_else(|| keys.get("text"));
        let calls = keys.get("tool_calls").is_some_and(|c| !c.is_null());
        let content = match content {
            None | Some(Value::Null) if calls => String::new(),
            None | Some(Value::Null) => return bail!("a message of role '{role}' has no content"),
            Some(value) => plain_text(value)?,
        };
        let role = match role {
            "human" => "user",
            "gpt" | "bot" | "model" => "assistant",
            "observation" | "observations" | "function_response" | "tool_response" | "function" => "tool",
            "function_call" | "tool_call" => return Message::tool_call(&content),
            known @ ("system" | "user" | "assistant" | "tool" | "developer") => known,
            other => return bail!("unknown role '{other}'"),
        };
        let mut message = Message::new(role, content);
        for key in ["tool_calls", "tool_call_id", "reasoning_content", "name"] {
            if let Some(value) = keys.get(key).filter(|v| !v.is_null()) {
                message.extra.insert(key.into(), value.clone());
            }
        }
        Ok(message)
    }

    /// A turn whose content is a call `{"name": …, "arguments": …}`, as ms-swift and ShareGPT write it.
    fn tool_call(content: &str) -> Result<Message> {
        let call: Value = match serde_json::from_str(content) {
            Ok(call) => call,
            Err(e) => return bail!("a tool call is not JSON: {e}"),
        };
        let calls = if call.is_array() { call } else { Value::Array(vec![call]) };
        let wrap = |call: &Value| serde_json::json!({"type": "function", "function": call});
        let calls = calls.as_array().map(|list| list.iter().map(wrap).collect::<Vec<_>>()).unwrap_or_default();
        let mut message = Message::new("assistant", "");
        message.extra.insert("tool_calls".into(), calls.into());
        Ok(message)
    }

    /// Turns as rows write them.
    pub fn parse_list(value: &Value) -> Result<Vec<Message>> {
        match value {
            Value::Array(list) => list.iter().map(Message::parse).collect(),
            other => bail!("a conversation should be a list, is {}", kind(other)),
        }
    }
}

/// A text, or the texts of a list of parts joined.
pub fn plain_text(value: &Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts.iter().map(part_text).collect(),
        other => bail!("content should be a text, is {}", kind(other)),
    }
}

fn part_text(part: &Value) -> Result<String> {
    let text = match part {
        Value::String(text) => Some(text.as_str()),
        part if part.get("type").and_then(Value::as_str).unwrap_or("text") == "text" => {
            part.get("text").or_else(|| part.get("value")).and_then(Value::as_str)
        }
        _ => None,
    };
    match text {
        Some(text) => Ok(text.to_owned()),
        None => Err(Error::new(format!("content has a part that is not text: {part}"))
            .help("images and audio are not supported")),
    }
}

/// The text of a column that must be there.
pub fn column<'a>(row: &'a Row, name: &str) -> Result<&'a Value> {
    match row.get(name) {
        Some(value) if !value.is_null() => Ok(value),
        _ => bail!("column '{name}' is missing"),
    }
}

/// The kind of a JSON value, for messages.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
