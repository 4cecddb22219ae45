//! Losses that compare the policy with its reference.

use dpo_plugin_api::prelude::*;

use crate::options::{Divergence, and_divergence, beta, label_smoothing, positive, smoothing};
use crate::{Loss, PAIRWISE, WHOLE_BATCH, logistic};

/// DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). TRL 1.16 has no smoothing here; earlier versions and ms-swift
/// have.
pub const SIGMOID: Loss = Loss {
    name: "sigmoid",
    summary: "DPO (Rafailov et al. 2023); with label_smoothing it is cDPO (Mitchell 2023)",
    formula: formula!("-(1-e) ls(beta D) - e ls(-beta D)", ls, e, D, ratios),
    peers: "TRL `sigmoid` (1.x has no label_smoothing), ms-swift `sigmoid`, LLaMA-Factory `pref_loss: sigmoid`, OpenRLHF, axolotl `rl: dpo`, torchtune",
    needs: PAIRWISE,
    options: || and_divergence(vec![beta(0.1), label_smoothing(0.0)]),
    eval: |batch, o, _| {
        let (beta, e, f) = (positive(o, "beta")?, smoothing(o, 1.0)?, Divergence::of(o)?);
        Ok(batch.each_pair(|p| logistic(beta * f.delta(p), e)))
    },
};

/// The hinge of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on DPO's margin, as RSO uses it (Liu et al. 2023, arXiv
/// 2309.06657).
pub const HINGE: Loss = Loss {
    name: "hinge",
    summary: "hinge on the margin: SLiC-HF (Zhao et al. 2023), RSO (Liu et al. 2023)",
    formula: formula!("max(0, 1 - beta D)", D, ratios),
    peers: "TRL `hinge`, ms-swift `hinge`; LLaMA-Factory's `pref_loss: hinge` trains sigmoid with TRL 0.20 to 0.24",
    needs: PAIRWISE,
    options: || and_divergence(vec![beta(0.1)]),
    eval: |batch, o, _| {
        let (beta, f) = (positive(o, "beta")?, Divergence::of(o)?);
        Ok(batch.each_pair(|p| (1.0 - beta * f.delta(p)).relu()))
    },
};

/// IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17), of means over tokens, as its authors computed it.
pub const IPO: Loss = Loss {
    name: "ipo",
    summary: "IPO (Azar et al. 2023): squared distance of the mean margin from 1/(2 beta)",
    formula: formula!("(s(rw)/|yw| - s(rl)/|yl| - 1/(2 beta))^2", s, ratios, tokens),
    peers: "TRL `ipo`, axolotl `rl: ipo`; OpenRLHF's `ipo` is of sums, not of means; LLaMA-Factory's trains sigmoid on means with TRL 0.20 to 0.24",
    needs: PAIRWISE,
    options: || and_divergence(vec![beta(0.1)]),
    eval: |batch, o, _| {
        let (beta, f) = (positive(o, "beta")?, Divergence::of(o)?);
        Ok(batch.each_pair(|p| (f.mean_delta(p) - 0.5 / beta).square()))
    },
};

/// EXO for pairs (Ji et al. 2024, arXiv 2402.00856, eq. 16). The default smoothing is the paper's; 0 has no finite
/// loss.
pub const EXO_PAIR: Loss = Loss {
    name: "exo_pair",
    summary: "EXO (Ji et al. 2024): reverse KL between the policy's preference and the smoothed label",
    formula: formula!("q (ln q - ln(1-e)) + (1-q) (ln(1-q) - ln e), q = sigmoid(beta D)", e, D, ratios),
    peers: "TRL `exo_pair`, ms-swift `exo_pair`",
    needs: PAIRWISE,
    options: || and_divergence(vec![beta(0.1), label_smoothing(1e-3)]),
    eval: |batch, o, _| {
        let (beta, e, f) = (positive(o, "beta")?, smoothing(o, 1.0)?, Divergence::of(o)?);
        if e == 0.0 {
            return Err(Error::new("exo_pair needs a label_smoothing above 0").help("the paper uses 1e-3"));
        }
        Ok(batch.each_pair(|p| {
            let x = beta * f.delta(p);
            x.sigmoid() * (x.log_sigmoid() - (1.0 - e).ln()) + (-x).sigmoid() * ((-x).log_sigmoid() - e.ln())
        }))
    },
};

