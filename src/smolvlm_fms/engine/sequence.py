"""One generation on its way through the engine. No torch."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolvlm_fms.engine.options import GenerationOptions

__all__ = ["Clock", "Event", "Extent", "Picture", "Sampled", "Sequence", "State", "content_symbols"]

Symbols = NDArray[np.int64]


@dataclass(frozen=True)
class Extent:
    """A run of the KV cache that one sequence owns: ``length`` tokens from ``start``, both whole blocks."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass
class Picture:
    """The tiles of one picture or video in a prompt, before and after the tower.

    key: a digest of the content that the tower will see. tiles: how many. positions: the prompt's placeholders that
    its features fill, in order. pixels: tiles whose slices the backend encodes. features: what came out, once all tiles
    are done; ``parts`` until then, of ``encoded`` tiles.
    """

    key: bytes
    tiles: int
    positions: NDArray[np.int64]
    pixels: Any = None
    features: Any = None
    parts: list[Any] = field(default_factory=list)
    encoded: int = 0

    def resolve(self) -> Any:
        """The pixels, made now if they were put off."""
        if callable(self.pixels):
            self.pixels = self.pixels()
        return self.pixels

    def add(self, part: Any, join: Callable[[list[Any]], Any]) -> None:
        """Take the features (tiles, …) of the next tiles; ``join`` puts all parts together once they are complete."""
        self.parts.append(part)
        if sum(len(one) for one in self.parts) == self.tiles:
            self.features = join(self.parts)
            self.parts = []


@dataclass(frozen=True)
class Sampled:
    """A token that the backend chose; ``top`` holds alternatives (id, logprob), likeliest first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """What a caller hears of a sequence: a piece of text (maybe empty), its tokens, and at the end the reason."""

    text: str = ""
    tokens: tuple[Sampled, ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None


class State(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    FINISHED = enum.auto()


@dataclass
class Clock:
    """Seconds, and moments in seconds of one monotonic clock, of a sequence."""

    arrived: float = 0.0
    first_token: float | None = None
    finished: float | None = None
    vision_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(eq=False)
class Sequence:
    """One generation. ``computed`` tokens have their keys and values in ``extent``."""

    id: int
    prompt: list[int]
    options: GenerationOptions
    pictures: list[Picture]
    stop_tokens: frozenset[int]
    seed: int
    symbols: Symbols
    sink: Callable[[Event], None]
    output: list[int] = field(default_factory=list)
    state: State = State.WAITING
    extent: Extent | None = None
    computed: int = 0
    reused: int = 0
    finish_reason: str | None = None
    cancelled: bool = False
    clock: Clock = field(default_factory=Clock)

    @property
    def length(self) -> int:
        """Tokens so far, prompt and answer."""
        return len(self.prompt) + len(self.output)

    @property
    def limit(self) -> int:
        """Tokens that the sequence may grow to."""
        return len(self.prompt) + self.options.max_tokens

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids ``start`` … ``end`` of prompt and answer."""
        cut = len(self.prompt)
        return self.prompt[start:end] + self.output[max(start - cut, 0) : max(end - cut, 0)]

    def history(self) -> Symbols:
        """Symbols of every token whose keys and values are computed."""
        generated = np.asarray(self.output, dtype=np.int64)
        return np.concatenate((self.symbols, generated))[: self.computed]


def content_symbols(prompt: SequenceOf[int], pictures: SequenceOf[Picture]) -> Symbols:
    """The prompt as numbers that are equal where the content is: token ids, and for each picture's placeholders
    negative numbers drawn from the picture's digest and the place in it."""
    symbols = np.asarray(prompt, dtype=np.int64)
    for picture in pictures:
        base = int.from_bytes(hashlib.blake2b(picture.key, digest_size=7).digest(), "little")
        symbols[picture.positions] = -1 - base - np.arange(len(picture.positions), dtype=np.int64)
    return symbols
