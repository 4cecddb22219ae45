//! Answers, token by token: what a device does for it, and the loop around it, which serves every device.
//!
//! A model speaks with two variants: as it was published, and as the adapter has made it. Both are of one model that is loaded
//! once, and each remembers its own text.

pub mod judge;
mod sampling;
mod text;

use std::time::Instant;

use dpo_plugin_api::dataset::Message;

use dpo_core::backend::Backend;
use dpo_core::decoder::{CHUNK, Decoder, Variant};
use dpo_core::error::{Error, Result};
use dpo_core::graph::{refuse_foreign_tokens, vocabulary};
use dpo_core::lora::Adapter;
use dpo_core::plan::MemoryOptions;
use dpo_core::weights::Checkpoint;
use dpo_data::{ChatTokenizer, Rendering};
use dpo_hub::model::Model;

pub use sampling::{Sampler, Sampling, SamplingOptions};
pub use text::TextStream;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model ended its turn.
    Turn,
    /// It has as many tokens as were allowed.
    Limit,
    /// The text is as long as the model was made for.
    Length,
    /// It was stopped from outside.
    Interrupt,
}

impl Stop {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Stop::Turn => "turn",
            Stop::Limit => "limit",
            Stop::Length => "length",
            Stop::Interrupt => "interrupt",
        }
    }
}

/// A model that answers.
pub struct Generator {
    decoder: Box<dyn Decoder>,
    tokenizer: ChatTokenizer,
    /// Tokens at which a turn ends.
    ends: Vec<u32>,
    /// Tokens that the model was made for.
    length: usize,
    vocabulary: usize,
    /// What each variant has taken in.
    heard: [Vec<u32>; 2],
}

/// An answer that grows.
pub struct Answer {
    variant: Variant,
    /// The prompt, then the answer.
    ids: Vec<u32>,
    prompt: usize,
    limit: usize,
    sampler: Sampler,
    stream: TextStream,
    text: String,
    /// When it had its first token.
    first: Option<Instant>,
    stop: Option<Stop>,
}

impl Answer {
    /// Who answers.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// Its text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its tokens so far, and the one that ended it.
    pub fn ids(&self) -> &[u32] {
        &self.ids[self.prompt..]
    }

    /// When its first token came: what came before was spent on the prompt.
    pub fn first(&self) -> Option<Instant> {
        self.first
    }

    /// Why it ended, if it has.
    pub fn stop(&self) -> Option<Stop> {
        self.stop
    }

    fn end(&mut self, stop: Stop, tokenizer: &ChatTokenizer) -> Option<String> {
        self.stop = Some(stop);
        let rest = self.stream.end(tokenizer);
        self.text.push_str(&rest);
        Some(rest).filter(|rest| !rest.is_empty())
    }
}

impl Generator {
    /// Loads a model, with an adapter or without, on a device, within the memory and with the base as options say.
    ///
    /// # Errors
    /// A checkpoint or an adapter that cannot be used, a device that does not answer, a model that does not fit.
    pub fn open(
        model: &Model<'_>,
        adapter: Option<Adapter>,
        backend: &dyn Backend,
        options: MemoryOptions,
    ) -> Result<Generator> {
        let tokenizer = ChatTokenizer::open(&model.folder, model.family.chat_template.as_deref())?;
        let checkpoint = Checkpoint::of(&model.folder, &model.graph)?;
        let decoder = backend.decoder(&model.graph, &checkpoint, adapter, model.memory(options)?)?;
        Ok(Generator::of(model, tokenizer, decoder))
    }

    /// A model that a device has already.
    pub fn of(model: &Model<'_>, tokenizer: ChatTokenizer, decoder: Box<dyn Decoder>) -> Generator {
        let length = model.positions().unwrap_or(usize::MAX);
        let mut ends = tokenizer.eos_ids().to_vec();
        // A base model's EOS ends a document; the template says what ends a turn, and answers are trained to end with it.
        ends.extend(tokenizer.turn_end().filter(|end| !ends.contains(end)));
        Generator { decoder, ends, tokenizer, length, vocabulary: vocabulary(&model.graph), heard: Default::default() }
    }

    /// What computes.
    pub fn device(&self) -> String {
        self.decoder.name()
    }

