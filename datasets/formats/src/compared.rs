//! Two answers in any order and a verdict beside them: HelpSteer2 and 3 (`overall_preference`: negative for the first), PKU-SafeRLHF
//! (`better_response_id`), AlpacaFarm (`preference`: 1 or 2), Chatbot Arena (`winner`), SHP (`labels`: 1 for the first).

use dpo_plugin_api::prelude::*;

use crate::row::{answer_of, filled, has_prompt, number, scored, tie};

/// Both answers.
const ANSWERS: [(&str, &str); 8] = [
    ("response1", "response2"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("output_1", "output_2"),
    ("human_ref_A", "human_ref_B"),
    ("conversation_a", "conversation_b"),
];

/// By how much the first answer is better; 0 for a tie, nothing for what is no verdict.
type Verdict = fn(&Value) -> Option<f64>;

/// Columns of verdicts. PKU-SafeRLHF has two: the answers are compared by the first of them.
const VERDICTS: [(&str, Verdict); 7] = [
    ("overall_preference", |v| Some(-number(v)?)),
    ("preference_strength", |v| Some(-number(v)?)),
    ("better_response_id", first_of_0_and_1),
    ("safer_response_id", first_of_0_and_1),
    ("winner", by_name),
    ("preference", |v| first_of_0_and_1(&json!(number(v)? - 1.0))),
    ("labels", |v| first_of_0_and_1(&json!(1.0 - number(v)?))),
];

fn first_of_0_and_1(value: &Value) -> Option<f64> {
    match number(value)? {
        0.0 => Some(1.0),
        1.0 => Some(-1.0),
        _ => None,
    }
}

/// `model_a`, `model_b`, `tie`, `tie (bothbad)`.
fn by_name(value: &Value) -> Option<f64> {
    match value.as_str()?.to_lowercase().trim_start_matches("model_") {
        "a" => Some(1.0),
        "b" => Some(-1.0),
        other if other.starts_with("tie") => Some(0.0),
        _ => None,
    }
}

/// The format `compared`.
pub(crate) struct Compared;

impl DatasetFormat for Compared {
    fn name(&self) -> &'static str {
        "compared"
    }

    fn summary(&self) -> &'static str {
        "two answers and which is better: overall_preference, better_response_id, preference, winner"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows/compared.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        crate::recognised(self.name(), row)
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let Some(((first, second), (name, verdict))) = answers(row).zip(verdict(row)) else {
            return bail!(
                "the row has no two answers with a verdict, such as 'response1', 'response2', 'overall_preference'"
            );
        };
        let value = &row[name];
        let Some(by) = verdict(value) else { return bail!("'{name}' is no verdict: {value}") };
        if by == 0.0 {
            return tie(format!("'{name}' is {value}"));
        }
        // By how much goes with the better one, so that losses over scores see it.
        let scores = [by.max(0.0), (-by).max(0.0)];
        let answers = vec![(answer_of(row, first)?, scores[0]), (answer_of(row, second)?, scores[1])];
        Ok(vec![scored(row, answers)?])
    }
}

pub(crate) fn takes(row: &Row) -> u8 {
    let whole = |(first, _): (&str, &str)| has_prompt(row) || filled(row, first).is_some_and(Value::is_array);
    if answers(row).is_some_and(whole) && verdict(row).is_some() { 2 } else { 0 }
}

fn answers(row: &Row) -> Option<(&'static str, &'static str)> {
    ANSWERS.into_iter().find(|(a, b)| filled(row, a).is_some() && filled(row, b).is_some())
}

fn verdict(row: &Row) -> Option<(&'static str, Verdict)> {
    VERDICTS.into_iter().find(|(name, _)| filled(row, name).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let by = |name: &str, value: Value| verdict(json!({name: value}).as_object().unwrap()).unwrap().1(&value);
        assert_eq!(by("overall_preference", json!(-2)), Some(2.0));
        assert_eq!(by("overall_preference", json!("3")), Some(-3.0));
        assert_eq!([0, 1, 2].map(|id| by("better_response_id", json!(id))), [Some(1.0), Some(-1.0), None]);
        assert_eq!([1, 2, 3].map(|n| by("preference", json!(n))), [Some(1.0), Some(-1.0), None]);
        assert_eq!([1, 0].map(|n| by("labels", json!(n))), [Some(1.0), Some(-1.0)]);
        let names = ["model_a", "model_b", "tie (bothbad)", "both"].map(|name| by("winner", json!(name)));
        assert_eq!(names, [Some(1.0), Some(-1.0), Some(0.0), None]);
    }
}
