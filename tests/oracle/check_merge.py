#!/usr/bin/env python3
"""Merges with peft and compares logits with those of a model that the host has merged.

Usage: dpo-host merge --model MODEL --adapter ADAPTER --output-dir MERGED
       check_merge.py MODEL ADAPTER MERGED     (needs torch, transformers, peft; MODEL in f32 or bf16)
Exits 1 where a logit is off by more than 1e-4 of the largest one (1e-3 in bf16, where a sum may round either way), or where the
merged folder lacks a file of the model's.
"""
import json, os, sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

model, adapter, merged = sys.argv[1:4]
config = json.load(open(f"{model}/config.json"))
wrapped, half = "text_config" in config, config.get("dtype", config.get("torch_dtype")) == "bfloat16"
load = lambda folder: (AutoModelForImageTextToText if wrapped else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32).eval()
theirs = PeftModel.from_pretrained(load(model), adapter).merge_and_unload()
if half:  # rounded as the file is
    with torch.no_grad():
        for weight in theirs.parameters(): weight.copy_(weight.bfloat16().float())
ours = load(merged)
ids = torch.randint((theirs.config.text_config if wrapped else theirs.config).vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    a, b, base = (net(ids).logits for net in (theirs, ours, load(model)))
worst = ((a - b).abs().max() / a.abs().max()).item()
moved = ((a - base).abs().max() / a.abs().max()).item()
missing = {f for f in os.listdir(model) if f.endswith((".json", ".jinja", ".safetensors"))} - set(os.listdir(merged))
print(f"logits of peft's merge and of the host's differ by at most {worst:.1e}, those of the base by {moved:.1e}; missing: {sorted(missing)}")
sys.exit(worst > (1e-3 if half else 1e-4) or bool(missing))