    /// Begins the answer that follows a conversation.
    ///
    /// # Errors
    /// A conversation that the template refuses, or that fills the model's length.
    pub fn answer(&mut self, variant: Variant, turns: &[Message], sampling: &Sampling) -> Result<Answer> {
        let text = self.tokenizer.render(turns, Rendering { generation_prompt: true, ..Rendering::default() })?;
        let ids = self.tokenizer.encode(&text, false)?;
        self.go_on(variant, ids, sampling)
    }

    /// Begins what follows some tokens.
    ///
    /// # Errors
    /// None of them, so many that they fill the model's length, or one that the model does not have.
    pub fn go_on(&mut self, variant: Variant, ids: Vec<u32>, sampling: &Sampling) -> Result<Answer> {
        let (prompt, length) = (ids.len(), self.length);
        if prompt == 0 {
            return Err(Error::input("there is nothing to answer"));
        }
        if prompt >= length {
            return Err(Error::input(format!("the conversation has {prompt} tokens, the model is made for {length}")));
        }
        refuse_foreign_tokens(&ids, self.vocabulary)?;
        // What is the same as last time is not computed again, but for one token, after which logits are needed.
        let heard = &mut self.heard[variant as usize];
        let same = heard.iter().zip(&ids).take_while(|(a, b)| a == b).count().min(prompt - 1);
        heard.truncate(self.decoder.truncate(variant, same));
        Ok(Answer {
            variant,
            ids,
            prompt,
            limit: sampling.max_new_tokens,
            sampler: Sampler::new(sampling),
            stream: TextStream::default(),
            text: String::new(),
            first: None,
            stop: None,
        })
    }

    /// Goes on with an answer, by a token or by a part of its prompt; returns what it adds to the text, or `None` at the end.
    ///
    /// # Errors
    /// What the device reports; logits that are NaN.
    pub fn step(&mut self, answer: &mut Answer) -> Result<Option<String>> {
        if answer.stop.is_some() {
            return Ok(None);
        }
        let count = answer.ids().len();
        let full = (answer.ids.len() >= self.length).then_some(Stop::Length);
        if let Some(stop) = (count >= answer.limit).then_some(Stop::Limit).or(full) {
            return Ok(answer.end(stop, &self.tokenizer));
        }
        let heard = &mut self.heard[answer.variant as usize];
        let new = &answer.ids[heard.len()..];
        let new = &new[..new.len().min(CHUNK)];
        let logits = self.decoder.append(answer.variant, new)?;
        heard.extend(new);
        if heard.len() < answer.ids.len() {
            return Ok(Some(String::new()));
        }
        let id = answer.sampler.draw(logits, &answer.ids)?;
        answer.ids.push(id);
        answer.first.get_or_insert_with(Instant::now);
        if self.ends.contains(&id) {
            return Ok(answer.end(Stop::Turn, &self.tokenizer));
        }
        let text = answer.stream.push(&self.tokenizer, id);
        answer.text.push_str(&text);
        Ok(Some(text))
    }

    /// Ends an answer where it is; returns what its text lacked.
    pub fn interrupt(&mut self, answer: &mut Answer) -> Option<String> {
        if answer.stop.is_some() { None } else { answer.end(Stop::Interrupt, &self.tokenizer) }
    }

    /// The whole of what follows some tokens.
    ///
    /// # Errors
    /// As [`Generator::go_on`] and [`Generator::step`].
    pub fn say(&mut self, variant: Variant, ids: &[u32], sampling: &Sampling) -> Result<Answer> {
        let mut answer = self.go_on(variant, ids.to_vec(), sampling)?;
        while self.step(&mut answer)?.is_some() {}
        Ok(answer)
    }
}

/// A prompt with what both variants answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// The conversation so far.
    pub prompt: String,
    /// What the model without adapter says.
    pub base: String,
    /// What the model with it says.
    pub tuned: String,
}

/// What both variants answer to some prompts, as pairs have them: rendered, in tokens.
///
/// # Errors
/// As [`Generator::go_on`] and [`Generator::step`].
pub fn compare(generator: &mut Generator, prompts: &[&[u32]], sampling: &Sampling) -> Result<Vec<Comparison>> {
    let compare = |prompt: &&[u32]| {
        let mut say = |variant| Ok::<_, Error>(generator.say(variant, prompt, sampling)?.text);
        let (base, tuned) = (say(Variant::Base)?, say(Variant::Tuned)?);
        Ok(Comparison { prompt: generator.tokenizer.decode(prompt, false).trim().to_owned(), base, tuned })
    };
    prompts.iter().map(compare).collect()
}
