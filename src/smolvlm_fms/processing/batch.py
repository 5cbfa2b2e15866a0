"""What the processors return: a mapping with attribute access that moves and casts its tensors."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch

__all__ = ["ProcessedBatch"]


class ProcessedBatch(UserDict[str, Any]):
    """Tensors (and lists) by name; ``batch["pixel_values"]`` and ``batch.pixel_values`` are the same thing.

    It unpacks as keyword arguments (``model(**batch)``) and stands where transformers' ``BatchFeature`` stands.
    """

    def __getattr__(self, name: str) -> Any:
        # `data` itself is looked up here before __init__ has run (copy, pickle): never recurse into it.
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(f"This batch has no {name!r}; it has {sorted(self.__dict__.get('data', {}))}.")

    def to(self, *args: Any, **kwargs: Any) -> ProcessedBatch:
        """Move and cast every tensor in place, as ``Tensor.to`` would; returns the batch itself.

        A dtype applies to floating-point tensors only: ids, masks and counts keep theirs. Lists are walked.
        """
        target = torch.empty(0).to(*args, **{k: v for k, v in kwargs.items() if k in ("dtype", "device")})
        casts = any(isinstance(value, torch.dtype | torch.Tensor) for value in [*args, *kwargs.values()])
        dtype = target.dtype if casts else None
        moves = any(isinstance(value, str | int | torch.device | torch.Tensor) for value in args) or "device" in kwargs
        device = target.device if moves else None
        non_blocking = bool(kwargs.get("non_blocking", False))
        for key, value in self.data.items():
            self.data[key] = _convert(value, device, dtype, non_blocking)
        return self


def _convert(value: Any, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(
            device=device if device is not None else value.device,
            dtype=dtype if dtype is not None and value.is_floating_point() else value.dtype,
            non_blocking=non_blocking,
        )
    if isinstance(value, list | tuple):
        return type(value)(_convert(item, device, dtype, non_blocking) for item in value)
    return value
