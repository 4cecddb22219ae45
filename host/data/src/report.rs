//! What became of the data: counts, lengths, causes, and one example as the model will see it.

use std::collections::HashSet;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::{Deserialize, Serialize};

use super::tokens::{ChatTokenizer, Truncation};
use dpo_core::console::Remark;
use dpo_core::error::Error;
use dpo_core::example::{Answer, Example, answer_name};

/// How many messages are kept in full, and how many places for a cause.
const MESSAGES: usize = 10;
const PLACES: usize = 3;
/// Letters of a rendered part that are shown: from its beginning and from its end.
const SHOWN: usize = 400;
const BARS: usize = 16;

/// The data report.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// What an example is called: `pair`, or `example`.
    pub noun: String,
    /// Files as they were read.
    pub files: Vec<FileReport>,
    /// Why rows make no example, most frequent first.
    pub dropped: Vec<Dropped>,
    /// The first messages, with their places.
    pub messages: Vec<String>,
    /// Examples that were cut to `max_length`.
    pub truncated: usize,
    /// Examples whose answers are the same up to `max_length`: they stay, and teach nothing.
    pub cut_alike: usize,
    /// The length that sequences are kept to.
    pub max_length: usize,
    /// How they are kept to it.
    pub truncation: Truncation,
    /// Examples that occur before, token by token. They are kept.
    pub duplicates: usize,
    /// Pairs that prefer what a pair before rejects, with the same prompt: what one teaches the other undoes.
    pub opposed: usize,
    /// The first of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_opposed: Option<String>,
    /// Of single answers with a label, those that were liked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub liked: Option<usize>,
    /// Of pairs, those whose chosen answer has more tokens than the rejected one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen_longer: Option<usize>,
    /// Single answers, and the pairs that were made of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub joined: Option<Joined>,
    /// Tokens of the parts of examples: prompts, and chosen and rejected answers where examples are pairs.
    pub parts: Vec<Part>,
    /// Tokens that an epoch computes: of every example the prompt once and all answers.
    pub unique_tokens: usize,
    /// How answers end.
    pub eos: Endings,
    /// How prompts begin.
    pub bos: Beginnings,
    /// Prompts that lost their end.
    pub prompt_prefix: PromptPrefix,
    /// Where the chat template is from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Whether it is the family plugin's, since the checkpoint has none.
    pub template_is_borrowed: bool,
    /// Whether the template writes the date, so that another day gives other tokens.
    pub template_reads_clock: bool,
    /// Examples of plain text, which no chat template renders.
    pub plain_examples: usize,
    /// Records of plain text that became turns of the chat template.
    pub templated: usize,
    /// Records of plain text that has the chat template's tokens already, and stays as it is.
    pub rendered_before: usize,
    /// The first example.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<Sample>,
}

/// A file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileReport {
    /// Its path.
    pub path: String,
    /// Its format.
    pub format: String,
    /// Rows that were taken of it.
    pub rows: usize,
    /// Examples that they make.
    pub examples: usize,
}

/// A cause for which rows make no example.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Dropped {
    /// The cause.
    pub cause: String,
    /// How many.
    pub count: usize,
    /// The first places.
    pub places: Vec<String>,
}

/// Single answers that were joined by their prompt.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Joined {
    /// Single answers.
    pub answers: usize,
    /// Pairs of a liked and a disliked answer to the same prompt.
    pub pairs: usize,
}

/// A part of every example, such as its prompt.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Part {
    /// What it is.
    pub name: String,
    /// How long.
    pub lengths: Lengths,
}

/// Lengths in tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lengths {
    /// Shortest.
    pub min: usize,
    /// Half are no longer.
    pub median: usize,
    /// 95 of 100 are no longer.
    pub p95: usize,
    /// Longest.
    pub max: usize,
    /// Counts in equal steps from 0 to the longest.
    pub histogram: Vec<usize>,
}

/// How answers end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Endings {
    /// The token that ends most answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Whether generation stops at that token.
    pub stops: bool,
    /// Answers that a turn's end was looked for in.
    pub answers: usize,
    /// Answers without one.
    pub without: usize,
    /// The first place of such an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<String>,
}

