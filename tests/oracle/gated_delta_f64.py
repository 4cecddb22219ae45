#!/usr/bin/env python3
"""Prints the first gradient norm of a trajectory of Qwen3.5 with experts: as transformers computes it in f32, and token by token in f64.

Usage: gated_delta_f64.py CASE [f32|rule|f64]     CASE as tests/oracle/trajectories.py writes one: model, init_adapter, expected.json
`f32` is transformers' chunks, `rule` the recurrence token by token in f32, `f64` the same with everything in f64. Needs torch, transformers, peft.
"""
import json
import sys

import torch
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as modeling
from peft import PeftModel
from transformers import AutoModelForCausalLM


def rule(query, key, value, g, beta, **_):
    """Yang et al. 2024, "Gated Delta Networks", eq. 10, token by token."""
    unit = lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    share = value.shape[2] // key.shape[2]
    q = unit(query).repeat_interleave(share, 2) * key.shape[-1] ** -0.5
    k = unit(key).repeat_interleave(share, 2)
    state = torch.zeros(value.shape[0], value.shape[2], key.shape[-1], value.shape[-1], dtype=value.dtype)
    out = []
    for t in range(value.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        written = beta[:, t][..., None] * (value[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t][..., None] * written[:, :, None, :]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(out, 1), None


def in_f64():
    """transformers computes parts in f32 whatever a model is in: lets these stay in f64."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def wider(self, *args, **kwargs):
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return to(self, *args, **kwargs)

    torch.Tensor.float = lambda self: self
    torch.Tensor.to = wider
    torch.nn.functional.softmax = lambda x, dim=None, dtype=None, **_: softmax(x, dim=dim)


def main():
    case, mode = sys.argv[1], (sys.argv[2:] or ["f64"])[0]
    dtype = torch.float64 if mode == "f64" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(f"{case}/model", dtype=dtype, attn_implementation="eager", experts_implementation="eager")
    if mode != "f32":
        modeling.torch_chunk_gated_delta_rule = rule
    if mode == "f64":
        in_f64()
    model = PeftModel.from_pretrained(base, f"{case}/init_adapter", is_trainable=True)
    model = model.double() if mode == "f64" else model
    expected = json.load(open(f"{case}/expected.json"))
    args = expected["args"]
    for row in expected["rows"][:args["batch"]]:
        sums = []
        for answer in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[answer]])
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].to(dtype), -1)
            sums.append(logps[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(row["prompt_ids"]) - 1:].sum())
        margin = args["beta"] * (sums[0] - sums[1])
        # Policy and reference are one at the first step.
        (-torch.nn.functional.logsigmoid(margin - margin.detach()) / args["batch"]).backward()
    norm = sum((p.grad.double() ** 2).sum() for p in model.parameters() if p.grad is not None) ** 0.5
    print(mode, norm.item(), "TRL:", expected["steps"][0]["grad_norm"])


main()
