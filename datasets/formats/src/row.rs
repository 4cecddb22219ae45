//! The usual names of columns, and how what they hold becomes a prompt and its answers.

use dpo_plugin_api::dataset::{column, kind, plain_text};
use dpo_plugin_api::prelude::*;

/// What is asked: a text, or the turns that end with it. The first that is filled is meant.
pub(crate) const QUESTIONS: [&str; 10] = [
    "prompt",
    "instruction",
    "question",
    "query",
    "problem",
    "input",
    "user_prompt",
    "user_message",
    "context",
    "history",
];
/// Turns before the answer, or with it.
pub(crate) const CONVERSATIONS: [&str; 6] =
    ["messages", "conversations", "conversation", "dialogue", "dialog", "context"];
/// The system message of a row.
const SYSTEMS: [&str; 3] = ["system", "system_prompt", "system_message"];

/// How turns of a dialogue that is one text begin.
const HUMAN: &str = "\n\nHuman:";
const ASSISTANT: &str = "\n\nAssistant:";

/// The value of a column that says something: many tools write "" or an empty list for what is not there.
pub(crate) fn filled<'a>(row: &'a Row, name: &str) -> Option<&'a Value> {
    row.get(name).filter(|v| !v.is_null() && v.as_str() != Some("") && v.as_array().is_none_or(|list| !list.is_empty()))
}

/// The first of some columns that is filled.
pub(crate) fn first<'a>(row: &'a Row, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
    names.iter().find_map(|name| Some((*name, filled(row, name)?)))
}

/// A number, as JSON or csv writes it.
pub(crate) fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim().parse().ok()).filter(|n| n.is_finite())
}

fn question(row: &Row) -> Option<(&'static str, &Value)> {
    // A history is of rounds before the question, unless it is one text.
    let asks = |(name, value): &(&str, &Value)| value.is_string() || value.is_array() && *name != "history";
    QUESTIONS.iter().filter_map(|name| Some((*name, filled(row, name)?))).find(asks)
}

/// The turns of the first column that has a conversation.
pub(crate) fn conversation(row: &Row) -> Option<&Value> {
    CONVERSATIONS.iter().filter_map(|name| filled(row, name)).find(|value| value.is_array())
}

/// Whether a row has a column that is, or may be, what its answers reply to.
pub(crate) fn has_prompt(row: &Row) -> bool {
    question(row).is_some() || conversation(row).is_some()
}

/// Whether a row has a column for what comes before its prompt, be it empty.
pub(crate) fn has_more_prompt(row: &Row) -> bool {
    SYSTEMS.iter().chain(&["history"]).any(|name| row.get(*name).is_some_and(|value| !value.is_null()))
}

/// The turns that a row's answers follow: its question with the rounds before it, or its conversation; empty without both.
pub(crate) fn prompt(row: &Row) -> Result<Vec<Message>> {
    let turns = match question(row) {
        Some((_, Value::Array(turns))) => Message::parse_list(&turns.clone().into())?,
        Some((name, text)) => {
            let mut turns = rounds(row)?;
            let mut text = plain_text(text)?;
            if let Some(input) = filled(row, "input").filter(|_| name == "instruction") {
                text = format!("{text}\n{}", plain_text(input)?);
            }
            match is_dialogue(&text) {
                true => turns.extend(dialogue(&text)?),
                false => turns.push(Message::new("user", text)),
            }
            turns
        }
        None => conversation(row).map_or(Ok(Vec::new()), Message::parse_list)?,
    };
    with_system(turns, row)
}

/// `history`: lists of a question and its answer, or turns.
fn rounds(row: &Row) -> Result<Vec<Message>> {
    let mut turns = Vec::new();
    let Some(Value::Array(history)) = filled(row, "history") else { return Ok(turns) };
    for round in history {
        match round.as_array().map(Vec::as_slice) {
            Some([Value::String(question), Value::String(reply)]) => {
                turns.extend([Message::new("user", question.as_str()), Message::new("assistant", reply.as_str())]);
            }
            None if round.is_object() => turns.push(Message::parse(round)?),
            _ => return bail!("'history' should be a list of [question, answer], has {}", kind(round)),
        }
    }
    Ok(turns)
}

