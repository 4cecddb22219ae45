#!/usr/bin/env python3
"""Compares what llama.cpp computes of a GGUF with what transformers computes of the merged checkpoint: tokens, log-probs, greedy answers.

Usage: check_llama_cpp.py GGUF MERGED LIBRARIES [PROMPT...]
Needs torch, transformers. LIBRARIES has libllama.so and what it needs: the folder bins/linux-x64 of the npm package @node-llama-cpp/linux-x64 (3.22.1 is
llama.cpp v0.5.0), which has to be in LD_LIBRARY_PATH, too. Answers in f16 part where two tokens are equally likely to a thousandth of a nat.
"""
import ctypes as C, glob, sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path, merged, libraries, *prompts = sys.argv[1:]
PROMPTS = ["What is the capital of France, and what is it known for?", "Explain in simple terms why the sky looks blue during the day.",
           "List five healthy foods and say why each of them is good for you.", "Give me a recipe for tomato soup with basil, step by step."]
CONTEXT, MOST = 1024, 64


class Parameters(C.Structure):
    """More than any of llama.cpp's, which it fills and reads by its own layout."""
    _fields_ = [("words", C.c_uint32 * 256)]


class Batch(C.Structure):
    _fields_ = [("count", C.c_int32)] + [(name, C.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")]


def load(name):
    return C.CDLL(glob.glob(f"{libraries}/{name}")[0], mode=C.RTLD_GLOBAL)


load("libggml-base.so")
ggml, llama = load("libggml.v*so"), load("libllama.v*so")
quiet = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)(lambda *_: None)
llama.llama_log_set(quiet, None)
ggml.ggml_backend_load_all_from_path(C.c_char_p(libraries.encode()))
for name, result, *arguments in [("llama_model_default_params", Parameters), ("llama_context_default_params", Parameters),
        ("llama_model_load_from_file", C.c_void_p, C.c_char_p, Parameters), ("llama_init_from_model", C.c_void_p, C.c_void_p, Parameters),
        ("llama_model_get_vocab", C.c_void_p, C.c_void_p), ("llama_vocab_n_tokens", C.c_int32, C.c_void_p), ("llama_free", None, C.c_void_p),
        ("llama_tokenize", C.c_int32, C.c_void_p, C.c_char_p, C.c_int32, C.c_void_p, C.c_int32, C.c_bool, C.c_bool),
        ("llama_vocab_is_eog", C.c_bool, C.c_void_p, C.c_int32), ("llama_decode", C.c_int32, C.c_void_p, Batch),
        ("llama_set_n_threads", None, C.c_void_p, C.c_int32, C.c_int32), ("llama_get_logits_ith", C.POINTER(C.c_float), C.c_void_p, C.c_int32)]:
    function = getattr(llama, name)
    function.restype, function.argtypes = result, arguments
model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
assert model, f"llama.cpp does not load {path}"
vocabulary = llama.llama_model_get_vocab(model)


def tokens(text):
    data = text.encode()
    ids = (C.c_int32 * (len(data) + 8))()
    return list(ids[:llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, True)])


class Context:
    def __init__(self):
        parameters = llama.llama_context_default_params()
        parameters.words[0] = CONTEXT
        self.context, self.at = llama.llama_init_from_model(model, parameters), 0
        llama.llama_set_n_threads(self.context, 1, 1)

    def log_probs(self, ids):
        count = len(ids)
        token, pos, counts = ((C.c_int32 * count)(*values) for values in (ids, range(self.at, self.at + count), [1] * count))
        zero, wanted = (C.c_int32 * 1)(0), (C.c_int8 * count)(*[1] * count)
        sequence = (C.c_void_p * count)(*[C.addressof(zero)] * count)
        batch = Batch(count, C.addressof(token), None, *map(C.addressof, (pos, counts, sequence, wanted)))
        assert llama.llama_decode(self.context, batch) == 0
        self.at += count
        rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, i), (llama.llama_vocab_n_tokens(vocabulary),)) for i in range(count)]
        return torch.log_softmax(torch.from_numpy(np.stack(rows)).double(), -1).numpy()


def greedy(ids):
    context, answer = Context(), []
    row = context.log_probs(ids)[-1]
    while len(answer) < MOST and not llama.llama_vocab_is_eog(vocabulary, int(row.argmax())):
        answer.append(int(row.argmax()))
        row = context.log_probs(answer[-1:])[-1]
    llama.llama_free(context.context)
    return answer


tokenizer, reference = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
off, equal, sums = 0.0, 0, np.zeros(3)
for prompt in prompts or PROMPTS:
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens(text) == ids, f"other tokens of {text!r}"
    answer = reference.generate(torch.tensor([ids]), max_new_tokens=MOST, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0].tolist()[len(ids):]
    while answer and llama.llama_vocab_is_eog(vocabulary, answer[-1]): answer.pop()
    whole = ids + answer
    with torch.no_grad(): theirs = torch.log_softmax(reference(torch.tensor([whole])).logits[0].double(), -1).numpy()
    context = Context()
    at, next_ids = np.arange(len(whole) - 1), np.array(whole[1:])
    own, theirs = context.log_probs(whole)[at, next_ids], theirs[at, next_ids]
    llama.llama_free(context.context)
    off, equal = max(off, np.abs(own - theirs).max()), equal + (greedy(ids) == answer)
    sums += [own[len(ids) - 1:].sum(), theirs[len(ids) - 1:].sum(), len(answer)]
print(f"{equal} of {len(prompts or PROMPTS)} answers equal; log-probs off by {off:.4f} at most; "
      f"perplexity of the answers {np.exp(-sums[0] / sums[2]):.4f}, in transformers {np.exp(-sums[1] / sums[2]):.4f}")
