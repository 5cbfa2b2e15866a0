"""An answer as it grows: tokens in, showable text and the reason to end out. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from smolvlm_fms.engine.detokenizer import Detokenizer
from smolvlm_fms.engine.options import GenerationOptions
from smolvlm_fms.engine.stops import LoopDetector, StopStrings

__all__ = ["Output"]


class Output:
    """Follows one answer. ``push`` takes each token; the pieces it returns, joined, are the answer's text."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        options: GenerationOptions,
        stop_tokens: frozenset[int],
        max_tokens: int,
    ) -> None:
        self._stop_tokens = stop_tokens
        self._detokenizer = Detokenizer(decode)
        self._stops = StopStrings(options.stop)
        self._loop = LoopDetector() if options.loop_detection else None
        self._left = max_tokens

    def push(self, token: int) -> tuple[str, str | None]:
        """Return the text that can be shown now and why the answer ends here, or None.

        ``"stop"``: the checkpoint's or caller's stop token (not shown) or stop string (cut off); ``"loop"``: the tail
        repeats itself; ``"length"``: max_tokens or the context is used up.
        """
        self._left -= 1
        if token in self._stop_tokens:
            return self._rest(), "stop"
        text = self._stops.push(self._detokenizer.push(token))
        if self._stops.found is not None:
            return text, "stop"
        if self._loop is not None and self._loop.push(token):
            reason = "loop"
        elif self._left <= 0:
            reason = "length"
        else:
            return text, None
        text += self._rest()
        return text, "stop" if self._stops.found is not None else reason

    def _rest(self) -> str:
        text = self._stops.push(self._detokenizer.flush())
        return text + self._stops.flush()
