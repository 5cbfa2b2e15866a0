"""Model FLOPs utilisation: the arithmetic that the model calls for, over what the machine could have done."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from smolvlm_fms.training.optimizer import part_of
from smolvlm_fms.training.samples import Batch

__all__ = ["batch_flops", "peak_flops"]

PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Dense bfloat16 (or, where there is none, float16) FLOP/s of the makers' data sheets."""


def batch_flops(model: Any, batch: Batch) -> float:
    """FLOPs of forward and backward of one micro-batch: 6 a weight and token (4 where frozen, 2 in a frozen tower).

    Attention is counted over whole rows, halved where it is causal. Recomputed activations are not counted (that is
    what makes it *model* FLOPs: Chowdhery et al., arXiv 2204.02311, appendix B).
    """
    config = model.config
    rows, length = batch["input_ids"].shape
    if "image_sizes" in batch:
        tiles = len(batch["pixel_values"])
    else:
        tiles = int((batch["input_ids"] == config.image_token_id).sum()) // config.tokens_per_tile
    patches = config.vision.patches_per_side**2
    tower, connector, text, head = weight_counts(model)
    learnt = int((batch["labels"] != -100).sum())
    linear = text * rows * length + head * learnt
    linear += tiles * (tower * patches + connector * config.tokens_per_tile)
    vision, words = config.vision, config.text
    attention = 12 * vision.num_hidden_layers * vision.hidden_size * tiles * patches**2
    attention += 6 * words.num_hidden_layers * words.hidden_size * rows * length**2
    return float(linear + attention)


@lru_cache(maxsize=4)
def weight_counts(model: nn.Module) -> tuple[int, int, int, int]:
    """FLOPs a token of the matrices in tower, connector, text and head."""
    sums = {"tower": 0, "connector": 0, "text": 0, "head": 0}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            part = "head" if name.endswith(".head") else part_of(name)
            # Behind a frozen tower there is nothing that a gradient would have to go on to.
            frozen = 2 if part == "tower" else 4
            sums[part] += module.weight.numel() * (6 if module.weight.requires_grad else frozen)
    return sums["tower"], sums["connector"], sums["text"], sums["head"]


@lru_cache(maxsize=1)
def peak_flops(device: torch.device, half: bool) -> float | None:
    """FLOP/s that the machine can do: a GPU's data sheet, or a matrix product measured here; None if unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((value for key, value in PEAKS.items() if key in name), None)
        return None if peak is None else peak if half else peak / 2
    if device.type != "cpu":
        return None
    a = torch.randn(2048, 2048).to(torch.bfloat16 if half else torch.float32)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return float(2 * 2048**3 / best)
