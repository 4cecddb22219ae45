//! Losses that know only the policy: no reference is computed where a run has no others.

use dpo_plugin_api::loss::Answer;
use dpo_plugin_api::prelude::*;

use crate::options::{beta, label_smoothing, positive, smoothing};
use crate::{Loss, REFERENCE_FREE, logistic, needs};

/// The likelihood of chosen answers, a mean over their tokens in the step: alone it is fine-tuning, beside `sigmoid` it
/// is RPO's term (Pang et al. 2024, arXiv 2404.19733), beside `sigmoid` and `bco_pair` it makes MPO (Wang et al. 2024).
pub const SFT: Loss = Loss {
    name: "sft",
    summary: "likelihood of the chosen answers, a mean over the step's tokens; the term of RPO and MPO",
    formula: formula!("NLL", NLL),
    needs: REFERENCE_FREE,
    options: Vec::new,
    eval: |batch, _| Ok(batch.each_pair(|p| likelihood(batch, p))),
};

/// The likelihood of single answers, a mean over the step's answer tokens, as TRL's `SFTTrainer` has it: `sft` without a
/// worse answer to every better one.
pub const NLL: Loss = Loss {
    name: "nll",
    summary: "likelihood of one answer to a prompt, a mean over the step's tokens: supervised fine-tuning",
    formula: formula!("nll", nll),
    needs: needs(Answers::One, false),
    options: Vec::new,
    eval: |batch, _| Ok(batch.each_example(|e| mean_over_step(batch, e.sum(0)))),
};

/// SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6). The defaults are the paper's and ms-swift's; TRL's are 0.1 and
/// 0.5.
pub const SIMPO: Loss = Loss {
    name: "simpo",
    summary: "SimPO (Meng et al. 2024): mean log-probs with a target margin, no reference",
    formula: formula!(
        "-(1-e) ls(x) - e ls(-x) + cpo_alpha NLL, x = beta (Lw/|yw| - Ll/|yl|) - simpo_gamma",
        ls,
        e,
        logps,
        tokens,
        NLL
    ),
    needs: REFERENCE_FREE,
    options: || {
        let gamma = LossOption::new("simpo_gamma", 1.0, "margin that the difference should reach");
        vec![beta(2.0), gamma, label_smoothing(0.0), cpo_alpha(0.0)]
    },
    eval: |batch, o| {
        let (beta, e) = (positive(o, "beta")?, smoothing(o, 1.0)?);
        let (gamma, alpha) = (o.float("simpo_gamma")?, o.float("cpo_alpha")?);
        Ok(batch.each_pair(|p| {
            let margin = mean_logp(p.chosen_logp(), &p.chosen) - mean_logp(p.rejected_logp(), &p.rejected);
            logistic(beta * margin - gamma, e) + alpha * likelihood(batch, p)
        }))
    },
};

/// CPO (Xu et al. 2024, arXiv 2401.08417, eq. 3 and its likelihood term).
pub const CPO: Loss = Loss {
    name: "cpo",
    summary: "CPO (Xu et al. 2024): DPO with a uniform reference, and the likelihood of the chosen answer",
    formula: formula!("-(1-e) ls(beta (Lw - Ll)) - e ls(-beta (Lw - Ll)) + cpo_alpha NLL", ls, e, logps, NLL),
    needs: REFERENCE_FREE,
    options: || vec![beta(0.1), label_smoothing(0.0), cpo_alpha(1.0)],
    eval: |batch, o| {
        let (beta, e, alpha) = (positive(o, "beta")?, smoothing(o, 1.0)?, o.float("cpo_alpha")?);
        Ok(batch
            .each_pair(|p| logistic(beta * (p.chosen_logp() - p.rejected_logp()), e) + alpha * likelihood(batch, p)))
    },
};

/// ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7). Its likelihood term is over the answer alone, as in
/// ms-swift; TRL's is over the prompt too.
pub const ORPO: Loss = Loss {
    name: "orpo",
    summary: "ORPO (Hong et al. 2024): likelihood of the chosen answer and the odds ratio; beta is its lambda",
    formula: formula!(
        "NLL - beta ls(logit(Lw/|yw|) - logit(Ll/|yl|)), logit(x) = x - ln(1 - exp x)",
        ls,
        logps,
        tokens,
        NLL
    ),
    needs: REFERENCE_FREE,
    options: || vec![beta(0.1)],
    eval: |batch, o| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_pair(|p| {
            let (w, l) = (mean_logp(p.chosen_logp(), &p.chosen), mean_logp(p.rejected_logp(), &p.rejected));
            likelihood(batch, p) - beta * (logit(w) - logit(l)).log_sigmoid()
        }))
    },
};

fn cpo_alpha(default: f64) -> LossOption {
    LossOption::new("cpo_alpha", default, "weight of the chosen answers' likelihood, NLL, the loss 'sft'")
}

fn likelihood(batch: &LossBatch<'_>, pair: &Pair<'_>) -> Dual {
    mean_over_step(batch, pair.chosen_sum())
}

/// The part of a best answer's log-prob in minus the mean over the tokens of the step's best answers. The host averages over
/// examples, which is undone here, so that the step's value does not depend on how it is split into micro-batches.
fn mean_over_step(batch: &LossBatch<'_>, sum: Dual) -> Dual {
    -sum * (batch.totals.examples / batch.totals.best_tokens)
}

fn mean_logp(logp: Dual, answer: &Answer<'_>) -> Dual {
    logp / answer.count()
}

/// `ln(p / (1-p))` of `x = ln p`.
fn logit(x: Dual) -> Dual {
    // An answer that is certain in f32 has no odds; the nearest one that is not has no derivative worth following
    // either.
    let x = x.min(-1e-7);
    let (value, p) = (x.value, x.value.exp());
    // Of the two ways to `ln(1 - exp x)` each is exact on its side (Mächler 2012, *Accurately computing log(1 -
    // exp(-|a|))*).
    let rest = if value > -std::f64::consts::LN_2 { (-value.exp_m1()).ln() } else { (-p).ln_1p() };
    x - x.map(rest, p / value.exp_m1())
}
