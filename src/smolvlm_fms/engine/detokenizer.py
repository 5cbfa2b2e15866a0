"""From tokens to text piece by piece, never cutting a character in half. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Detokenizer"]

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a growing list of tokens into pieces whose concatenation is the decoded whole.

    decode: token ids to text. A tail of tokens that decodes to an unfinished character waits for the next token.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._window = 0  # decoding starts here: context for tokenizers whose words depend on what came before
        self._shown = 0  # tokens before this one have been returned as text

    def push(self, token: int) -> str:
        """Add a token; return the text that is complete now (often one token's, sometimes none)."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._window : self._shown])
        text = self._decode(self._tokens[self._window :])
        if text.endswith(_REPLACEMENT):
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def flush(self) -> str:
        """Return what is left, an unfinished character as U+FFFD."""
        before = self._decode(self._tokens[self._window : self._shown])
        text = self._decode(self._tokens[self._window :])
        self._window = self._shown = len(self._tokens)
        return text[len(before) :]
