//! Learning rate by step, as transformers' schedulers have it.

use std::f64::consts::PI;

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// In a straight line to 0.
    Linear,
    /// Along half a cosine to 0.
    Cosine,
    /// Not at all.
    Constant,
}

impl Schedule {
    /// The factor on the learning rate for the step after `done` steps, of `total`, the first `warmup` of which rise.
    pub fn factor(self, done: u64, warmup: u64, total: u64) -> f64 {
        if done < warmup {
            return done as f64 / warmup as f64;
        }
        let rest = (total - warmup.min(total)).max(1) as f64;
        let gone = (done - warmup) as f64 / rest;
        match self {
            Schedule::Linear => (1.0 - gone).max(0.0),
            Schedule::Cosine => (0.5 * (1.0 + (PI * gone).cos())).max(0.0),
            Schedule::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    /// `transformers.get_*_schedule_with_warmup`, 2 warm-up steps of 6.
    #[test]
    fn same_as_transformers() {
        let cases = [
            (Schedule::Linear, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
            (Schedule::Cosine, [0.0, 0.5, 1.0, 0.853_553_4, 0.5, 0.146_446_6]),
            (Schedule::Constant, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ];
        for (schedule, factors) in cases {
            for (done, factor) in factors.into_iter().enumerate() {
                assert!((schedule.factor(done as u64, 2, 6) - factor).abs() < 1e-6, "{schedule:?} {done}");
            }
        }
    }
}
