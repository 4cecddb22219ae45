#!/usr/bin/env python3
"""Loads a model and an adapter with transformers and peft, and compares log-probs with those of the host.

Usage: dpo-host eval --model MODEL --adapter ADAPTER --dataset ROWS --output OURS
       check_adapter.py MODEL ADAPTER ROWS OURS [--bf16]     (ROWS as ms-swift writes them; needs torch, transformers, peft)
Exits 1 where a sum of log-probs is off by more than 1e-4 of itself. With --bf16, for scores that were computed on a GPU:
transformers computes in f32 and in bf16, and the host's distance from f32 may be at most that of transformers' own bf16.
"""
import json, sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

model, adapter, rows, ours = sys.argv[1:5]
bf16 = "--bf16" in sys.argv
device = "cuda" if bf16 else "cpu"
# Not AutoTokenizer: transformers 5 takes a family's own splitting rule in place of tokenizer.json's.
tok = PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json")
tok.chat_template = json.load(open(f"{model}/tokenizer_config.json", encoding="utf-8"))["chat_template"]
render = lambda messages, ask: tok(tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask), add_special_tokens=False)["input_ids"]


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def answers():
    for row in map(json.loads, open(rows, encoding="utf-8")):
        asked = row["messages"][:-1]
        prompt = render(asked, True)
        both = [render(asked + [{"role": "assistant", "content": text}], False) for text in (row["messages"][-1]["content"], row["rejected_response"])]
        begin = min(common(prompt, answer) for answer in both)
        yield from ((answer, begin) for answer in both)


def scores(dtype):
    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device), adapter).eval()

    def logp(ids, begin):
        with torch.no_grad():
            logits = net(torch.tensor([ids], device=device)).logits[0, :-1].double().log_softmax(-1)
        return float(logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][begin - 1:].sum())

    return [logp(*answer) for answer in answers()]


lines = [json.loads(line) for line in open(ours)]
host = [line[name] for line in lines for name in ("chosen", "rejected")]
exact = scores(torch.float32)
assert len(exact) == len(host), "rows and scores are not of the same pairs"
if bf16:
    rms = lambda theirs: (sum((a - b) ** 2 for a, b in zip(theirs, exact)) / len(exact)) ** 0.5
    own, peers = rms(host), rms(scores(torch.bfloat16))
    print(f"{len(host)} answers, log-probs of about {sum(exact) / len(exact):.0f}: distance from f32 {own:.3f} for the host, {peers:.3f} for transformers in bf16")
    sys.exit(own > peers)
worst = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(exact, host))
print(f"{len(host)} answers, log-probs of peft and of the host differ by at most {worst:.1e} of themselves")
sys.exit(worst > 1e-4)
