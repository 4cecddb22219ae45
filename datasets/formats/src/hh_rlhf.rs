//! Anthropic's HH-RLHF: `chosen` and `rejected` are whole dialogues as text, whose turns begin with `\n\nHuman:` and
//! `\n\nAssistant:`.

use dpo_plugin_api::dataset::{column, kind};
use dpo_plugin_api::prelude::*;

use crate::row::{dialogue, is_dialogue};

/// The format `hh-rlhf`.
pub(crate) struct HhRlhf;

impl DatasetFormat for HhRlhf {
    fn name(&self) -> &'static str {
        "hh-rlhf"
    }

    fn summary(&self) -> &'static str {
        "chosen and rejected dialogues as text with Human: and Assistant:"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows/hh-rlhf.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        crate::recognised(self.name(), row)
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let (chosen, rejected) = (turns(column(row, "chosen")?)?, turns(column(row, "rejected")?)?);
        Ok(vec![Record::pair(Text::Messages(Vec::new()), Text::Messages(chosen), Text::Messages(rejected))])
    }
}

pub(crate) fn takes(row: &Row) -> u8 {
    let dialogue = |name: &str| row.get(name).and_then(Value::as_str).is_some_and(is_dialogue);
    if dialogue("chosen") && dialogue("rejected") { 2 } else { 0 }
}

fn turns(value: &Value) -> Result<Vec<Message>> {
    let Value::String(text) = value else { return bail!("a dialogue should be a text, is {}", kind(value)) };
    let turns = dialogue(text)?;
    if turns.last().is_none_or(|m| m.role != "assistant") {
        return bail!("the dialogue ends without an assistant's answer");
    }
    Ok(turns)
}

#[cfg(test)]
mod tests {
    use super::*;

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
