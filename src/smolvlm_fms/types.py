"""Frozen records that cross rooms. No logic, no imports of ours."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Answer", "TileGrid", "Timings", "TokenLogprob", "Usage"]


@dataclass(frozen=True, slots=True)
class TileGrid:
    """How one picture is resized and cut; made by ``processing.geometry.plan_tiles`` only.

    Sizes are (height, width) in pixels. ``rows`` and ``cols`` are both 0 for a picture that is not cut; ``count`` is
    the number of tiles that the model sees, the overview included.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    cropped: tuple[int, int]
    canvas: tuple[int, int]
    tile: int
    rows: int
    cols: int
    count: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer: its prompt's (image tokens among them), its own, and those of the prompt whose keys and
    values were there already."""

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. ``load_s`` is the model's, once; ``ttft_s`` runs from the call to the first token, ``total_s`` to the
    end; waiting for other requests is in these two only."""

    load_s: float
    preprocess_s: float
    vision_s: float
    prefill_s: float
    decode_s: float
    ttft_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token, its log-probability, and the likeliest alternatives as (id, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said.

    ``tokens`` holds every generated id, the one that ended the answer included. ``finish_reason`` is ``"stop"``,
    ``"length"`` (max_tokens or the context are used up), ``"loop"`` (the tail repeated itself) or ``"cancelled"``.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    model: str
    logprobs: tuple[TokenLogprob, ...] | None = None
