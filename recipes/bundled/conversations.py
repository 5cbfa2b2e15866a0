"""The recipe's pictures as the samples that `smolvlm_fms.training` reads: numbered, the same for the same number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from smolvlm_fms.processing.prompt import image_prompt
from smolvlm_fms.training import IGNORE, Sample

import skills
from shape import tokenizer as read_tokenizer

TOKENS_PER_TILE = 16


class Writer:
    """Turns into token ids and labels, in the words of SmolVLM's chat template."""

    def __init__(self, work: Path) -> None:
        self.tokenizer = read_tokenizer(work)
        self.opening = "<|im_start|>User:" + image_prompt(0, 0, TOKENS_PER_TILE)
        self._ids: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            found = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._ids) > 50_000:
                self._ids.clear()
            self._ids[text] = found
        return self._ids[text]

    def write(self, turns: Sequence[tuple[str, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Input ids (T,) and labels (T,): the answers and the marks that end them are learnt, nothing else."""
        ids: list[int] = []
        labels: list[int] = []
        for index, (question, answer, *_) in enumerate(turns):
            opening = self.opening if index == 0 else "\nUser: "
            asked = self.ids(opening) + self.ids(question) + self.ids("<end_of_utterance>\nAssistant:")
            told = self.ids(" " + answer) + self.ids("<end_of_utterance>")
            ids += asked + told
            labels += [IGNORE] * len(asked) + told
        return torch.tensor(ids), torch.tensor(labels)


class Conversations:
    """Endless training samples; `dataset[i]` is drawn with seed i."""

    def __init__(self, work: Path, most_turns: int = 7) -> None:
        self.work, self.most_turns = work, most_turns
        self._ready: tuple[skills.World, Writer] | None = None

    def __getitem__(self, index: int) -> Sample:
        return self.with_targets(index)[0]

    def with_targets(self, index: int) -> tuple[Sample, np.ndarray, np.ndarray]:
        """The sample, and what kind and colour of thing each of its 64 patches shows."""
        if self._ready is None:  # in the worker that reads, not in the process that starts it
            self._ready = skills.World.load(self.work, held_out=False), Writer(self.work)
        world, writer = self._ready
        made = skills.make(world, index)
        turns = made.turns
        if random.Random(index).random() < 0.2:
            turns = [turns[-1] if random.Random(index + 1).random() < 0.5 else turns[0]]
        ids, labels = writer.write(turns[: self.most_turns])
        pixels = torch.from_numpy(made.pixels).permute(2, 0, 1).contiguous()[None]
        return Sample(ids, labels, pixels, name=f"{made.skill} {index}"), made.kinds, made.colours
