"""Quantised weights on a GPU: torchao's weight-only kinds for the linears of the text model's blocks."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from smolvlm_fms.errors import ConfigurationError, MissingDependencyError

__all__ = ["GROUP", "quantize_text"]

GROUP = 32
"""Inputs that share a scale in int4, as in this package's own kernels."""


def quantize_text(model: Any, kind: str) -> None:
    """Quantise the blocks' linears in place. ``kind``: ``"int8"`` (a scale a row) or ``"int4"`` (groups of 32; bf16 on
    CUDA only). Embedding and head keep their dtype: they may be one tensor.

    Raises MissingDependencyError without torchao, ConfigurationError for another kind.
    """
    try:
        quantization = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise MissingDependencyError(
            f"quantize={kind!r} on a GPU needs torchao: pip install 'smolvlm-fms[gpu]'."
        ) from error
    if kind == "int8":
        config = quantization.Int8WeightOnlyConfig()
    elif kind == "int4":
        # The packing that torch's own kernel reads; torchao's default needs a further library.
        config = quantization.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        raise ConfigurationError(f"quantize is {kind!r}; it is None, 'int8' or 'int4'.")

    def linear_of_a_block(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear)

    with torch.no_grad():
        quantization.quantize_(model.text_model.base_model.layers, config, filter_fn=linear_of_a_block)
