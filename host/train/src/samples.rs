//! A few pairs that are looked at token by token: what the model thought of every token of both answers at the start, and
//! what it thinks now. The log-probs are those of an evaluation that takes place anyway; where there is none, a pass over
//! these few pairs in its place.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::reference::Reference;
use super::step::{Scores, score};
use dpo_core::device::Device;
use dpo_core::error::Result;
use dpo_core::pair::TokenPair;
use dpo_data::{ChatTokenizer, report::shortened};
use dpo_ranks::Ranks;

/// Pairs that are looked at, and tokens of an answer that are shown: the file stays small however long a run is.
const PAIRS: usize = 4;
const TOKENS: usize = 256;

/// Pairs at the head of the validation pairs, or of those that are trained on.
pub(super) struct Samples {
    count: usize,
    start: Map<String, Value>,
}

impl Samples {
    /// The first of some pairs, with their log-probs at the start: the reference's, or where the loss reads none, computed
    /// here. The device has the adapter of the start.
    pub(super) fn take(
        ranks: &mut Ranks,
        device: &mut dyn Device,
        tokenizer: &ChatTokenizer,
        pairs: &[TokenPair],
        reference: &Reference,
    ) -> Result<Samples> {
        let first: Vec<&TokenPair> = pairs.iter().take(PAIRS).collect();
        let known = reference.gather(0..first.len());
        let scores = match known.is_empty() {
            true => score(ranks, device, &first, |_| {})?,
            false => Scores::of(&first, known),
        };
        let mut start = line(0, &scores, first.len());
        start.insert("pairs".into(), first.iter().map(|pair| described(pair, tokenizer)).collect());
        Ok(Samples { count: first.len(), start })
    }

    /// Log-probs now.
    pub(super) fn score(&self, ranks: &mut Ranks, device: &mut dyn Device, pairs: &[TokenPair]) -> Result<Scores> {
        score(ranks, device, &pairs.iter().take(self.count).collect::<Vec<_>>(), |_| {})
    }

    /// The first line of `samples.jsonl`: texts, and log-probs at the start.
    pub(super) fn start(&self) -> Map<String, Value> {
        self.start.clone()
    }

    /// A further line, of log-probs that begin with those of the samples.
    pub(super) fn line(&self, step: u64, scores: &Scores) -> Map<String, Value> {
        line(step, scores, self.count)
    }
}

/// Log-probs of the tokens shown, and the sum over all, of both answers of every pair.
fn line(step: u64, scores: &Scores, count: usize) -> Map<String, Value> {
    let mut rest = scores.logps.as_slice();
    let mut answer = |tokens: usize| {
        let (own, after) = rest.split_at(tokens.min(rest.len()));
        rest = after;
        // Four digits are more than can be seen.
        let short = |value: f64| (value * 1e4).round() / 1e4;
        let sum = short(own.iter().map(|l| f64::from(*l)).sum());
        let logps: Vec<f64> = own.iter().take(TOKENS).map(|l| short(f64::from(*l))).collect();
        json!({"logps": logps, "sum": sum})
    };
    let answers = scores.answers.iter().take(count);
    let scores: Vec<Value> = answers.map(|[c, r]| json!({"chosen": answer(*c), "rejected": answer(*r)})).collect();
    Map::from_iter([("global_step".to_owned(), json!(step)), ("scores".to_owned(), json!(scores))])
}

/// A pair's texts; of the answers token by token, those that have a log-prob.
fn described(pair: &TokenPair, tokenizer: &ChatTokenizer) -> Value {
    let place = Path::new(&pair.place).file_name().map_or(pair.place.clone(), |n| n.to_string_lossy().into_owned());
    let unpredicted = usize::from(pair.prompt.is_empty());
    let answer = |ids: &[u32]| {
        let shown = pieces(&ids[..ids.len().min(TOKENS + unpredicted)], tokenizer);
        json!({"tokens": shown[unpredicted.min(shown.len())..], "more": ids.len().saturating_sub(TOKENS + unpredicted)})
    };
    json!({
        "place": place,
        "prompt": shortened(&tokenizer.decode(&pair.prompt, true)),
        "chosen": answer(&pair.chosen),
        "rejected": answer(&pair.rejected),
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
