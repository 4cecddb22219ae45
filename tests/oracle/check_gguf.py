#!/usr/bin/env python3
"""Compares every tensor of a GGUF in f32, f16 or bf16 with the checkpoint that the host has merged.

Usage: dpo-host merge ... --output-dir MERGED; dpo-host merge ... --output-dir OUT --format gguf --quantize bf16
       or convert_hf_to_gguf.py MERGED --outtype bf16 --outfile GGUF     (of llama.cpp)
       check_gguf.py GGUF MERGED                                         (needs torch, safetensors, gguf)
Exits 1 where a value differs or a tensor is missing.
"""
import glob, re, sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from safetensors import safe_open

IN_LAYER = dict(attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj", attn_output="self_attn.o_proj",
    attn_q_norm="self_attn.q_norm", attn_k_norm="self_attn.k_norm", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj",
    ffn_down="mlp.down_proj", attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
AROUND = dict(token_embd="model.embed_tokens", output_norm="model.norm", output="lm_head")

gguf, merged = sys.argv[1:3]
reader = GGUFReader(gguf)
family = reader.fields["general.architecture"].contents()
heads = {side: reader.fields[f"{family}.attention.{key}"].contents() for side, key in (("q", "head_count"), ("k", "head_count_kv"))}
checkpoint = {}
for path in glob.glob(f"{merged}/*.safetensors"):
    with safe_open(path, "pt") as file:
        checkpoint |= {name: file.get_tensor(name).float().numpy() for name in file.keys()}


def theirs(tensor):
    data = np.array(tensor.data)
    if tensor.tensor_type == GGMLQuantizationType.BF16:
        data = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


def ours(name):
    """Name and values in the checkpoint. llama.cpp has the two halves of every head of q and k of a Llama interleaved."""
    stem, kind = name.rsplit(".", 1)
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    name = f"model.layers.{layer[1]}.{IN_LAYER[layer[2]]}.{kind}" if layer else f"{AROUND[stem]}.{kind}"
    values = checkpoint[name]
    if family == "llama" and layer and layer[2] in ("attn_q", "attn_k"):
        count = heads[layer[2][-1]]
        halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return name, values


# Frequencies of a scaled rope are the converter's own.
tensors = [t for t in reader.tensors if t.name != "rope_freqs.weight"]
pairs = [(*ours(t.name), theirs(t)) for t in tensors]
unequal = [name for name, values, other in pairs if not np.array_equal(values, other.reshape(values.shape))]
missing = sorted(set(checkpoint) - {name for name, *_ in pairs})
print(f"{family}: {len(pairs) - len(unequal)} of {len(pairs)} tensors are equal; unequal: {unequal}; missing: {missing}")
sys.exit(bool(unequal or missing))
