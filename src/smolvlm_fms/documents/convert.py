"""The pipeline: pages are drawn as their turn comes, several are generated at once, each ends or fails for itself."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from smolvlm_fms.documents.doctags import is_markup
from smolvlm_fms.documents.pages import PageSource
from smolvlm_fms.documents.sidecar import PageResult, Sidecar
from smolvlm_fms.engine.stops import LoopDetector
from smolvlm_fms.errors import ConfigurationError, SmolVLMError

__all__ = ["ConvertOptions", "ElementLoop", "convert_pages", "settings_of"]

PROMPT = "Convert this page to docling."
"""What SmolDocling and granite-docling were trained with for whole pages."""


class Model(Protocol):
    """What is needed of a VLM."""

    name: str

    def stream(self, images: Any, question: str, **options: Any) -> Any: ...


@dataclass(frozen=True)
class ConvertOptions:
    """prompt: the instruction for each page. max_tokens: a page's budget. batch: pages generated at once. detail: as
    in ``VLM.ask`` (None: the checkpoint's own)."""

    prompt: str = PROMPT
    max_tokens: int = 4096
    batch: int = 4
    detail: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1; it is {getattr(self, name)}.")


class ElementLoop:
    """Finds pages on which a model repeats elements at ever new places.

    The engine's own detector compares tokens, and location tokens that count on hide such a loop from it. Here an
    element's text alone is one symbol: up to 8 elements, at least 8 times over, make a loop. Elements without text
    (pictures) keep their place and never look alike.
    """

    _END = re.compile(r"</[a-z_]+[1-6]?>")
    _LOCATION = re.compile(r"<loc_\d+>")
    _MARKUP = re.compile(r"</?[a-z_]+[1-6]?>")

    def __init__(self) -> None:
        self._rest = ""
        self._symbols: dict[str, int] = {}
        self._detector = LoopDetector(max_period=8, min_repeats=8, min_tokens=16)

    def push(self, piece: str) -> bool:
        """Add a piece of the answer; True when its tail has become a loop."""
        self._rest += piece
        looped = False
        while (end := self._END.search(self._rest)) is not None:
            element, self._rest = self._rest[: end.end()], self._rest[end.end() :]
            placeless = self._LOCATION.sub("", element.replace("<doctag>", "")).strip()
            key = placeless if self._MARKUP.sub("", placeless).strip() else element
            looped = self._detector.push(self._symbols.setdefault(key, len(self._symbols))) or looped
        return looped


def settings_of(model: Model, source: PageSource, options: ConvertOptions, dpi: int) -> dict[str, Any]:
    """What a page's result depends on; a sidecar of other settings is not gone on with."""
    chosen = dataclasses.asdict(options)
    del chosen["batch"]
    return {"version": 1, "document": source.digest, "model": model.name, "dpi": dpi, **chosen}


def convert_pages(
    model: Model,
    source: PageSource,
    numbers: Sequence[int],
    options: ConvertOptions,
    *,
    sidecar: Sidecar | None = None,
    on_tokens: Callable[[int, int], None] = lambda number, tokens: None,
) -> Iterator[PageResult]:
    """Yield a result for each of ``numbers``, in this order, as soon as it and those before it are there.

    Pages that ``sidecar`` has are not generated again; what is new goes into it. on_tokens hears a page's number and
    how many tokens it has. A page that cannot be drawn or generated yields status ``"failed"``; nothing is raised for
    it. Leaving early ends the pages on their way.
    """
    known = {} if sidecar is None else dict(sidecar.done)
    waiting = deque(number for number in numbers if number not in known)
    window: deque[_Running] = deque()
    try:
        for number in numbers:
            if number in known:
                yield known[number]
                continue
            while waiting and len(window) < options.batch:
                window.append(_Running(model, source, waiting.popleft(), options))
            result = window.popleft().finish(on_tokens)
            if sidecar is not None:
                sidecar.add(result)
            yield result
    finally:
        for running in window:
            running.cancel()


class _Running:
    """A page on its way. Whatever goes wrong with it is kept until its turn comes."""

    def __init__(self, model: Model, source: PageSource, number: int, options: ConvertOptions) -> None:
        self.number = number
        self.started = time.perf_counter()
        self.size = (1.0, 1.0)
        self.stream: Any = None
        self.error: Exception | None = None
        try:
            self.size = source.size(number)
            picture = source.render(number)
            self.stream = model.stream(picture, options.prompt, max_tokens=options.max_tokens, detail=options.detail)
        except Exception as error:
            self.error = error

    def finish(self, on_tokens: Callable[[int, int], None]) -> PageResult:
        if self.error is not None:
            return self._failed(self.error)
        text, looped, loop = "", False, ElementLoop()
        try:
            for piece in self.stream:
                text += piece
                on_tokens(self.number, len(self.stream.answer.tokens))
                if loop.push(piece):
                    looped = True
                    break
        except Exception as error:
            return self._failed(error)
        answer = self.stream.answer
        status, message = _status(text, "loop" if looped else answer.finish_reason, len(answer.tokens))
        seconds = time.perf_counter() - self.started
        return PageResult(self.number, status, text, self.size, len(answer.tokens), seconds, message)

    def cancel(self) -> None:
        if self.stream is not None:
            self.stream.cancel()

    def _failed(self, error: Exception) -> PageResult:
        message = str(error) if isinstance(error, SmolVLMError) else f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - self.started
        return PageResult(self.number, "failed", size=self.size, seconds=seconds, message=message)


def _status(text: str, reason: str, tokens: int) -> tuple[str, str]:
    """A page's status and what to say about it."""
    if reason == "loop":
        return (
            "loop",
            f"the model repeated itself and was stopped after {tokens} tokens; the end of the page is missing",
        )
    if reason == "length":
        return "length", f"the budget of {tokens} tokens is used up; the end of the page is missing (--max-tokens)"
    if reason == "cancelled":
        return "failed", "cancelled"
    if not text.strip():
        return "done", "the model wrote nothing; an empty page?"
    if not is_markup(text):
        return "plain", "no DocTags in the answer; it is taken as plain text (is this a Docling checkpoint?)"
    return "done", ""