/// How prompts begin.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Beginnings {
    /// The tokenizer's BOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Prompts that begin with it.
    pub with: usize,
    /// Prompts that begin with it twice.
    pub twice: usize,
}

/// Prompts whose own rendering, with the generation prompt, is not what the conversation begins with. The end that they
/// lost is what the model reads before it answers, and was not trained on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PromptPrefix {
    /// How many.
    pub rows: usize,
    /// The first place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<String>,
    /// The text that the first one lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// An example as the model sees it, special tokens shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Its place.
    pub place: String,
    /// Prompt and answers.
    pub parts: Vec<SamplePart>,
}

/// A prompt or an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SamplePart {
    /// What it is.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: usize,
}

impl Lengths {
    /// Of some lengths, in any order.
    pub fn new(mut sorted: Vec<u32>) -> Lengths {
        sorted.sort_unstable();
        let Some(max) = sorted.last().map(|max| *max as usize) else { return Lengths::default() };
        // The nearest rank: the smallest length that this share does not exceed.
        let rank = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1] as usize;
        let mut histogram = vec![0; BARS];
        for length in &sorted {
            histogram[(*length as usize * BARS / (max + 1)).min(BARS - 1)] += 1;
        }
        Lengths { min: sorted[0] as usize, median: rank(50), p95: rank(95), max, histogram }
    }

    fn bars(&self) -> String {
        const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let most = self.histogram.iter().max().copied().unwrap_or(0).max(1);
        self.histogram.iter().map(|count| LEVELS[(count * 8).div_ceil(most)]).collect()
    }
}

impl Report {
    /// Counts what makes no example.
    pub(super) fn drop(&mut self, error: &Error, place: &str) {
        let cause = error.message();
        match self.dropped.iter_mut().find(|d| d.cause == cause) {
            Some(dropped) => {
                dropped.count += 1;
                if dropped.places.len() < PLACES {
                    dropped.places.push(place.to_owned());
                }
            }
            None => self.dropped.push(Dropped { cause: cause.into(), count: 1, places: vec![place.to_owned()] }),
        }
        if self.messages.len() < MESSAGES {
            self.messages.push(error.clone().at(place).to_string());
        }
    }

    fn examples(&self) -> usize {
        self.files.iter().map(|f| f.examples).sum()
    }

    /// What became of the rows, in few words: examples and tokens, then why rows were dropped.
    pub fn line(&self) -> String {
        let mut text = format!("{}, {} tokens an epoch", n(self.examples(), &self.noun), self.unique_tokens);
        if self.truncated > 0 {
            text += &format!(", {} truncated", self.truncated);
        }
        if self.cut_alike > 0 {
            text += &format!(", {} with the same answers up to {} tokens", self.cut_alike, self.max_length);
        }
        if self.opposed > 0 {
            text += &format!(", {} contradict others", self.opposed);
        }
        if self.templated > 0 {
            text += &format!(", {} of plain text as turns of the chat template", self.templated);
        }
        for dropped in &self.dropped {
            let first = dropped.places.first().map_or("", String::as_str);
            text += &format!("\n            dropped {}: {}, first at {first}", dropped.count, dropped.cause);
        }
        text
    }

