//! A few examples that are looked at token by token: what the model thought of every token of their answers at the start, and
//! what it thinks now. The log-probs are those of an evaluation that takes place anyway; where there is none, a pass over
//! these few examples in its place.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::reference::Reference;
use super::step::score;
use dpo_core::collective::ProcessGroup;
use dpo_core::device::Device;
use dpo_core::error::Result;
use dpo_core::example::{Example, answer_name};
use dpo_core::logprobs::AnswerLogProbs;
use dpo_data::{ChatTokenizer, Examples, report::shortened};

/// Examples that are looked at, and tokens of an answer that are shown: the file stays small however long a run is.
const EXAMPLES: usize = 4;
const TOKENS: usize = 256;

/// Examples at the head of the validation examples, or of those that are trained on.
pub(super) struct Samples {
    /// Of each of them, answers that are learned.
    learned: Vec<usize>,
    start: Map<String, Value>,
    /// Log-probs at the start.
    pub(super) logps: AnswerLogProbs,
}

impl Samples {
    /// The first of some examples, with their log-probs at the start: the reference's, or where the loss reads none, computed
    /// here. The device has the adapter of the start.
    pub(super) fn take(
        group: &mut dyn ProcessGroup,
        device: &mut dyn Device,
        tokenizer: &ChatTokenizer,
        examples: &Examples,
        reference: &Reference,
    ) -> Result<Samples> {
        let first = first_of(examples)?;
        let first: Vec<&Example> = first.iter().collect();
        let logps = match reference.gather(&(0..first.len()).collect::<Vec<_>>()) {
            None => score(group, device, &first, |_| {})?,
            Some(known) => known,
        };
        let learned: Vec<usize> = first.iter().map(|e| e.learned().len()).collect();
        let mut start = line(0, &logps, &learned);
        start.insert("examples".into(), first.iter().map(|example| described(example, tokenizer)).collect());
        Ok(Samples { learned, start, logps })
    }

    /// Log-probs now.
    pub(super) fn score(
        &self,
        group: &mut dyn ProcessGroup,
        device: &mut dyn Device,
        examples: &Examples,
    ) -> Result<AnswerLogProbs> {
        let first = first_of(examples)?;
        score(group, device, &first.iter().collect::<Vec<_>>(), |_| {})
    }

    /// The first line of `samples.jsonl`: texts, and log-probs at the start.
    pub(super) fn start(&self) -> Map<String, Value> {
        self.start.clone()
    }

    /// A further line, of log-probs that begin with those of the samples.
    pub(super) fn line(&self, step: u64, logps: &AnswerLogProbs) -> Map<String, Value> {
        line(step, logps, &self.learned)
    }
}

/// Those that are looked at.
fn first_of(examples: &Examples) -> Result<Vec<Example>> {
    examples.gather(0..examples.len().min(EXAMPLES))
}

/// Log-probs of the tokens shown, and the sum over all, of every answer of every example.
fn line(step: u64, logps: &AnswerLogProbs, learned: &[usize]) -> Map<String, Value> {
    // Four digits are more than can be seen.
    let short = |value: f64| (value * 1e4).round() / 1e4;
    let answer = |own: &[f32]| {
        let sum = short(own.iter().map(|l| f64::from(*l)).sum());
        let shown: Vec<f64> = own.iter().take(TOKENS).map(|l| short(f64::from(*l))).collect();
        json!({"logps": shown, "sum": sum})
    };
    let of = |(example, learned): (usize, &usize)| {
        logps.offsets.answers(example).take(*learned).map(|at| answer(&logps.logps[at])).collect::<Vec<Value>>()
    };
    let scores: Vec<Vec<Value>> = learned.iter().enumerate().map(of).collect();
    Map::from_iter([("global_step".to_owned(), json!(step)), ("scores".to_owned(), json!(scores))])
}

/// An example's texts; of the answers token by token.
fn described(example: &Example, tokenizer: &ChatTokenizer) -> Value {
    let place =
        Path::new(&example.place).file_name().map_or(example.place.clone(), |n| n.to_string_lossy().into_owned());
    let answers = example.learned();
    let answer = |(i, ids): (usize, &[u32])| {
        let shown = pieces(&ids[..ids.len().min(TOKENS)], tokenizer);
        let name = answer_name(i, answers.len());
        json!({"name": name, "tokens": shown, "more": ids.len().saturating_sub(TOKENS)})
    };
    json!({
        "place": place,
        "prompt": shortened(&tokenizer.decode(example.prompt(), true)),
        "answers": answers.iter().map(|a| a.ids.as_slice()).enumerate().map(answer).collect::<Vec<Value>>(),
    })
}

/// The text of every token, which joined are the text of all. A letter that takes several tokens is the last one's.
fn pieces(ids: &[u32], tokenizer: &ChatTokenizer) -> Vec<String> {
    let mut before = String::new();
    let piece = |end: usize| {
        let text = tokenizer.decode(&ids[..end], true);
        if text.ends_with('\u{fffd}') && end < ids.len() {
            return String::new();
        }
        // Some decoders tidy up behind themselves; then the token stands for itself.
        let new = text.strip_prefix(before.as_str()).map(str::to_owned);
        before = text;
        new.unwrap_or_else(|| tokenizer.decode(&ids[end - 1..end], true))
    };
    (1..=ids.len()).map(piece).collect()
}
