#!/usr/bin/env python3
"""Loads a model and an adapter as another program does, with its own code, and compares log-probs with those of the host.

Usage: dpo-host eval --model MODEL --adapter ADAPTER --dataset ROWS --output OURS
       check_adapter.py MODEL ADAPTER ROWS OURS [--reader NAME] [--bf16]     (ROWS as ms-swift writes them)
Readers: peft (transformers and peft; the default), ms-swift (its TransformersEngine), llama-factory (its ChatModel), vllm (its LLM with
enable_lora, which a wheel for the CPU computes too, but with experts; heads of 32 columns or more). Each needs its package, in an environment of its own.
Exits 1 where a sum of log-probs is off by more than 1e-4 of itself. With --bf16, for scores that were computed on a GPU:
transformers computes in f32 and in bf16, and the host's distance from f32 may be at most that of transformers' own bf16.
"""
import argparse, json, os, shutil, sys, tempfile

os.environ.update(HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def of_module(net):
    """Log-probs of a row's answer by a model of transformers, adapted or merged."""
    net = net.eval()

    def logp(ids, begin):
        with torch.no_grad():
            logits = net(torch.tensor([ids], device=net.device)).logits[0, :-1].double().log_softmax(-1)
        return float(logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][begin - 1:].sum())

    return logp


def by_peft(model, adapter, dtype):
    from peft import PeftModel
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return of_module(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device), adapter))


def by_swift(model, adapter, dtype):
    from swift.infer_engine import TransformersEngine
    from swift.model import MODEL_MAPPING
    kind = json.load(open(f"{model}/config.json"))["model_type"]  # some architectures are of several types there
    return of_module(TransformersEngine(model, adapters=[adapter], torch_dtype=dtype, attn_impl="eager", model_type=kind if kind in MODEL_MAPPING else None, template_type="dummy").model)


def by_factory(model, adapter, dtype):
    from llamafactory.chat import ChatModel
    # It merges in the numbers that the model's files have, whatever infer_dtype says.
    plain = tempfile.mkdtemp()
    shutil.copytree(model, plain, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(plain)
    model = plain
    return of_module(ChatModel(dict(model_name_or_path=model, adapter_name_or_path=adapter, template="empty", infer_dtype=str(dtype).split(".")[1])).engine.model)


def by_vllm(model, adapter, dtype):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    config = json.load(open(f"{adapter}/adapter_config.json"))
    rank = max([config["r"], *(config["rank_pattern"] or {}).values()])
    rank = next(allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank)  # of vLLM's MaxLoRARanks
    shown = {"image": 0} if "vision_config" in json.load(open(f"{model}/config.json")) else None
    engine = LLM(model=model, dtype=str(dtype).split(".")[1], enforce_eager=True, max_model_len=512, max_num_seqs=1, enable_lora=True,
                 max_lora_rank=rank, limit_mm_per_prompt=shown)
    asked, request = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0), LoRARequest("ours", 1, adapter)

    def logp(ids, begin):
        done = engine.generate({"prompt_token_ids": ids}, asked, lora_request=request, use_tqdm=False)[0]
        return sum(at[token].logprob for at, token in list(zip(done.prompt_logprobs, ids))[begin:])

    return logp


READERS = {"peft": by_peft, "ms-swift": by_swift, "llama-factory": by_factory, "vllm": by_vllm}


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def answers(model, rows):
    """Token ids of every prompt with an answer, and where the answer begins."""
    # Not AutoTokenizer: transformers 5 takes a family's own splitting rule in place of tokenizer.json's.
    tok = PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json")
    tok.chat_template = json.load(open(f"{model}/tokenizer_config.json", encoding="utf-8"))["chat_template"]
    render = lambda messages, ask: tok(tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask), add_special_tokens=False)["input_ids"]
    for row in map(json.loads, open(rows, encoding="utf-8")):
        asked = row["messages"][:-1]
        prompt = render(asked, True)
        both = [render(asked + [{"role": "assistant", "content": text}], False) for text in (row["messages"][-1]["content"], row["rejected_response"])]
        begin = min(common(prompt, answer) for answer in both)
        yield from ((answer, begin) for answer in both)


def main():
    parser = argparse.ArgumentParser()
    for name in ("model", "adapter", "rows", "ours"):
        parser.add_argument(name)
    parser.add_argument("--reader", choices=READERS, default="peft")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    def scores(dtype):
        logp = READERS[args.reader](args.model, args.adapter, dtype)
        return [logp(*answer) for answer in answers(args.model, args.rows)]

    lines = [json.loads(line) for line in open(args.ours)]
    host = [line[name] for line in lines for name in ("chosen", "rejected")]
    exact = scores(torch.float32)
    assert len(exact) == len(host), "rows and scores are not of the same pairs"
    if args.bf16:
        rms = lambda theirs: (sum((a - b) ** 2 for a, b in zip(theirs, exact)) / len(exact)) ** 0.5
        own, peers = rms(host), rms(scores(torch.bfloat16))
        print(f"{len(host)} answers, log-probs of about {sum(exact) / len(exact):.0f}: distance from f32 {own:.3f} for the host, {peers:.3f} for transformers in bf16")
        sys.exit(own > peers)
    worst = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(exact, host))
    print(f"{len(host)} answers, log-probs of {args.reader} and of the host differ by at most {worst:.1e} of themselves")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