    /// What of the data makes training other than it seems.
    pub fn warnings(&self) -> Vec<Remark> {
        let mut warnings = Vec::new();
        let mut warn = |text: String, help: &str| warnings.push(Remark::from(text).help(help));
        if self.rendered_before > 0 {
            let rows = n(self.rendered_before, "prompt");
            warn(
                format!(
                    "{rows} of plain text with tokens of the chat template: taken as rendered already, and left as they are"
                ),
                "write them as messages, [{\"role\": \"user\", \"content\": \"…\"}], if they are not; --plain-text leaves all plain text as it is",
            );
        }
        if self.template_is_borrowed {
            warn(
                "the checkpoint has no chat template: the plugin's is used".into(),
                "see in `dpo-host data` whether it is this model's; a chat_template.jinja in its folder is used instead",
            );
        }
        if self.liked.is_some_and(|liked| liked == 0 || liked == self.examples()) {
            let which = if self.liked == Some(0) { "no answer was" } else { "all answers were" };
            warn(
                format!("{which} liked: there is nothing to tell them apart by"),
                "rows of liked and of disliked answers are needed; a column of ratings can be made a label of true and false",
            );
        }
        if let Some(place) = &self.eos.first {
            warn(
                format!("{} of {} answers have no end, first {place}", self.eos.without, self.eos.answers),
                "the model would not learn to stop: end them with the checkpoint's eos_token",
            );
        } else if let Some(token) = self.eos.token.as_ref().filter(|_| !self.eos.stops) {
            warn(
                format!("answers end with {token}, where generation does not stop"),
                "add it to eos_token_id in generation_config.json",
            );
        }
        if let Some(token) = self.bos.token.as_ref().filter(|_| self.bos.twice > 0) {
            warn(
                format!("{} begin with {token} twice", n(self.bos.twice, "prompt")),
                "the rows have it, and the tokenizer adds it: leave it out of the rows",
            );
        }
        if let Some(place) = &self.prompt_prefix.first {
            warn(
                format!(
                    "the template renders {} otherwise before an answer, first {place}",
                    n(self.prompt_prefix.rows, "prompt")
                ),
                "training reads another context than generation: `dpo-host data` shows the difference",
            );
        }
        warnings
    }

    /// Rows that make no example.
    pub fn dropped_rows(&self) -> usize {
        self.dropped.iter().map(|d| d.count).sum()
    }
}

/// Counts over the examples that remain, one after the other.
pub(super) struct Measure {
    bos: Option<u32>,
    unique_tokens: usize,
    /// Most answers of an example.
    most: usize,
    prompts: Vec<u32>,
    best: Vec<u32>,
    others: Vec<u32>,
    chosen_longer: usize,
    liked: usize,
    /// Hashes of the examples so far, and of the pairs that would contradict them.
    seen: HashSet<u64>,
    duplicates: usize,
    opposed: usize,
    first_opposed: Option<String>,
    with_bos: [usize; 2],
    first: Option<Example>,
}

impl Measure {
    /// Of no example yet.
    pub(super) fn new(bos: Option<u32>) -> Measure {
        Measure {
            bos,
            unique_tokens: 0,
            most: 0,
            prompts: Vec::new(),
            best: Vec::new(),
            others: Vec::new(),
            chosen_longer: 0,
            liked: 0,
            seen: HashSet::new(),
            duplicates: 0,
            opposed: 0,
            first_opposed: None,
            with_bos: [0; 2],
            first: None,
        }
    }

    /// Counts an example.
    pub(super) fn add(&mut self, example: &Example) {
        let learned = example.learned();
        let length = |a: &Answer| a.ids.len() as u32;
        self.unique_tokens += example.unique_tokens();
        self.most = self.most.max(learned.len());
        self.prompts.push(example.prompt().len() as u32);
        self.best.push(length(&learned[0]));
        self.others.extend(learned[1..].iter().map(length));
        self.chosen_longer += usize::from(learned.len() == 2 && length(&learned[0]) > length(&learned[1]));
        self.liked += usize::from(learned[0].label > 0.0);
        let parts: Vec<&[u32]> =
            std::iter::once(example.prompt()).chain(learned.iter().map(|a| a.ids.as_slice())).collect();
        if let [prompt, chosen, rejected] = parts[..]
            && self.seen.contains(&hash(&[prompt, rejected, chosen]))
        {
            self.opposed += 1;
            self.first_opposed.get_or_insert_with(|| example.place.clone());
        }
        self.duplicates += usize::from(!self.seen.insert(hash(&parts)));
        if let Some(bos) = self.bos {
            let begins = example.prompt().iter().take_while(|id| **id == bos).take(2).count();
            self.with_bos[..begins].iter_mut().for_each(|count| *count += 1);
        }
        self.first.get_or_insert_with(|| example.clone());
    }

