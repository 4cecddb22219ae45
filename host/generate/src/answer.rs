//! An answer that grows, and why it ended.

use std::sync::Arc;
use std::time::Instant;

use dpo_core::error::Result;
use dpo_data::ChatTokenizer;

use super::Variant;
use super::sampling::{Sampler, Sampling, TokenLogProb};
use super::text::{StopStrings, TextStream};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model ended its turn.
    Turn,
    /// A string came that it was to stop at.
    StopString,
    /// It has as many tokens as were allowed.
    Limit,
    /// The text is as long as the model was made for, or as there is room for.
    Length,
    /// It was stopped from outside.
    Interrupt,
}

impl Stop {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Stop::Turn => "turn",
            Stop::StopString => "stop string",
            Stop::Limit => "limit",
            Stop::Length => "length",
            Stop::Interrupt => "interrupt",
        }
    }
}

/// An answer that grows. Its sequence is free once it ends or is dropped.
pub struct Answer {
    pub(super) adapter: Option<usize>,
    /// Its sequence, and what holds it.
    pub(super) sequence: usize,
    pub(super) lease: Option<Arc<()>>,
    /// The prompt, then the answer.
    pub(super) ids: Vec<u32>,
    prompt: usize,
    pub(super) limit: usize,
    ignore_eos: bool,
    sampler: Sampler,
    logprobs: Vec<TokenLogProb>,
    stream: TextStream,
    stops: StopStrings,
    text: String,
    /// When it had its first token.
    first: Option<Instant>,
    stop: Option<Stop>,
}

impl Answer {
    pub(super) fn new(
        adapter: Option<usize>,
        (sequence, lease): (usize, Arc<()>),
        ids: Vec<u32>,
        sampling: &Sampling,
    ) -> Answer {
        Answer {
            adapter,
            sequence,
            lease: Some(lease),
            prompt: ids.len(),
            ids,
            limit: sampling.max_new_tokens,
            ignore_eos: sampling.ignore_eos,
            sampler: Sampler::new(sampling),
            logprobs: Vec::new(),
            stream: TextStream::default(),
            stops: StopStrings::new(&sampling.stop),
            text: String::new(),
            first: None,
            stop: None,
        }
    }

    /// Who answers.
    pub fn variant(&self) -> Variant {
        if self.adapter.is_some() { Variant::Tuned } else { Variant::Base }
    }

    /// Its text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its tokens so far, and the one that ended it.
    pub fn ids(&self) -> &[u32] {
        &self.ids[self.prompt..]
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt
    }

    /// The log-probs of its tokens, where they were asked for.
    pub fn logprobs(&self) -> &[TokenLogProb] {
        &self.logprobs
    }

    /// When its first token came: what came before was spent on the prompt.
    pub fn first(&self) -> Option<Instant> {
        self.first
    }

    /// Why it ended, if it has.
    pub fn stop(&self) -> Option<Stop> {
        self.stop
    }

    /// Ends it; returns what its text lacked.
    pub(super) fn end(&mut self, stop: Stop, tokenizer: &ChatTokenizer) -> Option<String> {
        let rest = self.stream.end(tokenizer);
        let (mut text, found) = self.stops.push(&rest);
        text += &self.stops.end();
        self.text.push_str(&text);
        self.stop = Some(if found { Stop::StopString } else { stop });
        self.lease = None;
        Some(text).filter(|text| !text.is_empty())
    }

    /// Draws the next token from its logits; what it adds to the text, or what the text lacked where it ends the answer.
    pub(super) fn go_on(
        &mut self,
        logits: Vec<f32>,
        ends: &[u32],
        tokenizer: &ChatTokenizer,
    ) -> Result<Option<String>> {
        let drawn = self.sampler.draw(logits, &self.ids, self.prompt);
        let (id, logprob) = drawn.inspect_err(|_| drop(self.end(Stop::Interrupt, tokenizer)))?;
        self.ids.push(id);
        self.logprobs.extend(logprob);
        self.first.get_or_insert_with(Instant::now);
        if ends.contains(&id) && !self.ignore_eos {
            return Ok(self.end(Stop::Turn, tokenizer));
        }
        let (text, found) = self.stops.push(&self.stream.push(tokenizer, id));
        self.text.push_str(&text);
        if found {
            self.stop = Some(Stop::StopString);
            self.lease = None;
            return Ok(Some(text).filter(|text| !text.is_empty()));
        }
        Ok(Some(text))
    }
}
