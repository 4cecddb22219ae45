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
    peers: "none of TRL, ms-swift, LLaMA-Factory",
    needs: needs(Answers::Ranked, true),
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_example(|e| {
            let worse = |j: usize| (0..e.learned()).filter(move |k| e.answers[*k].label < e.answers[j].label);
            let terms = (0..e.learned()).map(|j| log_sum_exp(worse(j).map(|k| beta * (e.ratio(k) - e.ratio(j)))));
            terms.fold(Dual::constant(0.0), |sum, term| sum + term)
        }))
    },
};

/// Softmax-DPO (Chen et al. 2024, arXiv 2406.09215, eq. 10): the best answer against all worse ones at once: the first factor of
/// [`PLACKETT_LUCE`].
pub const SDPO: Loss = Loss {
    name: "sdpo",
    summary: "softmax DPO (Chen et al. 2024): the best answer against all worse ones; with two answers it is sigmoid",
    formula: formula!("ln(1 + sum over k of exp(beta (r(k) - r(1)))), k = every answer worse than the best", ranking),
    peers: "none of TRL, ms-swift, LLaMA-Factory; its authors' code",
    needs: needs(Answers::Ranked, true),
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_example(|e| {
            let worse = (1..e.learned()).filter(|k| e.answers[*k].label < e.answers[0].label);
            log_sum_exp(worse.map(|k| beta * (e.ratio(k) - e.ratio(0))))
        }))
    },
};

/// DPO over every pair of a better and a worse answer, with a margin by their scores, as ODPO has it with a linear offset (Amini et
/// al. 2024, arXiv 2402.10571, eq. 8).
pub const ALL_PAIRS: Loss = Loss {
    name: "all_pairs",
    summary: "DPO over all pairs of a ranking, with a margin by scores (ODPO, Amini et al. 2024); with two answers it is sigmoid",
    formula: formula!(
        "mean over pairs j better than k of -ls(beta (r(j) - r(k)) - score_margin (s(j) - s(k)))",
        ls,
        ranking,
        scores
    ),
    peers: "none of TRL, LLaMA-Factory; ms-swift reads the column margin for reward models alone",
    needs: needs(Answers::Ranked, true),
    options: || {
        vec![beta(0.1), LossOption::new("score_margin", 0.0, "margin for each point of difference between two scores")]
    },
    eval: |batch, o, _| {
        let (beta, margin) = (positive(o, "beta")?, o.float("score_margin")?);
        let pair = |e: &Example<'_>, j: usize, k: usize| {
            let offset = margin * (e.answers[j].label - e.answers[k].label);
            -(beta * (e.ratio(j) - e.ratio(k)) - offset).log_sigmoid()
        };
        Ok(batch.each_example(|e| mean_over(e, |e, j, k| e.answers[j].label > e.answers[k].label, pair)))
    },
};

/// REBEL (Gao et al. 2024, arXiv 2404.16767, eq. 9) on answers that are there: differences of log-ratios are regressed on
/// differences of scores; beta is 1/eta.
pub const REBEL: Loss = Loss {
    name: "rebel",
    summary: "REBEL (Gao et al. 2024): log-ratios regressed on scores, over all pairs of an example",
    formula: formula!("mean over pairs j, k of (beta (r(j) - r(k)) - score_scale (s(j) - s(k)))^2", ranking, scores),
    peers: "none of TRL, ms-swift, LLaMA-Factory; its authors' code, on answers sampled while training",
    needs: needs(Answers::Ranked, true),
    options: || vec![beta(1.0), LossOption::new("score_scale", 1.0, "what a point of score is worth; above 0")],
    eval: |batch, o, _| {
        let (beta, scale) = (positive(o, "beta")?, positive(o, "score_scale")?);
        let pair = |e: &Example<'_>, j: usize, k: usize| {
            let scores = scale * (e.answers[j].label - e.answers[k].label);
            (beta * (e.ratio(j) - e.ratio(k)) - scores).square()
        };
        Ok(batch.each_example(|e| mean_over(e, |_, _, _| true, pair)))
    },
};

/// The mean of a term over those pairs of answers, the better one first, that are `taken`; 0 where there is none.
fn mean_over(
    example: &Example<'_>,
    taken: impl Fn(&Example<'_>, usize, usize) -> bool,
    term: impl Fn(&Example<'_>, usize, usize) -> Dual,
) -> Dual {
    let all = (0..example.learned()).flat_map(|j| (j + 1..example.learned()).map(move |k| (j, k)));
    let pairs: Vec<(usize, usize)> = all.filter(|(j, k)| taken(example, *j, *k)).collect();
    let sum = pairs.iter().fold(Dual::constant(0.0), |sum, (j, k)| sum + term(example, *j, *k));
    sum / pairs.len().max(1) as f64
}

/// `ln(1 + sum exp x)`, without overflow.
fn log_sum_exp(xs: impl Iterator<Item = Dual>) -> Dual {
    let xs: Vec<Dual> = xs.collect();
    let top = xs.iter().fold(0.0_f64, |top, x| top.max(x.value));
    let sum = xs.iter().fold(Dual::constant((-top).exp()), |sum, x| sum + (*x - top).exp());
    sum.ln() + top
}
