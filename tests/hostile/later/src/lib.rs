//! A plugin that needs more than this host has.

use dpo_plugin_api::prelude::*;

/// A sound loss.
pub struct Later;

impl AlignmentLoss for Later {
    fn name(&self) -> &'static str {
        "later"
    }

    fn summary(&self) -> &'static str {
        "for tests"
    }

    fn formula(&self) -> &'static str {
        "none"
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, _: &mut Vec<f64>) -> Result<LossGrad> {
        Ok(batch.each_example(|e| e.sum(0)))
    }
}

plugin! { requires: ["foresight"], losses: [Later] }
