#!/usr/bin/env python3
"""Makes tests/golden/quantization/published.{safetensors,json}: a matrix in every form in which quantised checkpoints are published.

Usage: published.py OUT PACKAGES     needs torch, transformers, safetensors, bitsandbytes, compressed-tensors from PyPI; PACKAGES is a folder with auto_gptq 0.7.1 (its
wheel unpacked) and autoawq 0.2.9 (its sdist unpacked), of which single files are run: the packages as such want a GPU.
A case is the tensors `CASE.m.…` as the tool writes them, what config.json says of them, and `CASE.expected`: the weight as the tool dequantises it.
"""
import importlib.util, json, sys, types

import torch
import bitsandbytes.functional as F
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

OUT, PACKAGES = sys.argv[1:3]
CONFIGS, TENSORS = {}, {}


def case(name, config, expected, **parts):
    CONFIGS[name] = config
    TENSORS[f"{name}.expected"] = expected.contiguous()
    TENSORS.update({f"{name}.m.{part.replace('__', '.', 1) if part.startswith('weight__') else part}": t.contiguous() for part, t in parts.items()})


def source(path, **stubs):
    """A file of a package, with stubs for what it imports and does not need."""
    for name, module in stubs.items(): sys.modules[name] = module
    spec = importlib.util.spec_from_file_location(path.split("/")[-1][:-3], f"{PACKAGES}/{path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bitsandbytes():
    for name, kind, nested, dtype, shape in (("bnb", "nf4", True, torch.bfloat16, (24, 96)), ("bnb-plain", "nf4", False, torch.bfloat16, (24, 96)),
                                             ("bnb-fp4", "fp4", False, torch.float16, (16, 64)), ("bnb-blocks", "nf4", False, torch.float16, (16, 128))):
        weight = (torch.randn(*shape) * 0.05).to(dtype)
        packed, state = F.quantize_4bit(weight, compress_statistics=nested, quant_type=kind, blocksize=128 if name == "bnb-blocks" else 64)
        parts = {f"weight__{k}": v for k, v in state.as_dict(packed=True).items()}
        state.shape = torch.Size([weight.numel()])
        case(name, dict(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested),
             F.dequantize_4bit(packed, state, quant_type=kind).view(*shape), weight=packed, **parts)


def float8():
    config = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[16, 32])
    for name, shape in (("fp8", (48, 64)), ("fp8-rest", (40, 72))):
        weight, sides = torch.randn(*shape) * 0.05, [-(-n // b) for n, b in zip(shape, (16, 32))]
        whole = torch.nn.functional.pad(weight, (0, sides[1] * 32 - shape[1], 0, sides[0] * 16 - shape[0])).view(sides[0], 16, sides[1], 32)
        scales = whole.abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(16, 0).repeat_interleave(32, 1)[:shape[0], :shape[1]]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        expected = (codes.float() * spread).bfloat16()
        if name == "fp8": assert torch.equal(expected, Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16))
        case(name, config, expected, weight=codes, weight_scale_inv=scales)
    for strategy, shape in (("tensor", (1,)), ("channel", (24, 1)), ("block", (2, 3))):
        args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True, **({"block_structure": [12, 32]} if strategy == "block" else {}))
        weight = (torch.randn(24, 96) * 0.05).bfloat16()
        of = {"tensor": lambda w: w.abs().max().view(1), "channel": lambda w: w.abs().amax(1, keepdim=True), "block": lambda w: w.view(2, 12, 3, 32).abs().amax((1, 3))}[strategy]
        scales = (of(weight).float() / 448).bfloat16()
        codes = quantize(weight, scales, None, args, dtype=torch.float8_e4m3fn)
        group = dict(weights=json.loads(args.model_dump_json()), targets=["Linear"], input_activations=dict(num_bits=8, type="float", dynamic=False))
        case(f"compressed-{strategy}", dict(quant_method="compressed-tensors", format="float-quantized", config_groups=dict(group_0=group), ignore=["lm_head"]),
             dequantize(codes, scales, None, args), weight=codes, weight_scale=scales, input_scale=torch.ones(1))


