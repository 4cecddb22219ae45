//! UltraFeedback's binarized rows: the prompt as text, both answers as whole conversations, scores beside them
//! (`HuggingFaceH4/ultrafeedback_binarized` and the many sets made like it).

use dpo_plugin_api::dataset::{column, plain_text};
use dpo_plugin_api::prelude::*;

/// The format `ultrafeedback`.
pub struct UltraFeedback;

impl DatasetFormat for UltraFeedback {
    fn name(&self) -> &'static str {
        "ultrafeedback"
    }

    fn summary(&self) -> &'static str {
        "prompt as text, chosen and rejected as conversations, optional scores"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        let list = |name: &str| row.get(name).is_some_and(Value::is_array);
        if row.get("prompt").is_some_and(Value::is_string) && list("chosen") && list("rejected") { 2 } else { 0 }
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let score = |name: &str| row.get(name).and_then(Value::as_f64);
        if let (Some(chosen), Some(rejected)) = (score("score_chosen"), score("score_rejected"))
            && chosen < rejected
        {
            return Err(Error::new(format!("'chosen' has the lower score: {chosen} against {rejected}"))
                .help("swap both answers, or remove the score columns"));
        }
        let prompt = plain_text(column(row, "prompt")?)?;
        let conversation = |name| -> Result<Vec<Message>> {
            let mut turns = Message::parse_list(column(row, name)?)?;
            // Some sets leave the question out of the conversations.
            if turns.iter().all(|m| m.role == "assistant") && !turns.is_empty() {
                turns.insert(0, Message::new("user", prompt.as_str()));
            }
            Ok(turns)
        };
        let (chosen, rejected) = (Text::Messages(conversation("chosen")?), Text::Messages(conversation("rejected")?));
        Ok(vec![Record::pair(Text::Messages(Vec::new()), chosen, rejected)])
    }
}

plugin! { datasets: [UltraFeedback] }

#[cfg(test)]
mod tests {
    use dpo_plugin_api::testing::check_format;

    use super::*;

    #[test]
    fn examples() {
        check_format(&UltraFeedback);
    }

    #[test]
    fn a_lower_score_of_the_chosen_answer_is_an_error() {
        let mut row: Row = serde_json::from_str(UltraFeedback.examples().lines().next().unwrap()).unwrap();
        row.insert("score_chosen".into(), json!(2.0));
        row.insert("score_rejected".into(), json!(7.5));
        let error = UltraFeedback.records(&row).unwrap_err();
        assert_eq!(error.message, "'chosen' has the lower score: 2 against 7.5");
    }

    #[test]
    fn the_question_comes_from_the_prompt_where_conversations_lack_it() {
        let answer = |text: &str| json!([{"role": "assistant", "content": text}]);
        let row = json!({"prompt": "Why?", "chosen": answer("Because."), "rejected": answer("No.")});
        let record = &UltraFeedback.records(row.as_object().unwrap()).unwrap()[0];
        let turns = vec![Message::new("user", "Why?"), Message::new("assistant", "Because.")];
        assert_eq!(record.answers[0].text, Text::Messages(turns));
    }
}
