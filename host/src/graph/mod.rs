//! A family's graph, from plain data to something this host can run.

use dpo_plugin_api::graph::ModelGraph;

use crate::error::{Error, Result};

/// Checks a graph.
pub fn check(_graph: &ModelGraph) -> Result<()> {
    Ok(())
}

/// Statistics of answer tokens that a loss may ask for by name, each `[answer tokens]` under the policy.
pub const STATISTICS: &[&str] = &["log_sum_sq_probs"];

/// Refuses a statistic that this host does not compute.
pub fn check_statistics(names: &[String]) -> Result<()> {
    match names.iter().find(|n| !STATISTICS.contains(&n.as_str())) {
        Some(unknown) => Err(Error::unknown("statistic", unknown, STATISTICS.iter().copied())),
        None => Ok(()),
    }
}
