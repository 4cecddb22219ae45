//! Answers, token by token: what a device does for it, and the loop around it, which serves every device.
//!
//! A model answers as it was published, or as one of its adapters has made it. All of them are of one model that is loaded once. Each
//! answer has a sequence of the device, which remembers its tokens after it: what begins like an earlier text is not computed again.

mod answer;
mod compare;
pub mod judge;
mod sampling;
mod text;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use dpo_plugin_api::dataset::Message;
use rayon::prelude::*;

use dpo_core::backend::Backend;
use dpo_core::decoder::{CHUNK, Decoder, Sequences};
use dpo_core::error::{Error, Result};
use dpo_core::graph::{refuse_foreign_tokens, vocabulary};
use dpo_core::lora::Adapter;
use dpo_core::plan::MemoryOptions;
use dpo_core::weights::Checkpoint;
use dpo_data::{ChatTokenizer, Rendering};
use dpo_hub::model::Model;

pub use answer::{Answer, Stop};
pub use compare::{Comparison, Variant, compare};
pub use sampling::{Sampler, Sampling, SamplingOptions, TokenLogProb};
pub use text::TextStream;

/// Parts of prompts that are taken in between two tokens of the answers that have begun: more would make those wait for long.
const PROMPTS_AT_ONCE: usize = 4;

/// A model that answers.
pub struct Generator {
    decoder: Box<dyn Decoder>,
    tokenizer: ChatTokenizer,
    /// Tokens at which a turn ends.
    ends: Vec<u32>,
    bounds: Bounds,
    sequences: Vec<Sequence>,
    /// Answers that have begun.
    begun: u64,
}

/// What texts a generator goes on with.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Tokens of a text at most: what the model was made for, or what there is room for.
    pub length: usize,
    vocabulary: usize,
}

impl Bounds {
    /// Refuses tokens that nothing can follow.
    ///
    /// # Errors
    /// None of them, so many that they fill the length, or one that the model does not have.
    pub fn check(self, ids: &[u32]) -> Result<()> {
        let (prompt, length) = (ids.len(), self.length);
        if prompt == 0 {
            return Err(Error::input("there is nothing to answer"));
        }
        if prompt >= length {
            return Err(Error::input(format!("the conversation has {prompt} tokens, there is room for {length}")));
        }
        refuse_foreign_tokens(ids, self.vocabulary)
    }
}

/// A sequence of the device.
#[derive(Default)]
struct Sequence {
    /// What it has taken in, and with which adapter.
    tokens: Vec<u32>,
    adapter: Option<usize>,
    /// The answer that holds it.
    holder: Weak<()>,
    /// The number of the last one.
    used: u64,
}

impl Generator {
    /// Loads a model with some adapters on a device, within the memory and with the base as options say.
    ///
    /// # Errors
    /// A checkpoint or an adapter that cannot be used, a device that does not answer, a model that does not fit.
    pub fn open(
        model: &Model<'_>,
        adapters: Vec<Adapter>,
        backend: &dyn Backend,
        sequences: Sequences,
        options: MemoryOptions,
    ) -> Result<Generator> {
        let tokenizer = ChatTokenizer::open(&model.folder, model.family.chat_template.as_deref())?;
        let checkpoint = Checkpoint::of(&model.folder, &model.graph)?;
        let decoder = backend.decoder(&model.graph, &checkpoint, adapters, sequences, model.memory(options)?)?;
        Ok(Generator::of(model, tokenizer, decoder))
    }

    /// A model that a device has already.
    pub fn of(model: &Model<'_>, tokenizer: ChatTokenizer, decoder: Box<dyn Decoder>) -> Generator {
        let (count, room) = decoder.sequences();
        let length = model.positions().unwrap_or(usize::MAX).min(room);
        let mut ends = tokenizer.eos_ids().to_vec();
        // A base model's EOS ends a document; the template says what ends a turn, and answers are trained to end with it.
        ends.extend(tokenizer.turn_end().filter(|end| !ends.contains(end)));
        let sequences = (0..count).map(|_| Sequence::default()).collect();
        let bounds = Bounds { length, vocabulary: vocabulary(&model.graph) };
        Generator { decoder, ends, tokenizer, bounds, sequences, begun: 0 }
    }

