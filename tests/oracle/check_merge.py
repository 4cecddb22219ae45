#!/usr/bin/env python3
"""Merges with peft and compares logits with those of a model that the host has merged.

Usage: dpo-host merge --model MODEL --adapter ADAPTER --output-dir MERGED
       check_merge.py MODEL ADAPTER MERGED     (needs torch, transformers, peft; MODEL in f32)
Exits 1 where a logit is off by more than 1e-4 of the largest one, or where the merged folder lacks a file of the model's.
"""
import os, sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model, adapter, merged = sys.argv[1:4]
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
theirs = PeftModel.from_pretrained(load(model), adapter).merge_and_unload()
ours = load(merged)
ids = torch.randint(theirs.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    a, b, base = (net(ids).logits for net in (theirs, ours, load(model)))
worst = ((a - b).abs().max() / a.abs().max()).item()
moved = ((a - base).abs().max() / a.abs().max()).item()
missing = {f for f in os.listdir(model) if f.endswith((".json", ".jinja", ".safetensors"))} - set(os.listdir(merged))
print(f"logits of peft's merge and of the host's differ by at most {worst:.1e}, those of the base by {moved:.1e}; missing: {sorted(missing)}")
sys.exit(worst > 1e-4 or bool(missing))
