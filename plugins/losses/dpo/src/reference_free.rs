//! Losses that know only the policy: no reference is computed where a run has no others.

use dpo_plugin_api::loss::Answer;
use dpo_plugin_api::prelude::*;

use crate::options::{beta, label_smoothing, positive, smoothing};
use crate::{Loss, OF_PROMPTS, REFERENCE_FREE, logistic, needs};

/// The likelihood of the best answer: alone it is supervised fine-tuning, as TRL's `SFTTrainer` has it on prompts with completions;
/// beside `sigmoid` it is RPO's term (Pang et al. 2024, arXiv 2404.19733), beside `sigmoid` and `bco_pair` it makes MPO (Wang et al.
/// 2024).
pub const SFT: Loss = Loss {
    name: "sft",
    summary: "supervised fine-tuning: likelihood of one answer, or of the best of several; the term of RPO and MPO",
    formula: formula!("NLL", NLL),
    peers: "TRL DPOTrainer's `sft` and SFTTrainer on prompts with completions, ms-swift `swift sft` and rpo_alpha, whose means are over a micro-batch's tokens instead of the step's; LLaMA-Factory's pref_ftx and OpenRLHF's nll_loss_coef are nll_mean=answers",
    needs: needs(Answers::One, false),
    options: || vec![nll_mean()],
    eval: |batch, o, _| {
        let nll = Likelihood::of(o)?;
        Ok(batch.each_example(|e| nll.of_best(batch, e)))
    },
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
    peers: "ms-swift `rlhf_type simpo`; TRL CPOTrainer's `simpo` (defaults beta 0.1, simpo_gamma 0.5, cpo_alpha 1); LLaMA-Factory `pref_loss: simpo` (defaults 0.1 and 0.5, no likelihood)",
    needs: REFERENCE_FREE,
    options: || {
        let gamma = LossOption::new("simpo_gamma", 1.0, "margin that the difference should reach");
        vec![beta(2.0), gamma, label_smoothing(0.0), cpo_alpha(0.0), nll_mean()]
    },
    eval: |batch, o, _| {
        let (beta, e) = (positive(o, "beta")?, smoothing(o, 1.0)?);
        let (gamma, alpha, nll) = (o.float("simpo_gamma")?, o.float("cpo_alpha")?, Likelihood::of(o)?);
        Ok(batch.each_example(|example| {
            let p = example.pair();
            let margin = mean_logp(p.chosen_logp(), &p.chosen) - mean_logp(p.rejected_logp(), &p.rejected);
            logistic(beta * margin - gamma, e) + alpha * nll.of_best(batch, example)
        }))
    },
};

/// AlphaPO (Gupta et al. 2025, arXiv 2501.03884, eq. 9): SimPO on rewards bent by alpha; near 0 it is SimPO.
pub const ALPHAPO: Loss = Loss {
    name: "alphapo",
    summary: "AlphaPO (Gupta et al. 2025): SimPO with the shape of the reward bent by alpha, no reference",
    formula: formula!(
        "-ls(beta (a(Lw/|yw|) - a(Ll/|yl|)) - simpo_gamma), a(x) = (1 - exp(-alphapo_alpha x)) / alphapo_alpha",
        ls,
        logps,
        tokens
    ),
    peers: "TRL CPOTrainer's `alphapo` (defaults beta 0.1, simpo_gamma 0.5, alpha 0)",
    needs: REFERENCE_FREE,
    options: || {
        let gamma = LossOption::new("simpo_gamma", 1.0, "margin that the difference should reach");
        let alpha = LossOption::new("alphapo_alpha", 0.25, "shape of the reward; not 0, where it would be simpo");
        vec![beta(2.0), gamma, alpha]
    },
    eval: |batch, o, _| {
        let (beta, gamma, alpha) = (positive(o, "beta")?, o.float("simpo_gamma")?, o.float("alphapo_alpha")?);
        if alpha == 0.0 {
            return Err(Error::new("loss option 'alphapo_alpha' should not be 0").help("at 0 it is the loss 'simpo'"));
        }
        let bent = |logp: Dual, answer: &Answer<'_>| (1.0 - (-alpha * mean_logp(logp, answer)).exp()) / alpha;
        Ok(batch.each_pair(|p| {
            let margin = bent(p.chosen_logp(), &p.chosen) - bent(p.rejected_logp(), &p.rejected);
            -(beta * margin - gamma).log_sigmoid()
        }))
    },
};

