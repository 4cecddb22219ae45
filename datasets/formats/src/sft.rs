//! Rows that show answers and judge none: conversations, a prompt and its completion, Alpaca's and ms-swift's columns. Every answer
//! of a conversation is an example, as it is for ms-swift and LLaMA-Factory, but for turns that say that they are not learned.
//!
//! The least sure of all formats: whatever compares answers is of another one.

use dpo_plugin_api::prelude::*;

use crate::row::{answer, conversation, first, has_more_prompt, has_prompt, prompt, text, with_system, with_variables};

/// The answer.
const ANSWERS: [&str; 5] = ["completion", "response", "output", "answer", "solution"];
/// Keys of a turn that say whether it is learned (ms-swift, axolotl, OpenAI).
const LEARNED: [&str; 3] = ["loss", "train", "weight"];

/// The format `sft`.
pub(crate) struct Sft;

impl DatasetFormat for Sft {
    fn name(&self) -> &'static str {
        "sft"
    }

    fn summary(&self) -> &'static str {
        "answers to learn: messages, prompt and completion, Alpaca's columns, query and response"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows/sft.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        crate::recognised(self.name(), row)
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        if first(row, &ANSWERS).is_some() {
            let (prompt, answer) = single(row)?;
            return Ok(vec![with_variables(Record::liked(prompt, answer, true), row)?]);
        }
        let Some(list) = conversation(row) else { return bail!("the row has no answer") };
        let mut records = Vec::new();
        for (turns, answer) in rounds(Message::parse_list(list)?, |at| is_learned(list, at)) {
            let record = Record::liked(Text::Messages(with_system(turns, row)?), Text::Messages(answer), true);
            records.push(with_variables(record, row)?);
        }
        match records.is_empty() {
            true => bail!("the conversation has no assistant's answer that is learned"),
            false => Ok(records),
        }
    }
}

pub(crate) fn takes(row: &Row) -> u8 {
    let compares = |name: &String| ["reject", "chosen", "label", "kto_tag"].iter().any(|word| name.contains(word));
    let answered = first(row, &ANSWERS).is_some_and(|(_, answer)| is_answer(answer)) && has_prompt(row);
    if (answered || conversation(row).is_some_and(is_answered)) && !row.keys().any(compares) { 1 } else { 0 }
}

/// Whether a conversation ends with an answer: behind a question, the answer is in a column that is not known.
fn is_answered(list: &Value) -> bool {
    let last = list.as_array().and_then(|turns| turns.last());
    last.is_some_and(|turn| Message::parse(turn).is_ok_and(|turn| turn.role == "assistant"))
}

/// A text or turns, and no list of answers.
fn is_answer(value: &Value) -> bool {
    value.is_string() || value.as_array().is_some_and(|list| list.iter().all(|turn| turn.get("role").is_some()))
}

/// The prompt and the one answer of a row. TRL's two texts stay texts: the checkpoint may have no chat template.
pub(crate) fn single(row: &Row) -> Result<(Text, Text)> {
    let Some((name, value)) = first(row, &ANSWERS) else { return bail!("the row has no answer") };
    match row.get("prompt") {
        Some(Value::String(_)) if name == "completion" && value.is_string() && !has_more_prompt(row) => {
            Ok((text(&row["prompt"])?, text(value)?))
        }
        _ => Ok((Text::Messages(prompt(row)?), Text::Messages(answer(value)?))),
    }
}

/// Whether the row has an answer in a column of its own.
pub(crate) fn has_single(row: &Row) -> bool {
    first(row, &ANSWERS).is_some() && has_prompt(row)
}

/// Every answer of a conversation that is learned, with the turns before it. Turns of the assistant that follow each other are
/// one.
fn rounds(turns: Vec<Message>, learned: impl Fn(usize) -> bool) -> Vec<(Vec<Message>, Vec<Message>)> {
    let is_answer = |at: usize| turns[at].role == "assistant" && learned(at);
    let mut rounds = Vec::new();
    let mut at = 0;
    while at < turns.len() {
        let end = (at..turns.len()).find(|at| !is_answer(*at)).unwrap_or(turns.len());
        if end > at && at > 0 {
            rounds.push((turns[..at].to_vec(), turns[at..end].to_vec()));
        }
        at = end.max(at + 1);
    }
    rounds
}

/// Whether a turn does not say that it is not learned.
fn is_learned(list: &Value, at: usize) -> bool {
    let says_no = |value: &Value| *value == json!(false) || value.as_f64() == Some(0.0);
    !LEARNED.iter().any(|key| list[at].get(key).is_some_and(says_no))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_no_answer() {
        let turns = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]);
        assert_eq!(takes(json!({"context": turns, "response1": "d", "response2": "e"}).as_object().unwrap()), 0);
        assert_eq!(takes(json!({"messages": turns.as_array().unwrap()[..2]}).as_object().unwrap()), 1);
    }

    #[test]
    fn every_answer_is_learned_but_those_that_say_no() {
        let turn = |role: &str, text: &str| json!({"role": role, "content": text});
        let mut turns = vec![turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")];
        let answers = |turns: &[Value]| -> Vec<(usize, String)> {
            let records = Sft.records(json!({"messages": turns}).as_object().unwrap()).unwrap();
            let one = |r: &Record| match (&r.prompt, &r.answers[0].text) {
                (Text::Messages(prompt), Text::Messages(answer)) => (prompt.len(), answer[0].content.clone()),
                other => panic!("{other:?}"),
            };
            records.iter().map(one).collect()
        };
        assert_eq!(answers(&turns), [(1, "b".to_owned()), (3, "d".to_owned())]);
        turns[1]["loss"] = json!(false);
        assert_eq!(answers(&turns), [(3, "d".to_owned())]);
    }
}
