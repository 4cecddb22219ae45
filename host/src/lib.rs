//! dpo-host: LoRA preference training with plugins for model families, dataset formats and losses.

pub mod base;
pub mod batch;
pub mod cli;
pub mod console;
pub mod cuda;
pub mod data;
pub mod demo;
pub mod device;
pub mod engine;
pub mod error;
pub mod example;
pub mod files;
pub mod generate;
pub mod graph;
pub mod hub;
pub mod logprobs;
pub mod lora;
pub mod model;
pub mod ops;
pub mod page;
pub mod plan;
pub mod plugins;
pub mod ranks;
pub mod train;
pub mod weights;

// Referred to so that the linker keeps what they submit to `inventory`.
use {
    dpo_format_hh_rlhf as _, dpo_format_kto as _, dpo_format_llama_factory as _, dpo_format_ms_swift as _,
    dpo_format_trl as _, dpo_format_ultrafeedback as _,
};
use {dpo_losses as _, dpo_model_llama3 as _, dpo_model_qwen2 as _, dpo_model_qwen3 as _};
