"""The seam between deciding and computing. An engine runs on anything that has these methods; tests and servers bring
their own. No torch."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from smolvlm_fms.engine.sequence import Picture, Sampled, Sequence

__all__ = ["Backend"]


class Backend(Protocol):
    """Computes what a plan says. Calls come from one thread at a time.

    kv_tokens: positions in its cache of keys and values, a multiple of ``config.BLOCK``. kv_bytes_per_token: memory
    that one of them takes, over all layers.
    """

    kv_tokens: int
    kv_bytes_per_token: int

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy keys and values of ``tokens`` positions within the cache; the two runs do not overlap."""

    def encode(self, picture: Picture, first: int, count: int) -> None:
        """Send tiles ``first`` … through the tower, append the result to ``picture.parts``, and after the last tile
        set ``picture.features``."""

    def feature_bytes(self, picture: Picture) -> int:
        """Memory that a picture's features take."""

    def prefill(self, sequence: Sequence, start: int, count: int) -> Sampled | None:
        """Compute keys and values of prompt tokens ``start`` … ``start + count``; at the prompt's end also the first
        token of the answer, else None."""

    def decode(self, sequences: SequenceOf[Sequence]) -> list[Sampled]:
        """Compute one more token for each sequence: the last one's keys and values go to position ``computed``."""