/// Turns behind the system message of a row, unless they begin with one.
pub(crate) fn with_system(mut turns: Vec<Message>, row: &Row) -> Result<Vec<Message>> {
    let has_system = turns.first().is_some_and(|m| m.role == "system");
    if let Some((_, system)) = first(row, &SYSTEMS).filter(|_| !has_system) {
        turns.insert(0, Message::new("system", plain_text(system)?));
    }
    Ok(turns)
}

/// An answer, or the conversation that ends with it: a text, a turn, or a list of turns.
pub(crate) fn answer(value: &Value) -> Result<Vec<Message>> {
    match value {
        Value::String(text) => Ok(vec![Message::new("assistant", text.as_str())]),
        Value::Object(_) => Ok(vec![Message::parse(value)?]),
        _ => Message::parse_list(value),
    }
}

/// The answer that a column holds.
pub(crate) fn answer_of(row: &Row, name: &str) -> Result<Vec<Message>> {
    answer(column(row, name)?)
}

/// A text, or turns.
pub(crate) fn text(value: &Value) -> Result<Text> {
    match value {
        Value::String(text) => Ok(Text::Plain(text.clone())),
        Value::Array(_) => Ok(Text::Messages(Message::parse_list(value)?)),
        other => bail!("a prompt or an answer should be a text or a conversation, is {}", kind(other)),
    }
}

/// A record of scored answers, each of which follows the row's prompt, or is the whole conversation: such an answer begins
/// with a turn of somebody else.
pub(crate) fn scored(row: &Row, answers: Vec<(Vec<Message>, f64)>) -> Result<Record> {
    let begins_whole = |turns: &[Message]| turns.first().is_some_and(|turn| turn.role != "assistant");
    let whole = answers.iter().filter(|(turns, _)| begins_whole(turns)).count();
    if whole != 0 && whole != answers.len() {
        return bail!("one answer is a whole conversation, and another one is the answer alone");
    }
    let mut turns = Vec::new();
    if whole == 0 {
        turns = prompt(row)?;
        // Some have a conversation with its best answer.
        let best = answers.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        if let Some(rest) = best.and_then(|(best, _)| turns.strip_suffix(best.as_slice())) {
            turns.truncate(rest.len());
        }
        match turns.last() {
            None => return bail!("the row has answers and no prompt"),
            Some(turn) if turn.role == "assistant" => {
                return Err(Error::new("the conversation before the answers ends with an assistant's turn")
                    .help("it should end with the turn that they answer"));
            }
            Some(_) => {}
        }
    }
    let mut made = Vec::new();
    for (turns, score) in answers {
        let turns = if whole > 0 { with_system(turns, row)? } else { turns };
        made.push((Text::Messages(turns), score));
    }
    with_variables(Record::scored(Text::Messages(turns), made), row)
}

/// A record with the tools and the template's variables that its row has.
pub(crate) fn with_variables(mut record: Record, row: &Row) -> Result<Record> {
    record.tools = filled(row, "tools").cloned();
    match row.get("chat_template_kwargs") {
        None | Some(Value::Null) => {}
        Some(Value::Object(args)) => record.template_args = args.clone(),
        Some(other) => return bail!("'chat_template_kwargs' should be an object, is {}", kind(other)),
    }
    Ok(record)
}

/// Why a row makes no example where all its answers are equally good.
pub(crate) fn tie<T>(why: String) -> Result<T> {
    Err(Error::new("a tie: no answer is better than another").help(why))
}

/// Whether a text is a dialogue in Anthropic's way.
pub(crate) fn is_dialogue(text: &str) -> bool {
    text.trim_start().starts_with("Human:") && text.contains(ASSISTANT)
}

/// The turns of a dialogue that is one text, without the white space around them. Where its last turn is only begun, it is left
/// out.
pub(crate) fn dialogue(text: &str) -> Result<Vec<Message>> {
    let text = format!("\n\n{}", text.trim_start());
    if !text.starts_with(HUMAN) {
        return bail!("a dialogue should begin with 'Human:'");
    }
    let mut turns = Vec::new();
    for question in text.split(HUMAN).skip(1) {
        let mut parts = question.split(ASSISTANT).map(str::trim);
        turns.push(Message::new("user", parts.next().unwrap_or_default()));
        turns.extend(parts.map(|reply| Message::new("assistant", reply)));
    }
    if turns.last().is_some_and(|turn| turn.role == "assistant" && turn.content.is_empty()) {
        turns.pop();
    }
    Ok(turns)
}
