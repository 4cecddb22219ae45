//! Plugins: where they are found, how a library is opened, and what the registry knows by name.
//!
//! Linked-in plugins and shared libraries pass through the same checks and are called through the same two functions.

mod library;
mod registry;

pub(crate) use library::refuse_unknown_features;
pub use library::{Library, Origin, user_folder};
pub use registry::{Family, Format, Loss, LossCall, LossResult, Refusal, Registry, Row as ListRow};
