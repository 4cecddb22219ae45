#!/usr/bin/env python3
"""Write golden.json: values and per-token gradients of losses, from the peers' own code where they have it.

TRL's `DPOTrainer._compute_loss`, `CPOTrainer.cpo_loss` and `ORPOTrainer.odds_ratio_loss`, ms-swift's `DPOTrainer.dpo_loss` and
LLaMA-Factory's `odds_ratio_loss`, `simpo_loss` and `bco_loss` are called as they are, on a stand-in for the trainer and a
stand-in for the model that answers with given log-probs. What none of them has is the paper's equation, written out here in
f64. Run from this folder's crate, with trl 1.16 and torch installed, and the wheels of ms-swift 4.6 and llamafactory 0.9.5
unpacked into PEERS (`pip install --no-deps --target PEERS ms-swift llamafactory`):
`python tests/oracle/loss_goldens.py PEERS > tests/golden.json`.
"""
import ast
import json
import random
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import trl
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

SEED = 16
LENGTHS = [(3, 5), (7, 2), (1, 4), (6, 6), (12, 9)]  # tokens of the chosen and the rejected answer
PROMPTS = [4, 2, 6, 1, 3]
# Rankings made of the same answers, which are numbered chosen, rejected, chosen, ...: best first, with their scores.
RANKINGS = [([0, 3, 5], [2.5, 1.0, 0.5]), ([2, 1], [1.0, -1.0]), ([4, 7, 6, 9], [3.0, 2.0, 2.0, 0.0])]
LIKED = [1, 0, 1, 1, 0, 0, 1, 0, 1, 0]
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
    kind = {"simpo": "simpo", "alphapo": "simpo", "cpo": options.get("cpo_type", "sigmoid")}.get(name, "sigmoid")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), alpha=options.get("alphapo_alpha", 0.0), beta=options["beta"],
                              simpo_gamma=options.get("simpo_gamma"), label_smoothing=options.get("label_smoothing", 0.0), loss_type=kind)
    if name == "orpo":
        loss = nll - ORPOTrainer.odds_ratio_loss(trainer, means[:n], means[n:])[0].mean()
    elif name == "sigmoid":
        ratios = sums - batch(reference, torch.float64, False)[0].sum(1)
        loss = CPOTrainer.cpo_loss(trainer, ratios[:n], ratios[n:])[0].mean()
    else:
        logp = means if kind in ("simpo", "ipo") else sums
        loss = CPOTrainer.cpo_loss(trainer, logp[:n], logp[n:])[0].mean() + options.get("cpo_alpha", 0.0) * nll
    return loss, logps, mask


def method(path, name):
    """A method of a peer's trainer, from its source alone: its imports are not needed."""
    tree = ast.parse(open(path, encoding="utf-8").read())
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    node.decorator_list, node.returns = [], None
    for argument in node.args.args:
        argument.annotation = None
    space = {"torch": torch, "F": F}
    exec(compile(ast.Module([node], []), path, "exec"), space)
    return space[name]


class Running:
    """TRL's RunningMoments, as far as its mean goes."""

    def __init__(self):
        self.mean, self.count = 0.0, 1e-24

    def update(self, values):
        values = values.reshape(-1)
        self.count += len(values)
        self.mean += (float(values.mean()) - self.mean) * len(values) / self.count


def peer(policy, reference, losses, weights, options):
    """A loss of ms-swift or LLaMA-Factory, by the method that computes it."""
    peers, tool, name = options["code"]
    logps, mask = batch(policy, torch.float64, True)
    counts, sums, n = mask.sum(1), logps.sum(1), len(policy)
    means = sums / counts
    ref = batch(reference, torch.float64, False)[0].sum(1)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=options["beta"], running=Running(), reference_free=False,
                              simpo_gamma=options.get("simpo_gamma"), label_smoothing=options.get("label_smoothing", 0.0),
                              f_divergence_type=options.get("f_divergence", "reverse_kl"), f_divergence_params=None)
    if tool == "ms-swift":
        run = method(f"{peers}/swift/rlhf_trainers/dpo_trainer.py", "dpo_loss")
        own, ref = (means, ref / counts) if name == "ipo" else (sums, ref)
        return run(trainer, own[:n], own[n:], ref[:n], ref[n:], name)[0].mean(), logps, mask
    run = method(f"{peers}/llamafactory/train/dpo/trainer.py", name)
    if name == "bco_loss":
        # The mean of a pair's two terms, where LLaMA-Factory adds them.
        return run(trainer, sums[:n], sums[n:], ref[:n], ref[n:]).mean() / 2, logps, mask
    return run(trainer, means[:n], means[n:]).mean(), logps, mask


