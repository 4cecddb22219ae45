//! Learning rate by step, as transformers' schedulers have it.

use std::f64::consts::PI;

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    /// In a straight line to 0.
    Linear,
    /// Along half a cosine to 0.
    Cosine,
    /// Not at all.
    Constant,
    /// In a straight line to this part of the learning rate (`polynomial` of power 1).
    Polynomial(f64),
    /// As `1/√t`, with `t` in units of the warm-up, or of 10,000 steps without one.
    InverseSqrt,
    /// Along half a cosine to this part of the learning rate.
    CosineWithMinLr(f64),
}

impl Schedule {
    /// The factor on the learning rate for the step after `done` steps, of `total`, the first `warmup` of which rise.
    pub fn factor(self, done: u64, warmup: u64, total: u64) -> f64 {
        if done < warmup {
            return done as f64 / warmup as f64;
        }
        if let Schedule::InverseSqrt = self {
            let scale = if warmup > 0 { warmup as f64 } else { 10_000.0 };
            return (scale / (done as f64 + if warmup > 0 { 0.0 } else { scale })).sqrt();
        }
        let rest = (total - warmup.min(total)).max(1) as f64;
        let gone = (done - warmup) as f64 / rest;
        let cosine = (0.5 * (1.0 + (PI * gone).cos())).max(0.0);
        match self {
            Schedule::Linear => (1.0 - gone).max(0.0),
            Schedule::Cosine => cosine,
            Schedule::Constant | Schedule::InverseSqrt => 1.0,
            Schedule::Polynomial(end) => (1.0 - end) * (1.0 - gone).max(0.0) + end,
            Schedule::CosineWithMinLr(end) => (1.0 - end) * cosine + end,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::FRAC_1_SQRT_2;

    use super::Schedule;

    /// `transformers.get_*_schedule_with_warmup`, 2 warm-up steps of 6.
    #[test]
    fn same_as_transformers() {
        let cases = [
            (Schedule::Linear, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
            (Schedule::Cosine, [0.0, 0.5, 1.0, 0.853_553_4, 0.5, 0.146_446_6]),
            (Schedule::Constant, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
            (Schedule::Polynomial(0.1), [0.0, 0.5, 1.0, 0.775, 0.55, 0.325]),
            (Schedule::InverseSqrt, [0.0, 0.5, 1.0, 0.816_496_6, FRAC_1_SQRT_2, 0.632_455_5]),
            (Schedule::CosineWithMinLr(0.1), [0.0, 0.5, 1.0, 0.868_198_1, 0.55, 0.231_801_9]),
        ];
        for (schedule, factors) in cases {
            for (done, factor) in factors.into_iter().enumerate() {
                assert!((schedule.factor(done as u64, 2, 6) - factor).abs() < 1e-6, "{schedule:?} {done}");
            }
        }
    }
}