/// NCA for pairs (Chen et al. 2024, arXiv 2402.05369).
pub const NCA_PAIR: Loss = Loss {
    name: "nca_pair",
    summary: "NCA (Chen et al. 2024): each answer's likelihood against noise",
    formula: formula!("-ls(beta rw) - ls(-beta rw)/2 - ls(-beta rl)/2", ls, ratios),
    peers: "TRL `nca_pair`, ms-swift `nca_pair`",
    needs: PAIRWISE,
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_pair(|p| {
            let (w, l) = (beta * p.chosen_ratio(), beta * p.rejected_ratio());
            -w.log_sigmoid() - 0.5 * (-w).log_sigmoid() - 0.5 * (-l).log_sigmoid()
        }))
    },
};

/// rDPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased where labels are flipped at a known rate.
pub const ROBUST: Loss = Loss {
    name: "robust",
    summary: "robust DPO (Chowdhury et al. 2024); label_smoothing is the rate of flipped labels, below 0.5",
    formula: formula!("(-(1-e) ls(beta D) + e ls(-beta D)) / (1 - 2e)", ls, e, D, ratios),
    peers: "TRL `robust`, ms-swift `robust`; Liger's fused loss is sigmoid instead",
    needs: PAIRWISE,
    options: || and_divergence(vec![beta(0.1), label_smoothing(0.0)]),
    eval: |batch, o, _| {
        let (beta, e, f) = (positive(o, "beta")?, smoothing(o, 0.5)?, Divergence::of(o)?);
        Ok(batch.each_pair(|p| {
            let x = beta * f.delta(p);
            (e * (-x).log_sigmoid() - (1.0 - e) * x.log_sigmoid()) / (1.0 - 2.0 * e)
        }))
    },
};

/// BCO for pairs (Jung et al. 2024, arXiv 2404.04656), without the running shift, as in TRL since 0.29.
pub const BCO_PAIR: Loss = Loss {
    name: "bco_pair",
    summary: "BCO (Jung et al. 2024): a classifier of answers whose logit is the reward",
    formula: formula!("-ls(beta rw) - ls(-beta rl)", ls, ratios),
    peers: "TRL 1.x `bco_pair`; TRL up to 0.28, ms-swift and LLaMA-Factory's pref_bco_weight shift rewards by their running mean, as the loss `bco` does",
    needs: PAIRWISE,
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_pair(|p| -(beta * p.chosen_ratio()).log_sigmoid() - (-beta * p.rejected_ratio()).log_sigmoid()))
    },
};

/// SPPO with hard labels (Wu et al. 2024, arXiv 2405.00675, eq. 4.7 with win rates 1 and 0).
pub const SPPO_HARD: Loss = Loss {
    name: "sppo_hard",
    summary: "SPPO (Wu et al. 2024) with hard labels: ratios drawn to plus and minus 1/(2 beta)",
    formula: formula!("(rw - 1/(2 beta))^2 + (rl + 1/(2 beta))^2", ratios),
    peers: "TRL `sppo_hard`, ms-swift `sppo_hard`",
    needs: PAIRWISE,
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let goal = 0.5 / positive(o, "beta")?;
        Ok(batch.each_pair(|p| (p.chosen_ratio() - goal).square() + (p.rejected_ratio() + goal).square()))
    },
};

/// AOT for pairs (Melnyk et al. 2024, arXiv 2406.05882): quantiles of the policy's margins against the reference's.
pub const AOT: Loss = Loss {
    name: "aot",
    summary: "AOT (Melnyk et al. 2024): sorted margins of the step, policy against reference",
    formula: formula!("-(1-e) ls(beta d) - e ls(-beta d), d = sort(Lw - Ll) - sort(ref Lw - ref Ll)", ls, e, logps),
    peers: "TRL `aot`, ms-swift `aot`, both within a micro-batch of a device instead of the step",
    needs: WHOLE_BATCH,
    options: || vec![beta(0.1), label_smoothing(0.0)],
    eval: |batch, o, _| {
        let (beta, e) = (positive(o, "beta")?, smoothing(o, 1.0)?);
        let pairs = batch.pairs();
        let margins: Vec<Dual> = pairs.iter().map(|p| p.chosen_logp() - p.rejected_logp()).collect();
        let references: Vec<Dual> = pairs.iter().map(|p| (p.chosen_ref() - p.rejected_ref()).into()).collect();
        let mut grad = batch.zero();
        for (i, r) in ascending(&margins).into_iter().zip(ascending(&references)) {
            grad.add(i, logistic(beta * (margins[i] - references[r]), e));
        }
        Ok(grad)
    },
};

