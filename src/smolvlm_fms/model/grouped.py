"""Weights that were quantised before they were stored: small integers and a scale for every group of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GROUP", "GroupedWeight"]

GROUP = 32
"""Inputs that share a scale."""


@dataclass(frozen=True)
class GroupedWeight:
    """What stands in a linear's ``weight`` until it is packed.

    values_NK: int8, in -127…127 (``bits`` 8) or -8…7 (4). scales_NG: bf16, G = K / 32 rounded up. The weight is value
    times scale.
    """

    values_NK: Tensor
    scales_NG: Tensor
    bits: int

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.values_NK.shape

    def detach(self) -> GroupedWeight:
        """Itself; tensors have such a method."""
        return self

    def wide(self) -> Tensor:
        """The weight (N, K) in fp32."""
        scales_NK = self.scales_NG.float().repeat_interleave(GROUP, 1)[:, : self.shape[1]]
        return self.values_NK.float() * scales_NK

    @staticmethod
    def joined(parts: Sequence[GroupedWeight]) -> GroupedWeight:
        """Weights over the same inputs, one below the other."""
        if len(parts) == 1:
            return parts[0]
        values, scales = (
            torch.cat(tensors) for tensors in zip(*((p.values_NK, p.scales_NG) for p in parts), strict=True)
        )
        return GroupedWeight(values, scales, parts[0].bits)
