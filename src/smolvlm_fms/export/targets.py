"""What a target has to do, and which targets there are."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

import torch

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.export.checks import Check

__all__ = ["TARGETS", "Target", "make_target", "weight_bytes"]

_HOMES = {
    "hf": "smolvlm_fms.export.folders:HfFolder",
    "fms": "smolvlm_fms.export.folders:FmsFolder",
    "gguf": "smolvlm_fms.export.gguf:GgufFiles",
    "onnx": "smolvlm_fms.export.onnx:OnnxFolder",
}
TARGETS = tuple(_HOMES)
_QUANTIZED = {
    "hf": "smolvlm_fms.export.quantized:QuantizedFolder",
    "gguf": "smolvlm_fms.export.gguf:GgufFiles",
}
"""Targets that take ``quantize``, and who writes them then."""


class Target(Protocol):
    """A format that models are written in. ``dtype``: of the weights where the user says nothing (None: their own)."""

    dtype: torch.dtype | None

    def expected_bytes(self, model: Any) -> int:
        """About how much will be written."""
        ...

    def write(self, model: Any, source: Path, out: Path) -> None:
        """Write ``model``, read from the folder ``source`` (whose tokenizer goes along), into the folder ``out``."""
        ...

    def check(self, model: Any, source: Path, out: Path) -> list[Check]:
        """Read ``out`` again and compare it with ``model``, which may be changed by that (to fp32)."""
        ...


def make_target(name: str, quantize: str | None) -> Target:
    """The target called ``name``; raises ConfigurationError, also where it cannot be quantised."""
    if name not in _HOMES:
        raise ConfigurationError(f"Nothing converts to {name!r}; there are: {', '.join(TARGETS)}.")
    if quantize not in (None, "int8", "int4"):
        raise ConfigurationError(f"quantize is {quantize!r}; it is int8 or int4.")
    if quantize is not None and name not in _QUANTIZED:
        raise ConfigurationError(f"{name} cannot be written quantised; {' and '.join(sorted(_QUANTIZED))} can.")
    home = _HOMES[name] if quantize is None else _QUANTIZED[name]
    module, _, kind = home.partition(":")
    target: Target = getattr(importlib.import_module(module), kind)(*([] if quantize is None else [quantize]))
    return target


def weight_bytes(model: Any) -> int:
    """Bytes of the model's parameters, as they are."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
