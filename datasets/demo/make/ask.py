#!/usr/bin/env python3
"""Asks the demo's model questions that were held back, before and after a run, and prints what datasets/demo/README.md shows.

Usage: ask.py DPO_HOST RUN [COUNT]     e.g. ask.py target/release/dpo-host output/model-1
"""
import json, subprocess, sys

from dialogues import has_emoji, held_questions, plain

host, run = sys.argv[1:3]
asked = held_questions()[: int(sys.argv[3]) if len(sys.argv) > 3 else 192]
command = [host, "chat", "--adapter", run, "--compare", "--temperature", "0", "--max-new-tokens", "48", "--json", "--prompt"]
out = subprocess.run(command + [q["question"] for q in asked], check=True, capture_output=True, text=True).stdout
answers = [json.loads(line) for line in out.splitlines()]
assert [a["prompt"] for a in answers] == [q["question"] for q in asked]

curt = lambda q: [plain(c) for c in q["curt"]]
# Of a fact, a word or a sum the warm answers hold a curt one.
factual = [all(any(c in plain(w) for c in curt(q)) for w in q["warm"]) for q in asked]
for voice in ("base", "tuned"):
    texts = [a[voice]["text"] for a in answers]
    tables = lambda held: [t in q["curt"] + q["warm"] for q, t in zip(asked, texts) if q["phrasing"] == held]
    right = [any(c in plain(t) for c in curt(q)) for q, t in zip(asked, texts)]
    share = lambda hits: f"{sum(hits)} of {len(hits)} ({sum(hits) / len(hits):.1%})"
    print(f"{voice}: with an emoji {share([has_emoji(t) for t in texts])}; as in the tables, combination held back {share(tables(False))}, "
          f"phrasing held back {share(tables(True))}; facts right {share([r for r, f in zip(right, factual) if f])}")
