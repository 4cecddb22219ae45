//! A model and its adapters over HTTP, as OpenAI's API has it: chats, completions, their streams, and the names of models.
//!
//! The thread that calls [`serve`] computes: [`scheduler`] has one loop, in which all answers go on by a token. Connections are of a
//! runtime beside it, which reads requests, renders and tokenises them, and writes what comes of them. A slow client holds up nobody: its
//! tokens wait in its own channel.

mod door;
mod fields;
mod http;
mod refusal;
mod reply;
mod request;
mod scheduler;
mod service;

use std::sync::Arc;
use std::time::Duration;

use dpo_core::error::Result;
use dpo_data::ChatTokenizer;
use dpo_generate::{Generator, Sampling};

pub use http::Listener;

/// How long connections may write after the last token.
const FAREWELL: Duration = Duration::from_millis(200);

/// What is served, and how.
pub struct Config {
    /// The model's name.
    pub model: String,
    /// Names of adapters, in the generator's order.
    pub adapters: Vec<String>,
    /// What a request leaves out.
    pub sampling: Sampling,
    /// Tokens of an answer, where neither the request nor the user says so; `None` for as many as there is room for.
    pub max_new_tokens: Option<usize>,
    /// What clients have to show.
    pub api_key: Option<String>,
}

/// Serves until `stop` is told to.
///
/// # Errors
/// A runtime that the system does not give.
pub fn serve(
    mut generator: Generator,
    tokenizer: ChatTokenizer,
    config: Config,
    listener: Listener,
    stop: impl Fn() -> bool,
) -> Result<()> {
    let (queue, jobs) = scheduler::queue();
    let service = Arc::new(service::Service::new(tokenizer, generator.bounds(), config, queue));
    let running = listener.start(service)?;
    scheduler::run(&mut generator, &jobs, stop);
    // For what clients are told last.
    std::thread::sleep(FAREWELL);
    drop(running);
    Ok(())
}
