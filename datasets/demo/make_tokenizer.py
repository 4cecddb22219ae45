#!/usr/bin/env python3
"""Makes datasets/demo/model/tokenizer.json from the demo's rows: Qwen2.5's kind of tokenizer with a small vocabulary.
Needs tokenizers from PyPI. Usage, in datasets/demo: python3 make_tokenizer.py"""
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# The splitting rule that published Qwen2.5 tokenizers state (Apache-2.0).
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

texts = []
for name in ("prefs.jsonl", "val.jsonl"):
    for row in map(json.loads, open(name, encoding="utf-8")):
        texts += [m["content"] for m in row["messages"]] + [row["rejected_response"], "system\n", "user\n", "assistant\n"]
tok = Tokenizer(models.BPE())
tok.normalizer = normalizers.NFC()
tok.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
tok.decoder = decoders.ByteLevel()
tok.post_processor = processors.ByteLevel(trim_offsets=False)
tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2045, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
assert all(tok.decode(tok.encode(t).ids) == t for t in texts)
tok.save("model/tokenizer.json", pretty=False)
print(tok.get_vocab_size(), "tokens")
