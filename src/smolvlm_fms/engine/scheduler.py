"""What to compute next. Plain Python: no torch, no clock, no I/O.

Sequences are admitted in the order of their arrival, as long as a slot and room for keys and values are there. Each
step does one piece of work for the oldest sequence that is not generating yet (a few tiles, or a chunk of its prompt),
and one token for every sequence that is. A long prompt therefore delays the others by a chunk, not by its whole length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smolvlm_fms.engine.config import EngineConfig
from smolvlm_fms.engine.kv_cache import KVSpace
from smolvlm_fms.engine.sequence import Picture, Sequence, State

__all__ = ["Copy", "Encode", "Plan", "Prefill", "Scheduler"]


@dataclass(frozen=True)
class Copy:
    """Copy ``tokens`` of keys and values from position ``source`` of the cache to ``target``."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True)
class Encode:
    """Send tiles ``first`` … ``first + count`` of a sequence's picture through the tower."""

    sequence: Sequence
    picture: Picture
    first: int
    count: int


@dataclass(frozen=True)
class Prefill:
    """Compute ``count`` prompt tokens from ``start``; the chunk that ends the prompt yields the first token."""

    sequence: Sequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        return self.start + self.count == len(self.sequence.prompt)


@dataclass
class Plan:
    """One step, to be done in the order of the fields."""

    copies: list[Copy] = field(default_factory=list)
    encodes: list[Encode] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.copies or self.encodes or self.prefills or self.decodes)


class Scheduler:
    """Holds every unfinished sequence and plans step after step.

    cached: looks up the features of a picture seen before, by its key; None where there are none.
    """

    def __init__(self, config: EngineConfig, space: KVSpace, cached: Callable[[bytes], Any]) -> None:
        self.config = config
        self.space = space
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._cached = cached

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its limit must fit the space (the engine has checked)."""
        assert sequence.limit <= self.space.capacity, "a sequence that can never run was queued"
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or cancelled sequence out, wherever it stands; its prefix stays for others."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.space.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED

    def plan(self) -> Plan:
        """The next step; empty when there is nothing to do. Admits what can be admitted."""
        plan = Plan()
        self._admit(plan)
        plan.decodes = [sequence for sequence in self.running if sequence.state is State.DECODE]
        starting = next((sequence for sequence in self.running if sequence.state is State.PREFILL), None)
        if starting is not None:
            self._start(starting, plan)
        return plan

    def _admit(self, plan: Plan) -> None:
        while self.waiting and len(self.running) < self.config.max_sequences:
            sequence = self.waiting[0]
            reuse = self.space.admit(sequence)
            if reuse is None:
                return
            self.waiting.popleft()
            assert sequence.extent is not None
            if reuse.source >= 0 and reuse.tokens:
                plan.copies.append(Copy(reuse.source, sequence.extent.start, reuse.tokens))
            sequence.computed = sequence.reused = reuse.tokens
            sequence.state = State.PREFILL
            self.running.append(sequence)

    def _start(self, sequence: Sequence, plan: Plan) -> None:
        """Add the next piece of work of a sequence whose prompt is not computed yet."""
        if sequence.computed == sequence.reused and (reuse := self.space.improve(sequence)) is not None:
            assert sequence.extent is not None
            plan.copies.append(Copy(reuse.source, sequence.extent.start, reuse.tokens))
            sequence.computed = sequence.reused = reuse.tokens
        start = sequence.computed
        end = len(sequence.prompt)
        for picture in sequence.pictures:
            if not len(picture.positions) or picture.positions[-1] < start:
                continue
            if picture.features is None:
                picture.features = self._cached(picture.key)
            if picture.features is None:
                count = min(self.config.tiles_per_step, picture.tiles - picture.encoded)
                plan.encodes.append(Encode(sequence, picture, picture.encoded, count))
                return
        chunk = self.config.prefill_chunk if plan.decodes else self.config.prefill_chunk_alone
        plan.prefills.append(Prefill(sequence, start, min(chunk, end - start)))


def placeholders_between(picture: Picture, start: int, end: int) -> tuple[int, int]:
    """Which of a picture's features (first, last + 1) belong to the prompt tokens ``start`` … ``end``."""
    first, last = np.searchsorted(picture.positions, (start, end))
    return int(first), int(last)
