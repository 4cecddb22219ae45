//! Plugins: where they are found, how a library is opened, and what the registry knows by name.
//!
//! Linked-in plugins and shared libraries pass through the same checks and are called through the same two functions.

mod answer;
mod helper;
mod library;
mod registry;
pub mod shapes;
mod unclaimed;

pub use answer::answer;
pub use helper::COMMAND;
pub use library::{Library, Origin, user_folder};
pub use registry::{Family, Format, Loss, LossCall, LossResult, Refusal, Registry, Row as ListRow};

// Referred to so that the linker keeps what the built-in plugins submit to `inventory`.
use {
    dpo_formats as _, dpo_losses as _, dpo_model_llama3 as _, dpo_model_qwen2 as _, dpo_model_qwen3 as _,
    dpo_models_dense as _, dpo_models_hybrid as _, dpo_models_moe as _,
};
