"""Activation functions by the names that checkpoints use."""

from __future__ import annotations

import torch
from fms.utils.activation import str_to_activation
from torch import Tensor, nn

__all__ = ["QuickGELU", "activation"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): CLIP's approximation of GELU, which FMS does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    """Return the activation module that ``name`` (transformers' vocabulary) stands for."""
    if name == "quick_gelu":
        return QuickGELU()
    module: nn.Module = str_to_activation(name)
    return module
