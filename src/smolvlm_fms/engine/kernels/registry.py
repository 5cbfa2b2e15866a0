"""Registers a kernel as a torch operator, so that ``torch.compile`` and ``torch.export`` keep it as one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smolvlm_fms.errors import InputError

_OPERATORS = torch.library.Library("smolvlm_fms", "DEF")  # type: ignore[no-untyped-call]


def operator(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines ``smolvlm_fms::<schema>`` with its CPU implementation and the one that only knows shapes."""
    name = schema.split("(")[0]
    _OPERATORS.define(schema)  # type: ignore[no-untyped-call]
    _OPERATORS.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"smolvlm_fms::{name}", fake, lib=_OPERATORS)


def require_bf16(name: str, tensor: Tensor) -> None:
    """Raises: InputError for a tensor that the CPU kernels cannot read."""
    if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
        came = f"{tensor.dtype} on {tensor.device}"
        raise InputError(f"{name} must be bf16 on the CPU; got {came}. Use the torch path for anything else")
