"""Ids of a small tokenizer under the settings that a checkpoint's other files have; writes host/data/tests/golden/settings.json.

    python tests/oracle/tokenizer_settings.py OUT.json

Made with transformers 5.24. Texts are encoded with and without what the tokenizer puts around them.
"""

import json
import pathlib
import sys
import tempfile

from transformers import AutoTokenizer

WORDS = ["▁h", "▁hi", "hi", "▁▁", "▁▁hi"]
VOCAB = ["<unk>", "<s>", "</s>", "<|end|>", "<|pad|>", *"▁hi.é<|>/sadnep", *WORDS]
MERGES = ["▁ h", "▁h i", "h i", "▁ ▁", "▁▁ hi"]
POST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": i, "content": VOCAB[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i in range(3)
    ],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
    },
    "pre_tokenizer": None,
    "post_processor": POST,
    "decoder": None,
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {word: i for i, word in enumerate(VOCAB)},
        "merges": MERGES,
    },
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
LLAMA = {"tokenizer_class": "LlamaTokenizer", **NAMED}


def token(content, **more):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True, **more}


CASES = [
    (FAST, None),
    ({**FAST, "eos_token": "<|end|>"}, None),
    ({**FAST, "added_tokens_decoder": {"3": token("<|end|>")}}, None),
    ({**FAST, "added_tokens_decoder": {"3": token("<|end|>", lstrip=True, rstrip=True)}}, None),
    ({**FAST, "additional_special_tokens": ["<|end|>", "<|pad|>"]}, None),
    ({**FAST, "pad_token": {"__type": "AddedToken", **token("<|pad|>")}}, None),
    ({**FAST, "add_bos_token": False}, None),
    ({**FAST, "add_bos_token": True, "add_eos_token": True}, None),
    ({**FAST, "add_eos_token": True}, None),
    (LLAMA, None),
    ({**LLAMA, "legacy": True}, None),
    ({**LLAMA, "legacy": True, "add_bos_token": True}, "llama"),
    ({**LLAMA, "add_prefix_space": False}, "llama"),
    ({**LLAMA, "legacy": True}, "mistral"),
    ({**LLAMA, "tokenizer_class": "LlamaTokenizerFast", "legacy": False}, None),
]
TEXTS = ["hi", "hi hi", " hi", "hi</s> hi", "hi</s>hi", "<s>hi<|end|> hi <|end|>", "<|pad|> hi", "hi  hi", ""]


def main():
    cases = []
    for config, model_type in CASES:
        with tempfile.TemporaryDirectory() as made:
            folder = pathlib.Path(made)
            (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            if model_type:
                (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
            tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [[text, *(tokenizer.encode(text, add_special_tokens=special) for special in (False, True))] for text in TEXTS]
        cases.append({"tokenizer_config": config, "model_type": model_type, "ids": ids})
    lines = ",\n".join(" " + json.dumps(case, ensure_ascii=False) for case in cases)
    open(sys.argv[1], "w").write('{"tokenizer": ' + json.dumps(TOKENIZER, ensure_ascii=False) + f',\n"cases": [\n{lines}\n]}}\n')
    print(f"{len(cases)} settings, {len({json.dumps(c['ids']) for c in cases})} of them different")


main()
