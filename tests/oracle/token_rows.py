"""Tokenises preference rows with TRL and writes host/tests/golden/tokens.json.

    python tests/oracle/token_rows.py OUT.json MODEL_DIR

MODEL_DIR holds the small tokenizer of host/tests/golden/trl/model. Made with TRL 1.16, transformers 5.23. Each case names
the chat template and whether the tokenizer puts a BOS before plain text; its rows are of TRL's format.
"""

import json
import sys
from types import SimpleNamespace

from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

CHATML = open(sys.argv[2] + "/chat_template.jinja").read()
# Like Qwen3: the generation prompt of a non-thinking answer, and a last answer that is rendered with a thought.
THINK = CHATML.replace("m['content']", "('<think>\\n\\n</think>\\n\\n' if m['role'] == 'assistant' else '') + m['content']")
THINK_PROMPT = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def chat(prompt, chosen, rejected, **more):
    answer = lambda text: [{"role": "assistant", "content": text}]
    return {"prompt": prompt, "chosen": answer(chosen), "rejected": answer(rejected), **more}


USER = [{"role": "user", "content": "why 今天 not?"}]
MULTI = [{"role": "system", "content": "sat mat"}, *USER, {"role": "assistant", "content": "ok"}, *USER]
CASES = {
    "chat": (CHATML, False, [chat(USER, "then it ran", "then it sat"), chat(MULTI, "公园 😀", "a")]),
    "a thought before every answer": (THINK, False, [chat(USER, "ok", "not ok"), chat(MULTI, "ok", "maybe")]),
    "a generation prompt that the answer does not continue": (THINK_PROMPT, False, [chat(USER, "ok", "sure")]),
    "a chat tokenizer with bos": (CHATML, True, [chat(USER, "ok", "sure")]),
    "implicit conversation": (
        CHATML,
        False,
        [
            {
                "chosen": [*USER, {"role": "assistant", "content": "ok"}],
                "rejected": [*USER, {"role": "assistant", "content": "not"}],
            }
        ],
    ),
    "plain": (CHATML, False, [{"prompt": "the cat", "chosen": " sat on", "rejected": " ran away<|im_end|>"}]),
    "plain with bos": (CHATML, True, [{"prompt": "the cat", "chosen": " sat on", "rejected": " ran"}]),
    "plain, tokens merge over the boundary": (CHATML, False, [{"prompt": "then s", "chosen": "at on", "rejected": "ure"}]),
    "implicit plain": (CHATML, False, [{"chosen": "the cat sat.", "rejected": "the cat ran."}]),
}


def tokenizer(template, bos):
    backend = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
    if bos:
        backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if bos:
        tokens["bos_token"] = "<|endoftext|>"
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    made.chat_template = template
    return made


def main():
    PartialState()
    cases = []
    for name, (template, bos, rows) in CASES.items():
        processing = tokenizer(template, bos)
        args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
        trainer = SimpleNamespace(_tokenizer=processing)
        done = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), processing, args, "train")
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        expected = [{name: row[name] for name in names} for row in done]
        cases.append({"name": name, "template": template, "bos": bos, "rows": rows, "expected": expected})
    lines = ",\n".join(" " + json.dumps(case, ensure_ascii=False) for case in cases)
    open(sys.argv[1], "w").write(f"[\n{lines}\n]\n")


main()
