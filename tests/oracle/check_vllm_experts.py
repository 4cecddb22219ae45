#!/usr/bin/env python3
"""Lets vLLM's own code load an adapter on a model with experts, and compares every expert's update with that of the run's adapter.

Usage: dpo-host merge --model MODEL --adapter RUN --format adapter --output-dir EACH     (not where vLLM keeps experts in one tensor)
       check_vllm_experts.py MODEL RUN EACH     (EACH is RUN itself where it is read as it is; needs vllm, a wheel for the CPU will do)
vLLM opens the model, without LoRA, since its kernels of experts with LoRA want a GPU. Then its loader reads EACH with what the model says of its
modules, its names and what it packs, and packs the experts. Exits 1 where a tensor of the adapter is for no module, which vLLM passes over in silence, or
where B · A of an expert differs from the run's.
"""
import json, os, sys
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
import torch
from safetensors.torch import load_file
from vllm import LLM
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import get_supported_lora_modules, process_packed_modules_mapping
from vllm.model_executor.layers.fused_moe import MoERunner

model, run, each = sys.argv[1:4]


def load(net):
    """As WorkerLoRAManager._load_adapter: the adapter, what packs what, and the names of the model's modules."""
    packed, expected = process_packed_modules_mapping(net), set()
    for module in get_supported_lora_modules(net):
        expected.update(packed.get(module, [module]), ["experts"] if module == "experts" else [])
    helper = PEFTHelper.from_local_dir(each, None)
    helper.validate_legal(LoRAConfig(max_lora_rank=64))
    mapper = getattr(net, "hf_to_vllm_mapper", None)
    lora = LoRAModel.from_local_checkpoint(each, expected, helper, device="cpu", dtype=torch.float32, weights_mapper=mapper and mapper.get_rename_mapper(),
                                           skip_prefixes=getattr(net, "lora_skip_prefixes", None))
    return lora, packed, {name: module for name, module in net.named_modules()}


def check(net):
    lora, packed, modules = load(net)
    parts = lambda name: [f"{name.rpartition('.')[0]}.{part}" for part in packed.get(name.rpartition(".")[2], [])]
    known = {part for name in modules for part in [name, f"{name}.base_layer", *parts(name)]}
    ignored = sorted(set(lora.loras) - known)
    count = len(lora.loras)
    theirs = {}
    for name in [name for name, module in modules.items() if isinstance(module, MoERunner)]:
        if net.is_3d_moe_weight:
            if lora.loras.get(name) is None: continue
            experts = modules[name].moe_config.num_experts
            shape = SimpleNamespace(w13_lora_a_stacked=[torch.empty(1, experts)], global_num_experts=experts, ep_rank=0)
            manager = SimpleNamespace(_is_3d_moe_model=True, _get_lora_layer_weights=lambda lora, name: lora.loras.get(name))
            for own in (lora.loras[name], lora.loras[f"{name}.base_layer"]): own.optimize()
            LoRAModelManager._stack_moe_lora_weights(manager, lora, shape, name)
            a, b = lora.loras[name].lora_a, lora.loras[name].lora_b
            theirs[name] = [torch.einsum("eor,eri->eoi", b, a) for a, b in zip(a, b)]
        else:
            of_experts = [lora.loras.get(part) for part in parts(name)]
            if not any(of_experts): continue
            packs = PackedLoRALayerWeights.pack_moe(of_experts, name)
            packs.optimize()
            w1, w2, w3 = (torch.einsum("eor,eri->eoi", b, a) for a, b in zip(packs.lora_a, packs.lora_b))
            theirs[name] = [torch.cat([w1, w3], 1), w2]
    return ignored, count, theirs


def of_run():
    """s · B · A of every expert, of the run's adapter: gate and up, down; by the number of the layer."""
    config, tensors, found = json.load(open(f"{run}/adapter_config.json")), load_file(f"{run}/adapter_model.safetensors"), {}
    helper = PEFTHelper.from_dict(config)
    for name, a in tensors.items():
        if not name.endswith("lora_A.weight") or not (".experts.base_layer." in name or ".experts.lora_A" in name): continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, scale = helper.get_rank_and_scaling(module)
        experts, b = a.shape[0] // rank, tensors[name.replace("lora_A", "lora_B")]
        update = torch.einsum("ore,eri->eoi", b.reshape(b.shape[0], rank, experts), a.reshape(experts, rank, -1)) * scale
        layer = next(int(part) for part in module.split(".") if part.isdigit())
        found.setdefault(layer, {})["base_layer" not in module] = update.float()
    return {layer: [updates[False], updates[True]] for layer, updates in found.items()}


engine = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=1,
             limit_mm_per_prompt={"image": 0} if "vision_config" in json.load(open(f"{model}/config.json")) else None)
ignored, count, theirs = engine.apply_model(check)[0]
ours = of_run()
theirs = {next(int(part) for part in name.split(".") if part.isdigit()): updates for name, updates in theirs.items()}
worst = max((((a - b).norm() / b.norm()).item() for layer in ours for a, b in zip(theirs.get(layer, [torch.zeros(())] * 2), ours[layer])), default=1.0)
print(f"{count} modules, {len(ours)} layers of experts; updates of experts differ by at most {worst:.1e}; for no module of vLLM's: {ignored[:4]}{' and others' if ignored[4:] else ''}")
sys.exit(bool(ignored) or worst > 1e-5)
