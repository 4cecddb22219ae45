//! Training: the objective, the reference, the optimizer, the loop, and what it leaves on disk.

mod before_after;
mod checkpoint;
pub mod config;
mod data;
mod doctor;
mod evaluation;
mod log;
mod manifest;
mod metrics;
mod next_steps;
mod nonfinite;
pub mod objective;
mod own_reference;
mod reference;
mod run;
mod run_dir;
mod samples;
pub mod schedule;
mod settings;
mod setup;
mod step;
mod trackers;

pub use metrics::{ExampleMetrics, Sums};
pub use objective::{Objective, ObjectiveOptions};
pub use reference::Reference;
pub use run_dir::{output_of, refuse_run};
pub use setup::train;
pub use step::{Step, gradient, mean_metrics, score};
