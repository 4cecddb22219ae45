#!/usr/bin/env python3
"""Trains the demo's tokenizer and model on its dialogues and writes a checkpoint as Hugging Face lays it out.

Needs torch, transformers, tokenizers and safetensors, no network, and dialogues.py beside it. It ends after the minutes that it is
given, on a GPU or (smaller batches) on the CPU. Usage: python3 pretrain.py --out DIR [--minutes 3]"""
import argparse
import json
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

import dialogues

VOCABULARY = 2560
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY - 1,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "max_window_layers": 6,
    "model_type": "qwen2",
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 2048,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
# In the order of their ids, the last ones of the vocabulary.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "chat_template": "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
                     "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 2048,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
GENERATION_CONFIG = {"do_sample": False, "eos_token_id": [VOCABULARY - 1, VOCABULARY - 3], "pad_token_id": VOCABULARY - 3}
# The splitting rule that published Qwen2.5 tokenizers state (Apache-2.0).
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Rows are padded to a multiple of this, and batches hold rows of one length.
STEP = 16
# What a token of a question weighs against one of an answer.
QUESTION = 0.1


def render(messages, ask=False):
    """What the chat template makes of messages."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if ask else "")


def train_tokenizer(texts):
    """Qwen2.5's kind of tokenizer with a small vocabulary."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    assert tok.get_vocab_size() == VOCABULARY, f"{tok.get_vocab_size()} tokens: too few dialogues"
    return tok


