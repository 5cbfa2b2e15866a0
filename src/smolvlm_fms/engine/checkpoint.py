"""What a checkpoint folder says about generation: ends, defaults, banned tokens. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvlm_fms.engine.options import GenerationOptions
from smolvlm_fms.errors import ConfigurationError

__all__ = ["GenerationDefaults", "read_generation_defaults"]

END_OF_TURN = "<end_of_utterance>"


@dataclass(frozen=True)
class GenerationDefaults:
    """stop_tokens: ids that end an answer. banned: ids that are never generated. options: what holds where the caller
    says nothing."""

    stop_tokens: tuple[int, ...]
    banned: tuple[int, ...]
    options: GenerationOptions


def read_generation_defaults(folder: Path, tokenizer: Any) -> GenerationDefaults:
    """Read ``generation_config.json`` (and what the tokenizer and config.json know where it is silent)."""
    said = _read(folder / "generation_config.json")
    ends = _ids(said.get("eos_token_id"))
    if not ends:
        config = _read(folder / "config.json")
        ends = _ids(config.get("eos_token_id")) or _ids((config.get("text_config") or {}).get("eos_token_id"))
        ends += _ids(tokenizer.eos_token_id)
    turn_end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if turn_end is not None and turn_end != tokenizer.unk_token_id:
        ends.append(turn_end)
    banned = [words[0] for words in said.get("bad_words_ids") or [] if len(words) == 1]
    banned += _ids(said.get("suppress_tokens"))
    return GenerationDefaults(
        stop_tokens=tuple(dict.fromkeys(ends)),
        banned=tuple(dict.fromkeys(banned)),
        options=_options(said),
    )


def _options(said: Mapping[str, Any]) -> GenerationOptions:
    """The checkpoint's own sampling, as transformers would apply it: greedy unless ``do_sample``."""
    values: dict[str, Any] = {"repetition_penalty": said.get("repetition_penalty")}
    if said.get("do_sample"):
        values |= {
            "temperature": said.get("temperature") or 1.0,
            "top_k": said.get("top_k", 50),
            "top_p": said.get("top_p"),
            "min_p": said.get("min_p"),
        }
    return GenerationOptions().updated(values)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else [one for one in value if isinstance(one, int)]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} holds a {type(values).__name__}, not an object.")
    return values