/// CPO (Xu et al. 2024, arXiv 2401.08417, eq. 3 and its likelihood term), and with a hinge or IPO's square in place of the logistic loss,
/// as TRL's `CPOTrainer` has them.
pub const CPO: Loss = Loss {
    name: "cpo",
    summary: "CPO (Xu et al. 2024): DPO with a uniform reference, and the likelihood of the chosen answer",
    formula: formula!(
        "l(Lw - Ll) + cpo_alpha NLL, where l(x) = -(1-e) ls(beta x) - e ls(-beta x), or with cpo_type=hinge max(0, 1 - beta x); \
         with cpo_type=ipo l = (Lw/|yw| - Ll/|yl| - 1/(2 beta))^2",
        ls,
        e,
        logps,
        tokens,
        NLL
    ),
    peers: "TRL CPOTrainer (its loss_type is cpo_type), ms-swift `rlhf_type cpo`; their likelihood is a mean over a micro-batch's tokens instead of the step's",
    needs: REFERENCE_FREE,
    options: || {
        let kind = LossOption::new("cpo_type", "sigmoid", "how answers are compared: sigmoid, hinge or ipo");
        vec![beta(0.1), label_smoothing(0.0), cpo_alpha(1.0), nll_mean(), kind]
    },
    eval: |batch, o, _| {
        let (beta, e, alpha) = (positive(o, "beta")?, smoothing(o, 1.0)?, o.float("cpo_alpha")?);
        let nll = Likelihood::of(o)?;
        let margin = |p: &Pair<'_>| p.chosen_logp() - p.rejected_logp();
        let mean_margin =
            |p: &Pair<'_>| mean_logp(p.chosen_logp(), &p.chosen) - mean_logp(p.rejected_logp(), &p.rejected);
        let compared: &dyn Fn(&Pair<'_>) -> Dual = match o.text("cpo_type")? {
            "sigmoid" => &|p| logistic(beta * margin(p), e),
            "hinge" => &|p| (1.0 - beta * margin(p)).relu(),
            "ipo" => &|p| (mean_margin(p) - 0.5 / beta).square(),
            other => return Err(Error::new(format!("unknown cpo_type '{other}'")).help("known: sigmoid, hinge, ipo")),
        };
        Ok(batch.each_example(|example| compared(&example.pair()) + alpha * nll.of_best(batch, example)))
    },
};

/// ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7), its likelihood over the answer alone.
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
    peers: "ms-swift `rlhf_type orpo`; LLaMA-Factory's `pref_loss: orpo` is nll_mean=answers; TRL's has its likelihood over the prompt as well: `orpo_prompt`",
    needs: REFERENCE_FREE,
    options: || vec![beta(0.1), nll_mean()],
    eval: |batch, o, _| {
        let (beta, nll) = (positive(o, "beta")?, Likelihood::of(o)?);
        Ok(batch.each_example(|e| nll.of_best(batch, e) - beta * log_odds(&e.pair()).log_sigmoid()))
    },
};

/// ORPO as TRL's `ORPOTrainer` computes it: the likelihood is over prompt and answer.
pub const ORPO_PROMPT: Loss = Loss {
    name: "orpo_prompt",
    summary: "ORPO (Hong et al. 2024) as TRL has it: likelihood of prompt and chosen answer, and the odds ratio",
    formula: formula!(
        "NLLP - beta ls(logit(Lw/|yw|) - logit(Ll/|yl|)), logit(x) = x - ln(1 - exp x)",
        ls,
        logps,
        tokens,
        NLLP
    ),
    peers: "TRL ORPOTrainer, axolotl `rl: orpo`, whose means are over a micro-batch's tokens instead of the step's",
    needs: OF_PROMPTS,
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let beta = positive(o, "beta")?;
        let share = batch.totals.examples / (batch.totals.prompt_tokens + batch.totals.best_tokens);
        Ok(batch.each_example(|e| -(e.prompt_sum() + e.sum(0)) * share - beta * log_odds(&e.pair()).log_sigmoid()))
    },
};

fn cpo_alpha(default: f64) -> LossOption {
    LossOption::new("cpo_alpha", default, "weight of the chosen answers' likelihood, NLL, the loss 'sft'")
}

fn nll_mean() -> LossOption {
    LossOption::new("nll_mean", "tokens", "what NLL is a mean over: the tokens of the step, or its answers")
}

/// How the likelihood of best answers is averaged.
enum Likelihood {
    /// Over the tokens of the step's best answers.
    OfTokens,
    /// Over answers, each a mean over its own tokens.
    OfAnswers,
}

impl Likelihood {
    /// Reads `nll_mean`.
    fn of(options: &Options) -> Result<Likelihood> {
        match options.text("nll_mean")? {
            "tokens" => Ok(Likelihood::OfTokens),
            "answers" => Ok(Likelihood::OfAnswers),
            other => Err(Error::new(format!("unknown nll_mean '{other}'")).help("known: tokens, answers")),
        }
    }

    /// The part of an example's best answer in it. The host averages over examples, which is undone for the mean over tokens, so that
    /// the step's value does not depend on how it is split into micro-batches.
    fn of_best(&self, batch: &LossBatch<'_>, example: &Example<'_>) -> Dual {
        let sum = example.sum(0);
        match self {
            Likelihood::OfTokens => -sum * (batch.totals.examples / batch.totals.best_tokens),
            Likelihood::OfAnswers => -sum / example.answers[0].count(),
        }
    }
}

/// The logarithm of the chosen answer's odds over the rejected one's.
fn log_odds(pair: &Pair<'_>) -> Dual {
    logit(mean_logp(pair.chosen_logp(), &pair.chosen)) - logit(mean_logp(pair.rejected_logp(), &pair.rejected))
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
