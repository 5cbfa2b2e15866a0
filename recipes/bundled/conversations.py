"""The recipe's pictures as the samples that `smolvlm_fms.training` reads: numbered, the same for the same number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from smolvlm_fms.processing.prompt import image_prompt, video_prompt
from smolvlm_fms.training import IGNORE, Sample
from torch import Tensor

import skills
from shape import tokenizer as read_tokenizer

TOKENS_PER_TILE = 64


class Row(NamedTuple):
    """A conversation in tokens, each (T,) int64. `branches`: 0 for what all turns see, i for what only turn i sees."""

    ids: Tensor
    labels: Tensor
    places: Tensor
    branches: Tensor


class Writer:
    """Turns into token ids and labels, in the words of SmolVLM's chat template."""

    def __init__(self, work: Path, tokens_per_tile: int = TOKENS_PER_TILE) -> None:
        self.tokenizer, self.tokens_per_tile = read_tokenizer(work), tokens_per_tile
        self._ids: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            found = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._ids) > 50_000:
                self._ids.clear()
            self._ids[text] = found
        return self._ids[text]

    def opening(self, pictures: int = 1, fps: float | None = None) -> list[int]:
        """Ids in front of the first question: so many pictures, or so many frames of one video where `fps` is given."""
        if fps is None:
            return self.ids("<|im_start|>User:" + image_prompt(0, 0, self.tokens_per_tile) * pictures)
        stamps = [index / fps for index in range(pictures)]
        return self.ids("<|im_start|>User: " + video_prompt(stamps, pictures / fps, pictures, self.tokens_per_tile))

    def write(
        self, turns: Sequence[tuple[str, ...]], pictures: int = 1, fps: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Input ids (T,) and labels (T,): the answers and the marks that end them are learnt, nothing else."""
        row = self.row(turns, pictures, fps)
        return row.ids, row.labels

    def row(
        self, turns: Sequence[tuple[str, ...]], pictures: int = 1, fps: float | None = None, apart: bool = False
    ) -> Row:
        """The turns one after the other; or, `apart`, each as if it were the first: for a mask that keeps turns from
        seeing each other, so that no answer can be copied from an earlier question.
        """
        ids = list(self.opening(pictures, fps))
        labels, places, branches = [IGNORE] * len(ids), list(range(len(ids))), [0] * len(ids)
        start = len(ids)
        for index, (question, answer, *_) in enumerate(turns):
            first = apart or index == 0
            asked = self.ids(question if first else f"\nUser: {question}")
            asked = asked + self.ids("<end_of_utterance>\nAssistant:")
            told = self.ids(" " + answer) + self.ids("<end_of_utterance>")
            begin = start if first else places[-1] + 1
            ids += asked + told
            labels += [IGNORE] * len(asked) + told
            places += range(begin, begin + len(asked) + len(told))
            branches += [index + 1 if apart else 1] * (len(asked) + len(told))
        return Row(*(torch.tensor(values) for values in (ids, labels, places, branches)))


class Conversations:
    """Endless training samples; `dataset[i]` is drawn with seed i.

    Five in six hold turns that do not see each other, the rest are conversations.
    """

    def __init__(self, work: Path, pixels: bool = True) -> None:
        self.work, self.pixels = work, pixels
        self._ready: tuple[skills.World, Writer] | None = None

    def __getitem__(self, index: int) -> Sample:
        return self.with_targets(index)[0]

    def with_targets(self, index: int) -> tuple[Sample, Row, Tensor]:
        """The sample, its row with places and branches, and the dense targets (N, 6, 64) of its pictures."""
        if self._ready is None:  # in the worker that reads, not in the process that starts it
            self._ready = skills.World.load(self.work, held_out=False), Writer(self.work)
        world, writer = self._ready
        mixture = skills.MIXTURE if self.pixels else skills.LESSONS
        made = skills.make(world, index, mixture=mixture, pixels=self.pixels)
        rng = random.Random(index)
        fps = rng.choice([24.0, 24.0, 1.0]) if made.is_video else None  # frames in a list count as 24 a second
        row = writer.row(made.turns, len(made.targets), fps, apart=rng.random() < 5 / 6)
        pixels = torch.ones(len(made.targets), 3, 1, 1)
        if self.pixels:
            pixels = torch.from_numpy(made.pixels).permute(0, 3, 1, 2).contiguous()
        sample = Sample(row.ids, row.labels, pixels, name=f"{made.skill} {index}")
        return sample, row, torch.from_numpy(made.targets)