    /// What computes.
    pub fn device(&self) -> String {
        self.decoder.name()
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &ChatTokenizer {
        &self.tokenizer
    }

    /// What texts it goes on with.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Sequences that no answer has.
    pub fn free(&self) -> usize {
        self.sequences.iter().filter(|sequence| sequence.is_free()).count()
    }

    /// The tokens of a conversation, up to where an answer begins.
    ///
    /// # Errors
    /// One that the template refuses.
    pub fn tokens(&self, turns: &[Message], rendering: Rendering<'_>) -> Result<Vec<u32>> {
        let text = self.tokenizer.render(turns, Rendering { generation_prompt: true, ..rendering })?;
        self.tokenizer.encode(&text, false)
    }

    /// Begins the answer that follows a conversation.
    ///
    /// # Errors
    /// A conversation that the template refuses; as [`begin`](Self::begin).
    pub fn answer(&mut self, adapter: Option<usize>, turns: &[Message], sampling: &Sampling) -> Result<Answer> {
        let ids = self.tokens(turns, Rendering::default())?;
        self.begin(adapter, ids, sampling)
    }

    /// Begins what follows some tokens, with an adapter or without.
    ///
    /// # Errors
    /// None of them, so many that they fill the model's length, or one that the model does not have; no free sequence.
    pub fn begin(&mut self, adapter: Option<usize>, ids: Vec<u32>, sampling: &Sampling) -> Result<Answer> {
        self.bounds.check(&ids)?;
        let prompt = ids.len();
        // What is the same as in an earlier text is not computed again, but for one token, after which logits are needed.
        let same = |own: &Sequence| match own.adapter == adapter {
            true => own.tokens.iter().zip(&ids).take_while(|(a, b)| a == b).count().min(prompt - 1),
            false => 0,
        };
        let free = self.sequences.iter().enumerate().filter(|(_, own)| own.is_free());
        let best =
            free.max_by_key(|(_, own)| (same(own), std::cmp::Reverse(own.used))).map(|(at, own)| (at, same(own)));
        let Some((at, same)) = best else { return Err(Error::run("all sequences have an answer that goes on")) };
        let lease = Arc::new(());
        self.begun += 1;
        let left = self.decoder.truncate(at, same);
        let own = &mut self.sequences[at];
        own.tokens.truncate(left);
        (own.adapter, own.holder, own.used) = (adapter, Arc::downgrade(&lease), self.begun);
        Ok(Answer::new(adapter, (at, lease), ids, sampling))
    }

    /// Goes on with an answer, by a token or by a part of its prompt; returns what it adds to the text, or `None` at the end.
    ///
    /// # Errors
    /// What the device reports; logits that are NaN.
    pub fn step(&mut self, answer: &mut Answer) -> Result<Option<String>> {
        self.step_all(&mut [answer]).pop().unwrap_or(Ok(None))
    }

    /// Goes on with several answers at once, each as [`step`](Self::step) does; some whose prompts are not taken in yet may wait.
    pub fn step_all(&mut self, answers: &mut [&mut Answer]) -> Vec<Result<Option<String>>> {
        let mut results: Vec<Result<Option<String>>> = answers.iter().map(|_| Ok(Some(String::new()))).collect();
        let (mut tokens, mut prompts) = (BTreeMap::<Option<usize>, Vec<usize>>::new(), Vec::new());
        for (at, answer) in answers.iter_mut().enumerate() {
            if answer.stop().is_some() {
                results[at] = Ok(None);
                continue;
            }
            let full = (answer.ids.len() >= self.bounds.length).then_some(Stop::Length);
            if let Some(stop) = (answer.ids().len() >= answer.limit).then_some(Stop::Limit).or(full) {
                results[at] = Ok(answer.end(stop, &self.tokenizer));
                continue;
            }
            match answer.ids.len() - self.sequences[answer.sequence].tokens.len() {
                1 => tokens.entry(answer.adapter).or_default().push(at),
                _ => prompts.push(at),
            }
        }
        prompts.truncate(PROMPTS_AT_ONCE);
        let passes = tokens.into_values().chain(prompts.into_iter().map(|at| vec![at]));
        for pass in passes.collect::<Vec<_>>() {
            self.pass(answers, &pass, &mut results);
        }
        results
    }

    /// Goes on with answers of one adapter in one pass.
    fn pass(&mut self, answers: &mut [&mut Answer], pass: &[usize], results: &mut [Result<Option<String>>]) {
        let new = |at: &usize| {
            let answer = &answers[*at];
            let ids = &answer.ids[self.sequences[answer.sequence].tokens.len()..];
            (answer.sequence, &ids[..ids.len().min(CHUNK)])
        };
        let new: Vec<(usize, &[u32])> = pass.iter().map(new).collect();
        let logits = match self.decoder.append(answers[pass[0]].adapter, &new) {
            Ok(logits) => logits,
            Err(e) => {
                for at in pass {
                    answers[*at].end(Stop::Interrupt, &self.tokenizer);
                    results[*at] = Err(e.clone());
                }
                return;
            }
        };
        new.iter().for_each(|(sequence, ids)| self.sequences[*sequence].tokens.extend(*ids));
        let mut rows: Vec<Option<Vec<f32>>> = answers.iter().map(|_| None).collect();
        for (at, logits) in pass.iter().zip(logits) {
            let answer = &answers[*at];
            let whole = self.sequences[answer.sequence].tokens.len() == answer.ids.len();
            rows[*at] = Some(logits).filter(|_| whole);
        }
        let (ends, tokenizer) = (&self.ends, &self.tokenizer);
        // Threads are worth their while where there are several.
        if let [at] = pass {
            if let Some(logits) = rows[*at].take() {
                results[*at] = answers[*at].go_on(logits, ends, tokenizer);
            }
            return;
        }
        let all = answers.par_iter_mut().zip(rows).zip(results.par_iter_mut());
        all.for_each(|((answer, logits), result)| {
            if let Some(logits) = logits {
                *result = answer.go_on(logits, ends, tokenizer);
            }
        });
    }

    /// Ends an answer where it is; returns what its text lacked.
    pub fn interrupt(&mut self, answer: &mut Answer) -> Option<String> {
        if answer.stop().is_some() { None } else { answer.end(Stop::Interrupt, &self.tokenizer) }
    }

    /// The whole of what follows some tokens.
    ///
    /// # Errors
    /// As [`begin`](Self::begin) and [`step`](Self::step).
    pub fn say(&mut self, adapter: Option<usize>, ids: &[u32], sampling: &Sampling) -> Result<Answer> {
        let mut answer = self.begin(adapter, ids.to_vec(), sampling)?;
        while self.step(&mut answer)?.is_some() {}
        Ok(answer)
    }
}

impl Sequence {
    fn is_free(&self) -> bool {
        self.holder.strong_count() == 0
    }
}
