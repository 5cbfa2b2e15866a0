"""When an answer is over: stop strings and a tail that repeats itself. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["LoopDetector", "StopStrings"]


class StopStrings:
    """Finds stop strings in a text that arrives in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Add a piece; return what can be shown. Once ``found`` is set the text is over, before the stop string."""
        if not self._stops or self.found is not None:
            return "" if self.found is not None else piece
        text = self._held + piece
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:  # the one that is complete first, so that it does not matter how the text was cut into pieces
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back; the answer ended otherwise."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if stop.startswith(text[len(text) - length :]):
                return length
        return 0


class LoopDetector:
    """Says when the last tokens are one pattern over and over.

    A tail of ``min_tokens`` or more in which a pattern of at most ``max_period`` tokens comes ``min_repeats`` times or
    more counts as a loop. The numbers are generous: tables and lists repeat themselves for a while and then go on.
    """

    def __init__(self, max_period: int = 96, min_repeats: int = 8, min_tokens: int = 96) -> None:
        self._max_period = max_period
        self._tokens: list[int] = []
        self._runs = np.zeros(max_period, dtype=np.int64)  # per period: equal pairs in a row up to now
        periods = np.arange(1, max_period + 1)
        self._needed = np.maximum(min_tokens, min_repeats * periods) - periods

    def push(self, token: int) -> bool:
        """Add a token; True when the tail has become a loop."""
        recent = np.asarray(self._tokens[: -self._max_period - 1 : -1], dtype=np.int64)
        self._tokens.append(token)
        equal = np.zeros(self._max_period, dtype=bool)
        equal[: len(recent)] = recent == token
        self._runs = np.where(equal, self._runs + 1, 0)
        return bool((self._runs >= self._needed).any())
