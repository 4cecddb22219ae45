//! A plugin that panics when it is asked what it brings.

use dpo_plugin_api::prelude::*;

/// A loss without a name.
pub struct Nameless;

impl AlignmentLoss for Nameless {
    fn name(&self) -> &'static str {
        panic!("no name comes to mind")
    }

    fn summary(&self) -> &'static str {
        ""
    }

    fn formula(&self) -> &'static str {
        ""
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, _: &mut Vec<f64>) -> Result<LossGrad> {
        Ok(batch.zero())
    }
}

plugin! { losses: [Nameless] }
