"""Keep the dense targets of the warm-up beside the language loss, with the project's trainer unchanged.

The trainer sees a model that returns logits and batches that hold conversations. Here the batches also remember what
each patch shows, and the model adds the gradient of that second loss where the tower's features leave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from smolvlm_fms.model.smolvlm import SmolVLM
from smolvlm_fms.training import Batch, collate
from smolvlm_fms.training.batches import read_ahead
from torch import Tensor, nn

from conversations import Conversations
from warmup import DenseHeads


class _AlsoLearn(torch.autograd.Function):
    """The features as they are; backward sends a gradient of `weight` into the second loss."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], torch.full((), ctx.weight), None


class DenseBatches:
    """Numbered batches of conversations; `kinds` and `colours` (B, 64) belong to the batch handed out last."""

    def __init__(self, work: Path, batch_size: int, pad_token_id: int) -> None:
        self.dataset, self.batch_size, self.pad_token_id = Conversations(work), batch_size, pad_token_id
        self.rank, self.world = 0, 1
        self.kinds: Tensor | None = None
        self.colours: Tensor | None = None

    def make(self, number: int) -> Batch:
        pairs = [self.dataset.with_targets(i) for i in range(number * self.batch_size, (number + 1) * self.batch_size)]
        batch = collate([sample for sample, _, _ in pairs], self.pad_token_id)
        batch["kinds"] = torch.stack([torch.from_numpy(kinds) for _, kinds, _ in pairs])
        batch["colours"] = torch.stack([torch.from_numpy(colours) for _, _, colours in pairs])
        return batch

    def stream(self, start: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for batch in read_ahead(self.make, count(start * self.world + self.rank, self.world), workers=1, start="fork"):
            self.kinds, self.colours = batch.pop("kinds"), batch.pop("colours")
            yield batch


class Sighted(nn.Module):
    """A SmolVLM whose tower keeps naming patches while it is trained; `.smolvlm` is what gets exported."""

    def __init__(self, model: SmolVLM, heads: DenseHeads, batches: DenseBatches, weight: float) -> None:
        super().__init__()
        self.smolvlm, self.heads, self.config = model, heads, model.config
        self.batches, self.weight = batches, weight
        model.vision_tower.register_forward_hook(self._name_patches)

    def _name_patches(self, tower: nn.Module, inputs: Any, features_NPD: Tensor) -> Tensor | None:
        batches = self.batches
        if not (self.training and torch.is_grad_enabled()) or batches.kinds is None or batches.colours is None:
            return None
        kinds, colours, places = self.heads.losses(features_NPD.float(), batches.kinds, batches.colours)
        return _AlsoLearn.apply(features_NPD, kinds + 0.5 * colours + 0.2 * places, self.weight)  # type: ignore[no-any-return]

    def forward(self, **inputs: Any) -> Any:
        return self.smolvlm(**inputs)