    /// Puts what was counted into the report.
    pub(super) fn report(self, report: &mut Report, labelled: bool, tokenizer: &ChatTokenizer) {
        let names: &[&str] = match self.most {
            1 => &["answer"],
            2 => &["chosen", "rejected"],
            _ => &["best answer", "other answers"],
        };
        let parts = ["prompt"].iter().chain(names).zip([self.prompts, self.best, self.others]);
        let part = |(name, tokens): (&&str, Vec<u32>)| Part { name: (*name).to_owned(), lengths: Lengths::new(tokens) };
        report.parts = parts.map(part).collect();
        report.unique_tokens = self.unique_tokens;
        report.chosen_longer = (self.most == 2).then_some(self.chosen_longer);
        report.liked = labelled.then_some(self.liked);
        (report.duplicates, report.opposed, report.first_opposed) = (self.duplicates, self.opposed, self.first_opposed);
        report.dropped.sort_by_key(|d| std::cmp::Reverse(d.count));
        if let Some(bos) = self.bos {
            let [with, twice] = self.with_bos;
            report.bos = Beginnings { token: tokenizer.token(bos), with, twice };
        }
        report.sample = self.first.map(|e| {
            let part =
                |name: String, ids: &[u32]| SamplePart { name, text: tokenizer.decode(ids, true), tokens: ids.len() };
            let answer = |(i, a): (usize, &Answer)| part(answer_name(i, e.learned().len()), &a.ids);
            let parts =
                std::iter::once(part("prompt".into(), e.prompt())).chain(e.learned().iter().enumerate().map(answer));
            Sample { place: e.place.clone(), parts: parts.collect() }
        });
    }
}

/// A hash that two examples of a data set have in common by accident once in 40 million sets of a million.
fn hash(parts: &[&[u32]]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "data")?;
        for file in &self.files {
            writeln!(
                f,
                "  {}: {}, {} of format {}",
                file.path,
                n(file.examples, &self.noun),
                n(file.rows, "row"),
                file.format
            )?;
        }
        if let Some(Joined { answers, pairs }) = self.joined {
            writeln!(f, "  joined by prompt: {} make {}", n(answers, "single answer"), n(pairs, "pair"))?;
        }
        if self.templated > 0 {
            let records = n(self.templated, "record");
            writeln!(f, "  plain text: {records} as turns of the chat template (--plain-text leaves it as it is)")?;
        }
        if self.plain_examples > 0 {
            writeln!(f, "  plain text: {} without a chat template", n(self.plain_examples, &self.noun))?;
        }
        for dropped in &self.dropped {
            let more = if dropped.count > dropped.places.len() { ", …" } else { "" };
            writeln!(f, "  dropped {}: {} ({}{more})", dropped.count, dropped.cause, dropped.places.join(", "))?;
        }
        writeln!(f, "  lengths in tokens        min  median     p95     max")?;
        for Part { name, lengths: l } in &self.parts {
            writeln!(f, "    {name:<18} {:>9} {:>7} {:>7} {:>7}  0 |{}|", l.min, l.median, l.p95, l.max, l.bars())?;
        }
        writeln!(f, "  unique tokens: {} an epoch", self.unique_tokens)?;
        if self.truncated > 0 {
            let side = if self.truncation == Truncation::Left { "left" } else { "right" };
            writeln!(
                f,
                "  truncated: {} to {} tokens, from the {side}",
                n(self.truncated, &self.noun),
                self.max_length
            )?;
        }
        if self.cut_alike > 0 {
            writeln!(
                f,
                "  same answers up to {} tokens: {}, which teach nothing",
                self.max_length,
                n(self.cut_alike, &self.noun)
            )?;
        }
        if self.duplicates > 0 {
            writeln!(f, "  duplicates: {} occur before", n(self.duplicates, &self.noun))?;
        }
        if let Some(place) = &self.first_opposed {
            let pairs = n(self.opposed, "pair");
            writeln!(f, "  contradictions: {pairs} prefer what a pair before rejects, first {place}")?;
        }
        if let Some(liked) = self.liked {
            writeln!(f, "  liked: {liked} of {}", n(self.examples(), "answer"))?;
        }
        if let Some(longer) = self.chosen_longer {
            let longer = 100.0 * longer as f64 / self.examples().max(1) as f64;
            writeln!(f, "  chosen is the longer answer in {longer:.0}% of the pairs")?;
        }
        match (&self.template, self.plain_examples) {
            (Some(origin), 0) => writeln!(f, "  chat template: {origin}")?,
            (_, plain) => writeln!(f, "  plain text: {} without chat template", n(plain, &self.noun))?,
        }
        if self.template_reads_clock {
            writeln!(f, "    it writes today's date: another day gives other tokens")?;
        }
        self.write_ends(f)?;
        if let Some(sample) = &self.sample {
            writeln!(f, "  first {} ({}), special tokens shown", self.noun, sample.place)?;
            for (i, SamplePart { name, text, tokens }) in sample.parts.iter().enumerate() {
                let learned = if i > 0 { ": learned" } else { "" };
                writeln!(f, "    [{name}{learned}] {}", n(*tokens, "token"))?;
                shortened(text).lines().try_for_each(|line| writeln!(f, "      {line}"))?;
            }
        }
        Ok(())
    }
}

