"""transformers' own model of a checkpoint folder, as a function from inputs to logits, for comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText

__all__ = ["sees_pictures_right", "transformers_forward"]


def sees_pictures_right() -> bool:
    """Whether the transformers that is here gives tiles their position ids in fp32; 4 does in bf16 alone."""
    return int(transformers.__version__.split(".")[0]) >= 5


def transformers_forward(folder: Path, dtype: torch.dtype) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Load ``folder`` with transformers; the function takes its ``forward``'s tensors and returns logits (B, T, V)."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()

    @torch.no_grad()
    def forward(inputs: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(
            **{name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        ).logits
        return logits

    return forward
