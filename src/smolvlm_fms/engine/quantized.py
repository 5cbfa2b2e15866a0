"""Folders that ``smolvlm convert --quantize`` has written, on their way into the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.fms_bridge.grouped import load_grouped, stored_quantization

__all__ = ["load_stored"]


def load_stored(
    folder: Path, quantize: str | None, dtype: torch.dtype | None, device: torch.device, packed: bool
) -> tuple[Any, str | None] | None:
    """The model in ``folder`` and the kind of its quantised weights; None for a folder without such weights.

    On the CPU they are packed as they are. For another device or dtype, or ``packed=False``, they become plain weights
    of the same values, and the kind that is returned is None. Raises ConfigurationError where ``quantize`` asks for
    another kind than the folder holds.
    """
    kind = stored_quantization(folder)
    if kind is None:
        return None
    if quantize not in (None, kind):
        raise ConfigurationError(f"{folder} holds {kind} weights; they cannot become {quantize}. Leave quantize out.")
    direct = packed and device.type == "cpu" and dtype in (None, torch.bfloat16)
    return load_grouped(folder, dequantize=not direct, dtype=dtype, device=device), kind if direct else None