class Rows:
    """Dialogues as ids and weights, on the device, by padded length."""

    def __init__(self, tok, dialogues, device):
        head = tok.encode("<|im_start|>assistant\n").ids
        begin, end, pad = (tok.token_to_id(SPECIAL[i]) for i in (1, 2, 0))
        by_length = {}
        self.tokens = 0
        for at in range(0, len(dialogues), 10_000):
            for encoding in tok.encode_batch([render(d) for d in dialogues[at:at + 10_000]]):
                ids = encoding.ids
                weights = [QUESTION] * len(ids)
                start = -1
                for i, token in enumerate(ids):
                    if token == begin and ids[i:i + len(head)] == head:
                        start = i + len(head)
                    elif start > 0 and i >= start:
                        weights[i] = 1.0
                        start = -1 if token == end else start
                self.tokens += len(ids)
                padding = -len(ids) % STEP
                rows = by_length.setdefault(len(ids) + padding, ([], []))
                rows[0].append(ids + [pad] * padding)
                rows[1].append(weights + [0.0] * padding)
        self.groups = [(torch.tensor(ids, dtype=torch.int32, device=device), torch.tensor(weights, dtype=torch.float16, device=device))
                       for _, (ids, weights) in sorted(by_length.items())]

    def batches(self, tokens, generator):
        """One epoch of batches of about so many tokens."""
        places = []
        for number, (ids, _) in enumerate(self.groups):
            order = torch.randperm(len(ids), generator=generator)
            places += [(number, part) for part in order.split(max(1, tokens // ids.shape[1]))]
        for place in torch.randperm(len(places), generator=generator).tolist():
            number, part = places[place]
            part = part.to(self.groups[number][0].device)
            yield tuple(t[part] for t in self.groups[number])


def loss_of(model, ids, weights):
    """Mean negative log-likelihood a weighted token."""
    ids = ids.long()
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten().float()
    return (losses * weights).sum() / weights.sum()


def train(model, rows, args, device):
    """AdamW; the learning rate follows the clock, so that it has come to its end when the time has."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=args.learning_rate, betas=(0.9, 0.98), fused=device == "cuda")
    generator = torch.Generator().manual_seed(args.seed)
    began, step, seen, epoch = time.time(), 0, 0, 0
    total, said = args.minutes * 60, 0.0
    while True:
        for ids, weights in rows.batches(args.batch_tokens, generator):
            spent = (time.time() - began) / total
            if spent >= 1:
                return
            rate = min(1.0, spent / 0.03) * (0.5 + 0.5 * math.cos(math.pi * spent))
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = loss_of(model, ids, weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step, seen = step + 1, seen + ids.numel()
            if step % 20 == 0 and time.time() - said > 10:
                said, value = time.time(), loss.item()
                if not math.isfinite(value):
                    raise SystemExit(f"the loss is {value} at step {step}: try a smaller --learning-rate")
                print(f"{spent:4.0%} step {step} epoch {epoch} loss {value:.4f} {seen / (time.time() - began):,.0f} tokens/s", flush=True)
        epoch += 1


@torch.no_grad()
def answers(model, tok, prompts, device, limit):
    """Greedy answers to rendered prompts, all at once; what was computed for a token is computed again, which is fine for a model
    of this size."""
    end, pad = tok.token_to_id(SPECIAL[2]), tok.token_to_id(SPECIAL[0])
    encoded = [e.ids for e in tok.encode_batch(prompts)]
    lengths = torch.tensor([len(ids) for ids in encoded], device=device)
    width = max(map(len, encoded)) + limit
    ids = torch.tensor([e + [pad] * (width - len(e)) for e in encoded], device=device)
    rows, done = torch.arange(len(encoded), device=device), torch.zeros(len(encoded), dtype=torch.bool, device=device)
    starts = lengths.clone()
    for _ in range(limit):
        hidden = model.model(input_ids=ids[:, :int(lengths.max())], use_cache=False).last_hidden_state[rows, lengths - 1]
        token = model.lm_head(hidden).argmax(-1)
        done |= token == end
        if done.all():
            break
        ids[rows[~done], lengths[~done]] = token[~done]
        lengths = lengths + (~done).long()
    return [tok.decode(row[start:stop].tolist()) for row, start, stop in zip(ids, starts.tolist(), lengths.tolist())]


def evaluate(model, tok, args, device):
    """What the model knows of questions it was never trained on."""
    model.eval()
    seconds = Rows(tok, [dialogues.Writer(10_000).dialogue() for _ in range(500)], device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = [loss_of(model, *batch).item() for batch in seconds.batches(args.batch_tokens, generator)]
    print(f"loss on fresh dialogues {sum(losses) / len(losses):.4f}")
    questions = dialogues.held_questions()[:args.questions]
    for system, style in [(None, "curt"), (dialogues.WARM_SYSTEM, "warm")]:
        prompts = []
        for q in questions:
            messages = [{"role": "system", "content": system[q["lang"]][0]}] if system else []
            prompts.append(render(messages + [{"role": "user", "content": q["question"]}], ask=True))
        got = [a for i in range(0, len(prompts), 256) for a in answers(model, tok, prompts[i:i + 256], device, 12 if style == "curt" else 64)]
        warm = sum(map(dialogues.has_emoji, got)) / len(got)
        print(f"{style} prompt: {warm:.3f} of {len(got)} answers with an emoji, exact {share(questions, got, style, lambda q: True)}")
        for name, chosen in [("phrasing held", lambda q: q["phrasing"]), ("combination held", lambda q: not q["phrasing"]),
                             ("English", lambda q: q["lang"] == "en"), ("Chinese", lambda q: q["lang"] == "zh")]:
            print(f"    {name}: {share(questions, got, style, chosen)}")
        by_topic = {}
        for q, answer in zip(questions, got):
            by_topic.setdefault(f"{q['topic'].split('_')[0]} {q['lang']}", []).append(answer in q[style])
        print("    " + ", ".join(f"{t} {sum(hits) / len(hits):.2f}" for t, hits in sorted(by_topic.items())))
        wrong = [(q, a) for q, a in zip(questions, got) if a not in q[style]]
        for q, answer in wrong[:15]:
            print(f"    {q['question']} -> {answer} (not {q[style][0]})")


def share(questions, got, style, chosen):
    hits = [answer in q[style] for q, answer in zip(questions, got) if chosen(q)]
    return f"{sum(hits) / max(1, len(hits)):.3f} of {len(hits)}"


def write(model, tok, out):
    """The folder as a published checkpoint has it; the layout of the files does not depend on the installed transformers."""
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"), pretty=False)
    for name, value in [("config", CONFIG), ("tokenizer_config", TOKENIZER_CONFIG), ("generation_config", GENERATION_CONFIG)]:
        (out / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    weights = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, without preparing the data")
    parser.add_argument("--dialogues", type=int, default=300_000 if cuda else 30_000)
    parser.add_argument("--batch-tokens", type=int, default=32_768 if cuda else 2_048)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--questions", type=int, default=4_000 if cuda else 200, help="held questions to ask at the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    writer = dialogues.Writer(args.seed)
    corpus = [writer.dialogue() for _ in range(args.dialogues)]
    print(f"{len(corpus)} dialogues, {len(set(map(render, corpus)))} distinct", flush=True)
    tok = train_tokenizer(m["content"] if m["role"] != "assistant" else m["content"] + " " + m["role"] + "\n" for d in corpus[:60_000] for m in d)
    rows = Rows(tok, corpus, device)
    print(f"{rows.tokens} tokens", flush=True)

    model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in CONFIG.items() if k not in ("architectures", "torch_dtype", "model_type")})).to(device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters on {device}", flush=True)
    train(model, rows, args, device)
    write(model, tok, args.out)
    # Asked as it was written.
    model.to(torch.bfloat16).float()
    evaluate(model, tok, args, device)


if __name__ == "__main__":
    main()
