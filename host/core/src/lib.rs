//! What every other part of the host stands on: errors and files, examples and batches, graphs and their ops, weights and
//! adapters, the optimizer, and the CPU as a device. Knows the plugin API and nothing else of this workspace.

pub mod aux_loss;
pub mod backend;
pub mod base;
pub mod batch;
pub mod cache;
pub mod collective;
pub mod console;
pub mod cpu_decoder;
pub mod decoder;
pub mod device;
pub mod engine;
pub mod error;
pub mod example;
pub mod files;
pub mod fp8;
pub mod graph;
pub mod listen;
pub mod logprobs;
pub mod lora;
pub mod memory;
pub mod mxfp4;
pub mod nf4;
pub mod ops;
pub mod optimizer;
pub mod plan;
pub mod predictors;
pub mod progress;
pub mod quantized;
mod shard;
pub mod storage;
pub mod testing;
pub mod weights;