/// AOT without pairs (Melnyk et al. 2024): quantiles of the chosen answers' ratios against the rejected ones'.
pub const AOT_UNPAIRED: Loss = Loss {
    name: "aot_unpaired",
    summary: "AOT (Melnyk et al. 2024): sorted ratios of the step, chosen against rejected",
    formula: formula!("-(1-e) ls(beta d) - e ls(-beta d), d = sort(rw) - sort(rl)", ls, e, ratios),
    peers: "TRL `aot_unpaired` (up to 0.28 `aot_pair`), ms-swift `aot_unpaired`, both within a micro-batch of a device instead of the step",
    needs: WHOLE_BATCH,
    options: || vec![beta(0.1), label_smoothing(0.0)],
    eval: |batch, o, _| {
        let (beta, e) = (positive(o, "beta")?, smoothing(o, 1.0)?);
        let pairs = batch.pairs();
        let chosen: Vec<Dual> = pairs.iter().map(Pair::chosen_ratio).collect();
        let rejected: Vec<Dual> = pairs.iter().map(Pair::rejected_ratio).collect();
        let mut grad = batch.zero();
        for (w, l) in ascending(&chosen).into_iter().zip(ascending(&rejected)) {
            grad.add_across(w, l, logistic(beta * (chosen[w] - rejected[l]), e));
        }
        Ok(grad)
    },
};

/// APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7): for chosen answers better than the model's own.
pub const APO_ZERO: Loss = Loss {
    name: "apo_zero",
    summary: "APO-zero (D'Oosterlinck et al. 2024): chosen up, rejected down",
    formula: formula!("1 - sigmoid(beta rw) + sigmoid(beta rl)", ratios),
    peers: "TRL `apo_zero`, ms-swift `apo_zero`",
    needs: PAIRWISE,
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_pair(|p| 1.0 - (beta * p.chosen_ratio()).sigmoid() + (beta * p.rejected_ratio()).sigmoid()))
    },
};

/// APO-down (D'Oosterlinck et al. 2024, eq. 8): for chosen answers worse than the model's own.
pub const APO_DOWN: Loss = Loss {
    name: "apo_down",
    summary: "APO-down (D'Oosterlinck et al. 2024): chosen down, rejected down further",
    formula: formula!("sigmoid(beta rw) + 1 - sigmoid(beta (rw - rl))", ratios),
    peers: "TRL `apo_down`, ms-swift `apo_down`",
    needs: PAIRWISE,
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let beta = positive(o, "beta")?;
        Ok(batch.each_pair(|p| {
            let (w, l) = (beta * p.chosen_ratio(), beta * p.rejected_ratio());
            w.sigmoid() + 1.0 - (w - l).sigmoid()
        }))
    },
};

/// DiscoPOP, the log-ratio modulated loss (Lu et al. 2024, arXiv 2406.08414, eq. 5).
pub const DISCOPOP: Loss = Loss {
    name: "discopop",
    summary: "DiscoPOP (Lu et al. 2024): logistic and exponential loss, blended by the margin",
    formula: formula!("-(1-m) ls(x) + m exp(-x), x = beta D, m = sigmoid(x / discopop_tau)", ls, D, ratios),
    peers: "TRL `discopop`, ms-swift `discopop`",
    needs: PAIRWISE,
    options: || {
        let tau = LossOption::new("discopop_tau", 0.05, "temperature of the blend; above 0");
        and_divergence(vec![beta(0.1), tau])
    },
    eval: |batch, o, _| {
        let (beta, tau, f) = (positive(o, "beta")?, positive(o, "discopop_tau")?, Divergence::of(o)?);
        Ok(batch.each_pair(|p| {
            let x = beta * f.delta(p);
            let m = (x / tau).sigmoid();
            (-x).exp() * m - x.log_sigmoid() * (1.0 - m)
        }))
    },
};