def paper(policy, reference, prompts, name, o, examples=None, state=None):
    """The equation of a paper, over pairs, rankings or single answers."""
    flat = lambda pairs: [torch.tensor(a, dtype=torch.float64) for pair in pairs for a in pair]
    own = [a.requires_grad_() for a in flat(policy)]
    before = [torch.tensor(p, dtype=torch.float64).requires_grad_() for p in prompts]
    length = [len(a) for a in own]
    L, r = [a.sum() for a in own], [a.sum() - b.sum() for a, b in zip(own, flat(reference))]
    ls, beta = F.logsigmoid, o.get("beta", 0.1)
    examples = examples or [([2 * i, 2 * i + 1], [1.0, 0.0]) for i in range(len(policy))]
    pairs = lambda scores: [(j, k) for j in range(len(scores)) for k in range(j + 1, len(scores))]
    log_odds = lambda x: x - torch.log1p(-torch.exp(x))

    def loss(answers, scores):
        w, l = answers[0], answers[-1]
        if name == "dpop":
            return -ls(beta * (r[w] - r[l] - o["dpop_lambda"] * torch.relu(-r[w])))
        if name == "r_dpo":
            return -ls(beta * (r[w] - r[l]) + o["length_alpha"] * (length[w] - length[l]))
        if name == "cal_dpo":
            return -ls(r[w] - r[l]) + (r[w] - 0.5 / beta) ** 2 + (r[l] + 0.5 / beta) ** 2
        if name == "orpo_prompt":
            return -beta * ls(log_odds(L[w] / length[w]) - log_odds(L[l] / length[l]))
        if name == "sdpo":
            worse = [beta * r[a] for a, s in zip(answers, scores) if s < scores[0]]
            return -ls(-torch.logsumexp(torch.stack([x - beta * r[w] for x in worse]), 0))
        if name == "all_pairs":
            terms = [-ls(beta * (r[answers[j]] - r[answers[k]]) - o["score_margin"] * (scores[j] - scores[k]))
                     for j, k in pairs(scores) if scores[j] > scores[k]]
            return torch.stack(terms).mean()
        if name == "rebel":
            terms = [(beta * (r[answers[j]] - r[answers[k]]) - o["score_scale"] * (scores[j] - scores[k])) ** 2 for j, k in pairs(scores)]
            return torch.stack(terms).mean()
        if name == "plackett_luce":
            terms = [beta * r[a] - torch.logsumexp(torch.stack([beta * r[a]] + [beta * r[b] for b, t in zip(answers, scores) if t < s]), 0)
                     for a, s in zip(answers, scores)]
            return -torch.stack(terms).sum()
        if name == "bco":
            logit = beta * r[w] - shift
            return -ls(logit if scores[0] > 0 else -logit)
        raise KeyError(name)

    if name == "bco":
        count, total = state or [0.0, 0.0]
        rewards = [beta * float(r[a].detach()) for answers, _ in examples for a in answers]
        shift = (total + sum(rewards)) / (count + len(rewards))
    value = torch.stack([loss(answers, scores) for answers, scores in examples]).mean()
    if name == "orpo_prompt":
        chosen = [answers[0] for answers, _ in examples]
        tokens = torch.cat([own[a] for a in chosen] + before)
        value = value - tokens.mean()
    inputs = [x for i, (answers, _) in enumerate(examples) for x in [own[a] for a in answers] + ([before[i]] if name == "orpo_prompt" else [])]
    gradient = [g for grad in torch.autograd.grad(value, inputs) for g in grad.tolist()]
    made = {"losses": [name], "weights": [1.0], "options": o, "value": value.item(), "gradient": gradient}
    made["examples"] = [{"answers": answers, "labels": scores} for answers, scores in examples]
    return {**made, **({"state": state} if state else {}), **({"prompts": True} if name == "orpo_prompt" else {})}


