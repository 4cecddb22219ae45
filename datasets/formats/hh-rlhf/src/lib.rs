//! Anthropic's HH-RLHF: `chosen` and `rejected` are whole dialogues as text, whose turns begin with `\n\nHuman:` and
//! `\n\nAssistant:`.

use dpo_plugin_api::dataset::{column, kind};
use dpo_plugin_api::prelude::*;

const HUMAN: &str = "\n\nHuman:";
const ASSISTANT: &str = "\n\nAssistant:";

/// The format `hh-rlhf`.
pub struct HhRlhf;

impl DatasetFormat for HhRlhf {
    fn name(&self) -> &'static str {
        "hh-rlhf"
    }

    fn summary(&self) -> &'static str {
        "chosen and rejected dialogues as text with Human: and Assistant:"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        let dialogue = |name: &str| {
            row.get(name)
                .and_then(Value::as_str)
                .is_some_and(|t| t.trim_start().starts_with("Human:") && t.contains(ASSISTANT))
        };
        if dialogue("chosen") && dialogue("rejected") { 2 } else { 0 }
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let (chosen, rejected) = (turns(column(row, "chosen")?)?, turns(column(row, "rejected")?)?);
        Ok(vec![Record::pair(Text::Messages(Vec::new()), Text::Messages(chosen), Text::Messages(rejected))])
    }
}

/// The turns of a dialogue, without the white space around them.
fn turns(value: &Value) -> Result<Vec<Message>> {
    let Value::String(text) = value else { return bail!("a dialogue should be a text, is {}", kind(value)) };
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
    if turns.last().is_none_or(|m| m.role != "assistant") {
        return bail!("the dialogue ends without an assistant's answer");
    }
    Ok(turns)
}

plugin! { datasets: [HhRlhf] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::check_format;

    use super::*;

    #[test]
    fn examples() {
        check_format(&HhRlhf);
    }

    #[test]
    fn turns_of_a_dialogue() {
        let text = json!("\n\nHuman: Hi\n\nthere\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: See you.\n");
        let expected = [("user", "Hi\n\nthere"), ("assistant", "Yes?"), ("user", "Bye"), ("assistant", "See you.")];
        assert_eq!(turns(&text).unwrap(), expected.map(|(role, text)| Message::new(role, text)));
    }

    #[test]
    fn a_dialogue_needs_an_answer() {
        let error = turns(&json!("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye")).unwrap_err();
        assert_eq!(error.message, "the dialogue ends without an assistant's answer");
        assert!(turns(&json!("Hello")).is_err());
    }
}