impl Report {
    fn write_ends(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Endings { token, stops, answers, without, first } = &self.eos;
        match token {
            Some(token) if *without == 0 => writeln!(f, "  eos: every answer ends with {token}")?,
            Some(token) => writeln!(f, "  eos: {} of {answers} answers end with {token}", answers - without)?,
            None => writeln!(f, "  eos: no answer ends with a special token")?,
        }
        if let Some(place) = first {
            writeln!(f, "    {without} without an end, first {place}: the model would not learn to stop")?;
        }
        if token.is_some() && !stops {
            writeln!(f, "    generation does not stop at that token: it is not an eos_token of the checkpoint")?;
        }
        match &self.bos.token {
            None => writeln!(f, "  bos: the tokenizer has none")?,
            Some(token) if self.bos.twice > 0 => {
                writeln!(f, "  bos: {} begin with {token} twice", n(self.bos.twice, "prompt"))?
            }
            Some(token) => writeln!(f, "  bos: {} begin with {token}", n(self.bos.with, "prompt"))?,
        }
        match (&self.prompt_prefix.first, &self.prompt_prefix.text) {
            (Some(place), Some(text)) => {
                let rows = n(self.prompt_prefix.rows, "prompt");
                writeln!(f, "  prompt prefix: {rows} lost the end, first {place}: {text:?}")?;
                writeln!(
                    f,
                    "    the template renders it otherwise before an answer: training reads another context than generation"
                )
            }
            _ => writeln!(f, "  prompt prefix: whole in every {}", &self.noun),
        }
    }
}

/// "1 row", "2 rows".
fn n(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// The beginning and the end of a text.
pub fn shortened(text: &str) -> String {
    let letters = text.chars().count();
    if letters <= 2 * SHOWN {
        return text.to_owned();
    }
    let head: String = text.chars().take(SHOWN).collect();
    let tail: String = text.chars().skip(letters - SHOWN).collect();
    format!("{head} […] {tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        let l = Lengths::new((1..=100).rev().collect());
        assert_eq!((l.min, l.median, l.p95, l.max), (1, 50, 95, 100));
        assert_eq!(l.histogram.iter().sum::<usize>(), 100);
        assert_eq!(Lengths::new(vec![7]).p95, 7);
    }

    #[test]
    fn causes_are_counted_with_their_first_places() {
        let mut report = Report::default();
        for line in 1..=12 {
            report.drop(&Error::input("an answer is empty"), &format!("a.jsonl:{line}"));
        }
        assert_eq!(report.dropped[0].count, 12);
        assert_eq!(report.dropped[0].places, ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]);
        assert_eq!(report.messages.len(), 10);
        assert_eq!(report.messages[0], "a.jsonl:1: an answer is empty");
    }
}
