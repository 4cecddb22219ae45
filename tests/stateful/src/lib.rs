//! A loss with a memory: BCO as it was first published (Jung et al. 2024, eq. 8), whose reward shift is a running mean. And
//! one that takes its time.

use dpo_plugin_api::prelude::*;

/// The loss.
pub struct Shifted;

impl AlignmentLoss for Shifted {
    fn name(&self) -> &'static str {
        "bco-shifted"
    }

    fn summary(&self) -> &'static str {
        "for tests: BCO with a running mean of rewards"
    }

    fn formula(&self) -> &'static str {
        "-ls(rw - d) - ls(-(rl - d)), d = running mean of (rw + rl) / 2"
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, state: &mut Vec<f64>) -> Result<LossGrad> {
        let shift = state.first().copied().unwrap_or(0.0);
        let rewards = batch.pairs().into_iter().map(|p| (p.chosen_ratio().value + p.rejected_ratio().value) / 2.0);
        let mean = rewards.sum::<f64>() / batch.examples.len() as f64;
        *state = vec![0.5 * shift + 0.5 * mean];
        let of = |p: &Pair<'_>| -(p.chosen_ratio() - shift).log_sigmoid() - (shift - p.rejected_ratio()).log_sigmoid();
        Ok(batch.each_pair(of))
    }
}

/// A loss that computes for two seconds.
pub struct Slow;

impl AlignmentLoss for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn summary(&self) -> &'static str {
        "for tests: sigmoid, slowly"
    }

    fn formula(&self) -> &'static str {
        "-ls(rw - rl)"
    }

    fn eval(&self, batch: &LossBatch<'_>, _: &Options, _: &mut Vec<f64>) -> Result<LossGrad> {
        std::thread::sleep(std::time::Duration::from_secs(2));
        Ok(batch.each_pair(|p| -(p.chosen_ratio() - p.rejected_ratio()).log_sigmoid()))
    }
}

plugin! {
    losses: [Shifted, Slow],
}
