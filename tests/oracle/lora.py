#!/usr/bin/env python3
"""Makes tests/golden/lora: steps of DPO with PEFT's kinds of LoRA, on the model and rows of trajectories/qwen2.

Usage: lora.py TRAJECTORIES OUT      needs torch, transformers, peft from PyPI
A case is a folder: the starting adapter where its values cannot be made here again, and expected.json with the flags, what every step had
(loss, log-probs, gradient norm) and the log-probs of all answers at the end. The loss, the schedule and the clipping are those of
trajectories.py, written out: so only PEFT is between the numbers and torch.
"""
import importlib.metadata, json, os, shutil, sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

BATCH, STEPS, RATE, BETA = 4, 4, 2e-3, 0.1
ADAM = dict(betas=(0.9, 0.95), eps=1e-8)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Case: what LoraConfig has, the flags of the host, how the adapter begins (random values, those of PEFT, that of trajectories/qwen2),
# LoRA+'s ratio.
CASES = {
    "patterns": (dict(r=4, lora_alpha=8, target_modules=ALL, exclude_modules=["up_proj"], use_rslora=True, rank_pattern={
        "layers.1.self_attn.q_proj": 2, "q_proj|k_proj": 6, r"layers\.0\.mlp\..*": 3}, alpha_pattern={"down_proj": 20, "^model.layers.0.self_attn.v_proj": 2}),
        "", "random", None),
    "layers": (dict(r=2, lora_alpha=4, target_modules=["q_proj", "mlp.down_proj"], layers_to_transform=[1], layers_pattern="layers"), "", "random", None),
    "dora": (dict(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True), "", "random", None),
    "dora-new": (dict(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True), "", "random A", None),
    "loraplus": (None, "--loraplus-lr-ratio 8", "trajectories", 8.0),
    "pissa": (dict(r=4, lora_alpha=8, target_modules=ALL, init_lora_weights="pissa"),
              "--init-lora-weights pissa --lora-rank 4 --lora-alpha 8", "peft", None),
    "olora": (dict(r=3, lora_alpha=8, target_modules=ALL, init_lora_weights="olora", use_rslora=True),
              "--init-lora-weights olora --lora-rank 3 --lora-alpha 8 --use-rslora", "peft", None),
    # An adapter of SFT folded in, and a new one on top of it.
    "stacked": (dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]), "", "random", None),
}


def model(folder):
    return AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32, attn_implementation="eager").eval()


def logps(net, pairs):
    """Sums of log-probs of the answers' tokens, `[pairs, 2]`."""
    def one(prompt, answer):
        logits = net(torch.tensor([prompt + answer])).logits[0, :-1].log_softmax(-1)
        return logits[torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1), torch.tensor(answer)].sum()
    return torch.stack([torch.stack([one(p["prompt_ids"], p[k]) for k in ("chosen_ids", "rejected_ids")]) for p in pairs])


def main():
    source, out = f"{sys.argv[1]}/qwen2", sys.argv[2]
    rows = json.load(open(f"{source}/expected.json"))["rows"]
    shutil.rmtree(out, ignore_errors=True)
    for seed, (name, (config, flags, start, ratio)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        folder = f"{out}/{name}"
        os.makedirs(folder)
        base = model(source)
        if name == "stacked":
            base = PeftModel.from_pretrained(base, f"{source}/init_adapter").merge_and_unload()
        with torch.no_grad():
            reference = logps(base, rows)
        if start == "trajectories":
            policy = PeftModel.from_pretrained(base, f"{source}/init_adapter", is_trainable=True)
        else:
            policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for key, weight in policy.named_parameters():
                if "lora_" in key and (start == "random" or start == "random A" and "lora_A" in key):
                    weight.mul_(1 + 0.3 * torch.randn_like(weight)) if "magnitude" in key else weight.copy_(torch.randn_like(weight) * 0.05)
        if start.startswith("random"):
            policy.save_pretrained(f"{folder}/adapter")
            os.remove(f"{folder}/adapter/README.md")
            path = f"{folder}/adapter/adapter_config.json"
            json.dump(json.load(open(path)) | {"base_model_name_or_path": None}, open(path, "w"), indent=2)
        policy.eval()  # No dropout, as in DPO.
        if start != "peft":  # The reference is the adapter of the start; of PiSSA and OLoRA, that changes nothing.
            with torch.no_grad():
                reference = logps(policy, rows)
        elif (worst := float((logps(policy, rows) - reference).abs().max())) > 1e-3:
            raise SystemExit(f"{name}: the start is not the model, off by {worst}")
        trained = [p for p in policy.parameters() if p.requires_grad]
        if ratio: optimizer = create_loraplus_optimizer(policy, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.01, **ADAM)
        else: optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, **ADAM)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        steps = []
        for step in range(STEPS):
            at = slice(step * BATCH, (step + 1) * BATCH)
            own = logps(policy, rows[at])
            margins = BETA * (own - reference[at])
            loss = -torch.nn.functional.logsigmoid(margins[:, 0] - margins[:, 1]).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            chosen, rejected = own.mean(0).tolist()
            steps.append({"loss": float(loss), "grad_norm": float(norm), "logps/chosen": chosen, "logps/rejected": rejected})
        with torch.no_grad():
            end = logps(policy, rows).tolist()
        json.dump({"flags": flags, "steps": steps, "end": end}, open(f"{folder}/expected.json", "w"))
        print(name, steps[-1], flush=True)
    with open(f"{out}/PROVENANCE", "w") as file:
        file.write("Made by tests/oracle/lora.py; random adapters over the model and rows of trajectories/qwen2, no other source.\n")
        file.writelines(f"{p} {importlib.metadata.version(p)}\n" for p in ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
