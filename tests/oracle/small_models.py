#!/usr/bin/env python3
"""Small random models that other programs run, too, whose kernels want heads of 32 columns: those of trajectories.py, wider.

Usage: small_models.py OUT FOLDER...     (names of trajectories.py; needs what it needs)
Every folder gets a model and prefs.jsonl, rows for a short training run.
"""
import json, random, shutil, sys, zlib

import torch

import trajectories
from trajectories import BATCH, FOLDERS, STEPS, model_class, model_config, rows, tokenizer

trajectories.SMALL.update(hidden_size=128)
WIDER = dict(head_dim=32, query_pre_attn_scalar=32, intermediate_size=64, moe_intermediate_size=32)


def wider(change):
    nested = {key: wider(value) for key, value in change.items() if key == "text_config"}
    change = {**change, **{key: value for key, value in WIDER.items() if key in change}, **nested}
    if change.get("rope_parameters", {}).get("rope_type") == "longrope": del change["rope_parameters"]  # its factors are of narrower heads
    return change


out = sys.argv[1]
for name in sys.argv[2:]:
    kind, change, _ = FOLDERS[name]
    change = wider(change)
    folder, seed = f"{out}/{name}", zlib.crc32(name.encode())
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tok = tokenizer(f"{folder}/model", rng)
    net = model_class(change).from_config(model_config(kind, change, -(-len(tok) // 32) * 32), dtype=torch.float32)
    with torch.no_grad():
        for key, weight in net.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.1 + (1.0 if "norm" in key else 0.0))
    net.to(torch.bfloat16).save_pretrained(f"{folder}/model")
    with open(f"{folder}/prefs.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(rng, BATCH * STEPS))
