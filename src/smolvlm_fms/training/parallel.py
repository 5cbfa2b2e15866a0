"""One process or many: who this process is, and sums over all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group"]


@dataclass(frozen=True)
class Group:
    """The processes of a run; every one of them reads its own micro-batches."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this process writes the logs."""
        return self.rank == 0

    def total(self, *values: Tensor | float) -> list[float]:
        """Sum each value over all processes, in float64."""
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu").detach() for v in values])
        if self.world > 1:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return [float(value) for value in sums]
