"""The alphabet that tower and text model share: every dense target has a fixed direction in the tower's features.

The tower learns to put the directions of what a patch shows into that patch's feature, so reading them off is a product
with a frozen table. The text model meanwhile learns to speak from the same directions, summed from the truth, while the
tower cannot see yet: neither waits for the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skills
from draw import CHARACTERS, COLOURS, FIELDS, GRID, UNKNOWN

SIZES = {
    "kind": len(skills.KINDS), "colour": len(COLOURS), "centre": 2, "size": GRID + 1, "height": GRID + 1,
    "row": GRID, "column": GRID, "second": len(CHARACTERS) + 1,
}  # fmt: skip
"""How many values each field has; row and column are the patch's place."""
STRENGTH = {"kind": 8.0, "colour": 6.0, "centre": 4.0, "size": 3.0, "height": 3.0, "row": 4.0, "column": 4.0,
            "second": 6.0}  # fmt: skip
WEIGHTS = {"kind": 1.0, "colour": 0.5, "centre": 0.3, "size": 0.15, "height": 0.15, "row": 0.15, "column": 0.15,
           "second": 0.3}  # fmt: skip
"""Of the fields' cross-entropies in the loss."""
COMMON = {"kind": 0.2, "centre": 0.2, "second": 0.02}
"""Weight of a field's first value, which most patches have: background, no middle, no second character."""


class Symbols(nn.Module):
    """Frozen unit directions (values, D) of every field, and a learnt gain a field for the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        for field, size in SIZES.items():
            self.register_buffer(field, F.normalize(torch.randn(size, width, generator=generator), dim=1))
        self.gains = nn.ParameterDict({field: nn.Parameter(torch.ones(())) for field in SIZES})

    def logits(self, features_NPD: Tensor, field: str) -> Tensor:
        """(N, P, values) scores of a field."""
        return self.gains[field] * (features_NPD @ getattr(self, field).T)

    def losses(self, features_NPD: Tensor, targets_NFP: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of each field; background and patches without a middle count less, unknown ones nothing."""
        result = {}
        for field, target_NP in with_places(targets_NFP).items():
            weight = None
            if field in COMMON:
                weight = torch.ones(SIZES[field])
                weight[0] = COMMON[field]
            logits = self.logits(features_NPD, field).flatten(0, 1)
            result[field] = F.cross_entropy(logits, target_NP.flatten(), weight, ignore_index=UNKNOWN)
        return result

    def describe(self, targets_NFP: Tensor, noise: float = 0.0) -> Tensor:
        """Features (N, P, D) of a tower that sees perfectly; with `noise` of one that is often unsure."""
        total = torch.zeros(len(targets_NFP), targets_NFP.shape[2], self.kind.shape[1])
        for field, target_NP in with_places(targets_NFP).items():
            table, known = getattr(self, field), target_NP != UNKNOWN
            named = table[target_NP.clamp(min=0)]
            if noise and field in ("kind", "colour", "centre", "size", "height"):
                other = table[torch.randint(len(table), target_NP.shape)]
                doubt = torch.rand(target_NP.shape) * 0.6 * (torch.rand(target_NP.shape) < noise)
                named = named + doubt[..., None] * (other - named)
            total += STRENGTH[field] * named * known[..., None]
        return total + noise * torch.randn_like(total) if noise else total


def with_places(targets_NFP: Tensor) -> dict[str, Tensor]:
    """The targets (N, P) by field, and each patch's row and column."""
    count = len(targets_NFP)
    found = {field: targets_NFP[:, index] for index, field in enumerate(FIELDS)}
    patches = torch.arange(GRID * GRID)
    return found | {"row": (patches // GRID).expand(count, -1), "column": (patches % GRID).expand(count, -1)}


def total(losses: dict[str, Tensor]) -> Tensor:
    """The weighted sum; a field that is unknown everywhere in the batch adds nothing."""
    return torch.stack([WEIGHTS[field] * loss.nan_to_num(0.0) for field, loss in losses.items()]).sum()
