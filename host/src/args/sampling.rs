//! How tokens of an answer are drawn.

use clap::Args;
use dpo_generate::SamplingOptions;

/// With a seed of its own.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    #[command(flatten)]
    draw: DrawArgs,
    /// Random seed: the same one gives the same answers
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
}

/// What is left out is as in the model's `generation_config.json`.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct DrawArgs {
    /// Temperature; 0 is greedy decoding [default: as for the options below, the model's generation_config.json; 0 without]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Nucleus sampling: draw from the most likely tokens that together have this probability [default: 1]
    #[arg(long, value_name = "0..1")]
    top_p: Option<f64>,
    /// Draw from the N most likely tokens; 0 for all [default: 0]
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Repetition penalty: divide the logits of tokens that occurred before; 1 for none [default: 1]
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f64>,
    /// Maximum number of tokens of an answer [default: 512]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
}

impl SamplingArgs {
    /// As the generator takes them.
    pub(crate) fn options(&self) -> SamplingOptions {
        self.draw.options(self.seed)
    }
}

impl DrawArgs {
    /// As the generator takes them.
    pub(crate) fn options(&self, seed: u64) -> SamplingOptions {
        let DrawArgs { temperature, top_p, top_k, repetition_penalty, max_new_tokens } = *self;
        SamplingOptions { temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed }
    }
}
