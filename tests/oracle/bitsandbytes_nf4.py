#!/usr/bin/env python3
"""Makes tests/golden/quantization/nf4.safetensors: tensors quantised by bitsandbytes, with double quantisation.

Usage: bitsandbytes_nf4.py OUT [DEVICE]      needs torch, safetensors, bitsandbytes from PyPI

The scales' codes are by the rule of the CUDA kernel: the nearest value of the map, of two as near that of the even code. On a CPU bitsandbytes looks them up in a
table that is not exact near the bounds, so there the rule is written out here; with DEVICE cuda the kernel itself is compared. The scales' mean is in f64, rounded once.
"""
import sys

import torch
import bitsandbytes.functional as F
from safetensors.torch import save_file

MAP = F.create_dynamic_map()


def scale_codes(normed):
    bounds = (MAP[:-1] + MAP[1:]) * 0.5
    code = torch.bucketize(normed, bounds)  # bounds[code - 1] < normed <= bounds[code]
    tie = (code < 255) & (code % 2 == 1) & (bounds[code.clamp(max=254)] == normed)
    return (code + tie).to(torch.uint8)


def quantize_scales(rest, blocksize=256):
    """What F.quantize_blockwise gives: codes, and of every block its largest magnitude."""
    blocks = torch.nn.functional.pad(rest, (0, -len(rest) % blocksize)).view(-1, blocksize)
    largest = blocks.abs().max(1)[0]
    factor = torch.where(largest > 0, 1 / largest, 0)
    return scale_codes(blocks * factor[:, None]).view(-1)[:len(rest)], F.QuantState(absmax=largest, code=MAP.clone(), blocksize=blocksize, dtype=torch.float32)


def exact():
    """Lets bitsandbytes quantise scales by the rule on the CPU, too."""
    F.quantize_blockwise = quantize_scales


def main():
    out, device = sys.argv[1], (sys.argv[2:] or ["cpu"])[0]
    torch.manual_seed(0)
    normal = lambda *shape: torch.randn(*shape) * 0.02
    outlier = normal(8, 64)
    outlier[3, 5] = 77.0
    cases = {
        "matrix": normal(130, 128), "columns of no block": normal(7, 30), "an odd number": normal(131), "outlier": outlier,
        "zeros": torch.cat([torch.zeros(128), normal(64), torch.zeros(30)]), "one block": normal(64), "one value": torch.tensor([-0.3]),
        "negative": -normal(4, 64).abs(), "bounds": torch.cat([(F.get_4bit_type("nf4", device="cpu")[:-1] + F.get_4bit_type("nf4", device="cpu")[1:]) / 2, torch.ones(1)]).repeat(4),
        "small": normal(2, 64) * 1e-30,
    }
    tensors = {}
    for name, values in cases.items():
        values = values.to(torch.bfloat16)
        packed, state = F.quantize_4bit(values.to(device), compress_statistics=False, quant_type="nf4", blocksize=64)
        packed, state.absmax = packed.cpu(), state.absmax.cpu()
        offset = state.absmax.double().mean().float()
        codes, nested = quantize_scales(state.absmax - offset)
        largest = nested.absmax
        if device != "cpu":
            _, theirs = F.quantize_4bit(values.to(device), compress_statistics=True, quant_type="nf4", blocksize=64)
            same = (theirs.absmax.cpu().view(-1) == codes).float().mean()
            print(f"{name}: {same:.6f} of the scales' codes are the kernel's, offset {theirs.offset.item()} and {offset.item()}")
        absmax = MAP[codes.long()] * largest.repeat_interleave(256)[:len(codes)] + offset
        state.absmax, state.code = absmax, state.code.cpu()
        dequantized = F.dequantize_4bit(packed, state, quant_type="nf4").view(-1)[:values.numel()]
        of = dict(values=values.flatten(), codes=packed.flatten(), scales=codes, scale_scales=largest, offset=offset.view(1), dequantized=dequantized)
        tensors |= {f"{name}.{k}": v.contiguous() for k, v in of.items()}
    tensors["values"], tensors["scales"] = F.get_4bit_type("nf4", device="cpu"), MAP
    save_file(tensors, out)


if __name__ == "__main__":
    main()