def case(run, policy, reference, losses, options, weights=None):
    weights = weights or [1.0] * len(losses)
    loss, logps, mask = run(policy, reference, losses, weights, options)
    (grad,) = torch.autograd.grad(loss, logps)
    rows = [g[m[1:] == 1].tolist() for g, m in zip(grad, mask)]
    n = len(policy)
    gradient = [g for i in range(n) for g in rows[i] + rows[n + i]]
    assert len(gradient) == int(mask.sum())
    made = {"losses": losses, "weights": weights, "options": options, "value": loss.item(), "gradient": gradient}
    if losses == ["bco"]:
        made["examples"] = [{"answers": [i], "labels": [1.0 - i % 2]} for i in range(2 * n)]
    return made


def main():
    rng = random.Random(SEED)
    policy, reference = log_probs(rng), log_probs(rng)
    prompts = [torch.tensor([-rng.expovariate(0.5) for _ in range(n - 1)]).tolist() for n in PROMPTS]
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
    cases.append(kin_case(["cpo"], {"beta": 0.3, "cpo_alpha": 0.5, "cpo_type": "hinge"}))
    cases.append(kin_case(["cpo"], {"beta": 0.3, "cpo_alpha": 0.5, "cpo_type": "ipo"}))
    for alpha in [0.25, -0.5]:
        cases.append(kin_case(["alphapo"], {"beta": 2.0, "simpo_gamma": 0.5, "alphapo_alpha": alpha}))
    peer_case = lambda losses, tool, name, options: case(peer, policy, reference, losses, {**options, "code": [sys.argv[1], tool, name]})
    for loss in ["sigmoid", "robust", "exo_pair"]:
        cases.append(peer_case([loss], "ms-swift", loss, {"beta": 0.3, "label_smoothing": 0.2}))
    for loss in ["hinge", "ipo", "sppo_hard", "nca_pair", "aot", "aot_unpaired", "apo_zero", "apo_down"]:
        cases.append(peer_case([loss], "ms-swift", loss, {"beta": 0.3}))
    cases.append(peer_case(["sigmoid"], "ms-swift", "sigmoid", {"beta": 0.3, "f_divergence": "js_divergence"}))
    cases.append(peer_case(["orpo"], "LLaMA-Factory", "odds_ratio_loss", {"beta": 0.3, "nll_mean": "answers"}))
    cases.append(peer_case(["simpo"], "LLaMA-Factory", "simpo_loss", {"beta": 2.0, "simpo_gamma": 0.5}))
    cases.append(peer_case(["bco"], "LLaMA-Factory", "bco_loss", {"beta": 0.3}))
    for case_ in cases:
        case_["options"] = {k: v if k != "code" else v[1] for k, v in case_["options"].items()}
    paper_case = lambda *args, **more: cases.append(paper(policy, reference, prompts, *args, **more))
    paper_case("dpop", {"beta": 0.3, "dpop_lambda": 5.0})
    paper_case("r_dpo", {"beta": 0.3, "length_alpha": 0.2})
    paper_case("cal_dpo", {"beta": 0.3})
    paper_case("orpo_prompt", {"beta": 0.3})
    for name, more in [("plackett_luce", {}), ("sdpo", {}), ("all_pairs", {"score_margin": 0.4}), ("rebel", {"score_scale": 0.7})]:
        paper_case(name, {"beta": 0.3, **more}, examples=RANKINGS)
    single = [([i], [float(liked)]) for i, liked in enumerate(LIKED)]
    paper_case("bco", {"beta": 0.3}, examples=single)
    paper_case("bco", {"beta": 0.3}, examples=single, state=[6.0, -0.9])
    made_with = {"trl": trl.__version__, "torch": torch.__version__, "seed": SEED}
    parts = ",\n  ".join(json.dumps(c) for c in cases)
    sys.stdout.write('{"made_with": %s,\n "policy": %s,\n "reference": %s,\n "prompts": %s,\n "cases": [\n  %s\n ]}\n'
                     % (json.dumps(made_with), json.dumps(policy), json.dumps(reference), json.dumps(prompts), parts))


main()