def integers():
    """compressed-tensors' int8 by rows, and its packed forms."""
    args = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    weight = (torch.randn(24, 96) * 0.05).bfloat16()
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = quantize(weight, scales, None, args, dtype=torch.int8)
    config = lambda args, format: dict(quant_method="compressed-tensors", format=format, config_groups=dict(group_0=dict(weights=json.loads(args.model_dump_json()), targets=["Linear"])))
    case("compressed-int8", config(args, "int-quantized"), dequantize(codes, scales, None, args), weight=codes, weight_scale=scales)
    for name, bits, symmetric, strategy, shape in (("4", 4, True, "group", (24, 96)), ("4-zeros", 4, False, "group", (20, 96)), ("8", 8, True, "channel", (24, 50))):
        size = 32 if strategy == "group" else shape[1]
        args = QuantizationArgs(num_bits=bits, type="int", strategy=strategy, symmetric=symmetric, **({"group_size": 32} if strategy == "group" else {}))
        weight = (torch.randn(*shape) * 0.05).bfloat16()
        grouped, half = weight.float().view(shape[0], -1, size), 2 ** (bits - 1)
        if symmetric: scales, zeros = grouped.abs().amax(2) / (half - 0.5), None
        else:
            scales = (grouped.amax(2) - grouped.amin(2)) / (2 ** bits - 1)
            zeros = torch.round(-half - grouped.amin(2) / scales).clamp(-half, half - 1).to(torch.int8)
        tensors = dict(weight=weight, weight_scale=scales.bfloat16()) | ({} if symmetric else dict(weight_zero_point=zeros))
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        parts = PackedQuantizationCompressor.compress(tensors, scheme)
        case(f"compressed-packed-{name}", config(args, "pack-quantized"), PackedQuantizationCompressor.decompress(parts, scheme)["weight"], **parts)


def gptq():
    quiet = types.ModuleType("auto_gptq_stub")
    linear = source("auto_gptq/auto_gptq/nn_modules/qlinear/qlinear_cuda.py", autogptq_cuda_256=quiet, autogptq_cuda_64=quiet).QuantLinear
    for name, bits, group, order, symmetric in (("gptq-4", 4, 32, False, True), ("gptq-4-order", 4, 32, True, False), ("gptq-8", 8, -1, False, True)):
        inputs, outputs = 96, 64
        weight, size = torch.randn(outputs, inputs) * 0.05, inputs if group == -1 else group
        index = torch.arange(inputs) // size
        if order: index = index[torch.randperm(inputs)]
        scales, zeros = torch.empty(outputs, inputs // size), torch.empty(outputs, inputs // size)
        for g in range(inputs // size):
            low, high = weight[:, index == g].amin(1), weight[:, index == g].amax(1)
            if symmetric: low, high = -torch.maximum(high, -low), torch.maximum(high, -low)
            scales[:, g] = (high - low) / (2 ** bits - 1)
            zeros[:, g] = (2 ** (bits - 1)) if symmetric else torch.round(-low / scales[:, g]).clamp(1, 2 ** bits - 1)
        plain = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.float16)
        # Codes that fit: GPTQ rounds within them.
        codes = (torch.round(weight / scales[:, index]) + zeros[:, index]).clamp(0, 2 ** bits - 1)
        plain.weight.data = ((codes - zeros[:, index]) * scales[:, index]).half()
        small = linear(bits, group, inputs, outputs, False, weight_dtype=torch.float16)
        small.pack(plain, scales, zeros, index.int())
        with torch.no_grad(): expected = small(torch.eye(inputs, dtype=torch.float16)).t()
        parts = dict(qweight=small.qweight, qzeros=small.qzeros, scales=small.scales, g_idx=small.g_idx, bias=torch.zeros(outputs, dtype=torch.float16))
        case(name, dict(quant_method="gptq", bits=bits, group_size=group, desc_act=order, sym=symmetric), expected, **parts)


def awq():
    tools = source("autoawq-0.2.9/awq/utils/packing_utils.py")
    inputs, outputs, group = 64, 48, 32
    codes, zeros = torch.randint(0, 16, (inputs, outputs), dtype=torch.int32), torch.randint(0, 16, (inputs // group, outputs), dtype=torch.int32)
    scales = (torch.rand(inputs // group, outputs) * 0.01 + 0.001).half()

    def pack(values):  # as its WQLinear_GEMM.from_linear does
        words = torch.zeros(values.shape[0], outputs // 8, dtype=torch.int32)
        for nibble, column in enumerate(tools.AWQ_ORDER): words |= values[:, column::8] << (4 * nibble)
        return words

    packed, packed_zeros = pack(codes), pack(zeros)
    case("awq", dict(quant_method="awq", bits=4, group_size=group, version="gemm", zero_point=True), tools.dequantize_gemm(packed, packed_zeros, scales, 4, group).t(),
         qweight=packed, qzeros=packed_zeros, scales=scales)


def main():
    torch.manual_seed(0)
    for make in (bitsandbytes, float8, gptq, awq, integers): make()
    save_file(TENSORS, f"{OUT}/published.safetensors")
    with open(f"{OUT}/published.json", "w") as file: json.dump(CONFIGS, file, indent=1)


main()
