//! The loss `@name@`.
//!
//! As it stands it is DPO with a margin. Change the formula in `eval`, and what the other functions
//! say of it.

use dpo_plugin_api::prelude::*;

/// Say here what the loss is, and which equation of which paper it follows.
pub struct Loss;

impl AlignmentLoss for Loss {
    /// What `--loss` takes: lower case, unique among all plugins.
    fn name(&self) -> &'static str {
        "@name@"
    }

    /// The line of `dpo-host list`.
    fn summary(&self) -> &'static str {
        "DPO with a margin"
    }

    /// The text of `dpo-host describe`.
    fn formula(&self) -> &'static str {
        "-log sigmoid(beta (chosen_ratio - rejected_ratio) - margin)"
    }

    /// What `--loss-option NAME=VALUE` sets: name, default, meaning.
    fn options(&self) -> Vec<LossOption> {
        vec![
            LossOption::new("beta", 0.1, "strength of the reference"),
            LossOption::new("margin", 0.5, "how far apart the rewards should be"),
        ]
    }

    /// The formula. Write it with `+ - * /`, `exp`, `ln`, `sigmoid`, `log_sigmoid`, `square`,
    /// `relu`: derivatives follow by themselves. Of a pair there are `chosen_ratio`, `chosen_logp`,
    /// `chosen_ref`, `chosen.count()`, and the same of the rejected answer. A loss that reads no
    /// reference, compares pairs with each other, or takes another number of answers, says so in
    /// `needs`.
    fn eval(
        &self,
        batch: &LossBatch<'_>,
        options: &Options,
        _state: &mut Vec<f64>,
    ) -> Result<LossGrad> {
        let (beta, margin) = (options.float("beta")?, options.float("margin")?);
        Ok(batch.each_pair(|p| {
            -(beta * (p.chosen_ratio() - p.rejected_ratio()) - margin).log_sigmoid()
        }))
    }
}

plugin! { losses: [Loss] }

#[cfg(test)]
mod tests {
    use super::*;
    use dpo_plugin_api::testing::{check_loss, check_loss_with};

    #[test]
    fn derivatives_are_central_differences() {
        check_loss(&Loss);
        check_loss_with(&Loss, &Options::defaults(&Loss).with("beta", 0.5));
    }
}