/// DPO on means over tokens (TRL's `sigmoid_norm`): SimPO's normalisation with DPO's reference.
pub const SIGMOID_NORM: Loss = Loss {
    name: "sigmoid_norm",
    summary: "DPO on log-ratios averaged over tokens",
    formula: formula!("-ls(beta (s(rw)/|yw| - s(rl)/|yl|))", ls, s, ratios, tokens),
    peers: "TRL `sigmoid_norm`; open-instruct's `dpo_norm`, with which Olmo 3 was aligned at beta 5",
    needs: PAIRWISE,
    options: || and_divergence(vec![beta(0.1)]),
    eval: |batch, o, _| {
        let (beta, f) = (positive(o, "beta")?, Divergence::of(o)?);
        Ok(batch.each_pair(|p| -(beta * f.mean_delta(p)).log_sigmoid()))
    },
};

/// DPO-positive (Pal et al. 2024, *Smaug*, arXiv 2402.13228, eq. 3): a chosen answer that gets less likely than under the reference
/// costs more.
pub const DPOP: Loss = Loss {
    name: "dpop",
    summary: "DPO-positive (Pal et al. 2024): DPO that keeps the chosen answer's likelihood up",
    formula: formula!("-ls(beta (rw - rl - dpop_lambda max(0, -rw)))", ls, ratios),
    peers: "none of TRL, ms-swift, LLaMA-Factory",
    needs: PAIRWISE,
    options: || {
        vec![beta(0.1), LossOption::new("dpop_lambda", 50.0, "weight of the fall of the chosen answer's log-prob")]
    },
    eval: |batch, o, _| {
        let (beta, lambda) = (positive(o, "beta")?, o.float("dpop_lambda")?);
        Ok(batch.each_pair(|p| {
            let (w, l) = (p.chosen_ratio(), p.rejected_ratio());
            -(beta * (w - l - lambda * (-w).relu())).log_sigmoid()
        }))
    },
};

/// R-DPO (Park et al. 2024, arXiv 2403.19159, eq. 9): a margin by the difference of lengths, so that length alone teaches less.
pub const R_DPO: Loss = Loss {
    name: "r_dpo",
    summary: "length-regularised DPO (Park et al. 2024): a longer chosen answer has to win by less",
    formula: formula!("-ls(beta (rw - rl) + length_alpha (|yw| - |yl|))", ls, ratios, tokens),
    peers: "none of TRL, ms-swift, LLaMA-Factory",
    needs: PAIRWISE,
    options: || {
        vec![beta(0.1), LossOption::new("length_alpha", 0.05, "penalty of a token; the paper's peers try 0.05 to 1")]
    },
    eval: |batch, o, _| {
        let (beta, alpha) = (positive(o, "beta")?, o.float("length_alpha")?);
        Ok(batch.each_pair(|p| {
            let longer = p.chosen.count() - p.rejected.count();
            -(beta * (p.chosen_ratio() - p.rejected_ratio()) + alpha * longer).log_sigmoid()
        }))
    },
};

/// Cal-DPO (Xiao et al. 2024, arXiv 2412.14516, eq. 12): ratios are drawn to plus and minus 1/(2 beta) beside being compared.
pub const CAL_DPO: Loss = Loss {
    name: "cal_dpo",
    summary: "Cal-DPO (Xiao et al. 2024): compared log-ratios, calibrated to plus and minus 1/(2 beta)",
    formula: formula!("-ls(rw - rl) + (rw - 1/(2 beta))^2 + (rl + 1/(2 beta))^2", ls, ratios),
    peers: "none of TRL, ms-swift, LLaMA-Factory; its authors' code",
    needs: PAIRWISE,
    options: || vec![beta(0.1)],
    eval: |batch, o, _| {
        let goal = 0.5 / positive(o, "beta")?;
        Ok(batch.each_pair(|p| {
            let (w, l) = (p.chosen_ratio(), p.rejected_ratio());
            (w - goal).square() + (l + goal).square() - (w - l).log_sigmoid()
        }))
    },
};

/// Indices in the order of the values; equal ones stay in theirs.
fn ascending(values: &[Dual]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].value.total_cmp(&values[*b].value));
    order
}
