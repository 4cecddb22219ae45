//! A prompt and a list of answers with ranks or scores: Nectar, NeMo-RL's completions, UltraFeedback before it was binarized; or
//! best first, as LLaMA-Factory's `output` lists them.

use dpo_plugin_api::dataset::kind;
use dpo_plugin_api::prelude::*;

use crate::row::{answer, filled, first, has_prompt, number, scored, tie};

/// Lists of answers.
const LISTS: [&str; 7] = ["answers", "completions", "responses", "candidates", "outputs", "generations", "output"];
/// The text of an answer that is an object.
const TEXTS: [&str; 6] = ["answer", "response", "completion", "text", "output", "content"];
/// Of an answer, or lists beside that of the answers: 0 or 1 is the best rank, the highest score is the best one.
const RANKS: [&str; 4] = ["rank", "ranks", "ranking", "rankings"];
const SCORES: [&str; 8] =
    ["overall_score", "score", "scores", "rating", "ratings", "reward", "rewards", "overall_scores"];

/// The format `ranked`.
pub(crate) struct Ranked;

impl DatasetFormat for Ranked {
    fn name(&self) -> &'static str {
        "ranked"
    }

    fn summary(&self) -> &'static str {
        "a prompt and a list of answers, with ranks or scores, or best first"
    }

    fn examples(&self) -> &'static str {
        include_str!("../rows/ranked.jsonl")
    }

    fn recognises(&self, row: &Row) -> u8 {
        crate::recognised(self.name(), row)
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let Some((name, list)) = list(row) else { return bail!("the row has no list of answers") };
        let scores = all_scores(row, name, list)?;
        match scores.iter().copied().reduce(f64::min).zip(scores.iter().copied().reduce(f64::max)) {
            _ if scores.len() < 2 => return bail!("'{name}' has one answer, which is compared with nothing"),
            Some((least, most)) if least == most => return tie(format!("all of '{name}' have the same rank or score")),
            _ => {}
        }
        let mut answers = Vec::new();
        for (value, score) in list.iter().zip(scores) {
            let value = value.as_object().and_then(|keys| first(keys, &TEXTS)).map_or(value, |(_, text)| text);
            answers.push((answer(value)?, score));
        }
        Ok(vec![scored(row, answers)?])
    }
}

/// Surely where each answer has its rank or score with it; texts in a list beside other lists may be of somebody's own format.
pub(crate) fn takes(row: &Row) -> u8 {
    match list(row).filter(|(name, list)| has_prompt(row) && all_scores(row, name, list).is_ok()) {
        None => 0,
        Some((_, list)) => 1 + u8::from(list.iter().all(Value::is_object)),
    }
}

fn list(row: &Row) -> Option<(&'static str, &Vec<Value>)> {
    LISTS.iter().find_map(|name| Some((*name, filled(row, name)?.as_array()?)))
}

/// The score of every answer; a rank counts as many as there are behind it.
fn all_scores(row: &Row, name: &str, list: &[Value]) -> Result<Vec<f64>> {
    let of = |names: &[&'static str]| -> Option<Vec<f64>> {
        let inside: Option<Vec<f64>> = list.iter().map(|value| number(first(value.as_object()?, names)?.1)).collect();
        let beside = || first(row, names)?.1.as_array()?.iter().map(number).collect::<Option<Vec<f64>>>();
        inside.or_else(beside).filter(|scores| scores.len() == list.len())
    };
    if let Some(ranks) = of(&RANKS) {
        let last = ranks.iter().copied().fold(f64::MIN, f64::max);
        return Ok(ranks.iter().map(|rank| last - rank).collect());
    }
    if let Some(scores) = of(&SCORES) {
        return Ok(scores);
    }
    match list.first() {
        Some(Value::String(_)) if name == "output" => Ok((0..list.len()).rev().map(|behind| behind as f64).collect()),
        Some(other) => bail!("not every answer of '{name}' has a rank or a score; the first is {}", kind(other)),
        None => bail!("'{name}' is empty"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(row: Value) -> Result<Vec<f64>> {
        Ok(Ranked.records(row.as_object().unwrap())?[0].answers.iter().map(|a| a.label).collect())
    }

    #[test]
    fn ranks_scores_and_orders() {
        let ranks = json!({"prompt": "?", "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1}, {"answer": "c", "rank": 2}]});
        assert_eq!(labels(ranks).unwrap(), [1.0, 0.0, 0.0]);
        let beside = json!({"prompt": "?", "responses": ["a", "b"], "scores": ["0.5", 2]});
        assert_eq!(labels(beside).unwrap(), [2.0, 0.5]);
        assert_eq!(labels(json!({"instruction": "?", "output": ["a", "b", "c"]})).unwrap(), [2.0, 1.0, 0.0]);
        let tied = json!({"prompt": "?", "responses": ["a", "b"], "scores": [1, 1]});
        assert!(labels(tied).unwrap_err().message.starts_with("a tie"));
        assert!(labels(json!({"prompt": "?", "output": ["a"]})).is_err());
    }

    #[test]
    fn a_list_without_an_order_is_of_no_format() {
        for row in [
            json!({"prompt": "?", "responses": ["a", "b"]}),
            json!({"prompt": "?", "responses": ["a", "b"], "scores": [1]}),
        ] {
            assert_eq!(takes(row.as_object().unwrap()), 0, "{row}");
        }
    }
}
