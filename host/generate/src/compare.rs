//! A model with its adapter beside the model without it.

use dpo_core::error::{Error, Result};

use super::{Generator, Sampling};

/// Which of the two answers. Both share the frozen weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// The base model, its adapter disabled.
    Base,
    /// The model with its adapter.
    Tuned,
}

impl Variant {
    /// What output calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Variant::Base => "base",
            Variant::Tuned => "tuned",
        }
    }

    /// The adapter that it answers with: the first one.
    pub fn adapter(self) -> Option<usize> {
        (self == Variant::Tuned).then_some(0)
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
/// As [`Generator::begin`] and [`Generator::step`].
pub fn compare(generator: &mut Generator, prompts: &[&[u32]], sampling: &Sampling) -> Result<Vec<Comparison>> {
    let compare = |prompt: &&[u32]| {
        let mut say =
            |variant: Variant| Ok::<_, Error>(generator.say(variant.adapter(), prompt, sampling)?.text().to_owned());
        let (base, tuned) = (say(Variant::Base)?, say(Variant::Tuned)?);
        Ok(Comparison { prompt: generator.tokenizer().decode(prompt, false).trim().to_owned(), base, tuned })
    };
    prompts.iter().map(compare).collect()
}
