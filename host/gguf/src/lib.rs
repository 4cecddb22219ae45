//! Models as GGUF files, which llama.cpp and ollama run.
//!
//! - `architecture.rs`: which family is which architecture of llama.cpp, a row each; `facts.rs`: what a graph computes, in the words of the
//!   metadata; `hyperparameters.rs`: the metadata of both, and what of a model llama.cpp would compute otherwise; `rope.rs`: the same of
//!   rotary frequencies.
//! - `tensors.rs`: what tensors a file has, of which rows of a graph's weights; `mixture.rs`: in which number formats;
//!   `quantize/`: how values are packed.
//! - `tokenizer/`: the tokenizer as metadata; `modelfile.rs`: what ollama is told beside the file.
//! - `file.rs`: the container; `export.rs`: all of it planned, then written tensor by tensor.

pub mod architecture;
mod export;
mod facts;
pub mod file;
mod hyperparameters;
mod mixture;
mod modelfile;
pub mod quantize;
mod rope;
mod tensors;
mod tokenizer;

pub use export::{Export, Source};
pub use mixture::Mixture;
