"""Samples for training, drawn by worker processes while the model trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

import skills


class Stream(IterableDataset[dict[str, Any]]):
    """Endless batches of seeds start, start + 1, …; process `rank` of `world` takes every world-th batch."""

    def __init__(
        self, work: Path, batch: int, start: int, held_out: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self.work, self.batch, self.start, self.held_out = work, batch, start, held_out
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        torch.set_num_threads(1)
        world = skills.World.load(self.work, self.held_out)
        number = self.rank
        while True:
            first = self.start + number * self.batch
            samples = [
                skills.make(world, seed, mixture=skills.SINGLE_PICTURE) for seed in range(first, first + self.batch)
            ]
            yield {
                "pixels": torch.from_numpy(np.concatenate([s.pixels for s in samples])),
                "targets": torch.from_numpy(np.concatenate([s.targets for s in samples])),
                "skills": [s.skill for s in samples],
            }
            number += self.world


def loader(work: Path, batch: int, start: int, rank: int = 0, world: int = 1) -> DataLoader[dict[str, Any]]:
    """The stream, drawn ahead by one process of its own."""
    stream = Stream(work, batch, start, rank=rank, world=world)
    return DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=8)


def normalise(pixels_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in −1…1: what the image processor gives for a picture of this size."""
    return (pixels_NHWC.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
