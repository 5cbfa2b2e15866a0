"""Which samples go into which micro-batch: a pure function of the sources' lengths, the weights and the seed.

    draws: one source after the other by weight, each in its own shuffled order ─▶ windows ─▶ rows ─▶ micro-batches

The plan is an endless sequence. Nothing in it depends on what came of a batch, so a run that resumes takes it up at the
number of the next micro-batch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from smolvlm_fms.training.sources import Source, Stream, order

__all__ = ["Draw", "Measured", "Plan", "pack_rows"]


@dataclass(frozen=True)
class Draw:
    """One sample to be read: its source, its index there (or, of a stream, its name and record), its tokens."""

    source: int
    item: Any
    length: int


@dataclass(frozen=True)
class Measured:
    """A source and what is known of it: the length of every sample (0: left out). A stream is measured as it goes."""

    source: Source | Stream
    weight: float
    lengths: npt.NDArray[np.int64]
    measure: Any = None


class Plan:
    """Micro-batches as lists of rows, rows as lists of draws.

    packing: rows are filled up to ``max_length``, best fit first; else a row is one sample, and micro-batches hold
    samples of similar length. What does not fill a row or a batch at the end of a window waits for the next one.
    """

    def __init__(
        self, sources: Sequence[Measured], *, rows: int, max_length: int, packing: bool, window: int, seed: int
    ) -> None:
        self.sources = list(sources)
        self.rows = rows
        self.max_length = max_length
        self.packing = packing
        self.window = window
        self.seed = seed

    def batches(self, start: int = 0, step: int = 1) -> Iterator[list[list[Draw]]]:
        """Micro-batches start, start + step, start + 2 · step, …"""
        return islice(self._group(self.draws(), flush=False), start, None, step)

    def count(self, draws: int) -> int:
        """How many micro-batches the first ``draws`` samples make."""
        return sum(1 for _ in self._group(islice(self.draws(), draws), flush=True))

    def draws(self) -> Iterator[Draw]:
        """Samples without end: always from the source that is furthest behind its share."""
        total = sum(one.weight for one in self.sources)
        shares = [one.weight / total for one in self.sources]
        queues = [self._queue(number) for number in range(len(self.sources))]
        taken = [0] * len(self.sources)
        for drawn in _forever():
            chosen = max(range(len(shares)), key=lambda n: (shares[n] * (drawn + 1) - taken[n], -n))
            taken[chosen] += 1
            yield next(queues[chosen])

    def _queue(self, number: int) -> Iterator[Draw]:
        measured = self.sources[number]
        if isinstance(measured.source, Stream):
            for name, record in measured.source.records(0):
                length = measured.measure(name, record)
                if length:
                    yield Draw(number, (name, record), length)
            return
        for epoch in _forever():
            for index in order(measured.source, epoch, self.seed + number).tolist():
                if measured.lengths[index]:
                    yield Draw(number, index, int(measured.lengths[index]))

    def _group(self, draws: Iterator[Draw], flush: bool) -> Iterator[list[list[Draw]]]:
        waiting: list[Draw] = []
        for number in _forever():
            fresh = list(islice(draws, self.window))
            ends = len(fresh) < self.window
            random = np.random.default_rng((self.seed, number))
            rows, waiting = self._rows([*waiting, *fresh], last=ends)
            chunks = [rows[i : i + self.rows] for i in range(0, len(rows), self.rows)]
            if chunks and len(chunks[-1]) < self.rows and not ends:
                waiting += [draw for row in chunks.pop() for draw in row]
            yield from (chunks[i] for i in random.permutation(len(chunks)))
            if ends:
                return

    def _rows(self, draws: list[Draw], last: bool) -> tuple[list[list[Draw]], list[Draw]]:
        """Rows of a window, and the draws that wait for the next one."""
        if not self.packing:
            return [[draw] for draw in sorted(draws, key=lambda draw: -draw.length)], []
        packs = [[draws[i] for i in row] for row in pack_rows([draw.length for draw in draws], self.max_length)]
        if last or len(packs) == 1:
            return packs, []
        full = [pack for pack in packs if sum(draw.length for draw in pack) >= 0.9 * self.max_length]
        # Rows that cannot be filled (every sample fills two thirds of one, say) must not wait for ever.
        thin = [pack for pack in packs if sum(draw.length for draw in pack) < 0.9 * self.max_length]
        keep = max(0, len(thin) - max(1, len(packs) // 8))
        return full + thin[:keep], [draw for pack in thin[keep:] for draw in pack]


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in rows of at most ``capacity``: best fit, the longest first."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            rows.append([index])
            insort(room, (capacity - lengths[index], len(rows) - 1))
        else:
            free, row = room.pop(place)
            rows[row].append(index)
            insort(room, (free - lengths[index], row))
    return rows


def _forever() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1
