//! Losses over a ranking of any number of answers.

use dpo_plugin_api::prelude::*;

use crate::options::{beta, positive};
use crate::{Loss, needs};

/// DPO under the Plackett-Luce model of rankings (Rafailov et al. 2023, arXiv 2305.18290, appendix A.3, eq. 20). Of two answers
/// with equal labels neither is better, so that they are not compared. With two answers it is `sigmoid`.
pub const PLACKETT_LUCE: Loss = Loss {
    name: "plackett_luce",
    summary: "DPO over a ranking (Rafailov et al. 2023, eq. 20); with two answers it is sigmoid",
    formula: formula!(
        "-sum over j of (beta r(j) - ln sum over k of exp(beta r(k))), k = j and every worse answer",
        ranking
    ),
    needs: needs(Answers::Ranked, true),
    options: || vec![beta(0.1)],
    eval: |batch, o| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_example(|e| {
            let worse = |j: usize| (0..e.learned()).filter(move |k| e.answers[*k].label < e.answers[j].label);
            let terms = (0..e.learned()).map(|j| log_sum_exp(worse(j).map(|k| beta * (e.ratio(k) - e.ratio(j)))));
            terms.fold(Dual::constant(0.0), |sum, term| sum + term)
        }))
    },
};

/// `ln(1 + sum exp x)`, without overflow.
fn log_sum_exp(xs: impl Iterator<Item = Dual>) -> Dual {
    let xs: Vec<Dual> = xs.collect();
    let top = xs.iter().fold(0.0_f64, |top, x| top.max(x.value));
    let sum = xs.iter().fold(Dual::constant((-top).exp()), |sum, x| sum + (*x - top).exp());
    sum.ln() + top
}
