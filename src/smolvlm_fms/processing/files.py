"""JSON files of a checkpoint's folder, read and written in one way, with typed errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolvlm_fms.errors import ConfigurationError, FetchError

__all__ = ["read_json", "write_json"]


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The JSON object in a file; ``missing_ok``: an empty one where there is no file.

    Raises FetchError where the file is missing or cannot be read, ConfigurationError where it holds no JSON object.
    """
    if missing_ok and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FetchError(f"{path} could not be read: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, its keys sorted; raises FetchError where the folder cannot be written to."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FetchError(f"{path} could not be written: {error}") from error
