#!/usr/bin/env python3
"""Loads a model and an adapter with transformers and peft, and compares log-probs with those of the host.

Usage: dpo-host eval --model MODEL --adapter ADAPTER --dataset ROWS --output OURS
       check_adapter.py MODEL ADAPTER ROWS OURS     (ROWS as ms-swift writes them; needs torch, transformers, peft)
Exits 1 where a sum of log-probs is off by more than 1e-4 of itself.
"""
import json, sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

model, adapter, rows, ours = sys.argv[1:5]
# Not AutoTokenizer: transformers 5 takes a family's own splitting rule in place of tokenizer.json's.
tok = PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json")
tok.chat_template = json.load(open(f"{model}/tokenizer_config.json", encoding="utf-8"))["chat_template"]
net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter).eval()
render = lambda messages, ask: tok(tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask), add_special_tokens=False)["input_ids"]


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def logp(ids, begin):
    with torch.no_grad():
        logits = net(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return float(logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][begin - 1:].sum())


worst, count = 0.0, 0
for row, line in zip(map(json.loads, open(rows, encoding="utf-8")), map(json.loads, open(ours)), strict=True):
    asked = row["messages"][:-1]
    prompt = render(asked, True)
    answers = [render(asked + [{"role": "assistant", "content": text}], False) for text in (row["messages"][-1]["content"], row["rejected_response"])]
    begin = min(common(prompt, answer) for answer in answers)
    for name, answer in zip(("chosen", "rejected"), answers):
        theirs = logp(answer, begin)
        worst, count = max(worst, abs(theirs - line[name]) / max(1.0, abs(theirs))), count + 1
print(f"{count} answers, log-probs of peft and of the host differ by at most {worst:.1e} of themselves")
sys.exit(worst > 1e-4)
