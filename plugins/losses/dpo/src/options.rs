//! Options that several losses share, and how their values are read.

use std::f64::consts::LN_2;

use dpo_plugin_api::prelude::*;

/// `beta`, of a default that differs between losses.
pub(crate) fn beta(default: f64) -> LossOption {
    LossOption::new("beta", default, "strength of the reference, or scale of the log-probs; above 0")
}

/// `label_smoothing`.
pub(crate) fn label_smoothing(default: f64) -> LossOption {
    LossOption::new("label_smoothing", default, "share of the labels that is taken to be wrong")
}

/// `f_divergence` and `f_alpha`, after the options given.
pub(crate) fn and_divergence(mut options: Vec<LossOption>) -> Vec<LossOption> {
    let kinds = DIVERGENCES.map(|(name, _)| name).join(", ");
    options.push(LossOption::new("f_divergence", DIVERGENCES[0].0, &format!("how ratios are scored: {kinds}")));
    options.push(LossOption::new("f_alpha", 0.5, "coefficient of alpha_divergence; at 1 it is reverse_kl"));
    options
}

/// The value of an option that must be above 0, as divisors and scales must.
pub(crate) fn positive(options: &Options, name: &str) -> Result<f64> {
    match options.float(name)? {
        value if value > 0.0 && value.is_finite() => Ok(value),
        value => bail!("loss option '{name}' should be above 0, is {value}"),
    }
}

/// The value of `label_smoothing`, which must be at least 0 and below `limit`.
pub(crate) fn smoothing(options: &Options, limit: f64) -> Result<f64> {
    match options.float("label_smoothing")? {
        e if (0.0..limit).contains(&e) => Ok(e),
        e => bail!("loss option 'label_smoothing' should be at least 0 and below {limit}, is {e}"),
    }
}

/// How a log-ratio `r = ln t` becomes a score `s(r) = f'(t)`, up to a constant (Wang et al. 2023, *Beyond Reverse KL*).
#[derive(Clone, Copy)]
enum Kind {
    ReverseKl,
    ForwardKl,
    JensenShannon,
    Alpha,
}

const DIVERGENCES: [(&str, Kind); 4] = [
    ("reverse_kl", Kind::ReverseKl),
    ("forward_kl", Kind::ForwardKl),
    ("js_divergence", Kind::JensenShannon),
    ("alpha_divergence", Kind::Alpha),
];

/// The divergence a user chose.
pub(crate) struct Divergence {
    kind: Kind,
    alpha: f64,
}

impl Divergence {
    /// Reads `f_divergence` and `f_alpha`.
    pub(crate) fn of(options: &Options) -> Result<Divergence> {
        let (name, alpha) = (options.text("f_divergence")?, options.float("f_alpha")?);
        match DIVERGENCES.iter().find(|(known, _)| *known == name) {
            Some((_, kind)) => Ok(Divergence { kind: *kind, alpha }),
            None => Err(Error::new(format!("unknown f_divergence '{name}'"))
                .help(format!("known: {}", DIVERGENCES.map(|(known, _)| known).join(", ")))),
        }
    }

    /// `s(r)`.
    fn score(&self, r: Dual) -> Dual {
        let a = self.alpha - 1.0;
        match self.kind {
            Kind::ForwardKl => 1.0 - (-r).exp(),
            Kind::JensenShannon => LN_2 + r.log_sigmoid(),
            // TRL's limits: 80 keeps the exponential within f32, and a coefficient this near to 1 is the limit case.
            Kind::Alpha if a.abs() >= 1e-6 => ((a * r).min(80.0).exp() - 1.0) / a,
            Kind::Alpha | Kind::ReverseKl => r,
        }
    }

    /// `s(rw)`.
    fn chosen(&self, pair: &Pair<'_>) -> Dual {
        self.score(pair.chosen_ratio())
    }

    /// `s(rl)`.
    fn rejected(&self, pair: &Pair<'_>) -> Dual {
        self.score(pair.rejected_ratio())
    }

    /// `D = s(rw) - s(rl)`.
    pub(crate) fn delta(&self, pair: &Pair<'_>) -> Dual {
        self.chosen(pair) - self.rejected(pair)
    }

    /// `s(rw)/|yw| - s(rl)/|yl|`.
    pub(crate) fn mean_delta(&self, pair: &Pair<'_>) -> Dual {
        self.chosen(pair) / pair.chosen.count() - self.rejected(pair) / pair.rejected.count()
    }
}
