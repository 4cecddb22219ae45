//! A prompt and two answers of which one is better, under the names that most sets have: LLaMA-Factory's ranking rows (its
//! `src/llamafactory/data/converter.py`), UltraFeedback's binarized rows, Intel's orca_dpo_pairs, stack-exchange-paired and
//! their like. Scores beside the answers become their labels.

use dpo_plugin_api::prelude::*;

use crate::row::{answer_of, filled, has_prompt, number, scored, tie};

/// The better and the worse answer.
const ANSWERS: [(&str, &str); 10] = [
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("answer_chosen", "answer_rejected"),
    ("chosen_answer", "rejected_answer"),
    ("response", "rejected_response"),
    ("response_j", "response_k"),
    ("response_w", "response_l"),
    ("preferred", "dispreferred"),
];
/// What each of them was given.
const SCORES: [(&str, &str); 8] = [
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
];

/// The format `pairs`.
pub(crate) struct Pairs;

impl DatasetFormat for Pairs {
    fn name(&self) -> &'static str {
        "pairs"
    }

    fn summary(&self) -> &'static str {
        "a prompt and two answers under their usual names; optional system, history, scores"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows/pairs.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        crate::recognised(self.name(), row)
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let Some((chosen, rejected)) = answers(row) else {
            return bail!("the row has no two answers: columns such as 'chosen' and 'rejected' are missing");
        };
        let [better, worse] = scores(row)?;
        Ok(vec![scored(row, vec![(answer_of(row, chosen)?, better), (answer_of(row, rejected)?, worse)])?])
    }
}

pub(crate) fn takes(row: &Row) -> u8 {
    let Some((chosen, _)) = answers(row) else { return 0 };
    let whole = row.get(chosen).is_some_and(Value::is_array);
    if has_prompt(row) || whole { 2 } else { 0 }
}

fn answers(row: &Row) -> Option<(&'static str, &'static str)> {
    ANSWERS.into_iter().find(|(a, b)| filled(row, a).is_some() && filled(row, b).is_some())
}

/// What both answers were given, the better one first; 1 and 0 where nothing is said.
///
/// # Errors
/// A tie, and scores that say the opposite of the columns' names.
pub(crate) fn scores(row: &Row) -> Result<[f64; 2]> {
    let of = |name: &str| number(row.get(name)?);
    let said = SCORES.iter().find_map(|(a, b)| Some([of(a)?, of(b)?]));
    match said.or_else(|| ratings(row)) {
        Some([a, b]) if a == b => {
            tie(format!("both have the score {a}; without the columns of scores 'chosen' is taken"))
        }
        Some([a, b]) if a < b => Err(Error::new(format!("'chosen' has the lower score: {a} against {b}"))
            .help("swap both answers, or remove the columns of scores")),
        Some(scores) => Ok(scores),
        None => Ok([of("margin").filter(|margin| *margin != 0.0).unwrap_or(1.0), 0.0]),
    }
}

/// `rating` as distilabel writes it: of both answers, in the order in which they were generated. The chosen one is that with
/// the higher one.
fn ratings(row: &Row) -> Option<[f64; 2]> {
    let [a, b] = row.get("rating")?.as_array()?.as_slice() else { return None };
    let (a, b) = (number(a)?, number(b)?);
    Some([a.max(b), a.min(b)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(row: Value) -> Result<Vec<Record>> {
        Pairs.records(row.as_object().unwrap())
    }

    #[test]
    fn a_lower_score_of_the_chosen_answer_is_an_error() {
        let row = |a: f64, b: f64| json!({"prompt": "?", "chosen": "A", "rejected": "B", "score_chosen": a, "score_rejected": b});
        assert_eq!(records(row(2.0, 7.5)).unwrap_err().message, "'chosen' has the lower score: 2 against 7.5");
        assert_eq!(records(row(2.0, 2.0)).unwrap_err().message, "a tie: no answer is better than another");
        let labels: Vec<f64> = records(row(7.5, -2.0)).unwrap()[0].answers.iter().map(|a| a.label).collect();
        assert_eq!(labels, [7.5, -2.0]);
    }

    #[test]
    fn the_prompt_ends_with_the_question() {
        let row = json!({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}],
            "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}});
        let error = records(row).unwrap_err();
        assert!(error.message.contains("ends with an assistant's turn"), "{error}");
    }

    #[test]
    fn answers_are_both_whole_or_both_alone() {
        let whole = json!([{"role": "user", "content": "?"}, {"role": "assistant", "content": "A"}]);
        let error = records(json!({"prompt": "?", "chosen": whole, "rejected": "B"})).unwrap_err();
        assert!(error.message.contains("whole conversation"), "{error}");
    }
}
