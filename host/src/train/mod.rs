//! Training: the objective, the reference, the optimizer, the loop, and what it leaves on disk.

mod answers;
mod checkpoint;
mod doctor;
mod folders;
mod interrupt;
mod log;
mod manifest;
mod meaning;
mod metrics;
mod next;
pub mod objective;
pub mod optimizer;
pub mod options;
mod reference;
mod run;
mod samples;
pub mod schedule;
mod settings;
mod start;
mod step;
mod tensorboard;
mod unsound;

pub(crate) use interrupt::Interrupt;
pub(crate) use metrics::peak_memory_gib;
pub use metrics::{ExampleMetrics, Sums};
pub use objective::{Objective, ObjectiveOptions};
pub use optimizer::{AdamW, Moments};
pub use options::{DataArgs, LossArgs, TrainOptions};
pub use reference::Reference;
pub use start::run;
pub use step::{Step, appraise, gradient, score};
