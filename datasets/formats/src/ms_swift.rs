//! ms-swift's rows: a whole conversation in `messages` or `conversations`, and what should not have been said in
//! `rejected_response` or `rejected_messages` (ms-swift, `docs/source_en/Customization/Custom-dataset.md`). Its `query` and
//! `response` with `rejected_response` are of the format `pairs`.

use dpo_plugin_api::dataset::column;
use dpo_plugin_api::prelude::*;

use crate::pairs::scores;
use crate::row::{answer, conversation, filled, with_system, with_variables};

/// The format `ms-swift`.
pub(crate) struct MsSwift;

impl DatasetFormat for MsSwift {
    fn name(&self) -> &'static str {
        "ms-swift"
    }

    fn summary(&self) -> &'static str {
        "messages with rejected_response or rejected_messages"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows/ms-swift.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        crate::recognised(self.name(), row)
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let Some(list) = conversation(row) else { return bail!("column 'messages' is missing") };
        let mut turns = with_system(Message::parse_list(list)?, row)?;
        let (chosen, rejected) = match filled(row, "rejected_messages") {
            Some(other) => (std::mem::take(&mut turns), with_system(Message::parse_list(other)?, row)?),
            None => {
                let rejected = answer(column(row, "rejected_response")?)?;
                let start = turns.iter().rposition(|m| m.role != "assistant").map_or(0, |last| last + 1);
                let chosen = turns.split_off(start);
                if chosen.is_empty() {
                    return bail!("the conversation ends without an assistant's answer");
                }
                (chosen, rejected)
            }
        };
        let [better, worse] = scores(row)?;
        let answers = vec![(Text::Messages(chosen), better), (Text::Messages(rejected), worse)];
        Ok(vec![with_variables(Record::scored(Text::Messages(turns), answers), row)?])
    }
}

pub(crate) fn takes(row: &Row) -> u8 {
    let rejected = ["rejected_response", "rejected_messages"].iter().any(|name| filled(row, name).is_some());
    if conversation(row).is_some() && rejected && filled(row, "chosen_messages").is_none() { 2 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(row: &str) -> Result<Vec<Record>> {
        MsSwift.records(&serde_json::from_str(row).unwrap())
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
    fn a_margin_is_the_difference_of_the_labels() {
        let labels = |margin: &str| -> Vec<f64> {
            let row = format!(
                r#"{{"conversations": [{{"from": "human", "value": "?"}}, {{"from": "gpt", "value": "a"}}], "rejected_response": "b", "margin": {margin}}}"#
            );
            records(&row).unwrap()[0].answers.iter().map(|a| a.label).collect()
        };
        assert_eq!([labels("0.5"), labels("0"), labels("null")], [[0.5, 0.0], [1.0, 0.0], [1.0, 0.0]]);
    }
}
