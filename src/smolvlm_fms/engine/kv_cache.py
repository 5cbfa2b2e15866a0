"""Who owns which part of the KV cache, and whose keys and values can be used again. Integers only, no torch.

The cache is one static run of blocks. A sequence owns an extent of it, as long as the sequence can become, so that
generation never runs out half-way. When a sequence ends, its extent shrinks to what was computed and stays as a
*prefix entry*: a later prompt that begins the same copies the common part instead of computing it. Entries give way,
least recently used first, as soon as a running sequence needs the room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smolvlm_fms.engine.config import BLOCK
from smolvlm_fms.engine.sequence import Extent, Sequence, Symbols

__all__ = ["KVSpace", "Reuse", "common_prefix"]

MIN_REUSE = 16
"""Shorter common beginnings are computed again: nearly every prompt shares its first few tokens."""


@dataclass(frozen=True)
class Reuse:
    """``tokens`` of keys and values to copy from position ``source`` of the cache (-1: already in place)."""

    source: int
    tokens: int


@dataclass(eq=False)
class _Entry:
    extent: Extent
    symbols: Symbols
    used: int


def common_prefix(a: Symbols, b: Symbols) -> int:
    """How many leading symbols two histories share."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


class KVSpace:
    """Extents of a cache of ``blocks`` × BLOCK tokens; at most ``prefix_blocks`` of it in prefix entries."""

    def __init__(self, blocks: int, prefix_blocks: int | None = None) -> None:
        self.capacity = blocks * BLOCK
        self._prefix_tokens = (blocks if prefix_blocks is None else prefix_blocks) * BLOCK
        self._free: list[Extent] = [Extent(0, self.capacity)] if blocks else []
        self._entries: list[_Entry] = []
        self._live: list[Sequence] = []
        self._tick = 0

    @property
    def free_tokens(self) -> int:
        """Tokens that nobody owns."""
        return sum(extent.length for extent in self._free)

    @property
    def prefix_tokens(self) -> int:
        """Tokens in prefix entries."""
        return sum(entry.extent.length for entry in self._entries)

    def admit(self, sequence: Sequence) -> Reuse | None:
        """Give ``sequence`` an extent and say what of its prompt is there already; None: no room at present."""
        needed = _round_up(sequence.limit)
        entry, live, shared = self._best_match(sequence.symbols[:-1])
        if entry is not None:
            entry.used = self._now()
        extent = self._take(needed)
        if extent is None and entry is not None and (extent := self._grow(entry, needed)) is not None:
            return self._own(sequence, extent, Reuse(-1, shared))
        if extent is None:
            extent = self._take_evicting(needed)
        if extent is None:
            return None
        if entry is not None and entry in self._entries:
            return self._own(sequence, extent, Reuse(entry.extent.start, shared))
        if live is not None and live.extent is not None:
            return self._own(sequence, extent, Reuse(live.extent.start, shared))
        return self._own(sequence, extent, Reuse(-1, 0))

    def improve(self, sequence: Sequence) -> Reuse | None:
        """What can be copied for a sequence of which nothing has been computed yet, if it is more than at its
        admission: one that came with it and begins the same may be ahead by now."""
        entry, live, shared = self._best_match(sequence.symbols[:-1], sequence)
        if shared < sequence.computed + MIN_REUSE:
            return None
        if entry is not None:
            entry.used = self._now()
        extent = entry.extent if entry is not None else live.extent if live is not None else None
        return None if extent is None else Reuse(extent.start, shared)

    def _own(self, sequence: Sequence, extent: Extent, reuse: Reuse) -> Reuse:
        sequence.extent = extent
        self._live.append(sequence)
        return reuse

    def release(self, sequence: Sequence) -> None:
        """End a sequence's ownership; what it computed stays as a prefix entry, within the bound."""
        assert sequence.extent is not None
        extent, symbols = sequence.extent, sequence.history()
        self._live.remove(sequence)
        sequence.extent = None
        used = Extent(extent.start, _round_up(len(symbols)) if len(symbols) >= MIN_REUSE else 0)
        if used.length > self._prefix_tokens:
            used = Extent(extent.start, 0)
        self._give_back(Extent(used.end, extent.length - used.length))
        if not used.length:
            return
        for entry in list(self._entries):
            if len(entry.symbols) <= len(symbols) and common_prefix(entry.symbols, symbols) == len(entry.symbols):
                self._drop(entry)
        self._entries.append(_Entry(used, symbols, self._now()))
        while self.prefix_tokens > self._prefix_tokens:
            self._drop(self._oldest())

    def clear_prefixes(self) -> None:
        """Forget every prefix entry."""
        for entry in list(self._entries):
            self._drop(entry)

    def _best_match(
        self, symbols: Symbols, itself: Sequence | None = None
    ) -> tuple[_Entry | None, Sequence | None, int]:
        """The prefix entry or the other running sequence that shares most, and how much (0: not worth it)."""
        best: tuple[_Entry | None, Sequence | None, int] = (None, None, MIN_REUSE - 1)
        for entry in self._entries:
            shared = common_prefix(entry.symbols, symbols)
            if shared > best[2]:
                best = (entry, None, shared)
        for other in self._live:
            if other is itself:
                continue
            shared = common_prefix(other.symbols[: other.computed], symbols)
            if shared > best[2]:
                best = (None, other, shared)
        return best if best[0] or best[1] else (None, None, 0)

    def _take(self, tokens: int) -> Extent | None:
        """The smallest free run that is long enough, cut to size."""
        fitting = [extent for extent in self._free if extent.length >= tokens]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda extent: extent.length)
        self._free.remove(chosen)
        self._give_back(Extent(chosen.start + tokens, chosen.length - tokens))
        return Extent(chosen.start, tokens)

    def _take_evicting(self, tokens: int) -> Extent | None:
        """The same, after as many of the oldest entries as it takes have gone."""
        while (extent := self._take(tokens)) is None:
            if not self._entries:
                return None
            self._drop(self._oldest())
        return extent

    def _grow(self, entry: _Entry, tokens: int) -> Extent | None:
        """Turn a prefix entry into an extent of ``tokens`` where it stands, if what follows it is free."""
        after = next((extent for extent in self._free if extent.start == entry.extent.end), None)
        room = entry.extent.length + (after.length if after else 0)
        if room < tokens:
            return None
        self._entries.remove(entry)
        if after is not None:
            self._free.remove(after)
        self._give_back(Extent(entry.extent.start + tokens, room - tokens))
        return Extent(entry.extent.start, tokens)

    def _drop(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._give_back(entry.extent)

    def _give_back(self, extent: Extent) -> None:
        """Return a run to the free list, joined with its neighbours."""
        if not extent.length:
            return
        merged: list[Extent] = []
        for one in sorted([*self._free, extent], key=lambda e: e.start):
            if merged and merged[-1].end == one.start:
                merged[-1] = Extent(merged[-1].start, merged[-1].length + one.length)
            else:
                merged.append(one)
        self._free = merged

    def _oldest(self) -> _Entry:
        return min(self._entries, key=lambda entry: entry.used)

    def _now(self) -> int:
        self._tick += 1
        return self._tick


def _round_up(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK
