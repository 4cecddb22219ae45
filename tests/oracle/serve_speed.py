"""Tokens a second of `dpo-host serve`: N requests at once, each of so many prompt and answer tokens, greedy, past the end of turns.

    python serve_speed.py [--shape qwen2.5-7b] [--adapters 2] -- dpo-host serve --device cuda ...

Makes a checkpoint of random weights in the shape and adapters on all linears (rank 8) beside it, starts the command on them, and prints a
line for each number of requests. Needs torch and safetensors.
"""

import argparse
import http.client
import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import torch
from safetensors.torch import save_file

SHAPES = {
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                       vocab_size=152064),
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                         vocab_size=151936),
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=4096),
}
DEMO = pathlib.Path(__file__).parents[2] / "datasets/demo/model"


def checkpoint(folder, shape):
    if folder.exists():
        return
    folder.mkdir(parents=True)
    config = json.loads((DEMO / "config.json").read_text()) | shape
    config |= dict(max_position_embeddings=32768, tie_word_embeddings=False, torch_dtype="bfloat16", rope_theta=1e6)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (DEMO / name).exists():
            shutil.copy(DEMO / name, folder / name)
    hidden, inner, heads, kv = (shape[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    dim = hidden // heads
    where = "cuda" if torch.cuda.is_available() else "cpu"
    random = lambda *size: (torch.randn(*size, device=where) * 0.02).to(torch.bfloat16).cpu()
    for layer in range(shape["num_hidden_layers"]):
        p, t = f"model.layers.{layer}.", {}
        for name, rows, columns in linears(hidden, inner, dim, heads, kv):
            t[f"{p}{name}.weight"] = random(rows, columns)
            if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                t[f"{p}{name}.bias"] = random(rows)
        t[p + "input_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        t[p + "post_attention_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save_file(t, folder / f"model-{layer:05}.safetensors", metadata={"format": "pt"})
    t = {"model.embed_tokens.weight": random(shape["vocab_size"], hidden), "lm_head.weight": random(shape["vocab_size"], hidden),
         "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    save_file(t, folder / "model-99999.safetensors", metadata={"format": "pt"})
    index = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        index |= {name: file.name for name in header if name != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def linears(hidden, inner, dim, heads, kv):
    return [("self_attn.q_proj", heads * dim, hidden), ("self_attn.k_proj", kv * dim, hidden), ("self_attn.v_proj", kv * dim, hidden),
            ("self_attn.o_proj", hidden, heads * dim), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner)]


def adapter(folder, model, shape, seed):
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    hidden, inner, heads, kv = (shape[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    names = [name.split(".")[1] for name, _, _ in linears(hidden, inner, hidden // heads, heads, kv)]
    (folder / "adapter_config.json").write_text(json.dumps(dict(
        peft_type="LORA", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=names, bias="none", task_type="CAUSAL_LM",
        base_model_name_or_path=str(model))))
    t = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, rows, columns in linears(hidden, inner, hidden // heads, heads, kv):
            p = f"base_model.model.model.layers.{layer}.{name}."
            t[p + "lora_A.weight"], t[p + "lora_B.weight"] = torch.randn(8, columns) * 0.02, torch.randn(rows, 8) * 0.02
    save_file(t, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def ask(port, model, prompt, tokens, results, at):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = json.dumps(dict(model=model, prompt=prompt, max_tokens=tokens, temperature=0, ignore_eos=True))
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    if "usage" not in answer:
        raise SystemExit(f"refused: {answer}")
    results[at] = (answer["usage"]["completion_tokens"], answer["choices"][0]["text"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="qwen2.5-7b", choices=SHAPES)
    parser.add_argument("--folder", default="/tmp/serve-speed")
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    shape, folder = SHAPES[args.shape], pathlib.Path(args.folder) / args.shape
    checkpoint(folder, shape)
    adapters = [folder.parent / f"{args.shape}-adapter-{i}" for i in range(args.adapters)]
    for i, path in enumerate(adapters):
        adapter(path, folder, shape, i)
    command = args.command + ["--model", str(folder), "--listen", "8765"]
    command += ["--adapter", *map(str, adapters)] if adapters else []
    started = time.perf_counter()
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        print("   ", line, end="", flush=True)
        if line.startswith("serving"):
            break
    else:
        raise SystemExit("the server did not start")
    print(f"started in {time.perf_counter() - started:.1f} s")
    threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
    names = [folder.name] + [a.name for a in adapters]
    try:
        for models in [names[:1]] + ([names[1:2]] if adapters else []) + ([names] if adapters else []):
            for count in args.requests:
                results = [None] * count
                prompt = lambda i: [(7 * i + 13 * j + count) % 2000 for j in range(args.prompt)]
                threads = [threading.Thread(target=ask, args=(8765, models[i % len(models)], prompt(i), args.tokens, results, i))
                           for i in range(count)]
                start = time.perf_counter()
                [t.start() for t in threads]
                [t.join() for t in threads]
                seconds = time.perf_counter() - start
                tokens = sum(r[0] for r in results)
                what = " ".join(m.replace(args.shape, "base", 1) if m == names[0] else m[-9:] for m in models)
                print(f"{count:3} requests of {args.prompt} + {args.tokens} tokens, {what:28} {tokens / seconds:9.1f} tokens/s", flush=True)
    finally:
        server.terminate()
        server.wait()


main()
