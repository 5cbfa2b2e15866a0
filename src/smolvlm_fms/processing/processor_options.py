"""Which argument of ``SmolVLMProcessor`` is meant for text, pictures or videos.

An argument can come flat (``size=…``: to every part that knows it), inside ``text_kwargs``, ``images_kwargs`` or
``videos_kwargs`` (to that part alone), or inside ``common_kwargs`` (to all that know it, and last in rank).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.processing import options, video
from smolvlm_fms.processing.tokenizer import SmolVLMTokenizer

__all__ = ["NAMES", "CallOptions", "route"]

GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs")
_OWN = ("return_mm_token_type_ids", "return_text_replacement_offsets")
NAMES: dict[str, frozenset[str]] = {
    "text_kwargs": frozenset(
        name
        for name in inspect.signature(SmolVLMTokenizer.__call__).parameters
        if name not in ("self", "text", "text_pair")
    ),
    "images_kwargs": frozenset([*options.DEFAULTS, *options.CALL_ONLY]),
    "videos_kwargs": frozenset([*video.DEFAULTS, *video.CALL_ONLY]),
}


@dataclass
class CallOptions:
    """One call's arguments, sorted. ``return_tensors`` holds for the whole answer."""

    text: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    videos: dict[str, Any] = field(default_factory=dict)
    return_tensors: str | None = None
    return_mm_token_type_ids: bool = False
    return_text_replacement_offsets: bool = False
    return_metadata: bool = False


def route(given: Mapping[str, Any], names_of: Mapping[str, frozenset[str]] = NAMES) -> CallOptions:
    """Sort the arguments of one call; ``names_of`` says which part knows which.

    Raises ConfigurationError for an argument that nothing knows (with the nearest that something does), one that came
    twice, and for ``audio``, which these models do not hear.
    """
    flat = {name: value for name, value in given.items() if name not in (*GROUPS, "common_kwargs", "audio_kwargs")}
    if flat.pop("audio", None) is not None or given.get("audio_kwargs"):
        raise ConfigurationError("SmolVLM takes text, pictures and videos; it does not hear audio.")
    grouped = {group: dict(given.get(group) or {}) for group in GROUPS}
    common = dict(given.get("common_kwargs") or {})
    sorted_out: dict[str, dict[str, Any]] = {}
    for group, names in names_of.items():
        own = grouped[group]
        twice = [name for name in own if name in flat and name in names]
        if twice:
            raise ConfigurationError(f"{twice[0]!r} was passed twice: in {group} and by itself.")
        _check(group, own, [*names, *(_OWN if group == "text_kwargs" else ())])
        shared = {name: value for name, value in (common | flat).items() if name in names}
        if group == "videos_kwargs":
            shared.pop("backend", None)  # flat, it is the pictures' choice
        sorted_out[group] = shared | own
    _check("the processor", common | flat, [name for names in names_of.values() for name in names] + [*_OWN])
    text = sorted_out["text_kwargs"]
    chosen = CallOptions(
        text=text,
        images=sorted_out["images_kwargs"],
        videos=sorted_out["videos_kwargs"],
        return_tensors=getattr(text.get("return_tensors"), "value", text.get("return_tensors")),
        return_metadata=bool(sorted_out["videos_kwargs"].get("return_metadata")),
        **{name: bool(text.pop(name, flat.get(name, False))) for name in _OWN},
    )
    for part in (chosen.images, chosen.videos):
        part.setdefault("return_tensors", chosen.return_tensors)
    return chosen


def _check(where: str, names: Mapping[str, Any], known: list[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigurationError(f"{where} has no argument {name!r}.{f' Did you mean {near[0]}?' if near else ''}")
