"""Keep the dense targets of the warm-up beside the language loss, with the project's trainer unchanged.

The trainer sees a model that returns logits and batches that hold conversations. Here the batches also remember what
each patch shows, and the model adds the gradient of that second loss where the tower's features leave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import torch
from smolvlm_fms.model.smolvlm import SmolVLM
from smolvlm_fms.training import Batch, collate
from smolvlm_fms.training.batches import read_ahead
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from conversations import Conversations
from symbols import Symbols, total

WINDOW = 16
"""Batches that are drawn together and sorted by length, so that rows are padded little."""


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
    """Numbered batches of conversations; `extra` belongs to the batch handed out last: the dense targets (M, 6, 64) of
    its pictures, its rows' `branches` (B, T), and how many pictures each row has.
    """

    def __init__(self, work: Path, batch_size: int, pad_token_id: int, pixels: bool = True) -> None:
        self.dataset, self.batch_size, self.pad_token_id = Conversations(work, pixels), batch_size, pad_token_id
        self.rank, self.world = 0, 1
        self.extra: dict[str, Tensor] = {}

    def window(self, number: int) -> list[Batch]:
        """The batches of a window, in an order of its own; the same for all processes, which then wait little."""
        size = self.batch_size * WINDOW
        rows = [self.dataset.with_targets(index) for index in range(number * size, (number + 1) * size)]
        rows.sort(key=lambda row: row[0].length)
        batches = [self.batch(rows[first : first + self.batch_size]) for first in range(0, size, self.batch_size)]
        Random(number // self.world).shuffle(batches)
        return batches

    def batch(self, rows: list[Any]) -> Batch:
        batch = collate([sample for sample, _, _ in rows], self.pad_token_id)
        batch["position_ids"] = pad_sequence([row.places for _, row, _ in rows], batch_first=True)
        batch["branches"] = pad_sequence([row.branches for _, row, _ in rows], batch_first=True, padding_value=-1)
        batch["targets"] = torch.cat([targets for _, _, targets in rows])
        batch["pictures"] = torch.tensor([len(targets) for _, _, targets in rows])
        return batch

    def stream(self, start: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        first, skip = divmod(start, WINDOW)
        numbers = count(first * self.world + self.rank, self.world)
        for window in read_ahead(self.window, numbers, workers=1, start="fork", depth=2):
            for batch in window[skip:]:
                self.extra = {name: batch.pop(name) for name in ("branches", "targets", "pictures")}
                yield batch
            skip = 0


class Sighted(nn.Module):
    """A SmolVLM whose tower keeps naming patches while it is trained; `.smolvlm` is what gets exported.

    With `imagined` the tower is not used at all: the text model is told in its language what each patch shows.
    """

    def __init__(
        self, model: SmolVLM, symbols: Symbols, batches: DenseBatches, weight: float, imagined: float | None = None
    ) -> None:
        super().__init__()
        self.smolvlm, self.symbols, self.config = model, symbols, model.config
        self.batches, self.weight = batches, weight
        if imagined is None:
            model.vision_tower.register_forward_hook(self._name_patches)
        else:
            told = lambda *_, **__: symbols.describe(batches.extra["targets"], imagined).detach()  # noqa: E731
            model.vision_tower.forward = told  # type: ignore[method-assign]

    def _name_patches(self, tower: nn.Module, inputs: Any, features_NPD: Tensor) -> Tensor | None:
        if not (self.training and torch.is_grad_enabled()):
            return None
        losses = self.symbols.losses(features_NPD.float(), self.batches.extra["targets"])
        return _AlsoLearn.apply(features_NPD, total(losses), self.weight)  # type: ignore[no-any-return]

    def forward(self, **inputs: Any) -> Any:
        extra = self.batches.extra
        for name in ("attn_name", "cuts"):  # the trainer's way to keep packed samples apart; ours shares pictures
            inputs.pop(name, None)
        branches_BT = extra["branches"]
        causal = torch.ones(branches_BT.shape[1], branches_BT.shape[1], dtype=torch.bool).tril()
        same = branches_BT[:, :, None] == branches_BT[:, None, :]
        inputs["mask"] = causal & (same | (branches_BT[:, None, :] == 0))
        pixels = inputs["pixel_values"]
        absent = torch.arange(pixels.shape[1]) >= extra["pictures"][:, None]
        if absent.any():  # padding must be blank, which bytes of zero no longer are once they are scaled
            inputs["pixel_values"] = pixels.masked_fill(absent[:, :, None, None, None], 0.0)
        return self.smolvlm(**inputs)
