"""Held-out tests of the bundled model: a table of exact answers per skill, each beside a blank picture.

An answer counts when greedy decoding gives exactly the words expected. That is the same as every token of the answer
being the most likely one after the right tokens before it, so one forward pass tells.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from smolvlm_fms.training import IGNORE
from torch import nn

import skills
from conversations import Writer
from stream import normalise
from wordings import Turn

TESTS: dict[str, tuple[str, set[str]]] = {
    "shape": ("single", {"shape", "choice", "is it"}),
    "colour": ("single", {"colour", "is colour"}),
    "size": ("single", {"size"}),
    "place": ("single", {"place"}),
    "relation": ("pair", {"relation", "where of two"}),
    "bigger": ("pair", {"bigger"}),
    "side": ("pair", {"side", "side colour"}),
    "count": ("count", {"count", "count of kind", "count of colour"}),
    "digits": ("number", {"digits"}),
    "words": ("word", {"words"}),
    "emoji_unseen_art": ("emoji", {"emoji"}),
}
"""Name of the test → the generator's skill, and what its questions are about."""


def questions(
    work: Path, test: str, number: int, held_out: bool = True, icons: list[str] | None = None
) -> list[tuple[skills.Sample, Turn]]:
    """(sample, (question, answer)) × number, the same each time."""
    skill, about = TESTS[test]
    world = skills.World.load(work, held_out, icons)
    rng, found = Random(test), []
    while len(found) < number:
        sample = skills.make(world, rng.getrandbits(40), skill)
        turns = [turn for turn in sample.turns if turn.about in about]
        if turns:
            found.append((sample, rng.choice(turns)))
    return found


@torch.no_grad()
def right(model: nn.Module, writer: Writer, pixels_NHWC: torch.Tensor, turns: Sequence[Turn]) -> list[bool]:
    """Whether each question is answered exactly."""
    rows = [writer.write([turn]) for turn in turns]
    length = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    labels_BT = torch.full((len(rows), length), IGNORE)
    for row, (ids, labels) in enumerate(rows):
        ids_BT[row, : len(ids)] = ids
        labels_BT[row, : len(ids)] = labels
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids_BT, pixel_values=normalise(pixels_NHWC)[:, None])
    hit = (logits[:, :-1].argmax(-1) == labels_BT[:, 1:]) | (labels_BT[:, 1:] == IGNORE)
    return hit.all(1).tolist()  # type: ignore[no-any-return]


def score(model: nn.Module, work: Path, number: int = 200, held_out: bool = True) -> dict[str, dict[str, Any]]:
    """Every test: share of exact answers, with the picture and with a grey one."""
    writer = Writer(work)
    model.eval()
    table: dict[str, dict[str, Any]] = {}
    for test in TESTS:
        items = questions(work, test, number, held_out)
        pixels = torch.stack([torch.from_numpy(s.pixels) for s, _ in items])
        turns = [turn for _, turn in items]
        sums = defaultdict(float)
        for name, seen in (("score", pixels), ("blank", torch.full_like(pixels, 128))):
            for first in range(0, number, 100):
                sums[name] += sum(right(model, writer, seen[first : first + 100], turns[first : first + 100]))
        table[test] = {"metric": "exact", "score": sums["score"] / number, "blank": sums["blank"] / number, "n": number}
    return table


def show(table: dict[str, dict[str, Any]]) -> str:
    return json.dumps({k: (round(v["score"], 3), round(v["blank"], 3)) for k, v in table.items()})
