//! What a dpo-host plugin is written with.
//!
//! A plugin is a crate of type `["cdylib", "rlib"]` that implements one of three traits and exports it:
//!
//! - [`ModelFamily`](model::ModelFamily): from `config.json` to a graph of named ops;
//! - [`DatasetFormat`](dataset::DatasetFormat): from a row of a file to records of a prompt and its answers;
//! - [`AlignmentLoss`](loss::AlignmentLoss): from log-probs to a loss and its derivatives.
//!
//! A plugin describes, the host computes: no tensor, thread or device of the host is visible here. A whole loss:
//!
//! ```
//! use dpo_plugin_api::prelude::*;
//!
//! /// SLiC-HF's hinge on the difference of log-ratios (Zhao et al. 2023).
//! struct Hinge;
//!
//! impl AlignmentLoss for Hinge {
//!     fn name(&self) -> &'static str { "my-hinge" }
//!     fn summary(&self) -> &'static str { "hinge on the difference of log-ratios" }
//!     fn formula(&self) -> &'static str { "max(0, 1 - beta * (chosen_ratio - rejected_ratio))" }
//!     fn options(&self) -> Vec<LossOption> { vec![LossOption::new("beta", 0.1, "strength of the reference")] }
//!     fn eval(&self, batch: &LossBatch<'_>, options: &Options, _: &mut Vec<f64>) -> Result<LossGrad> {
//!         let beta = options.float("beta")?;
//!         Ok(batch.each_pair(|p| (1.0 - beta * (p.chosen_ratio() - p.rejected_ratio())).relu()))
//!     }
//! }
//!
//! plugin! { losses: [Hinge] }
//! # fn main() { dpo_plugin_api::testing::check_loss(&Hinge) }
//! ```
//!
//! `dpo-host new loss NAME` writes such a crate with its tests; `cargo build` and a look at `dpo-host list` do the rest.

#[doc(hidden)]
// abi_stable's derives name types in snake case with capitals and expand to undocumented items.
#[allow(non_camel_case_types, non_local_definitions, missing_docs)]
pub mod abi;
pub mod builder;
pub mod check;
pub mod config_keys;
pub mod dataset;
pub mod decoder;
pub mod dual;
mod error;
mod export;
pub mod graph;
pub mod loss;
pub mod mixer;
pub mod mla;
pub mod model;
pub mod moe;
pub mod ops;
pub mod rope;
pub mod testing;

pub use error::{Error, Result, nearest};

/// Version of this crate. Within a major version, plugins built against any older one go on loading.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Everything an author usually needs.
pub mod prelude {
    pub use crate::builder::{Attention, BlockBuilder, GraphBuilder, Norm, Var};
    pub use crate::dataset::{DatasetFormat, Message, Record, RecordAnswer, Row, Text};
    pub use crate::decoder::{Decoder, LayerNorms, QkNorm, QkNormOver};
    pub use crate::dual::Dual;
    pub use crate::graph::{ModelGraph, Weight};
    pub use crate::loss::{AlignmentLoss, Answers, Example, LossBatch, LossGrad, LossOption, Needs, Options, Pair};
    pub use crate::model::{Config, Family, ModelFamily};
    pub use crate::rope::Rope;
    pub use crate::{Error, Result, bail, plugin};
    pub use serde_json::{Value, json};
}

/// What the macros expand to.
#[doc(hidden)]
pub mod __private {
    pub use crate::abi;
    pub use abi_stable;
    pub use inventory;
}
