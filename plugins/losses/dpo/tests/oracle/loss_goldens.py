#!/usr/bin/env python3
"""Write golden.json: values and per-token gradients of TRL's losses, from TRL's own code.

`DPOTrainer._compute_loss`, `CPOTrainer.cpo_loss` and `ORPOTrainer.odds_ratio_loss` are called as they are, on a stand-in for
the trainer and a stand-in for the model that answers with given log-probs. Run from this folder's crate:
`python tests/oracle/loss_goldens.py > tests/golden.json` with trl 1.16 and torch installed.
"""
import json
import random
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
import trl
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

SEED = 16
LENGTHS = [(3, 5), (7, 2), (1, 4), (6, 6), (12, 9)]  # tokens of the chosen and the rejected answer
PROMPTS = [4, 2, 6, 1, 3]
SCORED = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]
PLAIN = ["nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "sft"]
SMOOTHED = ["exo_pair", "robust", "aot", "aot_unpaired"]
DIVERGENCES = [("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.5), ("alpha_divergence", 2.0),
               ("alpha_divergence", 1.0)]


def log_probs(rng):
    """Of every pair the chosen and the rejected answer's log-probs, exact in f32."""
    answer = lambda n: torch.tensor([-rng.expovariate(0.8) for _ in range(n)]).tolist()
    return [[answer(w), answer(l)] for w, l in LENGTHS]


def batch(pairs, dtype, grad):
    """TRL's layout, chosen answers first, padded on the right: log-probs [2B, S-1], completion mask [2B, S]."""
    rows = [p[0] for p in pairs] + [p[1] for p in pairs]
    width = max(p + len(r) for p, r in zip(PROMPTS * 2, rows))
    logps, mask = torch.zeros(len(rows), width - 1, dtype=dtype), torch.zeros(len(rows), width, dtype=torch.long)
    for i, (prompt, row) in enumerate(zip(PROMPTS * 2, rows)):
        mask[i, prompt:prompt + len(row)] = 1
        logps[i, prompt - 1:prompt - 1 + len(row)] = torch.tensor(row, dtype=dtype)
    return logps.requires_grad_(grad), mask


def model_of(logps):
    """What TRL reads of a model's output."""
    shape = logps.shape
    outputs = SimpleNamespace(log_probs=logps, entropy=torch.zeros(shape), mean_logits=torch.zeros(shape),
                              is_top1=torch.zeros(shape, dtype=torch.bool))
    return lambda **_: outputs


def dpo(policy, reference, losses, weights, options):
    # TRL's table of clamps has no entry for f64, so the alpha divergence is computed in f32.
    dtype = torch.float32 if options.get("f_divergence") == "alpha_divergence" else torch.float64
    logps, mask = batch(policy, dtype, True)
    ref, _ = batch(reference, dtype, False)
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), ref_model=model_of(ref), accelerator=accelerator, aux_loss_enabled=False,
        precompute_ref_logps=False, args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=options.get("discopop_tau", 0.05)),
        beta=options.get("beta", 0.1), label_smoothing=options.get("label_smoothing", 0.0), ld_alpha=options.get("ld_alpha"),
        f_divergence_type=options.get("f_divergence", "reverse_kl"), f_alpha_divergence_coef=options.get("f_alpha", 0.5),
        loss_types=losses, loss_weights=weights, use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1)
    inputs = {"input_ids": mask * 7, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    trl.trainer.dpo_trainer.disable_gradient_checkpointing = lambda *_: torch.no_grad()
    trl.trainer.dpo_trainer.is_peft_model = lambda _: False
    loss = DPOTrainer._compute_loss(trainer, model_of(logps), inputs, False)
    return loss, logps, mask


def kin(policy, reference, losses, weights, options):
    """The losses that other trainers of TRL have, and the smoothing that its DPOTrainer had."""
    (name,) = losses
    logps, mask = batch(policy, torch.float64, True)
    counts = mask.sum(1)
    sums = logps.sum(1)
    means = sums / counts
    n = len(policy)
    nll = -logps[:n].sum() / counts[:n].sum()
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), alpha=0.0, beta=options["beta"],
                              simpo_gamma=options.get("simpo_gamma"), label_smoothing=options.get("label_smoothing", 0.0),
                              loss_type="simpo" if name == "simpo" else "sigmoid")
    if name == "orpo":
        loss = nll - ORPOTrainer.odds_ratio_loss(trainer, means[:n], means[n:])[0].mean()
    elif name == "sigmoid":
        ratios = sums - batch(reference, torch.float64, False)[0].sum(1)
        loss = CPOTrainer.cpo_loss(trainer, ratios[:n], ratios[n:])[0].mean()
    else:
        logp = means if name == "simpo" else sums
        loss = CPOTrainer.cpo_loss(trainer, logp[:n], logp[n:])[0].mean() + options["cpo_alpha"] * nll
    return loss, logps, mask


def case(run, policy, reference, losses, options, weights=None):
    weights = weights or [1.0] * len(losses)
    loss, logps, mask = run(policy, reference, losses, weights, options)
    (grad,) = torch.autograd.grad(loss, logps)
    rows = [g[m[1:] == 1].tolist() for g, m in zip(grad, mask)]
    n = len(policy)
    gradient = [g for i in range(n) for g in rows[i] + rows[n + i]]
    assert len(gradient) == int(mask.sum())
    return {"losses": losses, "weights": weights, "options": options, "value": loss.item(), "gradient": gradient}


def main():
    rng = random.Random(SEED)
    policy, reference = log_probs(rng), log_probs(rng)
    dpo_case = lambda *args: case(dpo, policy, reference, *args)
    kin_case = lambda *args: case(kin, policy, reference, *args)
    cases = []
    for loss in SCORED + PLAIN:
        base = {"label_smoothing": 1e-3} if loss == "exo_pair" else {}
        cases.append(dpo_case([loss], base))
        cases.append(dpo_case([loss], {**base, "ld_alpha": 0.5}))
        if loss != "sft":
            cases.append(dpo_case([loss], {**base, "beta": 0.5}))
        if loss in SMOOTHED:
            cases.append(dpo_case([loss], {"label_smoothing": 0.2}))
        for name, coef in DIVERGENCES if loss in SCORED else []:
            cases.append(dpo_case([loss], {**base, "f_divergence": name, "f_alpha": coef}))
    cases.append(dpo_case(["discopop"], {"discopop_tau": 0.3}))
    cases.append(dpo_case(["sigmoid", "bco_pair", "sft"], {}, [0.8, 0.2, 1.0]))
    cases.append(kin_case(["sigmoid"], {"beta": 0.1, "label_smoothing": 0.2}))
    cases.append(kin_case(["simpo"], {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}))
    cases.append(kin_case(["simpo"], {"beta": 0.1, "simpo_gamma": 0.5, "cpo_alpha": 1.0, "label_smoothing": 0.1}))
    cases.append(kin_case(["cpo"], {"beta": 0.1, "cpo_alpha": 1.0}))
    cases.append(kin_case(["cpo"], {"beta": 0.3, "cpo_alpha": 0.5, "label_smoothing": 0.1}))
    cases.append(kin_case(["orpo"], {"beta": 0.1}))
    cases.append(kin_case(["orpo"], {"beta": 0.5}))
    made_with = {"trl": trl.__version__, "torch": torch.__version__, "seed": SEED}
    parts = ",\n  ".join(json.dumps(c) for c in cases)
    sys.stdout.write('{"made_with": %s,\n "policy": %s,\n "reference": %s,\n "cases": [\n  %s\n ]}\n'
                     % (json.dumps(made_with), json.dumps(policy), json.dumps(reference), parts))


main()
