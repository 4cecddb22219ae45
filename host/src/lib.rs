//! dpo-host: LoRA preference training with plugins for model families, dataset formats and losses.

pub mod error;
pub mod graph;
pub mod plugins;

// Referred to so that the linker keeps what they submit to `inventory`.
use {dpo_losses as _, dpo_model_llama3 as _, dpo_model_qwen2 as _, dpo_model_qwen3 as _};
