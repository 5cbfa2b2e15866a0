"""People's words as words: a control token that somebody types is text, not a token.

    messages ─▶ marked ─▶ template, placeholders ─▶ encode ─▶ ids

``<image>`` in a question is five letters in angle brackets. Left alone, it would be taken for a picture's placeholder,
and ``<end_of_utterance>`` would end the speaker's turn. So a mark goes into the control tokens that stand in messages
before a template writes its own, and comes out again when nothing but ids is left to be made. Text without control
tokens is not touched, and its ids are the tokenizer's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from smolvlm_fms.processing.prompt import PlaceholderTokens
from smolvlm_fms.processing.tokenizer import SmolVLMTokenizer

__all__ = ["LiteralText"]

_MARK = "\ue0f3"  # private use; see chat_template for its neighbours
_FRAME = re.compile(r"<row_\d+_col_\d+>|<\|.*\|>")


class LiteralText:
    """Marks control tokens in messages, and encodes prompts in which some are marked.

    markup_is_control: whether every special token of the vocabulary is one. Docling's markup is not: its questions
    name places with ``<loc_…>`` tokens, so there only pictures' and turns' tokens are.
    """

    def __init__(self, tokenizer: SmolVLMTokenizer, tokens: PlaceholderTokens, *, markup_is_control: bool) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        framing = {tokens.image, tokens.fake, tokens.overview, tokens.video, *tokenizer.all_special_tokens}
        control = {t for t in self._special if markup_is_control or t in framing or _FRAME.fullmatch(t)} | framing
        self._control = _any_of(control)
        self._trusted = _any_of(self._special)
        self._marked = re.compile(f"({_any_of(_with_mark(token) for token in control).pattern})")
        self._copy: tuple[Tokenizer, dict[int, int]] | None = None

    def marked(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages, with a mark in every control token that their texts hold."""
        return [{**message, "content": self._content(message.get("content"))} for message in messages]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt; what is marked in it is read as ordinary characters."""
        if not self._marked.search(text):
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        copy, originals = self._splitting()
        text = self._trusted.sub(lambda found: found[0] + _MARK, text)
        text = self._marked.sub(lambda found: found[0].replace(_MARK, "", 1), text)
        ids = copy.encode(text, add_special_tokens=add_special_tokens).ids
        return [originals.get(token, token) for token in ids]

    def _content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._control.sub(lambda found: _with_mark(found[0]), content)
        if not isinstance(content, list | tuple):
            return content
        return [
            {**part, "text": self._content(part["text"])}
            if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            else part
            for part in content
        ]

    def _splitting(self) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer that knows the special tokens under marked names alone, and its ids of them to the true ones."""
        if self._copy is None:
            backend = self._tokenizer.backend_tokenizer
            copy = Tokenizer.from_str(backend.to_str())
            copy.encode_special_tokens = True  # reads the special ones as characters; those added here are not special
            added = backend.get_added_tokens_decoder()
            copy.add_tokens(
                [
                    AddedToken(
                        name + _MARK,
                        lstrip=added[number].lstrip,
                        rstrip=added[number].rstrip,
                        single_word=added[number].single_word,
                        normalized=False,
                    )
                    for name, number in self._special.items()
                ]
            )
            vocabulary = copy.get_vocab(with_added_tokens=True)
            self._copy = copy, {vocabulary[name + _MARK]: number for name, number in self._special.items()}
        return self._copy


def _with_mark(token: str) -> str:
    """The mark stands behind the first character, so that nothing takes the whole for the token."""
    return token[0] + _MARK + token[1:]


def _any_of(tokens: Any) -> re.Pattern[str]:
    """The longest of ``tokens`` that stands at a place; without any, a pattern that is found nowhere."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token) or r"(?!)")
